"""Wrap a custom ONNX classifier as a bundle.

    file.onnx + file.card.json ─► read, checked
        ─► pixels → [BGR] → float → [NCHW] → − mean → ÷ deviation → the external graph
        → `logits` (n, classes), `embedding` (n, features) ─► run once ─► bundle

The card is JSON, written by hand or by `imagemill wrap`; `onnx_card` has the defaults. `graph`
changes the graph. A batch size that was fixed when the file was exported is opened, and a check run
shows whether the graph allows that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ClassCountError, ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import evaluate
from imagemill.models.custom.graph import Plan, assemble, examine
from imagemill.models.custom.onnx_card import OnnxCard, card_file, card_text, changed, read_card
from imagemill.records import Bundle, Card, Scores
from imagemill.system import files, serialization

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]

_WRAPPER: Final = 1
"""Version of the wrapping: bundles of another version are built again."""
_TOLERANCE: Final = 1e-3
"""Between an image's scores beside one neighbour and beside another, as a share of the largest
score.
"""
_NEAR_ONE: Final = 0.05
"""How far the probabilities of a softmax may be from a sum of 1: those of a quantised one are
rounded.
"""


@dataclass(frozen=True, slots=True)
class Checked:
    """A custom file that was wrapped and run without a fault."""

    bundle: Bundle
    card: OnnxCard
    """With everything that was left open filled in."""
    lines: tuple[str, ...]
    """What was found, for people."""


def wrap(file: Path, given: Mapping[str, Any], output: Path | None = None) -> tuple[Path, Checked]:
    """Check a custom file by wrapping and running it, and write its card or a portable bundle.

    Args:
        file: ONNX.
        given: fields of OnnxCard by name, None where unsaid: then they are those of the card beside
            the file, if there is one. `labels` is a file's path.
        output: a folder for a bundle; None writes the card beside the file.

    Returns:
        what was written, and what was found.

    Raises:
        UsageError: a value that makes no sense, or does not fit the file. ClassCountError: the
        labels do not. ModelError: the file is not a classifier that can be wrapped, or nothing can
        be written.
    """
    beside = card_file(file)
    labels = given.get("labels")
    given = dict(given) | {"labels": None if labels is None else bundles.read_labels(Path(labels))}
    card = changed(read_card(beside) if beside.is_file() else OnnxCard(), given)
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(f"--output {output} is there already. Give a new folder.")
        return output, _build_whole(file, card, output, labels)
    with tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        checked = _build(file, card, Path(folder) / "bundle", labels)
    files.write_whole(beside, card_text(checked.card).encode())
    return beside, checked


def bundle_for(file: Path, models_dir: Path, say: Say) -> Bundle:
    """Return the bundle of a custom file, and build it in the models folder if it is missing.

    The folder's name has the file's name and a hash over file and card, so that a change of either
    builds another bundle.

    Raises:
        UsageError: there is no such file, or no card beside it. ModelError: see `wrap`.
    """
    beside = card_file(file)
    if not file.is_file():
        raise UsageError(f"--model {file}: there is no such file.")
    if not beside.is_file():
        raise UsageError(
            f"--model {file} has no card beside it, which says how images are prepared:"
            f" {beside.name} is not there. Make one: `imagemill wrap {file}`, see its --help; or"
            " write it by hand (docs/models.md)."
        )
    card = read_card(beside)
    key = _key(file, card)
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", file.stem)[:100].lstrip(".-") or "model"
    folder = models_dir / f"{stem}-{key[:12]}"
    if bundles.is_bundle(folder):
        return bundles.load(folder)
    say(f"{file.name}: wrapping it, once, into {folder}")
    for line in _build_whole(file, card, folder, None, key).lines:
        say(f"{file.name}: {line}")
    return bundles.load(folder)


def _build_whole(
    file: Path, card: OnnxCard, folder: Path, labels_file: str | None, key: str | None = None
) -> Checked:
    """As `_build`, but the folder appears whole."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        checked = _build(file, card, making, labels_file, key)
        making.rename(folder)
    except OSError as error:
        if not bundles.is_bundle(folder):  # another process may have made it meanwhile
            raise ModelError(
                f"{folder} cannot be written: {error.strerror}. Choose another folder."
            ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return checked


def _key(file: Path, card: OnnxCard) -> str:
    """Hash of what decides the bundle: the file, the weights beside it, the card."""
    names = external_files(file, _parsed(file))
    sums = [bundles.sha256(file), *(bundles.sha256(file.parent / name) for name in names)]
    return hashlib.sha256(
        json.dumps([_WRAPPER, *sums, asdict(card), file.stem]).encode()
    ).hexdigest()


def external_files(file: Path, model: onnx.ModelProto) -> list[str]:
    """Return the names of the files that an ONNX file reads weights from.

    Raises:
        ModelError: a name is absolute, leads out of the file's folder (links followed), or is not a
            regular file.
    """
    folder = file.parent.resolve()
    names = {
        entry.value
        for tensor in _tensors(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in sorted(names):
        parts = name.replace("\\", "/").split("/")
        if not name or not parts[0] or ".." in parts or ":" in name or "\0" in name:
            raise ModelError(
                f"{file} refused: it wants weights from {name!r}, outside its folder. Use a model"
                " that you trust."
            )
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise ModelError(
                f"{file} refused: {name!r}, where it wants weights from, links to outside its"
                " folder."
            )
        if not target.is_file():
            raise ModelError(
                f"{file} is incomplete: {name}, which holds its weights, is not a file beside it."
                " Copy it there."
            )
    return sorted(names)


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor inside a protobuf message."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                yield from _tensors(inner)


def _parsed(file: Path) -> onnx.ModelProto:
    """The file's graph, without weights that lie beside it. Raises: ModelError."""
    import onnx

    if file.stat().st_size == 0:
        raise ModelError(f"{file} is empty. Export it again.")
    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ModelError(f"{file} is damaged or not ONNX: {error}. Export it again.") from error


def _build(
    file: Path, card: OnnxCard, folder: Path, labels_file: str | None, key: str | None = None
) -> Checked:
    """Wrap a file into a bundle folder and run it once. `labels_file` names the labels in an
    error.
    """
    key = key or _key(file, card)
    model = _parsed(file)
    external_files(file, model)
    import onnx

    onnx.external_data_helper.load_external_data_for_model(model, str(file.parent))
    plan = examine(file, model, card)
    assemble(model, plan)
    made = bundles.write(folder, _bundle_card(plan, key), model)
    del model
    answers = _run(made, plan)
    classes, has_embedding, notes = _judge(plan, answers)
    labels = _labels(plan, classes, labels_file)
    outputs = ("logits", "embedding") if has_embedding else ("logits",)
    final = replace(made.card, labels=labels, outputs=outputs)
    files.write_whole(folder / bundles.CARD, serialization.encode(final))
    told = replace(
        plan.card, logits=card.logits
    )  # what was found by itself stays open, for the next export of the file
    size = answers[0]["embedding"].shape[1] if has_embedding else 0
    return Checked(Bundle(folder, final), told, (*plan.lines, *_found(plan, classes, size), *notes))


def _bundle_card(plan: Plan, key: str) -> Card:
    card, file = plan.card, plan.file
    mean, std = plan.normalisation
    # The scores of a graph that ends in a sigmoid are probabilities already, to be taken as they
    # are.
    scores = (
        Scores.SOFTMAX
        if plan.scores is Scores.SIGMOID and plan.ends_in == "Sigmoid"
        else plan.scores
    )
    return Card(
        name=card.name or file.stem,
        architecture="onnx",
        labels=(),
        recipe=plan.recipe,
        mean=mean,
        std=std,
        sha256="",
        licence=card.licence,
        origin={
            "source": "onnx",
            "file": str(file.absolute()),
            "sha256": bundles.sha256(file),
            "verified": False,
            "wrapped": key,
        },
        scores=scores,
        normalised=None if plan.takes_bytes else "normalised",
        outputs=("logits", "embedding") if plan.features else ("logits",),
    )


# ── the check run ─────────────────────────────────────────────────────────────────────────────────


def _run(made: Bundle, plan: Plan) -> list[dict[str, NDArray[np.float32]]]:
    """Answers to two made-up images, and to the second of them twice. Raises: ModelError."""
    shape = (2, plan.recipe.height, plan.recipe.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[1] //= 2
    try:
        return evaluate.answers(made.dir / bundles.MODEL, [pixels, pixels[[1, 1]]])
    except Exception as error:  # OpenVINO's front end has kinds of its own
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        if plan.batch is None:
            raise ModelError(
                f"{plan.file.name} cannot be run on a batch of 2: {reason}. Export it again, with"
                " an open batch."
            ) from error
        raise ModelError(
            f"{plan.file.name} was exported for batches of {plan.batch} and does not bear others:"
            f" {reason}. Export it with an open batch: dynamic_axes or dynamic_shapes of"
            " torch.onnx.export."
        ) from error


def _judge(
    plan: Plan, answers: list[dict[str, NDArray[np.float32]]]
) -> tuple[int, bool, tuple[str, ...]]:
    """Number of classes, whether there is an embedding, and notes. Raises: ModelError,
    UsageError.
    """
    name, scores = plan.file.name, answers[0]["logits"]
    if scores.shape[0] != 2 or (plan.classes is not None and scores.shape[1] != plan.classes):
        raise ModelError(
            f"{name}: {plan.logits} has the shape {scores.shape} for 2 images; scores are (n,"
            f" {plan.classes or 'classes'})."
        )
    valid, valid_again = (_valid(answer) for answer in answers)
    if not valid.any():
        bad = next(output for output, values in answers[0].items() if not np.isfinite(values).all())
        raise ModelError(
            f"{name} returns NaN or infinity ({bad}) for random images. Check --mean, --std and"
            " --scale."
        )
    again = np.where(valid_again[:, None], answers[1]["logits"], 0)
    scores = np.where(valid[:, None], scores, 0)
    slack = _TOLERANCE * max(1e-6, float(np.abs(scores).max()))
    if (valid_again != valid[1]).any() or float(np.abs(again - scores[1]).max()) > slack:
        raise ModelError(
            f"{name} answers differently to one image beside different neighbours, so its answers"
            " could not be relied on. Export it in evaluation mode, with an open batch."
        )
    notes = _judge_scores(plan, scores[valid])
    if not valid.all():
        notes.append(
            "note: it returned NaN or infinity for one of two random images; a job reports such"
            " images as invalid_output"
        )
    has_embedding = plan.features is not None
    if plan.features is not None and not plan.features.asked:
        features = plan.features
        plain = features.classes in (None, scores.shape[1]) and features.features in (
            None,
            answers[0]["embedding"].shape[1],
        )
        has_embedding = plain and answers[0]["embedding"].shape[0] == len(scores)
    return scores.shape[1], has_embedding, tuple(notes)


def _valid(answer: Mapping[str, NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Tell for each of two images whether all of its outputs are finite."""
    rows = [np.isfinite(values).all(axis=1) for values in answer.values() if len(values) == 2]
    return np.asarray(np.logical_and.reduce(rows))


def _judge_scores(plan: Plan, scores: NDArray[np.float32]) -> list[str]:
    """Compare scores (n, classes) with what the card says they are. Returns notes. Raises:
    UsageError.
    """
    name, kind, classes = plan.file.name, plan.scores, scores.shape[1]
    if classes == 1 and kind is not Scores.SIGMOID:
        raise UsageError(
            f"{name} returns one score per image, and a softmax over one class is 1.0 for every"
            " image. Add --scores sigmoid, which makes the score the probability of that class."
        )
    within = bool((scores >= 0).all() and (scores <= 1 + _TOLERANCE).all())
    sums = scores.sum(axis=1, dtype=np.float64)
    farthest = float(sums[np.abs(sums - 1).argmax()])
    if kind is Scores.SOFTMAX:
        if not within:
            raise UsageError(
                f"{name} returns scores from {scores.min():.4g} to {scores.max():.4g}, no"
                " probabilities. Leave --scores out."
            )
        if abs(farthest - 1) > _NEAR_ONE:
            if plan.ends_in == "Softmax":
                raise UsageError(
                    f"{name}: its Softmax is not over the classes: an image's scores sum to"
                    f" {farthest:.4g}. Correct its axis."
                )
            return [
                f"note: an image's scores sum to {farthest:.4g}, not 1; they are written as"
                " they are"
            ]
    elif within and plan.ends_in is None:
        if classes > 1 and abs(farthest - 1) < _TOLERANCE:
            raise UsageError(
                f"{name}: the scores of each image lie between 0 and 1 and sum to 1, so they are"
                " probabilities already, not logits. Add --scores softmax."
            )
        if classes > 1:
            return [
                "note: scores lie between 0 and 1; if they are probabilities already, --scores"
                " softmax says so"
            ]
        return [
            "note: the score lies between 0 and 1; if it is a probability already, export the model"
            " without its last step"
        ]
    return []


def _found(plan: Plan, classes: int, features: int) -> tuple[str, ...]:
    lines = [f"{plan.logits}: {plan.scores}, {classes:,} classes"]
    if features and plan.features:
        lines.append(f"embedding: {plan.features.tensor}, {features:,} features")
    else:
        lines.append("embedding: none found; name its tensor with --embedding if you want one")
    if plan.batch is not None:
        lines.append(f"its batch was fixed to {plan.batch} and is open now")
    return tuple(lines)


def _labels(plan: Plan, classes: int, file: str | None) -> tuple[str, ...]:
    labels = plan.card.labels
    if labels is None:
        return tuple(str(number) for number in range(classes))
    if len(labels) != classes:
        where = f"{file} has {len(labels)} lines" if file else f"its card has {len(labels)} labels"
        raise ClassCountError(
            f"{plan.file.name} returns {classes} classes, {where}. Give the {classes}-line file"
            " with --labels."
        )
    return tuple(labels)
