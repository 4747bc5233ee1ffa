"""The commands that list or make models: models, get-model, wrap, classes, quantize."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from imagemill.cli.options import (
    JSON,
    MODELS_DIR,
    Command,
    add_preprocessing,
    add_settings,
    given_preprocessing,
)
from imagemill.cli.output import log, print_result
from imagemill.errors import UsageError, printable

if TYPE_CHECKING:
    from pathlib import Path  # takes 4 ms to import, which `--help` can do without


def add(command: Command) -> None:
    """Add these commands."""
    _add_models(command)
    _add_get_model(command)
    _add_wrap(command)
    _add_classes(command)
    _add_quantize(command)


def _add_models(command: Command) -> None:
    sub = command("models", _models, "list the models, and how each can run on this machine")
    sub.add_argument(
        "word", nargs="?", metavar="WORD", help="only models whose name, family or origin has it"
    )
    add_settings(sub, MODELS_DIR)
    sub.add_argument("--json", **JSON)


def _models_dir(parsed: argparse.Namespace) -> Path:
    from imagemill.models import bundle

    return bundle.default_models_dir(parsed.models_dir)


def _models(parsed: argparse.Namespace) -> int:
    from imagemill.display import models
    from imagemill.models import listing

    folder, word = _models_dir(parsed), parsed.word
    rows = [row for row in listing.listing(folder) if row.matches(word or "")]
    types, missing = listing.network_types(word or ""), listing.missing_extras()
    text = models.format_models(rows, str(folder), word, types=types, missing=missing)
    print_result(parsed, {"models_dir": folder, "models": rows}, text)
    return 0


def _add_get_model(command: Command) -> None:
    sub = command("get-model", _get_model, "download a published model, or build one from a file")
    sub.add_argument("name", metavar="NAME", help="name of the model; see `imagemill models`")
    origin = sub.add_mutually_exclusive_group()
    origin.add_argument(
        "--from",
        dest="from_file",
        metavar="SOURCE",
        help=(
            "build from your own file with weights (.pth, .pt, .pth.tar, .ckpt, .bin,"
            " .safetensors), from a folder of transformers or timm, or from hf:owner/name; NAME is"
            " yours to choose"
        ),
    )
    origin.add_argument(
        "--url", metavar="URL", help="download from this URL instead of the publisher's"
    )
    origin.add_argument(
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
    add_settings(sub, MODELS_DIR)
    own = "your own weights, with --from or --url (defaults: as usual for the architecture)"
    add_preprocessing(sub.add_argument_group(own))


def _get_model(parsed: argparse.Namespace) -> int:
    from imagemill.display.terminal import DownloadDisplay
    from imagemill.models import bundle, get, resolve
    from imagemill.system import userdirs

    folder, source = _models_dir(parsed), parsed.from_file
    if (smallest := min(parsed.batch_size, default=1)) < 1:
        raise UsageError(f"--batch-size {smallest}: a batch holds at least 1 image.")
    if source and resolve.is_folder(source):
        made = resolve.get_from(
            parsed.name,
            source,
            folder,
            given=given_preprocessing(parsed),
            notify=log,
            progress=DownloadDisplay(),
        )
    else:
        made = get.get(
            parsed.name,
            folder,
            from_file=userdirs.expand(source) if source else None,
            url=parsed.url,
            random_seed=parsed.random_weights,
            given=given_preprocessing(parsed),
            notify=log,
            progress=DownloadDisplay(),
        )
    for size in parsed.batch_size:
        bundle.freeze(made, size)
    print(made.dir)
    _log_ready(parsed.name, parsed.models_dir)
    return 0


def _log_ready(model: object, models_dir: str | None = None) -> None:
    """Log how a model that was made is used. Its path is on stdout, for scripts."""
    import shlex

    words = ["--model", str(model), *(["--models-dir", models_dir] if models_dir else [])]
    log(f"Ready: imagemill run SOURCE --output DIR {printable(shlex.join(words), 1_000)}")


def _add_wrap(command: Command) -> None:
    sub = command(
        "wrap",
        _wrap,
        "make an ONNX classifier usable: describe its preprocessing in a card, and test it",
    )
    sub.add_argument(
        "file",
        metavar="FILE",
        help="file.onnx; writes file.card.json beside it, for `run --model file.onnx`",
    )
    add_preprocessing(
        sub.add_argument_group(
            "preprocessing and scores",
            "`run` does not guess --mean, --std and --resize: give what the file does not say",
        )
    )
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


def _wrap(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.models import mistaken
    from imagemill.models.custom import wrap

    names = ("layout", "logits", "embedding", "name")
    given = given_preprocessing(parsed) | {name: getattr(parsed, name) for name in names}
    if why := mistaken.for_wrap(parsed.file, given):
        raise UsageError(why)
    written, checked = wrap.wrap(
        Path(parsed.file), given, Path(parsed.output) if parsed.output else None
    )
    for line in checked.lines:
        log(line)
    print(written)
    if checked.is_complete:
        _log_ready(parsed.output or parsed.file)
    return 0


def _add_classes(command: Command) -> None:
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
    add_settings(sub, MODELS_DIR)


def _classes(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from imagemill.display.terminal import DownloadDisplay
    from imagemill.models.zero_shot import classes, prompts, towers

    wanted = prompts.read_prompts(Path(parsed.labels), parsed.template)
    found = towers.find(
        parsed.model,
        _models_dir(parsed),
        log,
        DownloadDisplay(),
        with_scale=parsed.logit_scale is None,
    )
    made = classes.make(
        found,
        wanted,
        Path(parsed.output),
        log,
        logit_scale=parsed.logit_scale,
        logit_bias=parsed.logit_bias,
    )
    print(made.dir)
    _log_ready(parsed.output)
    return 0


def _add_quantize(command: Command) -> None:
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
    add_settings(sub, MODELS_DIR)
    sub.add_argument("--json", **JSON)


def _quantize(parsed: argparse.Namespace) -> int:
    from imagemill.display.terminal import DownloadDisplay
    from imagemill.models import bundle, resolve
    from imagemill.pipeline.backends import devices
    from imagemill.tuning import command

    found = resolve.resolve(
        parsed.model, _models_dir(parsed), notify=log, progress=DownloadDisplay()
    )
    bundle.verify_hash(found)
    report = command.quantize_bundle(
        found,
        parsed.images,
        chosen=devices.resolve("cpu"),
        calibration=parsed.calibration,
        held_out=parsed.held_out,
        min_agreement=parsed.min_agreement,
        truth=parsed.truth,
        notify=log,
    )
    print_result(parsed, report, "\n".join(command.report_lines(report)))
    return 0
