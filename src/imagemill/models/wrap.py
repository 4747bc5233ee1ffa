"""Foreign ONNX files: any classifier, wrapped to what every bundle is.

    file.onnx + file.card.json ─► read, checked ─► pixels → [BGR] → float → [NCHW] → − mean → ÷ deviation → the foreign graph
                                                   → `logits` (n, classes), `embedding` (n, features) ─► run once ─► bundle

The card is JSON, written by hand or by `imagemill wrap`; what it does not say has its default (`OnnxCard`). The foreign graph's tensors
keep their names behind a prefix; opset and IR version are kept. A batch that was fixed when the file was exported is opened, and the
check run tells whether the graph bears it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill import layout
from imagemill.errors import ClassCountError, ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import quantize
from imagemill.records import Bundle, Card, Interpolation, Recipe, Scores

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]

CARD_SUFFIX: Final = ".card.json"
_WRAPPER: Final = 1
"""Rises when the wrapping changes, so that bundles of an older one are built anew."""
_PREFIX: Final = "onnx/"
_OURS: Final = "imagemill/"
_OLDEST_OPSET: Final = 7
"""The first whose arithmetic broadcasts as NumPy does."""
_DOMAINS: Final = ("", "ai.onnx")
_CROPPED: Final = 0.875
"""Share of the resized short side that the crop keeps where the card does not say it: 224 of 256."""
_TOLERANCE: Final = 1e-3
"""Between a picture's scores beside one neighbour and beside another, as a share of the largest score."""
_PASSED: Final = ("Softmax", "Sigmoid", "LogSoftmax", "Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")
"""Operators that may stand between the classifier's last layer and the scores, besides arithmetic with a constant."""
_RESHAPING: Final = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ARITHMETIC: Final = ("Add", "Sub", "Mul", "Div")


class Layout(StrEnum):
    """Order of the model's input dimensions."""

    NCHW = "NCHW"
    NHWC = "NHWC"


class Color(StrEnum):
    """Order of the model's colour channels."""

    RGB = "RGB"
    BGR = "BGR"


class Crop(StrEnum):
    """What of the resized picture the model sees."""

    CENTER = "center"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class OnnxCard:
    """`file.card.json`: what a foreign ONNX file does not say itself. Every key may be left out; None means the default told here."""

    name: str | None = None
    """As results name the model; default: the file's name without `.onnx`."""
    size: int | None = None
    """Height and width of the input, pixels; needed only where the file leaves them open."""
    resize: int | str | None = None
    """Length of the short side after resizing; or `WxH`, squashed; or `none`. Default: size / 0.875, and size × size where crop is none."""
    crop: Crop = Crop.CENTER
    interpolation: Interpolation = Interpolation.BILINEAR
    exif: bool = True
    """Whether pictures are turned as their EXIF orientation says."""
    layout: Layout | None = None
    """Default: as the file's input shape shows it; needed where it does not."""
    color: Color = Color.RGB
    scale: int | None = None
    """1: pixels are divided by 255, and mean and std are on the scale 0 to 1 (the default); 255: they are not."""
    mean: tuple[float, float, float] | None = None
    """Of red, green and blue, in this order whatever `color` says; default: 0 0 0."""
    std: tuple[float, float, float] | None = None
    """As `mean`; default: 1 1 1."""
    scores: Scores = Scores.LOGITS
    """`logits`: a softmax is still to come; `softmax`: they are probabilities already; `sigmoid`: each class has one of its own, which is
    applied unless the graph ends in it."""
    labels: tuple[str, ...] | str | None = None
    """One per class, or the name of a text file beside the card with one a line; default: the classes' numbers."""
    logits: str | None = None
    """Name of the output with the scores; needed where several could be meant."""
    embedding: str | None = None
    """Name of the tensor with the features; default: what the last matrix or 1×1 convolution reads, where that is plain."""
    licence: str = "unknown"


@dataclass(frozen=True, slots=True)
class Checked:
    """A foreign file that was wrapped, run and found sound."""

    bundle: Bundle
    card: OnnxCard
    """With everything that was left open filled in."""
    lines: tuple[str, ...]
    """What was found, for people."""


# ── cards ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_file(file: Path) -> Path:
    """Where the card of an ONNX file is looked for."""
    return file.with_suffix(CARD_SUFFIX)


def read_card(path: Path) -> OnnxCard:
    """Read a card, and the labels that it names.

    Raises:
        ModelError: it cannot be read, is no JSON object, or a key is unknown or has a value that it cannot have; names it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{path} cannot be read: {reason}. Mend it, or make it with `imagemill wrap`.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object. Mend it, or make it with `imagemill wrap`.")
    known = [field.name for field in fields(OnnxCard)]
    if unknown := [key for key in values if key not in known]:
        raise ModelError(f"{path} has the unknown key {unknown[0]!r}. Known: {', '.join(known)}.")
    try:
        card = OnnxCard(**{name: _value(name, value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}. Mend it, or make it with `imagemill wrap`.") from error
    if isinstance(card.labels, str):
        card = replace(card, labels=bundles.read_labels(path.parent / card.labels))
    return card


def card_text(card: OnnxCard) -> str:
    """Spell a card as its file holds it, keys at their default included."""
    return json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"


_CHOICES: Final[Mapping[str, type[StrEnum]]] = {
    "crop": Crop,
    "interpolation": Interpolation,
    "layout": Layout,
    "color": Color,
    "scores": Scores,
}


def _value(name: str, value: Any) -> Any:
    """One value of a card as OnnxCard holds it. Raises: ValueError, naming the key, the value and what could stand there."""
    if value is None and getattr(OnnxCard(), name) is None:
        return None
    if (kind := _CHOICES.get(name)) is not None:
        if value not in list(kind):
            raise ValueError(f"{name} is {value!r}; known: {', '.join(kind)}")
        return kind(value)
    numbers = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
    good, wanted = {
        "size": (type(value) is int and value > 0, "a number of pixels"),
        "resize": (
            (type(value) is int and value > 0) or (isinstance(value, str) and (value == "none" or _squashed(value) is not None)),
            'a number of pixels, a text such as "224x224" (width, height), or "none"',
        ),
        "exif": (type(value) is bool, "true or false"),
        "scale": (value in (1, 255) and type(value) is int, "1 or 255"),
        "mean": (numbers and len(value) == 3 and bool(np.isfinite(value).all()), "three numbers: red, green, blue"),
        "std": (numbers and len(value) == 3 and all(0 < item < float("inf") for item in value), "three numbers above 0: red, green, blue"),
        "labels": (
            isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)),
            "a list of texts, or a file's name",
        ),
    }.get(name, (isinstance(value, str) and value != "", "a text"))
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return tuple(value) if isinstance(value, list) else value


def _squashed(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return (int(found[1]), int(found[2])) if found else None


def changed(card: OnnxCard, given: Mapping[str, Any]) -> OnnxCard:
    """A card with what the command line says. Raises: UsageError."""
    try:
        return replace(card, **{name: _value(name, value) for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UsageError(f"--{error}.") from error


# ── from file to bundle ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def wrap(file: Path, given: Mapping[str, Any], output: Path | None = None) -> tuple[Path, Checked]:
    """Check a foreign file by wrapping and running it, and write its card, or a bundle that can be carried anywhere.

    Args:
        file: ONNX.
        given: fields of OnnxCard by name, None where unsaid: then they are those of the card beside the file, if there is one. `labels`
            is a file's path.
        output: a folder for a bundle; None writes the card beside the file.

    Returns:
        what was written, and what was found.

    Raises:
        UsageError: a value that makes no sense, or does not fit the file. ClassCountError: the labels do not. ModelError: the file is
        not a classifier that can be wrapped, or nothing can be written.
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
    layout.write_whole(beside, card_text(checked.card).encode())
    return beside, checked


def bundle_for(file: Path, models_dir: Path, say: Say) -> Bundle:
    """The wrapped bundle of a foreign file, built in the models folder unless it is there.

    Its folder is named by the file and a hash over file and card, so that whatever changes is built anew.

    Raises:
        UsageError: there is no such file, or no card beside it. ModelError: see `wrap`.
    """
    beside = card_file(file)
    if not file.is_file():
        raise UsageError(f"--model {file}: there is no such file.")
    if not beside.is_file():
        raise UsageError(
            f"--model {file} has no card beside it, which says how pictures are prepared: {beside.name} is not there. "
            f"Make one: `imagemill wrap {file}`, see its --help; or write it by hand (docs/models.md)."
        )
    bundles.check_external_data(file)
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


def _build_whole(file: Path, card: OnnxCard, folder: Path, labels_file: str | None, key: str | None = None) -> Checked:
    """As `_build`, but the folder appears whole."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        checked = _build(file, card, making, labels_file, key)
        making.rename(folder)
    except OSError as error:
        if not bundles.is_bundle(folder):  # another process may have made it meanwhile
            raise ModelError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return checked


def _key(file: Path, card: OnnxCard) -> str:
    """Hash of what decides the bundle: the file, the weights beside it, the card."""
    graph = _parsed(file).graph
    held = [attribute.t for node in _all_nodes(graph) for attribute in node.attribute if attribute.HasField("t")]
    names = {entry.value for tensor in (*graph.initializer, *held) for entry in tensor.external_data if entry.key == "location"}
    sums = [bundles.sha256(file), *(bundles.sha256(file.parent / name) for name in sorted(names))]
    return hashlib.sha256(json.dumps([_WRAPPER, *sums, asdict(card), file.stem]).encode()).hexdigest()


def _parsed(file: Path) -> onnx.ModelProto:
    """The file's graph, without weights that lie beside it. Raises: ModelError."""
    import onnx

    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ModelError(f"{file} is damaged or not ONNX: {error}. Export it again.") from error


def _build(file: Path, card: OnnxCard, folder: Path, labels_file: str | None, key: str | None = None) -> Checked:
    """Wrap a file into a bundle folder and run it once. `labels_file` names the labels in an error."""
    bundles.check_external_data(file)
    key = key or _key(file, card)
    model = _parsed(file)
    import onnx

    onnx.external_data_helper.load_external_data_for_model(model, str(file.parent))
    plan = _examine(file, model, card)
    _assemble(model, plan)
    made = bundles.write(folder, _bundle_card(plan, key), model)
    del model
    answers = _run(made, plan)
    classes, has_embedding, notes = _judge(plan, answers)
    labels = _labels(plan, classes, labels_file)
    outputs = ("logits", "embedding") if has_embedding else ("logits",)
    final = replace(made.card, labels=labels, outputs=outputs)
    layout.write_whole(folder / bundles.CARD, bundles.card_json(final).encode())
    told = replace(plan.card, logits=card.logits)  # what was found by itself stays open, for the next export of the file
    size = answers[0]["embedding"].shape[1] if has_embedding else 0
    return Checked(Bundle(folder, final), told, (*plan.lines, *_found(plan, classes, size), *notes))


def _bundle_card(plan: _Plan, key: str) -> Card:
    card, file = plan.card, plan.file
    mean, std = plan.normalisation
    # The scores of a graph that ends in a sigmoid are probabilities already, to be taken as they are.
    scores = Scores.SOFTMAX if card.scores is Scores.SIGMOID and plan.ends_in == "Sigmoid" else card.scores
    return Card(
        name=card.name or file.stem,
        architecture="onnx",
        labels=(),
        recipe=plan.recipe,
        mean=mean,
        std=std,
        sha256="",
        licence=card.licence,
        origin={"source": "onnx", "file": str(file.absolute()), "sha256": bundles.sha256(file), "verified": False, "wrapped": key},
        scores=scores,
        normalised=None if plan.takes_bytes else "normalised",
        outputs=("logits", "embedding") if plan.features else ("logits",),
    )


# ── looking at the foreign graph ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Features:
    """Where the embedding is."""

    tensor: str
    classes: int | None
    """Rows of the layer that reads it; None where not known."""
    features: int | None
    """Its length; None where not known."""
    asked: bool
    """Named by the card, not found."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a file is going to be wrapped."""

    file: Path
    card: OnnxCard
    recipe: Recipe
    input: str
    type: int
    """ONNX's number of the input's element type."""
    batch: int | None
    """To which the file's batch is fixed; None: it is open."""
    logits: str
    classes: int | None
    """As the file declares them; None: it leaves them open."""
    ends_in: str | None
    """`Softmax` or `Sigmoid` where that makes the scores."""
    features: _Features | None
    lines: tuple[str, ...] = ()

    @property
    def takes_bytes(self) -> bool:
        """Whether the graph normalises by itself."""
        return self.type == _types()["uint8"]

    @property
    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation, RGB, on the scale 0 to 255."""
        factor = 255.0 if self.card.scale == 1 else 1.0
        (a, b, c), (d, e, f) = self.card.mean or (0.0, 0.0, 0.0), self.card.std or (1.0, 1.0, 1.0)
        return (a * factor, b * factor, c * factor), (d * factor, e * factor, f * factor)


def _types() -> dict[str, int]:
    from onnx import TensorProto

    return {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def _examine(file: Path, model: onnx.ModelProto, card: OnnxCard) -> _Plan:
    """Compare a file with its card. Raises: UsageError, ModelError."""
    name = file.name
    opset = max((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), default=0)
    if opset < _OLDEST_OPSET:
        raise ModelError(
            f"{name} has opset {opset}, {_OLDEST_OPSET} is the oldest that can be wrapped. Convert it: onnx.version_converter."
        )
    for node in _all_nodes(model.graph):
        if node.domain not in _DOMAINS:
            raise ModelError(
                f"{name} uses the operator {node.domain}::{node.op_type}, which is not ONNX's own. Export it with standard operators only."
            )
    if model.functions:
        raise ModelError(f"{name} defines functions of its own ({model.functions[0].name}). Inline them first (onnx.inliner).")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ModelError(f"{name} has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}); a picture fills one.")
    entry = inputs[0]
    kind = entry.type.tensor_type.elem_type
    dims = _dims(entry)
    shown = _shown(dims)
    if kind not in _types().values():
        from onnx import TensorProto

        raise ModelError(f"{name} takes {TensorProto.DataType.Name(kind).lower()}; float32, float16 and uint8 can be fed.")
    if dims is None or len(dims) != 4:
        raise ModelError(f"{name} takes an input of shape {shown}; a batch of pictures has four dimensions.")
    card = _filled(file, card, dims, kind)
    recipe = _recipe(card)
    logits, classes = _scores(name, model.graph, card.logits)
    producers = {output: node for node in model.graph.node for output in node.output if output}
    ends_in = _ending(producers, logits)
    if card.scores is Scores.LOGITS and ends_in is not None:
        said = "softmax" if ends_in == "Softmax" else "sigmoid"
        raise UsageError(f"{name} ends in a {ends_in}, so its scores are probabilities already, not logits. Add --scores {said}.")
    features = _features(name, model.graph, producers, logits, card.embedding)
    batch = dims[0] if isinstance(dims[0], int) else None
    card = replace(card, name=card.name or file.stem, logits=logits)
    return _Plan(file, card, recipe, entry.name, kind, batch, logits, classes, ends_in, features, _told(card, recipe, kind, shown))


def _told(card: OnnxCard, recipe: Recipe, kind: int, shown: str) -> tuple[str, ...]:
    from onnx import TensorProto

    how = "not resized"
    if isinstance(recipe.resize, tuple):
        how = f"squashed to {recipe.resize[0]}×{recipe.resize[1]}"
    elif recipe.resize is not None:
        how = f"short side resized to {recipe.resize}"
    how += f" ({recipe.interpolation})" if recipe.resize is not None else ""
    if card.mean is None or card.std is None:
        values = "0 to 255 as they are"
    else:
        most = 1.0 if card.scale == 1 else 255.0
        ends = [((0.0 - m) / s, (most - m) / s) for m, s in zip(card.mean, card.std, strict=True)]
        values = ", ".join(f"{channel} {low:.4g} to {high:.4g}" for channel, (low, high) in zip("RGB", ends, strict=True))
    return (
        f"input {TensorProto.DataType.Name(kind).lower()} {shown}, {card.layout}, {card.color}",
        f"pictures: {how}, the central {recipe.size}×{recipe.size} cut out; values fed: {values}",
    )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _all_nodes(inner)


def _dims(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """Dimensions, open ones as a text; None where no shape is declared."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or "?" for dim in tensor.shape.dim]


def _shown(dims: list[int | str] | None) -> str:
    return "unknown" if dims is None else f"({', '.join(map(str, dims))})"


def _filled(file: Path, card: OnnxCard, dims: list[int | str], kind: int) -> OnnxCard:
    """The card with layout, size and scale filled in. Raises: UsageError where it contradicts the file, or the file does not say."""
    name, shown = file.name, _shown(dims)
    fitting = [item for item, place in ((Layout.NCHW, 1), (Layout.NHWC, 3)) if dims[place] == 3 or not isinstance(dims[place], int)]
    if card.layout is not None and card.layout not in fitting:
        raise UsageError(f"{name} takes {shown}, which is not {card.layout} with 3 channels. Give another --layout.")
    if card.layout is None:
        sure = [item for item, place in ((Layout.NCHW, 1), (Layout.NHWC, 3)) if dims[place] == 3]
        if not fitting:
            raise ModelError(f"{name} takes {shown}: neither the second nor the last dimension is 3, for red, green and blue.")
        if len(sure) != 1:
            raise UsageError(f"{name} takes {shown}, which does not show where the channels are. Add --layout NCHW or --layout NHWC.")
        card = replace(card, layout=sure[0])
    height, width = dims[2:] if card.layout is Layout.NCHW else dims[1:3]
    sides = {side for side in (height, width) if isinstance(side, int)}
    if len(sides) > 1:
        raise ModelError(f"{name} takes pictures of {width}×{height}; only square ones can be fed.")
    size = card.size or next(iter(sides), None)
    if size is None:
        raise UsageError(f"{name} takes {shown}, pictures of any size. Add --size N, the one it was trained with.")
    if sides and size not in sides:
        raise UsageError(f"{name} takes pictures of {width}×{height}, --size {size} is asked for. Leave it out.")
    if kind == _types()["uint8"]:
        if card.mean is not None or card.std is not None or card.scale == 1:
            raise UsageError(f"{name} takes uint8, so it normalises by itself. Leave --mean, --std and --scale 1 out.")
        return replace(card, size=size, scale=255)
    card = replace(card, size=size, scale=card.scale or 1, mean=card.mean or (0.0, 0.0, 0.0), std=card.std or (1.0, 1.0, 1.0))
    for flag, values in (("--mean", card.mean), ("--std", card.std)):
        if card.scale == 1 and max(map(abs, values or ())) > 1:
            raise UsageError(
                f"{flag} {' '.join(f'{value:g}' for value in values or ())} is on the scale 0 to 255, --scale is 1: pixels from 0 to 1. "
                "Add --scale 255."
            )
    return card


def _recipe(card: OnnxCard) -> Recipe:
    size = card.size
    assert size is not None
    resize: int | tuple[int, int] | None
    if card.crop is Crop.NONE:
        resize = (size, size)
        if card.resize not in (None, f"{size}x{size}"):
            raise UsageError(
                f"--crop none with --resize {card.resize}: without a crop every picture must come out as {size}x{size}, which is what the "
                "model takes. Leave --resize out, or the crop in."
            )
    elif card.resize is None:
        resize = round(size / _CROPPED)
    elif isinstance(card.resize, int):
        resize = card.resize
    else:
        resize = None if card.resize == "none" else _squashed(card.resize)
    return Recipe(size=size, resize=resize, interpolation=card.interpolation, exif=card.exif)


def _scores(name: str, graph: onnx.GraphProto, asked: str | None) -> tuple[str, int | None]:
    """Pick the output that holds the scores: (n, classes), or with further dimensions of 1."""

    def classes(dims: list[int | str] | None) -> tuple[bool, int | None]:
        if dims is None or len(dims) < 2:
            return False, None
        rest = [dim for dim in dims[1:] if dim != 1]
        if not rest or (len(dims) == 2 and len(rest) == 1):
            known = rest[0] if rest else 1
            return True, known if isinstance(known, int) else None
        return len(rest) == 1 and isinstance(rest[0], int), rest[0] if isinstance(rest[0], int) else None

    listed = ", ".join(f"{value.name} {_shown(_dims(value))}" for value in graph.output)
    if asked is not None:
        value = next((value for value in graph.output if value.name == asked), None)
        if value is None:
            raise UsageError(f"--logits {asked}: {name} has no such output. It has {listed}.")
        dims = _dims(value)
        fits, count = classes(dims)
        if not fits and dims is not None and all(isinstance(dim, int) for dim in dims[1:]):
            raise UsageError(f"--logits {asked} has the shape {_shown(dims)}; scores are (n, classes).")
        return asked, count
    fitting = [(value.name, classes(_dims(value))[1]) for value in graph.output if classes(_dims(value))[0]]
    if len(fitting) != 1:
        which = "none of its outputs has" if not fitting else f"{len(fitting)} of its outputs have"
        raise UsageError(f"{name}: {which} the shape of scores, (n, classes): {listed}. Name the right one with --logits TENSOR.")
    return fitting[0]


def _ending(producers: Mapping[str, onnx.NodeProto], tensor: str) -> str | None:
    """`Softmax` or `Sigmoid` where the scores come from one, reshaped at most."""
    while (node := producers.get(tensor)) is not None:
        if node.op_type in ("Softmax", "Sigmoid"):
            return str(node.op_type)
        if node.op_type not in _RESHAPING:
            return None
        tensor = node.input[0]
    return None


def _features(
    name: str, graph: onnx.GraphProto, producers: Mapping[str, onnx.NodeProto], logits: str, asked: str | None
) -> _Features | None:
    """Find the embedding: what the last Gemm, MatMul or 1×1 convolution before the scores reads."""
    if asked is not None:
        if asked not in producers:
            raise UsageError(f"--embedding {asked}: {name} computes no tensor of that name.")
        return _Features(asked, None, None, asked=True)
    constants, shapes = _constants(graph)
    tensor = logits
    while (node := producers.get(tensor)) is not None:
        moving = [item for item in node.input if item and item not in constants]
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            shape = shapes.get(node.input[1])
            if len(moving) != 1 or moving[0] != node.input[0]:
                return None
            attributes = {attribute.name: attribute for attribute in node.attribute}
            if node.op_type == "Conv":
                if shape is None or any(side != 1 for side in shape[2:]) or ("group" in attributes and attributes["group"].i != 1):
                    return None
                return _Features(moving[0], shape[0], shape[1], asked=False)
            if shape is None or len(shape) != 2:
                return _Features(moving[0], None, None, asked=False)
            turned = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
            rows, columns = (shape[0], shape[1]) if turned else (shape[1], shape[0])
            return _Features(moving[0], rows, columns, asked=False)
        if len(moving) != 1 or node.op_type not in (*_PASSED, *_ARITHMETIC):
            return None
        tensor = moving[0]
    return None


def _constants(graph: onnx.GraphProto) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Names of the tensors that do not depend on the input, and the shapes of those whose shape is plain to see."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = set(shapes)
    for node in graph.node:
        if node.op_type == "Constant":
            constants.add(node.output[0])
            shapes.update((node.output[0], tuple(attribute.t.dims)) for attribute in node.attribute if attribute.name == "value")
        elif node.input and all(item in constants for item in node.input if item):
            constants.update(node.output)
            if node.op_type in ("Identity", "Cast") and node.input[0] in shapes:
                shapes[node.output[0]] = shapes[node.input[0]]
    return constants, shapes


# ── assembling ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _assemble(model: onnx.ModelProto, plan: _Plan) -> None:
    """Turn the foreign model into the wrapped one, in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph, card = model.graph, plan.card
    if plan.batch is not None:
        _open_batch(graph, plan.batch)
    _rename(graph)
    for place, tensor in enumerate(graph.initializer):
        if not tensor.raw_data and tensor.data_type != TensorProto.STRING:  # as bundle.write counts and moves them
            graph.initializer[place].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    before: list[onnx.NodeProto] = []
    at = "pixels"

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        before.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def weight(name: str, array: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(array, _OURS + name))
        return _OURS + name

    goal = _PREFIX + plan.input
    steps: list[tuple[str, list[str], str, dict[str, object]]] = []
    if card.color is Color.BGR:
        steps.append(("Gather", [weight("bgr", np.array([2, 1, 0], np.int64))], _OURS + "reordered", {"axis": 3}))
    if not plan.takes_bytes:
        steps.append(("Cast", [], _OURS + "floats", {"to": TensorProto.FLOAT}))
    if card.layout is Layout.NCHW:
        steps.append(("Transpose", [], _OURS + "planes", {"perm": [0, 3, 1, 2]}))
    if not plan.takes_bytes:
        order = [2, 1, 0] if card.color is Color.BGR else [0, 1, 2]
        shape = (1, 3, 1, 1) if card.layout is Layout.NCHW else (1, 1, 1, 3)
        mean, std = (np.array([values[place] for place in order], np.float32).reshape(shape) for values in plan.normalisation)
        steps.append(("Sub", [weight("mean", mean)], _OURS + "centred", {}))
        steps.append(("Div", [weight("std", std)], "normalised", {}))
    for kind, constants, output, attributes in steps:
        at = node(kind, [at, *constants], output, **attributes)
    node("Cast", [at], goal, to=plan.type)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *nodes])
    wanted: list[tuple[str, str, int | str]] = [("logits", plan.logits, plan.classes or "classes")]
    if plan.features is not None:
        wanted.append(("embedding", plan.features.tensor, plan.features.features or "features"))
    for output, tensor, _ in wanted:
        graph.node.append(helper.make_node("Flatten", [_PREFIX + tensor], [_OURS + output], name=_OURS + output, axis=1))
        graph.node.append(helper.make_node("Cast", [_OURS + output], [output], name=output, to=TensorProto.FLOAT))
    kept = [tensor for tensor in graph.input if tensor.name != goal]
    for field in (graph.input, graph.output, graph.value_info, graph.quantization_annotation):
        del field[:]
    size = card.size
    graph.input.extend([helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", size, size, 3]), *kept])
    graph.output.extend(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", count]) for output, _, count in wanted)
    others = [entry for entry in model.metadata_props if entry.key != bundles.DATA_SHA256]
    del model.metadata_props[:]
    model.metadata_props.extend(others)


def _rename(graph: onnx.GraphProto) -> None:
    """Put the prefix before every tensor's name, those of inner graphs included, so that none clashes with ours."""

    def prefixed(names: Any) -> list[str]:
        return [_PREFIX + name if name else name for name in names]

    for node in graph.node:
        for field in (node.input, node.output):
            names = prefixed(field)
            del field[:]
            field.extend(names)
        node.name = _PREFIX + node.name if node.name else node.name
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                _rename(inner)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = _PREFIX + value.name
    for sparse in graph.sparse_initializer:
        sparse.values.name = _PREFIX + sparse.values.name


def _open_batch(graph: onnx.GraphProto, batch: int) -> None:
    """Let reshapes to a fixed batch keep whatever batch comes; whether that was all, the check run tells."""
    from onnx import numpy_helper

    constants, _ = _constants(graph)
    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            held = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            known.update(zip(node.output, held, strict=False))
    for number, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[1] not in known or node.input[0] in constants:
            continue
        shape = numpy_helper.to_array(known[node.input[1]]).copy()
        if len(shape) > 1 and shape[0] == batch and 0 not in shape:
            shape[0] = 0  # as the input has it
            for place, attribute in reversed(list(enumerate(node.attribute))):
                if attribute.name == "allowzero":
                    del node.attribute[place]
            graph.initializer.append(numpy_helper.from_array(shape, f"{_OURS}opened{number}"))
            node.input[1] = f"{_OURS}opened{number}"


# ── the check run ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(made: Bundle, plan: _Plan) -> list[dict[str, NDArray[np.float32]]]:
    """Answers to two made-up pictures, and to the second of them twice. Raises: ModelError."""
    size = plan.recipe.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    pixels[1] //= 2
    try:
        return quantize.answers(made.dir / bundles.MODEL, [pixels, pixels[[1, 1]]])
    except Exception as error:  # OpenVINO's front end has kinds of its own
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        if plan.batch is None:
            raise ModelError(f"{plan.file.name} cannot be run on a batch of 2: {reason}. Export it again, with an open batch.") from error
        raise ModelError(
            f"{plan.file.name} was exported for batches of {plan.batch} and does not bear others: {reason}. Export it with an open batch: "
            "dynamic_axes or dynamic_shapes of torch.onnx.export."
        ) from error


def _judge(plan: _Plan, answers: list[dict[str, NDArray[np.float32]]]) -> tuple[int, bool, tuple[str, ...]]:
    """Number of classes, whether there is an embedding, and notes. Raises: ModelError, UsageError."""
    name, scores = plan.file.name, answers[0]["logits"]
    if scores.shape[0] != 2 or (plan.classes is not None and scores.shape[1] != plan.classes):
        raise ModelError(f"{name}: {plan.logits} has the shape {scores.shape} for 2 pictures; scores are (n, {plan.classes or 'classes'}).")
    for output, values in ((output, values) for answer in answers for output, values in answer.items()):
        if not np.isfinite(values).all():
            raise ModelError(f"{name} returns NaN or infinity ({output}) for a made-up picture. Check --mean, --std and --scale.")
    again = answers[1]["logits"]
    slack = _TOLERANCE * max(1e-6, float(np.abs(scores).max()))
    if max(float(np.abs(again[0] - scores[1]).max()), float(np.abs(again[1] - scores[1]).max())) > slack:
        raise ModelError(
            f"{name} answers differently to one picture beside different neighbours, so its answers could not be relied on. Export it in "
            "evaluation mode, with an open batch."
        )
    within = bool((scores >= 0).all() and (scores <= 1 + _TOLERANCE).all())
    if plan.card.scores is Scores.SOFTMAX and not within:
        raise UsageError(f"{name} returns scores from {scores.min():.4g} to {scores.max():.4g}, no probabilities. Leave --scores out.")
    notes = []
    if within and plan.ends_in is None and plan.card.scores is not Scores.SOFTMAX:
        notes.append("note: scores lie between 0 and 1; if they are probabilities already, --scores softmax says so")
    has_embedding = plan.features is not None
    if plan.features is not None and not plan.features.asked:
        features = plan.features
        plain = features.classes in (None, scores.shape[1]) and features.features in (None, answers[0]["embedding"].shape[1])
        has_embedding = plain and answers[0]["embedding"].shape[0] == len(scores)
    return scores.shape[1], has_embedding, tuple(notes)


def _found(plan: _Plan, classes: int, features: int) -> tuple[str, ...]:
    lines = [f"{plan.logits}: {plan.card.scores}, {classes:,} classes"]
    if features and plan.features:
        lines.append(f"embedding: {plan.features.tensor}, {features:,} features")
    else:
        lines.append("embedding: none found; name its tensor with --embedding if you want one")
    if plan.batch is not None:
        lines.append(f"its batch was fixed to {plan.batch} and is open now")
    return tuple(lines)


def _labels(plan: _Plan, classes: int, file: str | None) -> tuple[str, ...]:
    labels = plan.card.labels
    if labels is None:
        return tuple(str(number) for number in range(classes))
    if len(labels) != classes:
        where = f"{file} has {len(labels)} lines" if file else f"its card has {len(labels)} labels"
        raise ClassCountError(f"{plan.file.name} returns {classes} classes, {where}. Give the {classes}-line file with --labels.")
    return tuple(labels)
