"""Wrap a custom ONNX classifier as a bundle.

    file.onnx ─► `metadata`: what it says itself ─┐
    file.card.json, flags ─► `card` ──────────────┴► `graph`: the plan ─► `assemble`: the wrapped
        graph ─► `check`: run once ─► bundle

The card is JSON, written by hand or by `imagemill wrap`. A batch size that was fixed when the file
was exported is opened, and the check run shows whether the graph allows that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import asdict, replace

from imagemill.errors import ClassCountError, ModelError, UsageError, counted, printable, quoted
from imagemill.models import bundle as bundles
from imagemill.models import mistaken
from imagemill.models.card import (
    Crop,
    ModelCard,
    ReadCard,
    card_file,
    card_text,
    read_card,
    read_given,
)
from imagemill.models.custom.assemble import assemble
from imagemill.models.custom.check import Findings, judge, run_twice
from imagemill.models.custom.graph import (
    STANDARD_DOMAINS,
    UINT8,
    Plan,
    examine,
    image_input,
)
from imagemill.models.custom.metadata import read_metadata
from imagemill.models.preprocessing import normalisation
from imagemill.records import Bundle, Card
from imagemill.system import files, serialization
from imagemill.system.messages import Notify

if TYPE_CHECKING:
    import onnx


_WRAPPER: Final = 3
"""Version of the wrapping: bundles of another version are built again."""


class Source(Struct, frozen=True):
    """What a bundle is made of."""

    file: Path
    model: onnx.ModelProto
    """The file's content, as `parse` returned it. It is consumed."""
    read: ReadCard
    key: str
    """Hash of all of it."""
    origin: Mapping[str, str | int | bool | None] = {}
    """What the bundle's card says about where the model comes from, besides the file."""
    architecture: str = "onnx"
    """For the bundle's card."""


class Checked(Struct, frozen=True):
    """A custom file that was wrapped and run without a fault."""

    bundle: Bundle
    lines: tuple[str, ...]
    """What was found, for people."""
    is_complete: bool = True
    """Whether `run` takes it as it is."""


def wrap(file: Path, given: Mapping[str, Any], output: Path | None = None) -> tuple[Path, Checked]:
    """Check a custom file by wrapping and running it, and write its card or a portable bundle.

    Args:
        file: ONNX.
        given: fields of ModelCard by name. None leaves the value of the card beside the file, else
            of the file's metadata, else the default. `labels` is a file's path.
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
    given = read_given(given)
    model = parse(file)
    read = _read(file, model, given)
    if labels is not None:
        read = ReadCard(read.card, {**read.origins, "labels": f"--labels {printable(labels)}"})
    missing = _missing(file, model, read)
    source = Source(file, model, read, _key(file, model, read.card))
    if output is not None:
        if not bundles.is_free(output):
            raise UsageError(f"--output {printable(output)} is there already. Give a new folder.")
        if missing:
            raise UsageError(
                "--output makes a model that runs as it is, and"
                f" {_not_given(missing)}. Add {_flags(missing, read)}"
            )
        return output, build(source, output)
    with tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        checked = _build(source, Path(folder) / "bundle")
    # What the file says itself stays open, so that it is read again from the next export.
    said = [name for name, origin in read.origins.items() if not origin.startswith("metadata")]
    files.write_whole(beside, card_text(read.card, said).encode())
    if missing:
        usual = " ".join(_USUAL[name] for name in missing)
        note = (
            f"note: {_not_given(missing)}, so `run` refuses the model. Most networks trained on"
            f" ImageNet take {usual}. Add the values that this one was trained with: imagemill wrap"
            f" {quoted(file)} {_flags(missing, read)}"
        )
        checked = replace(checked, lines=(*checked.lines, note), is_complete=False)
    return beside, checked


def bundle_for(file: Path, models_dir: Path, notify: Notify) -> Bundle:
    """Return the bundle of a custom file, and build it in the models folder if it is missing.

    The folder's name has the file's name and a hash over file and card, so that a change of either
    builds another bundle.

    Raises:
        UsageError: neither the file nor its card says how images are prepared, or the card does
        not fit the file. ModelError: see `wrap`.
    """
    shown, card = printable(file), printable(card_file(file).name)
    model = parse(file)
    read = _read(file, model, {})
    if missing := _missing(file, model, read):
        lack = (
            f"neither the file nor its card ({card}) says {_listed(missing)}"
            if card_file(file).is_file()
            else f"it has no card beside it ({card}), and the file does not say {_listed(missing)}"
        )
        found = "; ".join(read.lines()) or "nothing"
        raise UsageError(
            f"--model {shown}: {lack}. Known: {found}. Say it once, with the values that the model"
            f" was trained with: imagemill wrap {quoted(file)} {_flags(missing, read)}"
        )
    key = _key(file, model, read.card)
    folder = models_dir / bundles.unnamed_folder(file.stem, key)
    if bundles.is_bundle(folder):
        return bundles.load(folder)
    notify(f"{printable(file.name)}: wrapping it, once, into {folder}")
    for line in build(Source(file, model, read, key), folder).lines:
        notify(f"{printable(file.name)}: {line}")
    return bundles.load(folder)


_ESSENTIAL: Final = {"mean": "--mean R G B", "std": "--std R G B", "resize": "--resize N"}
"""What `run` never guesses → the flag of `wrap` that says it."""
_USUAL: Final = {
    "mean": "--mean 0.485 0.456 0.406",
    "std": "--std 0.229 0.224 0.225",
    "resize": "--resize 256",
}
"""The same with the values of most networks trained on ImageNet."""


def _read(file: Path, model: onnx.ModelProto, given: Mapping[str, Any]) -> ReadCard:
    """Return what the file's metadata, the card beside it and the given fields say."""
    beside = card_file(file)
    card = read_card(beside) if beside.is_file() else ReadCard(ModelCard())
    has_labels = given.get("labels") is not None or card.card.labels is not None
    read = read_metadata(file.name, model, with_labels=not has_labels)
    return read.with_card(card).with_values(given)


def _missing(file: Path, model: onnx.ModelProto, read: ReadCard) -> list[str]:
    """Return which essential values nobody has said. A uint8 input needs no normalisation, pixels
    of scale 255 may be fed as they are, and an image that is not cropped is resized to the input.
    """
    kind = image_input(file.name, model).type.tensor_type.elem_type
    is_fed = kind == UINT8 or read.card.scale == 255
    needed = ["resize"] if is_fed else list(_ESSENTIAL)
    if read.card.crop is Crop.NONE:
        needed.remove("resize")
    return [name for name in needed if name not in read.origins]


def _flags(missing: list[str], read: ReadCard) -> str:
    """Return the flags of `wrap` that say what is missing, and labels if there are none."""
    flags = " ".join(_ESSENTIAL[name] for name in missing)
    if "labels" in read.origins:
        return flags
    return f"{flags} --labels FILE. {mistaken.LABELS}"


def _not_given(names: list[str]) -> str:
    return f"{_listed(names)} {'was' if len(names) == 1 else 'were'} not given"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def build(source: Source, folder: Path) -> Checked:
    """Wrap a file into a bundle folder, which appears whole, and run it once.

    Args:
        source: the file and its card.
        folder: of the bundle; missing or empty.

    Raises:
        UsageError: the card does not fit the file. ClassCountError: the labels do not. ModelError:
        the file is not a classifier that can be wrapped, or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        ) as making:
            checked = _build(source, Path(making) / "bundle")
            try:
                checked.bundle.dir.rename(folder)
            except OSError:
                if not bundles.is_bundle(folder):  # another process may have made it meanwhile
                    raise
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    return replace(checked, bundle=replace(checked.bundle, dir=folder))


def _key(file: Path, model: onnx.ModelProto, card: ModelCard) -> str:
    """Hash of what decides the bundle: the file, the weights beside it, the card."""
    return bundles.key_of(files_of(file, model), _WRAPPER, asdict(card), file.stem)


def files_of(file: Path, model: onnx.ModelProto) -> list[Path]:
    """Return an ONNX file and the files beside it that it reads weights from.

    Raises:
        ModelError: a name is absolute, leads out of the file's folder (links followed), or is not a
            regular file.
    """
    folder, shown = file.parent.resolve(), printable(file)
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
                f"{shown} refused: it wants weights from {name!r}, outside its folder. Use a model"
                " that you trust."
            )
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise ModelError(
                f"{shown} refused: {name!r}, where it wants weights from, links to outside its"
                " folder."
            )
        if not target.is_file():
            raise ModelError(
                f"{shown} is incomplete: {printable(name)}, which holds its weights, is not a file"
                " beside it. Copy it there."
            )
    return [file, *(file.parent / name for name in sorted(names))]


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor inside a protobuf message."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                yield from _tensors(inner)


def parse(file: Path) -> onnx.ModelProto:
    """Return a file's graph, without the weights in files beside it.

    Raises:
        ModelError: the file is empty or damaged.
    """
    import onnx

    if file.stat().st_size == 0:
        raise ModelError(f"{printable(file)} is empty. Export it again.")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ModelError(
            f"{printable(file)} is damaged or not ONNX: {printable(error)}. Export it again."
        ) from error
    if not _is_text(model):
        raise ModelError(
            f"{printable(file)} is damaged: a name in it is not UTF-8. Export it again."
        )
    if (node := _without_inputs(model)) is not None:
        raise ModelError(
            f"{printable(file)} is damaged: its operator {node.op_type} {printable(node.name)!r}"
            f" has {counted(len(node.input), 'input')}, which is too few. Export it again."
        )
    return model


def _without_inputs(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """Return a node with fewer inputs than its operator needs: OpenVINO's reader would crash."""
    from onnx import defs

    versions = [entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS]
    opset = min(max(versions, default=1), defs.onnx_opset_version())
    for node in model.graph.node:
        is_known = node.domain in STANDARD_DOMAINS and defs.has(node.op_type, opset)
        if is_known and len(node.input) < defs.get_schema(node.op_type, opset).min_input:
            return node
    return None


def _is_text(message: Any) -> bool:
    """Tell whether every text in a protobuf message is UTF-8. Other texts are bytes in Python."""
    for kind, value in message.ListFields():
        items = (
            (value,) if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        )
        if kind.type == kind.TYPE_STRING:
            good = all(isinstance(item, str) for item in items)
        else:
            good = kind.message_type is None or all(map(_is_text, items))
        if not good:
            return False
    return True


def load_external_data(file: Path, model: onnx.ModelProto) -> None:
    """Add the weights in files beside an ONNX file to its graph.

    Raises:
        ModelError: a file is missing, damaged, or outside the folder.
    """
    from onnx.external_data_helper import load_external_data_for_model

    files_of(file, model)  # which checks their places
    try:
        load_external_data_for_model(model, str(file.parent))
    except Exception as error:  # onnx's own
        raise ModelError(
            f"{file} is damaged, or does not belong to the weights beside it: {printable(error)}."
            " Copy both again."
        ) from error


def _build(source: Source, folder: Path) -> Checked:
    """Wrap a file into a bundle folder, which may be left unfinished, and run it once."""
    file, model = source.file, source.model
    load_external_data(file, model)
    plan = examine(file, model, source.read)
    own = _own_labels(file.name, model) or plan.head.labels
    assemble(model, plan)
    made = bundles.write(folder, _bundle_card(plan, source), model)
    findings = judge(plan, run_twice(made, plan))
    outputs = (["logits"] if findings.classes else []) + (
        ["embedding"] if findings.features else []
    )
    labels = _labels(plan, findings.classes, own)
    read = plan.read
    if labels and read.card.labels is None:
        read = read.with_values({"labels": labels}, "the classes' numbers; no labels were given")
    final = replace(made.card, labels=labels, outputs=tuple(outputs))
    files.write_whole(folder / bundles.CARD, serialization.encode(final))
    lines = (*read.lines(), *plan.lines, *_found(plan, findings), *findings.notes)
    return Checked(Bundle(folder, final), lines)


def _bundle_card(plan: Plan, source: Source) -> Card:
    card, file = plan.card, plan.file
    mean, std = normalisation(card)
    outputs = ("logits", "embedding") if plan.features else ("logits",)
    return Card(
        name=card.name or file.stem,
        architecture=source.architecture,
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
            **source.origin,
            "wrapped": source.key,
        },
        scores=plan.bundle_scores,
        # An IPU's host normalises byte by byte, which makes no grey.
        normalised=None if plan.takes_bytes or plan.channels == 1 else "normalised",
        outputs=outputs if plan.head.tensor else ("embedding",),
    )


def _own_labels(name: str, model: onnx.ModelProto) -> tuple[str, ...] | None:
    """Return the labels that a file names itself, if they can be read."""
    try:
        labels = read_metadata(name, model).card.labels
    except (ModelError, UsageError):
        return None
    return labels if isinstance(labels, tuple) else None


def _found(plan: Plan, findings: Findings) -> tuple[str, ...]:
    """Return what the check run found, for people."""
    lines = []
    if findings.classes:
        second = "; the score is the probability of the second" if plan.two_classes else ""
        lines.append(
            f"{plan.head.tensor}: {plan.scores}, {counted(findings.classes, 'class')}{second}"
        )
    if findings.features and plan.features:
        lines.append(f"embedding: {plan.features.tensor}, {findings.features:,} features")
    else:
        lines.append("embedding: none found; name its tensor with --embedding if you want one")
    if plan.batch is not None:
        size = "one image at a time" if plan.batch == 1 else f"batches of {plan.batch}"
        lines.append(f"exported for {size}; it now takes any number (checked)")
    return tuple(lines)


def _labels(plan: Plan, classes: int, own: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return a label per class. Raises: ClassCountError.

    Args:
        plan: has the labels that were given, or were found.
        classes: of the model.
        own: labels that the file names itself.
    """
    labels = plan.card.labels
    if labels is None:
        return tuple(str(number) for number in range(classes))
    if len(labels) != classes:
        origin = plan.read.origins.get("labels", "its card")
        name = printable(plan.file.name)
        raise ClassCountError(mistaken.label_count(origin, labels, name, classes, own))
    return tuple(labels)
