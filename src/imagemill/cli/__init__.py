"""The command line: arguments → Settings → one call → print.

Progress and logs go to stderr, the result to stdout; with `--json` stdout holds exactly one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from imagemill.cli.parser import Parser, PrintCompletion
from imagemill.errors import ImagemillError, Interrupted, UsageError, printable
from imagemill.runner.settings import GROUPS, SETTINGS, SHORT, Kind, Setting, make_settings, number
from imagemill.version import __version__

if TYPE_CHECKING:
    from pathlib import Path  # takes 4 ms to import, which `--help` can do without

    from imagemill.job.open_job import OpenJob


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Expected errors are one line on stderr, never a traceback.
    """
    if arguments is None:  # this process runs nothing but this command
        from imagemill.system.without_pandas import hide_pandas

        hide_pandas()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    # OpenBLAS sends SIGINT if it cannot start its threads; this process needs none of them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A file name that the terminal cannot show must not end the command. A replaced stdout may
    # have no `reconfigure`.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        parsed = _parser(arguments).parse_args(arguments)
        with contextlib.suppress(ValueError):  # only the main thread can set a signal handler
            signal.signal(signal.SIGTERM, _terminated)
        code: int = parsed.call(parsed)
        if sys.stdout is not None:  # None if the caller closed it
            sys.stdout.flush()
    except ImagemillError as error:
        _log(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("imagemill: interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        _drop_stdout()
        return 0
    except OSError as error:
        if message := _shortage(error):
            print(f"imagemill: {message}", file=sys.stderr)
            return 1
        if not _is_stdout_at_fault():
            raise
        _drop_stdout()
        print(
            f"imagemill: the result cannot be printed: {error.strerror}. The job itself is not"
            " affected.",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        if (message := _shortage(error)) is None:
            raise
        print(f"imagemill: {message}", file=sys.stderr)
        return 1
    return code


def _shortage(error: Exception) -> str | None:
    try:
        from imagemill.system import processes
    except (ImportError, MemoryError):  # too little memory for one import is too little for another
        return (
            f"{' '.join(str(error).split())}. Free some memory, or raise the limits of this shell"
            " (ulimit -v)."
        )
    return processes.shortage(error)


def _is_stdout_at_fault() -> bool:
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_stdout() -> None:
    """Send stdout to /dev/null, so that the interpreter's flush at exit does not fail."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(number: int, _frame: object) -> NoReturn:
    """Handle SIGTERM outside the launcher's loop, which has its own handler."""
    raise Interrupted("terminated. Run the same command again to continue.", 128 + number)


def _parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = Parser(
        prog="imagemill",
        description="Classify images in bulk: folders in, one Parquet row per image out.",
        allow_abbrev=False,
    )
    parser.arguments = arguments
    parser.add_argument("--version", action="version", version=f"imagemill {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=["bash", "zsh", "fish"],
        help="print a script that completes commands, options and files in this shell",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )

    def command(
        name: str, call: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub: Parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.arguments = arguments
        sub.set_defaults(call=call)
        return sub

    sub = command(
        "run", _run, "classify all images of the sources; run the same command again to resume"
    )
    _add_options(sub, SETTINGS)
    sub.usage = "%(prog)s SOURCE... --output DIR [options]"
    _add_summary_options(sub)

    sub = command(
        "demo", _demo, "classify the sample images with the model that comes with the package"
    )
    demo = {name: setting for name, setting in SETTINGS.items() if name != "sources"}
    demo["output"] = demo["output"]._replace(
        help="output folder (default: %(default)s)", options={"default": "imagemill-demo"}
    )
    demo["model"] = demo["model"]._replace(
        help="name, folder, file.onnx or hf:owner/name of a model (default: %(default)s)",
        options={"default": "efficientnet_lite0"},
    )
    _add_options(sub, demo)
    sub.usage = "%(prog)s [options]"
    _add_summary_options(sub)

    sub = command("status", _status, "show the progress of a job, which may be running")
    sub.add_argument("dir", metavar="DIR", help="output folder or URL of a job")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "verify", _verify, "check all results; exit 0 only if the job is complete and undamaged"
    )
    sub.add_argument("dir", metavar="DIR", help="output folder or URL of a job")
    sub.add_argument(
        "--quarantine",
        action="store_true",
        help="move damaged parts to another folder, so that `run` computes them again",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "export",
        _export,
        "write all rows of a job as CSV or JSON lines, in the order of its images",
    )
    sub.add_argument("dir", metavar="DIR", help="output folder or URL of a job")
    sub.add_argument(
        "--to",
        required=True,
        choices=["csv", "jsonl"],
        help="csv: lists are JSON in a cell; jsonl: one JSON object per line",
    )
    sub.add_argument("--output", metavar="FILE", help="output file (default: standard output)")
    sub.add_argument(
        "--columns", metavar="A,B,…", help="columns to write, in this order (default: all)"
    )
    sub.add_argument(
        "--partial", action="store_true", help="if the job is not finished, write the existing rows"
    )

    sub = command(
        "report",
        _report,
        "write the report again: results, speed, failures and sample images of a job",
    )
    sub.add_argument("dir", metavar="DIR", help="output folder or URL of a job")
    sub.add_argument("--output", metavar="FILE", help="file of the page (default: DIR/report.html)")

    sub = command(
        "score", _score, "compare a job's rows with true labels: accuracy, confusions, calibration"
    )
    sub.add_argument("dir", metavar="DIR", help="output folder or URL of a job")
    sub.add_argument(
        "--truth",
        required=True,
        metavar="WHERE",
        help=(
            "where the true labels are: folders (the image's folder is its label), regex:PATTERN"
            " (a group in the path), @FILE.csv#path,label (also .tsv, .parquet), column:NAME (of"
            " the source table), or cls (WebDataset). Labels, class ids, or ImageNet synsets"
        ),
    )
    sub.add_argument(
        "--min-top1",
        type=_probability,
        metavar="SHARE",
        help="exit 1 if the top-1 accuracy over all images is lower, such as 0.8",
    )
    sub.add_argument(
        "--no-report", dest="report", action="store_false", help="do not write report.html again"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "sort",
        _sort,
        "put the images of a job into one folder per label, as links or copies",
    )
    sub.add_argument("dir", metavar="DIR", help="output folder or URL of a job")
    sub.add_argument(
        "--into",
        required=True,
        metavar="FOLDER",
        help="output folder; run the same command again to continue, or to add new rows",
    )
    sub.add_argument(
        "--by",
        default="label",
        metavar="label|status|COLUMN",
        help="column whose values are the folders (default: %(default)s)",
    )
    sub.add_argument(
        "--min-probability",
        type=_probability,
        metavar="P",
        help="leave out images whose first class is less probable",
    )
    sub.add_argument(
        "--failed", action="store_true", help="also put failed images into _failed/STATUS"
    )
    sub.add_argument(
        "--link",
        choices=["hard", "symbolic", "copy"],
        help=(
            "default: hard, or symbolic if hard links are impossible; images in archives and behind"
            " URLs are copied"
        ),
    )
    sub.add_argument("--dry-run", action="store_true", help="show the folders, and write nothing")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("devices", _devices, "list the devices of this machine")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("models", _models, "list the models, and how each can run on this machine")
    sub.add_argument(
        "word", nargs="?", metavar="WORD", help="only models whose name, family or origin has it"
    )
    _add_options(sub, {"models_dir": SETTINGS["models_dir"]})
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("get-model", _get_model, "download a published model, or build one from a file")
    sub.add_argument("name", metavar="NAME", help="name of the model; see `imagemill models`")
    sub.add_argument(
        "--from",
        dest="from_file",
        metavar="SOURCE",
        help=(
            "build from your own file with weights (.pth, .pt, .pth.tar, .ckpt, .bin,"
            " .safetensors), from a folder of transformers or timm, or from hf:owner/name; NAME is"
            " yours to choose"
        ),
    )
    sub.add_argument(
        "--url", metavar="URL", help="download from this URL instead of the publisher's"
    )
    sub.add_argument(
        "--random-weights", type=int, metavar="SEED", help="use random weights, to measure speed"
    )
    sub.add_argument(
        "--batch-size",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="also write model_N.onnx for batches of N; may be repeated",
    )
    _add_options(sub, {"models_dir": SETTINGS["models_dir"]})
    own = "your own weights, with --from or --url (defaults: as usual for the architecture)"
    _preprocessing_options(sub.add_argument_group(own))

    sub = command(
        "wrap",
        _wrap,
        "make an ONNX classifier usable: describe its preprocessing in a card, and test it",
    )
    _wrap_options(sub)

    sub = command(
        "classes",
        _classes,
        "make a model whose classes are your own words, from a CLIP or SigLIP model",
    )
    sub.add_argument(
        "model", metavar="MODEL", help="hf:owner/name, or a folder with onnx/vision_model.onnx"
    )
    sub.add_argument(
        "--labels", required=True, metavar="FILE", help="file with one class per line, in words"
    )
    sub.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        help=(
            "text that a label is put into, at {}; may be repeated: the texts are averaged; @FILE:"
            ' one per line (default: "a photo of a {}.")'
        ),
    )
    sub.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder of the new model, for `run --model DIR`",
    )
    sub.add_argument(
        "--logit-scale",
        type=float,
        metavar="N",
        help="factor of the cosines, not its logarithm (default: from the model's files)",
    )
    sub.add_argument(
        "--logit-bias",
        type=float,
        metavar="N",
        help="SigLIP only: what is added to the scores (default: from the model's files)",
    )
    _add_options(sub, {"models_dir": SETTINGS["models_dir"]})

    sub = command(
        "quantize",
        _quantize,
        "make the int8 variant of a model and compare its results with fp32; needs 1,300 different"
        " images",
    )
    sub.add_argument(
        "model", metavar="MODEL", help="name, folder, file.onnx or hf:owner/name of a model"
    )
    sub.add_argument(
        "--images",
        action="append",
        required=True,
        metavar="SOURCE",
        help="images similar to those to be classified; may be repeated",
    )
    sub.add_argument(
        "--calibration",
        type=int,
        default=300,
        metavar="N",
        help="number of calibration images (default: %(default)s)",
    )
    sub.add_argument(
        "--held-out",
        type=int,
        default=1000,
        metavar="N",
        help="number of further images to compare on (default: %(default)s); an accepted result"
        " needs 1000",
    )
    sub.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="accept a precision if the lower end of the confidence interval of its agreement with"
        " fp32 is at least SHARE (default: 0.97 for int8, else 0.95)",
    )
    sub.add_argument(
        "--truth",
        metavar="WHERE",
        help="true labels of the images, to print the accuracy of each precision: folders,"
        " regex:PATTERN or @FILE.csv#path,label, as for `score`",
    )
    _add_options(sub, {"models_dir": SETTINGS["models_dir"]})
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "partition", _partition, "divide a folder of images into sub-folders, one per device"
    )
    sub.add_argument(
        "--data-dir", required=True, metavar="DIR", help="folder of images (searched recursively)"
    )
    sub.add_argument(
        "--partitions",
        type=int,
        required=True,
        metavar="N",
        help="number of sub-folders; their sizes differ by at most one image",
    )
    sub.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="output folder; run the same command again to continue",
    )
    sub.add_argument(
        "--link",
        choices=["hard", "symbolic", "copy"],
        help="default: hard, or symbolic if hard links are impossible",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "bench",
        _bench,
        "measure decoding, inference and both; show the bottleneck and how to remove it",
    )
    sub.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="images to measure with, as for `run`; none with --synthetic",
    )
    sub.add_argument(
        "--synthetic", action="store_true", help="measure inference only, on images made in memory"
    )
    shared = "model models_dir devices precision batch_size batches_per_step num_workers limit"
    options = {name: SETTINGS[name] for name in shared.split()}
    options["batch_size"] = options["batch_size"]._replace(
        help="images per batch, or `search` for the fastest size (default: as `run`)",
        kind=Kind(_number_or_search),
    )
    options["batches_per_step"] = options["batches_per_step"]._replace(
        help="batches handed to a device at a time (default: about 2 s of them)"
    )
    options["limit"] = options["limit"]._replace(
        help="the first N images per iteration (default: about 10 s of them)"
    )
    _add_options(sub, options)
    sub.add_argument(
        "--iterations",
        type=int,
        default=3,
        metavar="N",
        help="report the median over N iterations (default: %(default)s)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_summary_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    sub.add_argument(
        *("-v", "--verbose"),
        action="store_true",
        help="also print what decoding alone and computing alone would reach",
    )


def _wrap_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "file",
        metavar="FILE",
        help="file.onnx; writes file.card.json beside it, for `run --model file.onnx`",
    )
    _preprocessing_options(sub)
    sub.add_argument(
        "--layout",
        metavar="NCHW|NHWC",
        help="order of the input's dimensions (default: from the file)",
    )
    sub.add_argument(
        "--logits",
        metavar="TENSOR",
        help=(
            "output with the scores (default: found by shape and name); none: the model has no"
            " scores, only an embedding"
        ),
    )
    sub.add_argument(
        "--embedding",
        metavar="TENSOR",
        help="features for `run --save embedding` (default: the input of the last layer)",
    )
    sub.add_argument(
        "--name", metavar="NAME", help="name of the model in results (default: the file's name)"
    )
    sub.add_argument(
        "--output",
        metavar="DIR",
        help="make a folder with a model instead, for `run --model DIR` on any machine",
    )


_PREPROCESSING: Final = (
    *("size", "resize", "crop", "fill", "centre", "interpolation", "exif"),
    *("color", "scale", "mean", "std", "scores", "labels", "licence"),
)
"""Flags of `_preprocessing_options`; each is a field of `onnx_card.OnnxCard`."""


def _preprocessing_options(sub: argparse._ActionsContainer) -> None:
    """Add the flags that say how an image becomes the model's input and what its scores mean."""
    colours = ("R", "G", "B")
    sub.add_argument(
        "--mean",
        type=float,
        nargs=3,
        metavar=colours,
        help="mean to subtract; red green blue, whatever --color is (default: 0 0 0)",
    )
    sub.add_argument(
        "--std",
        type=float,
        nargs=3,
        metavar=colours,
        help="divisor; red green blue, whatever --color is (default: 1 1 1)",
    )
    sub.add_argument(
        "--scale",
        type=int,
        metavar="1|255",
        help="range of the pixels that --mean and --std apply to: 0 to 1 (default) or 0 to 255",
    )
    sub.add_argument(
        "--color", metavar="RGB|BGR", help="order of the model's channels (default: RGB)"
    )
    sub.add_argument(
        "--size",
        type=_number_or_text,
        metavar="N|WxH",
        help="width and height of the input (default: from the file)",
    )
    sub.add_argument(
        "--resize",
        type=_number_or_text,
        metavar="N|WxH|pad|none",
        help=(
            "resize the short side to N, or both sides to WxH, or fit the image into the input and"
            " fill the rest (pad), or none (default: size / 0.875; with --crop none: both sides to"
            " size)"
        ),
    )
    sub.add_argument(
        "--crop",
        metavar="center|none",
        help="use the centre of the resized image, or all of it (default: center)",
    )
    sub.add_argument(
        "--fill",
        metavar="#RRGGBB",
        help="colour around an image smaller than the input (default: #000000)",
    )
    sub.add_argument(
        "--centre",
        metavar="LIBRARY",
        help=(
            "whose centre to cut out if the number of pixels is odd: torchvision (default) or"
            " transformers"
        ),
    )
    sub.add_argument(
        "--interpolation",
        metavar="FILTER",
        help="nearest, box, bilinear, hamming, bicubic, lanczos (default: bilinear)",
    )
    sub.add_argument(
        "--exif",
        action=argparse.BooleanOptionalAction,
        help="rotate images as their EXIF orientation says (default: yes)",
    )
    sub.add_argument(
        "--scores",
        metavar="KIND",
        help=(
            "output of the model: logits, softmax (probabilities), or sigmoid (one independent"
            " probability per class) (default: as the graph ends, else logits)"
        ),
    )
    sub.add_argument(
        "--labels",
        metavar="FILE",
        help=(
            "file with one label per line, in the order of the classes (default: from the file,"
            " else numbers)"
        ),
    )
    sub.add_argument(
        "--licence", metavar="NAME", help="licence of the weights (default: from the file)"
    )


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


_probability.__name__ = "number"  # in argparse's messages


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() else text


def _preprocessing(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of `_preprocessing_options` say, by field of OnnxCard."""
    return {name: getattr(parsed, name) for name in _PREPROCESSING}


def _add_options(sub: argparse.ArgumentParser, settings: Mapping[str, Setting]) -> None:
    """Add the options of some settings, in groups if they are many."""
    are_many = len(settings) > 12
    for title, names in GROUPS.items():
        named = [name for name in names if name in settings]
        group = sub.add_argument_group(title) if named and title and are_many else sub
        for name in named:
            setting = settings[name]
            is_option = setting.flag.startswith("-")
            options: dict[str, Any] = {
                "dest": name if is_option else None,
                "help": setting.help,
                "metavar": setting.metavar if is_option else setting.flag,
                "type": setting.kind.parse,
                "action": "append" if setting.kind.is_list and not setting.options else None,
            }
            given = {key: value for key, value in options.items() if value is not None}
            flags = [SHORT[name]] if name in SHORT else []
            flags.append(setting.flag if is_option else name)
            group.add_argument(*flags, **given, **setting.options)


def _number_or_search(text: str) -> int | str | None:
    return text if text == "search" else number(text)


_number_or_search.__name__ = "number"  # in argparse's messages


def _run(parsed: argparse.Namespace) -> int:
    from imagemill.display import observer, results
    from imagemill.runner import run

    settings = make_settings(vars(parsed))
    if settings.dry_run:
        found = run.dry_run(settings)
        for note in found.notes:
            _log(note)
        print(_as_json(found) if parsed.json else results.format_dry_run(found))
    else:
        summary = run.run(settings, observer.Terminal())
        if parsed.json:
            print(_as_json(summary))
        else:
            _print_result(results.format_summary(summary, verbose=parsed.verbose))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from importlib.resources import as_file, files

    from imagemill.display import results
    from imagemill.job import ledger

    with as_file(files("imagemill") / "data" / "demo") as images:
        parsed.sources = [str(images)]
        code = _run(parsed)
    if not parsed.json and not parsed.dry_run:
        columns = ["path", "status", "label", "probability", "error"]
        rows = ledger.rows(_open_job(parsed.output).store, columns)
        print(f"\n{results.format_rows(rows)}")
    return code


def _open_job(output: str) -> OpenJob:
    from imagemill.job.open_job import OpenJob

    return OpenJob.open(output)


def _status(parsed: argparse.Namespace) -> int:
    from imagemill.display import results

    found = _open_job(parsed.dir).status()
    print(_as_json(found) if parsed.json else results.format_status(found))
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from imagemill.display import results

    job = _open_job(parsed.dir)
    problems, moved = job.verify(quarantine=parsed.quarantine)
    shown = job.paths.shown
    found = [{"shard": p.shard, "path": shown(p.path), "problem": p.what} for p in problems]
    moved_to = [shown(path) for path in moved]
    images = job.frozen.images
    if parsed.json:
        report = {"sound": not found, "images": images, "problems": found, "moved": moved_to}
        print(json.dumps(report))
    else:
        print(results.format_problems(found, moved_to, images))
        if any(problem.damaged for problem in problems) and not parsed.quarantine:
            _log(
                f"to repair it, run `imagemill verify --quarantine {parsed.dir}`, which moves"
                " damaged parts to another folder, then repeat the run"
            )
    return 1 if found else 0


def _export(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.job import export

    job = _open_job(parsed.dir)
    columns = parsed.columns.split(",") if parsed.columns else None
    form = export.Form(parsed.to)
    pieces = export.export(job, form, columns=columns, partial=parsed.partial, notify=_log)
    if parsed.output:
        export.write(pieces, Path(parsed.output))
    else:
        sys.stdout.buffer.writelines(pieces)
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from imagemill import report

    job = _open_job(parsed.dir)
    report.write(job, parsed.output)
    print(parsed.output or job.paths.shown(job.paths.report))
    return 0


def _score(parsed: argparse.Namespace) -> int:
    from imagemill import report
    from imagemill.display import score as display
    from imagemill.scoring import score

    job = _open_job(parsed.dir)
    found = score.score(job, parsed.truth)
    for note in found.notes:
        _log(note)
    print(_as_json(found) if parsed.json else display.format_score(found))
    report.add_score(job, found, _log, rewrite=parsed.report)
    top1 = found.top1.value or 0.0
    if parsed.min_top1 is not None and top1 < parsed.min_top1:
        _log(f"top-1 {top1:.4f} is lower than --min-top1 {parsed.min_top1:g}")
        return 1
    return 0


def _devices(parsed: argparse.Namespace) -> int:
    from imagemill.display import results
    from imagemill.pipeline.backends.offers import offers

    found = offers()
    print(json.dumps({"devices": found}) if parsed.json else results.format_devices(found))
    return 0


def _models_dir(parsed: argparse.Namespace) -> Path:
    from pathlib import Path

    from imagemill.models import bundle

    return Path(parsed.models_dir) if parsed.models_dir else bundle.default_models_dir()


def _models(parsed: argparse.Namespace) -> int:
    from imagemill.display import models
    from imagemill.models import listing
    from imagemill.system import serialization

    folder = _models_dir(parsed)
    rows = [row for row in listing.listing(folder) if row.matches(parsed.word or "")]
    if parsed.json:
        print(json.dumps({"models_dir": str(folder), "models": serialization.to_plain(rows)}))
    else:
        types, missing = listing.network_types(parsed.word or ""), listing.missing_extras()
        text = models.format_models(rows, str(folder), parsed.word, types=types, missing=missing)
        print(text)
    return 0


def _get_model(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.display.terminal import DownloadDisplay
    from imagemill.models import bundle, get, resolve

    folder, source = _models_dir(parsed), parsed.from_file
    if source and resolve.is_folder(source):
        if parsed.url or parsed.random_weights is not None:
            raise UsageError("--from, --url and --random-weights exclude each other. Give one.")
        made = resolve.get_from(
            parsed.name,
            source,
            folder,
            given=_preprocessing(parsed),
            notify=_log,
            progress=DownloadDisplay(),
        )
        for size in parsed.batch_size:
            bundle.freeze(made, size)
    else:
        made = get.get(
            parsed.name,
            folder,
            from_file=Path(source) if source else None,
            url=parsed.url,
            random_seed=parsed.random_weights,
            given=_preprocessing(parsed),
            batch_sizes=tuple(parsed.batch_size),
            notify=_log,
            progress=DownloadDisplay(),
        )
    print(made.dir)
    _log_ready(parsed.name, parsed.models_dir)
    return 0


def _log_ready(model: object, models_dir: str | None = None) -> None:
    """Log how a model that was made is used. Its path is on stdout, for scripts."""
    import shlex

    words = ["--model", str(model), *(["--models-dir", models_dir] if models_dir else [])]
    _log(f"Ready: imagemill run SOURCE --output DIR {printable(shlex.join(words), 1_000)}")


def _wrap(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.models import mistaken
    from imagemill.models.custom import wrap

    names = ("layout", "logits", "embedding", "name")
    given = _preprocessing(parsed) | {name: getattr(parsed, name) for name in names}
    if why := mistaken.for_wrap(parsed.file, given):
        raise UsageError(why)
    written, checked = wrap.wrap(
        Path(parsed.file), given, Path(parsed.output) if parsed.output else None
    )
    for line in checked.lines:
        _log(line)
    print(written)
    if checked.is_complete:
        _log_ready(parsed.output or parsed.file)
    return 0


def _classes(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.display.terminal import DownloadDisplay
    from imagemill.models.zero_shot import classes, prompts, towers

    wanted = prompts.read_prompts(Path(parsed.labels), parsed.template)
    found = towers.find(
        parsed.model,
        _models_dir(parsed),
        _log,
        DownloadDisplay(),
        with_scale=parsed.logit_scale is None,
    )
    made = classes.make(
        found,
        wanted,
        Path(parsed.output),
        _log,
        logit_scale=parsed.logit_scale,
        logit_bias=parsed.logit_bias,
    )
    print(made.dir)
    _log_ready(parsed.output)
    return 0


def _quantize(parsed: argparse.Namespace) -> int:
    from imagemill.display.terminal import DownloadDisplay
    from imagemill.models import bundle, resolve
    from imagemill.pipeline.backends import devices
    from imagemill.tuning import precisions

    found = resolve.resolve(
        parsed.model, _models_dir(parsed), notify=_log, progress=DownloadDisplay()
    )
    bundle.verify_hash(found)
    report = precisions.quantize_bundle(
        found,
        parsed.images,
        chosen=devices.resolve("cpu"),
        calibration=parsed.calibration,
        held_out=parsed.held_out,
        min_agreement=parsed.min_agreement,
        truth=parsed.truth,
        notify=_log,
    )
    print(_as_json(report) if parsed.json else "\n".join(precisions.report_lines(report)))
    return 0


def _partition(parsed: argparse.Namespace) -> int:
    from imagemill.arrange import partition
    from imagemill.arrange.links import Link

    link = Link(parsed.link) if parsed.link else None
    made = partition.partition(parsed.data_dir, parsed.partitions, parsed.output, link, _log)
    print(_as_json(made) if parsed.json else partition.format_partitioned(made))
    return 0


def _sort(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.arrange import sort
    from imagemill.arrange.links import Link

    if "://" in parsed.into:
        raise UsageError(f"--into {parsed.into} is a URL. Give a folder on this machine.")
    choice = sort.Choice(parsed.by, parsed.min_probability, parsed.failed)
    link = Link(parsed.link) if parsed.link else None
    done = sort.sort(
        _open_job(parsed.dir), Path(parsed.into), choice, link, dry_run=parsed.dry_run, log=_log
    )
    print(_as_json(done) if parsed.json else sort.format_sorted(done, dry_run=parsed.dry_run))
    return 1 if done.unreadable else 0


def _bench(parsed: argparse.Namespace) -> int:
    from imagemill import bench

    same = (
        "synthetic model models_dir devices precision batch_size batches_per_step num_workers"
        " iterations limit".split()
    )
    settings = bench.BenchSettings(
        sources=tuple(parsed.sources), **{name: getattr(parsed, name) for name in same}
    )
    report = bench.run(settings, _log)
    print(_as_json(report) if parsed.json else bench.format_report(report))
    return 0


def _print_result(result: str) -> None:
    """Print text for people, in lines that fit into a terminal."""
    from imagemill.display import text

    print(text.fit_to(result, sys.stdout))


def _as_json(record: object) -> str:
    from imagemill.system import serialization

    return json.dumps(serialization.to_plain(record))


def _log(message: str) -> None:
    from imagemill.display import text

    text.print_message(f"imagemill: {message}")


if __name__ == "__main__":
    sys.exit(main())
