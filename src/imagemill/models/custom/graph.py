"""Compare a custom graph with its card: `examine` makes the plan by which `assemble` wraps it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from imagemill.errors import ModelError, UsageError, printable
from imagemill.models.card import Layout, ModelCard, ReadCard, as_size, dimensions
from imagemill.models.custom.outputs import (
    Dims,
    Features,
    Head,
    Tokens,
    all_nodes,
    dims,
    find_features,
    find_head,
    format_dims,
    inner_graphs,
    live_nodes,
)
from imagemill.models.labels import check_labels
from imagemill.models.preprocessing import with_normalisation, with_recipe
from imagemill.records import Recipe, Scores
from imagemill.system.openvino_library import new_core

if TYPE_CHECKING:
    import onnx

STANDARD_DOMAINS: Final = ("", "ai.onnx")
UINT8: Final = 2
"""ONNX's number of the element type."""
_FED: Final = (1, 10, UINT8)
"""The element types that an input may have: float32, float16 and uint8."""
_OLDEST_OPSET: Final = 7
"""The first whose arithmetic broadcasts as NumPy does."""
_MAX_AREA: Final = 2**24
"""Pixels of an input. A larger one could not be tried in the memory of an ordinary machine."""
_SURE: Final = "shape of the input"


class Plan(Struct, frozen=True):
    """How a file is going to be wrapped."""

    file: Path
    read: ReadCard
    """With everything that was left open filled in."""
    recipe: Recipe
    input: str
    type: int
    """ONNX's number of the input's element type."""
    channels: int
    """3, or 1: the graph gets grey images."""
    batch: int | None
    """To which the file's batch is fixed; None: it is open."""
    head: Head
    scores: Scores
    """As the card says, else as the graph ends."""
    two_classes: bool
    """The one score is the second of two classes."""
    features: Features | None
    lines: tuple[str, ...] = ()
    """What was found, for people."""

    @property
    def card(self) -> ModelCard:
        """The card, with everything that was left open filled in."""
        return self.read.card

    @property
    def bundle_scores(self) -> Scores:
        """What is left to do with the scores of the wrapped graph. Probabilities are taken as they
        are, which the card of a bundle calls `softmax`.
        """
        if self.scores is not Scores.SIGMOID:
            return Scores.SOFTMAX if self.two_classes else self.scores
        if self.head.ends_in == "Sigmoid":
            return Scores.SOFTMAX
        return Scores.LOGITS if self.two_classes else Scores.SIGMOID

    @property
    def takes_bytes(self) -> bool:
        """Whether the graph normalises by itself."""
        return self.type == UINT8


def image_input(name: str, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return the one input of a graph, whose shape has four dimensions.

    Raises:
        ModelError: there is none or are several, or it cannot be an image.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        listed = ", ".join(printable(value.name, 40) for value in inputs[:10])
        raise ModelError(f"{name} has {len(inputs)} inputs ({listed}); an image fills one.")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in _FED:
        from onnx import TensorProto

        kinds = {number: word.lower() for word, number in TensorProto.DataType.items()}
        raise ModelError(
            f"{name} takes {kinds.get(kind, kind)}; float32, float16 and uint8 can be fed."
        )
    shape = dims(inputs[0])
    if shape is None or len(shape) != 4:
        raise ModelError(
            f"{name} takes an input of shape {format_dims(shape)}; a batch of images has four"
            " dimensions."
        )
    return inputs[0]


def examine(file: Path, model: onnx.ModelProto, read: ReadCard) -> Plan:
    """Compare a file with its card.

    Raises:
        UsageError: the card contradicts the file, or leaves out what the file does not say.
        ModelError: the file is no classifier that can be wrapped.
    """
    name = file.name
    opset = max(
        (entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS),
        default=0,
    )
    if opset < _OLDEST_OPSET:
        raise ModelError(
            f"{name} has opset {opset}, {_OLDEST_OPSET} is the oldest that can be wrapped. Convert"
            " it: onnx.version_converter."
        )
    if model.functions:
        raise ModelError(
            f"{name} defines functions of its own ({printable(model.functions[0].name)}). Inline"
            " them first (onnx.inliner)."
        )
    entry = image_input(name, model)
    shape = dims(entry)
    assert shape is not None
    takes_bytes = entry.type.tensor_type.elem_type == UINT8
    read, channels = _with_layout(name, read, shape)
    read = _with_size(name, read, shape)
    read = with_normalisation(name, read, channels, takes_bytes=takes_bytes)
    read, recipe = with_recipe(read)
    batch = shape[0] if isinstance(shape[0], int) else None
    head = find_head(name, model.graph, read.card.logits, read.origin("logits"))
    read, scores, two_classes = _with_scores(name, read, head)
    asked = read.card.embedding
    features = find_features(name, model.graph, head, asked, read.origin("embedding"))
    if features is not None and features.tokens is not None:
        images, sides = batch or 1, (recipe.height, recipe.width)
        nchw = read.card.layout is Layout.NCHW
        fed = (images, channels, *sides) if nchw else (images, *sides, channels)
        tokens = _tokens(file, entry.name, fed, sides, features.tensor)
        features = replace(features, tokens=tokens, origin=f"{features.origin}, {tokens}")
    read = _with_outputs(read, head, features)
    _check_operators(name, model.graph, head, features)
    if read.card.name is None:
        read = read.with_values({"name": printable(file.stem) or "model"}, "the file's name")
    return Plan(
        file,
        _with_defaults(read),
        recipe,
        entry.name,
        entry.type.tensor_type.elem_type,
        channels,
        batch,
        head,
        scores,
        two_classes,
        features,
        _summary(read.card, recipe, entry, channels),
    )


def _tokens(
    file: Path, entry: str, shape: Sequence[int], sides: tuple[int, int], tensor: str
) -> Tokens:
    """Return how an image's tokens become its embedding.

    If they fill a grid, no class token is among them, and the embedding is their mean, as in Swin.

    Args:
        file: the model.
        entry: its input.
        shape: of the input.
        sides: height and width of the input, in pixels.
        tensor: the output (n, tokens, features).
    """
    height, width = sides
    try:
        model = new_core().read_model(str(file))
        model.reshape({entry: list(shape)})
        count = model.output(tensor).get_partial_shape()[1].get_length()
    except Exception:  # OpenVINO's own; why it cannot read the file, the check run will tell
        return Tokens.FIRST
    strides = (side for side in range(1, min(sides) + 1) if not (height % side or width % side))
    fills = any(height // stride * (width // stride) == count for stride in strides)
    return Tokens.MEAN if fills else Tokens.FIRST


def _check_operators(
    name: str, graph: onnx.GraphProto, head: Head, features: Features | None
) -> None:
    wanted = [tensor for tensor in (head.tensor, features.tensor if features else None) if tensor]
    for outer in live_nodes(graph, wanted):
        inner = [node for each in inner_graphs(outer) for node in all_nodes(each)]
        for node in (outer, *inner):
            if node.domain not in STANDARD_DOMAINS:
                raise ModelError(
                    f"{name} uses the operator {printable(node.domain)}::{printable(node.op_type)},"
                    " which is not ONNX's own. Export it with standard operators only."
                )


def _with_layout(name: str, read: ReadCard, shape: Dims) -> tuple[ReadCard, int]:
    """Fill in the layout, and return it with the number of channels, 3 or 1."""
    places = {Layout.NCHW: shape[1], Layout.NHWC: shape[3]}
    for channels in (3, 1):
        sure = [layout for layout, side in places.items() if side == channels]
        if sure:
            break
    if not sure:  # an open dimension may say what it is, as in exports of optimum
        channels = 3
        sure = [layout for layout, side in places.items() if "channel" in str(side).lower()]
    fitting = [layout for layout, side in places.items() if side in (1, 3)]
    fitting += [layout for layout, side in places.items() if not isinstance(side, int)]
    layout = read.card.layout
    if layout is not None:
        if layout not in fitting:
            raise UsageError(
                f"{name} takes {format_dims(shape)}, which is not {layout} with 3 channels or 1."
                " Give another --layout."
            )
        return read, 1 if places[layout] == 1 else 3
    if not fitting:
        raise ModelError(
            f"{name} takes {format_dims(shape)}: neither the second nor the last dimension is 3,"
            " for red, green and blue, or 1, for grey."
        )
    if len(sure) != 1:
        raise UsageError(
            f"{name} takes {format_dims(shape)}, which does not show where the channels are. Add"
            " --layout NCHW or --layout NHWC."
        )
    return read.with_values({"layout": sure[0]}, _SURE), channels


def _with_size(name: str, read: ReadCard, shape: Dims) -> ReadCard:
    """Fill in the size of the input."""
    height, width = shape[2:] if read.card.layout is Layout.NCHW else shape[1:3]
    if read.card.size is None:
        if not isinstance(height, int) or not isinstance(width, int):
            raise UsageError(
                f"{name} takes {format_dims(shape)}, images of any size. Add --size N (or WxH), the"
                " one it was trained with."
            )
        if height * width > _MAX_AREA:
            raise ModelError(
                f"{name} takes images of {width}x{height}; at most {_MAX_AREA:,} pixels can be fed."
            )
        return read.with_values({"size": as_size(width, height)}, _SURE)
    found_width, found_height = dimensions(read.card.size)
    if found_width * found_height > _MAX_AREA:
        raise UsageError(
            f"size {read.card.size} ({read.origin('size')}): at most {_MAX_AREA:,} pixels can be"
            f" fed to {name}."
        )
    wrong_width = isinstance(width, int) and width != found_width
    wrong_height = isinstance(height, int) and height != found_height
    if wrong_width or wrong_height:
        raise UsageError(
            f"{name} takes images of {width}x{height}, but size is {read.card.size}"
            f" ({read.origin('size')}). Leave --size out, or give the right one."
        )
    return read


def _with_scores(name: str, read: ReadCard, head: Head) -> tuple[ReadCard, Scores, bool]:
    """Fill in what the scores are, and return it, and whether one score stands for two classes."""
    if head.tensor is None:
        if read.card.labels:
            raise UsageError(
                f"{name} has no scores ({head.origin}), so it takes no labels"
                f" ({read.origin('labels')})."
            )
        return read, Scores.LOGITS, False
    if head.labels is not None and read.card.labels is None:
        names = check_labels(f"{name}: its ZipMap", head.labels)
        read = read.with_values({"labels": names}, "ZipMap")
    card, ends_in = read.card, head.ends_in
    two_classes = head.classes == 1 and isinstance(card.labels, tuple) and len(card.labels) == 2
    if ends_in is not None:
        found, origin = Scores(ends_in.lower()), f"the graph ends in a {ends_in}"
    elif two_classes:
        found, origin = Scores.SIGMOID, "one score, two labels"
    else:
        found, origin = Scores.LOGITS, "default: the graph ends without softmax and sigmoid"
    scores = card.scores or found
    if head.classes == 1 and ends_in == "Softmax":
        raise UsageError(
            f"{name} ends in a Softmax over one class, which is 1.0 for every image. Export it"
            " without, for --scores sigmoid."
        )
    if ends_in is not None and scores not in (Scores.SOFTMAX, found):
        raise UsageError(
            f"{name} ends in a {ends_in}, so its scores are probabilities already, not {scores}."
            f" Leave --scores {scores} out."
        )
    if two_classes and scores is Scores.LOGITS:
        raise UsageError(
            f"{name} returns one score for two labels, so --scores logits cannot be right: a"
            " softmax needs a score per class. Leave --scores out."
        )
    if card.scores is None:
        read = read.with_values({"scores": scores}, origin)
    return read, scores, two_classes


def _with_outputs(read: ReadCard, head: Head, features: Features | None) -> ReadCard:
    read = read.with_values({"logits": head.tensor or "none"}, head.origin)
    if features is not None:
        read = read.with_values({"embedding": features.tensor}, features.origin)
    return read


def _with_defaults(read: ReadCard) -> ReadCard:
    """Return the card with an origin for each of its values."""
    fields = ["crop", "interpolation", "exif", "color", "centre", "licence"]
    if read.card.fill is not None:
        fields.append("fill")
    return ReadCard(read.card, {**dict.fromkeys(fields, "default"), **read.origins})


def _summary(
    card: ModelCard, recipe: Recipe, entry: onnx.ValueInfoProto, channels: int
) -> tuple[str, ...]:
    from onnx import TensorProto

    size = f"{recipe.width}×{recipe.height}"
    if isinstance(recipe.resize, tuple):
        how = "fitted into" if recipe.pad else "squashed to"
        how += f" {recipe.resize[0]}×{recipe.resize[1]} ({recipe.interpolation})"
    elif recipe.resize is not None:
        how = f"short side resized to {recipe.resize} ({recipe.interpolation})"
    else:
        how = "not resized"
    if recipe.resize == (recipe.width, recipe.height):
        then = f", the rest filled with {recipe.fill}" if recipe.pad else ""
    else:
        then = f", the central {size} cut out"
    if card.mean is None or card.std is None:
        values = "0 to 255 as they are"
    else:
        most = 1.0 if card.scale == 1 else 255.0
        ends = [((0.0 - m) / s, (most - m) / s) for m, s in zip(card.mean, card.std, strict=True)]
        values = ", ".join(
            f"{channel} {low:.4g} to {high:.4g}"
            for channel, (low, high) in zip(
                "RGB" if channels == 3 else ("grey",), ends[:channels], strict=True
            )
        )
    kind = TensorProto.DataType.Name(entry.type.tensor_type.elem_type).lower()
    colours = str(card.color) if channels == 3 else "grey"
    return (
        f"input {kind} {format_dims(dims(entry))}, {card.layout}, {colours}",
        f"images: {how}{then}; values fed: {values}",
    )
