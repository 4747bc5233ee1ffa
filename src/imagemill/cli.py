"""The command line: arguments → Settings → one call; prints; no logic.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from imagemill.errors import ImagemillError, Interrupted
from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.records import Settings, Summary
    from imagemill.runner.run import DryRun

_OLD_SPELLINGS = {
    "--batch_size": "--batch-size",
    "--batches_per_step": "--batches-per-step",
    "--data_dir": "the SOURCE argument of `imagemill run` (or `partition --data-dir`)",
    "--data-dir": "the SOURCE argument of `imagemill run`",
    "--data_sub_dir": "the SOURCE argument of `imagemill run`",
    "--device_iterations": "--batches-per-step",
    "--half_partials": "--precision",
    "--hide_output": "nothing: logs are files, see --log-dir",
    "--log_path": "--log-dir",
    "--log-path": "--log-dir",
    "--micro_batch_size": "--batch-size",
    "--micro-batch-size": "--batch-size",
    "--model_name": "--model",
    "--model-name": "the NAME argument of `imagemill get-model` (or `run --model`)",
    "--model_path": "--models-dir",
    "--model-path": "--models-dir",
    "--nohide_output": "nothing: logs are files, see --log-dir",
    "--num_ipus": "--devices ipu:N",
    "--num-ipus": "--devices ipu:N",
    "--num_workers": "--num-workers",
    "--num_of_partitions": "--partitions",
    "--pretrained-model-path": "get-model --from FILE",
    "--report_hw_cycle_count": "nothing: `imagemill bench` measures rates",
    "--use_popart": "--devices ipu:N@popart",
}
"""Flags of Graphcore's example (and near misses) → what says it here."""
_NAMED_MISSING = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A mistake of the user's is one line on stderr, never
    a traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # OpenBLAS sends SIGINT if it cannot start its threads; none is needed here
    with contextlib.suppress(
        AttributeError
    ):  # replaced by something simpler; else names that it cannot spell are no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        parsed = _parser(arguments).parse_args(arguments)
        with contextlib.suppress(ValueError):  # not the main thread: the signal stays its owner's
            signal.signal(signal.SIGTERM, _terminated)
        code: int = parsed.call(parsed)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except ImagemillError as error:
        print(f"imagemill: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("imagemill: interrupted. Repeat the command to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of stdout, printing the result: whoever read it has enough
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
            " harmed.",
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
    from imagemill.system import processes

    return processes.shortage(error)


def _is_stdout_at_fault() -> bool:
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_stdout() -> None:
    """Have nothing more go to stdout, so that the interpreter's own flush at exit finds no
    fault.
    """
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(number: int, _frame: object) -> NoReturn:
    """SIGTERM outside the launcher's loop, which has a handler of its own."""
    raise Interrupted("terminated. Nothing is lost: repeat the command.", 128 + number)


class _Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors that knows the flags of Graphcore's example."""

    arguments: Sequence[str] = ()
    """What the user typed."""

    def error(self, message: str) -> NoReturn:
        for argument in self.arguments:
            flag = argument.partition("=")[0]
            at_fault = (
                not message.startswith("unrecognized arguments") or argument in message.split()
            )
            if at_fault and flag in _OLD_SPELLINGS and flag not in self._option_string_actions:
                message = f"{flag} is spelt {_OLD_SPELLINGS[flag]} here"
        self.exit(2, f"{self.prog}: {message}. See `{self.prog} --help`.\n")


def _parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="imagemill",
        description="Classify images in bulk: folders in, one Parquet row per image out.",
        allow_abbrev=False,
    )
    parser.arguments = arguments
    parser.add_argument("--version", action="version", version=f"imagemill {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )

    def command(
        name: str, call: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub: _Parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.arguments = arguments
        sub.set_defaults(call=call)
        return sub

    sub = command("run", _run, "classify every image of the sources; repeat the command to resume")
    sub.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=(
            "folder (with all below it), image, archive, table, URL, or @LIST: one path or URL a"
            " line; see docs/sources.md"
        ),
    )
    sub.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="output folder or s3:// URL; new, or of the same job",
    )
    _job_options(sub)

    sub = command(
        "demo", _demo, "the whole thing on images and a trained model that install with the package"
    )
    sub.add_argument(
        "--output",
        default="imagemill-demo",
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    _job_options(sub, "efficientnet_lite0")

    sub = command("status", _status, "how far a job is; safe beside a running one")
    sub.add_argument("dir", metavar="DIR")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("verify", _verify, "exit 0 only if the job is complete and sound")
    sub.add_argument("dir", metavar="DIR")
    sub.add_argument(
        "--quarantine",
        action="store_true",
        help="move damaged parts aside, so that `run` computes them again",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("export", _export, "the rows of a job in plan order, as CSV or JSON lines")
    sub.add_argument("dir", metavar="DIR")
    sub.add_argument(
        "--to",
        required=True,
        choices=["csv", "jsonl"],
        help="csv: lists are JSON in a cell; jsonl: one JSON object a line",
    )
    sub.add_argument("--output", metavar="FILE", help="default: standard output")
    sub.add_argument(
        "--columns", metavar="A,B,…", help="these columns, in this order (default: all)"
    )
    sub.add_argument(
        "--partial",
        action="store_true",
        help="of a job that is not finished: the rows that are there",
    )

    sub = command(
        "report",
        _report,
        "write DIR/report.html again: figures, speed, failures and images of a job on one page",
    )
    sub.add_argument("dir", metavar="DIR")

    sub = command("devices", _devices, "what this machine offers and what each would be used for")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("models", _models, "what models can be had and which are here")
    sub.add_argument(
        "--models-dir",
        metavar="DIR",
        help="default: $IMAGEMILL_MODELS, else the user's cache folder",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "get-model", _get_model, "fetch a published model, or build one from a file, as a bundle"
    )
    sub.add_argument("name", metavar="NAME", help="see `imagemill models`")
    sub.add_argument(
        "--from",
        dest="from_file",
        metavar="FILE",
        help="build from this .pth or .safetensors file, download nothing",
    )
    sub.add_argument("--url", metavar="URL", help="download from here instead of the model's home")
    sub.add_argument(
        "--random-weights", type=int, metavar="SEED", help="random weights, for measuring"
    )
    sub.add_argument(
        "--batch-size",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="also write model_N.onnx; may be repeated",
    )
    sub.add_argument(
        "--models-dir",
        metavar="DIR",
        help="default: $IMAGEMILL_MODELS, else the user's cache folder",
    )

    sub = command(
        "wrap",
        _wrap,
        "make any ONNX classifier usable: write the card that says how images are prepared, and"
        " try it",
    )
    _wrap_options(sub)

    sub = command(
        "quantize",
        _quantize,
        "make the int8 variant of a model and measure its agreement with fp32",
    )
    sub.add_argument("model", metavar="MODEL", help="model name or bundle folder")
    sub.add_argument(
        "--images",
        action="append",
        required=True,
        metavar="SOURCE",
        help="images like those to be classified; may be repeated",
    )
    sub.add_argument(
        "--calibration",
        type=int,
        default=300,
        metavar="N",
        help="images to calibrate on (default: %(default)s)",
    )
    sub.add_argument(
        "--held-out",
        type=int,
        default=1000,
        metavar="N",
        help="further images to compare on (default: %(default)s)",
    )
    sub.add_argument(
        "--models-dir",
        metavar="DIR",
        help="default: $IMAGEMILL_MODELS, else the user's cache folder",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "partition",
        _partition,
        "cut a folder of images into one sub-folder per device; nothing is dropped",
    )
    sub.add_argument(
        "--data-dir", required=True, metavar="DIR", help="folder of images, taken with all below it"
    )
    sub.add_argument(
        "--partitions",
        type=int,
        required=True,
        metavar="N",
        help="how many sub-folders; their sizes differ by at most one",
    )
    sub.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="where they are made; repeat the command to make what lacks",
    )
    sub.add_argument(
        "--link",
        choices=["hard", "symbolic", "copy"],
        help="default: hard, else symbolic where that is impossible",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "bench",
        _bench,
        "measure decoding, computing and both; says what bounds a job and what to change",
    )
    sub.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="images to measure with, as for `run`; leave it out with --synthetic",
    )
    sub.add_argument(
        "--synthetic", action="store_true", help="compute alone, on images made in memory"
    )
    _bench_options(sub)
    return parser


def _wrap_options(sub: argparse.ArgumentParser) -> None:
    colours = ("R", "G", "B")
    sub.add_argument(
        "file",
        metavar="FILE",
        help="file.onnx; its card becomes file.card.json beside it, for `run --model file.onnx`",
    )
    sub.add_argument(
        "--mean",
        type=float,
        nargs=3,
        metavar=colours,
        help="subtracted, red green blue whatever --color (default: 0 0 0)",
    )
    sub.add_argument(
        "--std",
        type=float,
        nargs=3,
        metavar=colours,
        help="divided by, red green blue whatever --color (default: 1 1 1)",
    )
    sub.add_argument(
        "--scale",
        type=int,
        metavar="1|255",
        help="range of the pixels that --mean and --std apply to: 0 to 1 (default) or 0 to 255",
    )
    sub.add_argument(
        "--layout",
        metavar="NCHW|NHWC",
        help="order of the input's dimensions (default: as the file's shape shows it)",
    )
    sub.add_argument(
        "--color", metavar="RGB|BGR", help="order of the model's channels (default: RGB)"
    )
    sub.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="height and width of the input (default: as the file says)",
    )
    sub.add_argument(
        "--resize",
        metavar="N|WxH|none",
        help=(
            "short side to N, squash to WxH, or none (default: size / 0.875; with --crop none:"
            " squash)"
        ),
    )
    sub.add_argument(
        "--crop",
        metavar="center|none",
        help="cut the centre out of the resized image, or take all of it (default: center)",
    )
    sub.add_argument(
        "--interpolation",
        metavar="FILTER",
        help="nearest, box, bilinear, hamming, bicubic, lanczos (default: bilinear)",
    )
    sub.add_argument(
        "--exif",
        action=argparse.BooleanOptionalAction,
        help="turn images as their EXIF says (default: yes)",
    )
    sub.add_argument(
        "--scores",
        metavar="KIND",
        help=(
            "logits (default), softmax: probabilities already, or sigmoid: each class has one of"
            " its own"
        ),
    )
    sub.add_argument(
        "--labels",
        metavar="FILE",
        help="one label a line, in the order of the classes (default: their numbers)",
    )
    sub.add_argument(
        "--logits",
        metavar="TENSOR",
        help="output that holds the scores (default: the only one of their shape)",
    )
    sub.add_argument(
        "--embedding",
        metavar="TENSOR",
        help="features for `run --save embedding` (default: what the last layer reads)",
    )
    sub.add_argument("--licence", metavar="NAME", help="of the weights (default: unknown)")
    sub.add_argument(
        "--name", metavar="NAME", help="as results name the model (default: the file's name)"
    )
    sub.add_argument(
        "--output",
        metavar="DIR",
        help="make a bundle there instead, for `run --model DIR` on any machine",
    )


def _batch_size(text: str) -> int | str:
    return text if text == "search" else int(text)


_batch_size.__name__ = "number"


def _bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model",
        metavar="NAME",
        help="model name, bundle folder or wrapped file.onnx (default: resnext101_32x4d)",
    )
    sub.add_argument(
        "--models-dir",
        metavar="DIR",
        help="default: $IMAGEMILL_MODELS, else the user's cache folder",
    )
    sub.add_argument("--devices", metavar="SPEC", help="as for `run` (default: auto)")
    sub.add_argument("--precision", metavar="P", help="as for `run` (default: auto)")
    sub.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="images per batch, or `search` for the fastest size (default: as `run`)",
    )
    sub.add_argument(
        "--batches-per-step",
        type=int,
        metavar="N",
        help="batches handed to a device at a time (default: about 2 s of them)",
    )
    sub.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="decoding threads per device (default: as `run`)",
    )
    sub.add_argument(
        "--iterations",
        type=int,
        default=3,
        metavar="N",
        help="the median over them is reported (default: %(default)s)",
    )
    sub.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="the first N images per iteration (default: about 10 s of them)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _job_options(sub: argparse.ArgumentParser, model: str = "resnext101_32x4d") -> None:
    def number(text: str) -> int | None:
        return None if text == "auto" else int(text)

    number.__name__ = "number"

    def moved(text: str) -> tuple[str, str]:
        old, equals, new = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text}: write OLD=NEW")
        return old, new

    sub.add_argument(
        "--model",
        metavar="NAME",
        help=f"model name, bundle folder or wrapped file.onnx (default: {model})",
    )
    sub.add_argument(
        "--models-dir",
        metavar="DIR",
        help="default: $IMAGEMILL_MODELS, else the user's cache folder",
    )
    sub.add_argument(
        "--devices",
        metavar="SPEC",
        help="auto, cpu, cpu:N (processes), cuda:I,J (ids), ipu:N; joined by + (default: auto)",
    )
    sub.add_argument(
        "--precision", metavar="P", help="auto, fp32, fp16, bf16 or int8 (default: auto)"
    )
    sub.add_argument(
        "--batch-size", type=number, metavar="N", help="images per batch (default: auto)"
    )
    sub.add_argument(
        "--batches-per-step",
        type=number,
        metavar="N",
        help="batches in flight per device (default: auto)",
    )
    sub.add_argument(
        "--num-workers",
        type=number,
        metavar="N",
        help="decoding threads per device (default: auto, its cores)",
    )
    sub.add_argument("--top-k", type=int, metavar="K", help="classes kept per image (default: 5)")
    sub.add_argument(
        "--labels",
        metavar="FILE",
        help="one label a line, in the order of the classes, instead of the model's own",
    )
    sub.add_argument(
        "--save",
        action="append",
        metavar="WHAT",
        help="also keep `logits` or `embedding`; may be repeated",
    )
    sub.add_argument(
        "--shard-size", type=number, metavar="N", help="images per part file (default: auto)"
    )
    sub.add_argument(
        "--include", action="append", metavar="GLOB", help="plan only these; may be repeated"
    )
    sub.add_argument(
        "--exclude", action="append", metavar="GLOB", help="leave these out; may be repeated"
    )
    sub.add_argument(
        "--all-files",
        action="store_true",
        default=None,
        help="plan every file, whatever its suffix",
    )
    sub.add_argument("--limit", type=int, metavar="N", help="plan the first N images only")
    sub.add_argument(
        "--preprocess",
        choices=["card", "center-crop"],
        help="the model's own recipe, or the centre cropped without resizing",
    )
    sub.add_argument(
        "--background",
        metavar="COLOR",
        help=(
            "blend transparent images onto this colour: white, #rrggbb, … (default: drop alpha, as"
            " published pipelines do)"
        ),
    )
    sub.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="larger images become a too_large row, undecoded",
    )
    sub.add_argument(
        "--max-bytes", type=int, metavar="N", help="larger files become a too_large row, unread"
    )
    sub.add_argument(
        "--max-seconds",
        type=float,
        metavar="S",
        help="images that take longer become a timeout row",
    )
    sub.add_argument("--dry-run", action="store_true", help="list and count, write nothing")
    sub.add_argument(
        "--retry-failed",
        nargs="?",
        const="",
        metavar="STATUS,…",
        help="compute shards with failed images again (default: any status)",
    )
    sub.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="F",
        help="stop once more than this fraction of all images is bad",
    )
    sub.add_argument(
        "--moved",
        type=moved,
        action="append",
        default=[],
        metavar="OLD=NEW",
        help=(
            "read what was at OLD, a path or URL, at NEW; rows keep the old names; may be repeated"
        ),
    )
    sub.add_argument(
        "--user-agent",
        metavar="TEXT",
        help="sent to web servers (default: imagemill and its version)",
    )
    sub.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds to finish shards in hand when stopped (default: 20)",
    )
    sub.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="workers on this machine, or on a Ray cluster",
    )
    sub.add_argument(
        "--allow-mixed",
        action="store_true",
        help="allow backends whose answers differ in the last bits",
    )
    sub.add_argument("--log-dir", metavar="DIR", help="default: logs/ in the output folder")
    sub.add_argument(
        "--no-preflight",
        dest="preflight",
        action="store_false",
        help="do not look at a sample of a new job's images as it starts",
    )
    sub.add_argument(
        "--no-report", dest="report", action="store_false", help="write no report.html at the end"
    )
    sub.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _settings(parsed: argparse.Namespace, sources: Sequence[str], **changes: Any) -> Settings:
    from imagemill.records import Settings

    retry = parsed.retry_failed
    values: dict[str, Any] = {
        "sources": tuple(sources),
        "output": parsed.output,
        "save": tuple(parsed.save) if parsed.save else None,
        "include": tuple(parsed.include) if parsed.include else None,
        "exclude": tuple(parsed.exclude) if parsed.exclude else None,
        "retry_failed": None if retry is None else tuple(filter(None, retry.split(","))),
        "grace_s": parsed.grace,
        "moved": tuple(parsed.moved) or None,
    }
    same = """
        model models_dir devices precision batch_size batches_per_step num_workers top_k
        shard_size all_files limit preprocess labels background max_pixels max_bytes
        max_seconds dry_run         max_bad_fraction engine allow_mixed log_dir report
        preflight user_agent
    """.split()
    values |= {name: getattr(parsed, name) for name in same}
    return Settings(**(values | changes))


def _run(parsed: argparse.Namespace) -> int:
    return _carry_out(_settings(parsed, parsed.sources), as_json=parsed.json)


def _demo(parsed: argparse.Namespace) -> int:
    from importlib.resources import as_file, files

    with as_file(files("imagemill") / "data" / "demo") as images:
        code = _carry_out(
            _settings(parsed, [str(images)], model=parsed.model or "efficientnet_lite0"),
            as_json=parsed.json,
        )
        if not parsed.json and not parsed.dry_run:
            _show_rows(Path(parsed.output))
    return code


def _carry_out(settings: Settings, *, as_json: bool) -> int:
    from imagemill.display import observer
    from imagemill.runner import run
    from imagemill.system import serialization

    if settings.dry_run:
        found = run.dry_run(settings)
        for note in found.notes:
            _say(note)
        if as_json:
            print(json.dumps(serialization.to_plain(found)))
        else:
            skipped = _format_skipped(found)
            print(
                f"{found.images:,} images, shards of {found.shard_size:,}"
                + (f"; skipped: {skipped}" if skipped else "")
            )
        return 0
    summary = run.run(settings, observer.Terminal())
    print(json.dumps(serialization.to_plain(summary)) if as_json else _told(summary))
    return 0


def _told(summary: Summary) -> str:
    """The aggregate for people."""
    from imagemill.display.text import statuses

    lines = [f"{summary.images:,} images: {summary.ok:,} ok, {summary.failed:,} failed"]
    if summary.failed:
        lines[0] += f" ({statuses(dict(summary.failed_by_status))})"
    if skipped := _format_skipped(summary):
        lines.append(f"skipped: {skipped}")
    if summary.images_per_second:
        lines.append(
            f"{summary.images_per_second:,.1f} images/s over {summary.seconds:,.1f} s,"
            f" {summary.model} in {summary.precision}"
        )
        for device in summary.devices:
            restarts = (
                f", {device.restarts} restart{'s' if device.restarts > 1 else ''}"
                if device.restarts
                else ""
            )
            lines.append(
                f"  {device.name}: {device.images:,} images, {device.images_per_second or 0:,.1f}"
                f" images/s{restarts}"
            )
        believable = {
            name: rate for name, rate in summary.rates.items() if rate >= summary.rates["achieved"]
        }  # else of a job too short
        rates = ", ".join(
            f"{name.replace('_', ' ')} {rate:,.1f}" for name, rate in believable.items()
        )
        lines.append(
            f"bounded by {summary.bottleneck}: {summary.advice}"
            if summary.bottleneck
            else f"bottleneck: {summary.advice}"
        )
        lines.append(f"images/s: {rates}")
    if any(device.name.partition("#")[0] == "null" for device in summary.devices):
        lines.append("note: the null device computes nothing: its predictions are made up")
    lines.append(f"results: {summary.output}/predictions")
    return "\n".join(lines)


def _format_skipped(found: Summary | DryRun) -> str:
    from imagemill.runner import listing

    return listing.format_skipped(
        found.skipped_by_suffix,
        found.skipped_hidden,
        found.skipped_by_filter,
        found.skipped_broken_links,
    )


def _show_rows(output: Path) -> None:
    """Print the demo's rows, as anybody would read them."""
    from imagemill.job import ledger
    from imagemill.job.paths import JobPaths

    print()
    for row in ledger.rows(
        JobPaths(output.absolute()), ["path", "status", "label", "probability", "error"]
    ):
        answer = (
            f"{row['probability']:6.1%}  {row['label']}"
            if row["status"] == "ok"
            else f"{row['status']}: {row['error']}"
        )
        print(f"  {row['path']:<34} {answer}")


def _open_job(folder: str) -> Any:
    from imagemill.errors import OutputError
    from imagemill.job import documents
    from imagemill.job.paths import JobPaths

    paths = JobPaths.of(folder)
    frozen = documents.read_frozen(paths)
    if frozen is None:
        raise OutputError(f"{folder} is not an imagemill job: it has no job.json.")
    return paths, frozen


def _status(parsed: argparse.Namespace) -> int:
    from imagemill.display.text import statuses
    from imagemill.job import inspect
    from imagemill.system import serialization

    found = inspect.status(*_open_job(parsed.dir))
    if parsed.json:
        print(json.dumps(serialization.to_plain(found)))
        return 0
    state = (
        "finished"
        if found.complete
        else "running"
        if found.running
        else "not finished: repeat the run command to resume"
    )
    print(
        f"{found.done:,} of {found.images:,} images ({found.shards_done:,} of {found.shards:,}"
        f" shards), {state}"
    )
    if found.failed_by_status:
        print(f"failed: {statuses(dict(found.failed_by_status))}")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from imagemill.job import inspect

    paths, frozen = _open_job(parsed.dir)
    problems, moved = inspect.verify(paths, frozen, quarantine=parsed.quarantine)
    found = [{"shard": p.shard, "path": paths.shown(p.path), "problem": p.what} for p in problems]
    if parsed.json:
        aside = [paths.shown(path) for path in moved]
        print(
            json.dumps(
                {"sound": not found, "images": frozen.images, "problems": found, "moved": aside}
            )
        )
    else:
        missing = [
            problem
            for problem in found
            if problem["problem"] == "is missing" and problem["shard"] is not None
        ]
        for problem in found:
            if problem not in missing[_NAMED_MISSING:]:
                print(f"{problem['path']} {problem['problem']}")
        if len(missing) > _NAMED_MISSING:
            print(f"… and {len(missing) - _NAMED_MISSING:,} more parts are missing: repeat the run")
        for path in moved:
            print(f"moved to {paths.shown(path)}")
        if any(problem.damaged for problem in problems) and not parsed.quarantine:
            _say(
                f"to mend it, imagemill verify --quarantine {parsed.dir} moves what is damaged"
                " aside; then repeat the run"
            )
        print(
            f"{len(found)} problem{'s' if len(found) > 1 else ''}"
            if found
            else f"complete and sound: {frozen.images:,} images, one row each"
        )
    return 1 if found else 0


def _export(parsed: argparse.Namespace) -> int:
    from imagemill.job import export

    paths, frozen = _open_job(parsed.dir)
    columns = parsed.columns.split(",") if parsed.columns else None
    form = export.Form(parsed.to)
    pieces = export.export(paths, frozen, form, columns=columns, partial=parsed.partial, say=_say)
    if parsed.output:
        export.write(pieces, Path(parsed.output))
    else:
        sys.stdout.buffer.writelines(pieces)
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from imagemill import report

    paths, frozen = _open_job(parsed.dir)
    report.write(paths, frozen)
    print(paths.shown(paths.report))
    return 0


def _devices(parsed: argparse.Namespace) -> int:
    from imagemill.pipeline.backends import devices

    offers = devices.offers()
    if parsed.json:
        print(json.dumps({"devices": offers}))
    else:
        for offer in offers:
            print(
                f"{offer['devices']:<8} {offer['what']}"
                + (": not usable" if offer["missing"] else "")
            )
            for note in [offer["missing"], *offer["notes"]] if offer["missing"] else offer["notes"]:
                print(f"{'':<8} {note}")
    return 0


def _models_dir(parsed: argparse.Namespace) -> Path:
    from imagemill.models import bundle

    return Path(parsed.models_dir) if parsed.models_dir else bundle.default_models_dir()


def _models(parsed: argparse.Namespace) -> int:
    from imagemill.models import registry
    from imagemill.system import serialization

    folder = _models_dir(parsed)
    rows = registry.listing(folder)
    if parsed.json:
        print(json.dumps({"models_dir": str(folder), "models": serialization.to_plain(rows)}))
        return 0
    print(f"{'name':<42} {'top-1':>6} {'parameters':>11} {'licence':<14} here")
    for row in rows:
        here = (
            ""
            if row.bytes_on_disk is None
            else f"{row.bytes_on_disk / 2**20:,.0f} MiB, {row.origin}"
        )
        top1 = "" if row.top1 is None else f"{row.top1:.2f}"
        print(f"{row.name:<42} {top1:>6} {row.parameters / 1e6:>9.1f} M {row.licence:<14} {here}")
    for bare, meant in registry.ALIASES.items():
        print(f"{bare} means {meant}")
    return 0


def _get_model(parsed: argparse.Namespace) -> int:
    from imagemill.display.terminal import DownloadProgress
    from imagemill.display.text import tell
    from imagemill.models import registry

    made = registry.get(
        parsed.name,
        _models_dir(parsed),
        from_file=Path(parsed.from_file) if parsed.from_file else None,
        url=parsed.url,
        random_seed=parsed.random_weights,
        batch_sizes=tuple(parsed.batch_size),
        say=lambda message: tell(f"imagemill: {message}"),
        progress=DownloadProgress(),
    )
    print(made.dir)
    return 0


def _wrap(parsed: argparse.Namespace) -> int:
    from imagemill.models.custom import wrap

    resize = int(parsed.resize) if parsed.resize and parsed.resize.isdecimal() else parsed.resize
    names = (
        "mean std scale layout color size crop interpolation exif scores labels logits embedding"
        " licence name".split()
    )
    given = {name: getattr(parsed, name) for name in names} | {"resize": resize}
    written, checked = wrap.wrap(
        Path(parsed.file), given, Path(parsed.output) if parsed.output else None
    )
    for line in checked.lines:
        _say(line)
    print(written)
    return 0


def _quantize(parsed: argparse.Namespace) -> int:
    from imagemill.display.terminal import DownloadProgress
    from imagemill.models import bundle, registry
    from imagemill.pipeline.backends import devices
    from imagemill.system import serialization
    from imagemill.tuning import precisions

    def say(message: str) -> None:
        print(f"imagemill: {message}", file=sys.stderr, flush=True)

    found = registry.resolve(
        parsed.model, _models_dir(parsed), say=say, progress=DownloadProgress()
    )
    bundle.verify_hash(found)
    report = precisions.quantize_bundle(
        found,
        parsed.images,
        chosen=devices.resolve("cpu"),
        calibration=parsed.calibration,
        held_out=parsed.held_out,
        say=say,
    )
    print(
        json.dumps(serialization.to_plain(report))
        if parsed.json
        else "\n".join(precisions.report_lines(report))
    )
    return 0


def _say(message: str) -> None:
    print(f"imagemill: {message}", file=sys.stderr, flush=True)


def _partition(parsed: argparse.Namespace) -> int:
    from imagemill import partition
    from imagemill.system import serialization

    link = partition.Link(parsed.link) if parsed.link else None
    made = partition.partition(parsed.data_dir, parsed.partitions, parsed.output, link, _say)
    print(json.dumps(serialization.to_plain(made)) if parsed.json else partition.told(made))
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    from imagemill import bench
    from imagemill.system import serialization

    same = (
        "synthetic model models_dir devices precision batch_size batches_per_step num_workers"
        " iterations limit".split()
    )
    settings = bench.BenchSettings(
        sources=tuple(parsed.sources), **{name: getattr(parsed, name) for name in same}
    )
    report = bench.run(settings, _say)
    print(json.dumps(serialization.to_plain(report)) if parsed.json else bench.told(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
