"""Compare a custom graph with its card (`examine`), and make it the graph of a bundle (`assemble`).

The graph's tensors keep their names behind a prefix. Opset and IR version are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models.custom.onnx_card import Color, Crop, Layout, OnnxCard, box
from imagemill.records import Recipe, Scores

if TYPE_CHECKING:
    import onnx

_PREFIX: Final = "onnx/"
_OURS: Final = "imagemill/"
_OLDEST_OPSET: Final = 7
"""The first whose arithmetic broadcasts as NumPy does."""
_DOMAINS: Final = ("", "ai.onnx")
_CROPPED: Final = 0.875
"""Share of the resized short side that the crop keeps where the card does not say it: 224 of
256.
"""
_PASSED: Final = (
    "Softmax",
    "Sigmoid",
    "LogSoftmax",
    "Identity",
    "Cast",
    "Flatten",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Dropout",
)
"""Operators that may stand between the classifier's last layer and the scores, besides arithmetic
with a constant.
"""
_RESHAPING: Final = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ARITHMETIC: Final = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True, slots=True)
class Features:
    """Where the embedding is."""

    tensor: str
    classes: int | None
    """Rows of the layer that reads it; None where not known."""
    features: int | None
    """Its length; None where not known."""
    asked: bool
    """Named by the card, not found."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a file is going to be wrapped."""

    file: Path
    card: OnnxCard
    recipe: Recipe
    input: str
    type: int
    """ONNX's number of the input's element type."""
    batch: int | None
    """To which the file's batch is fixed; None: it is open."""
    scores: Scores
    """As the card says, else as the graph ends."""
    logits: str
    classes: int | None
    """As the file declares them; None: it leaves them open."""
    ends_in: str | None
    """`Softmax` or `Sigmoid` where that makes the scores."""
    features: Features | None
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

    return {
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "uint8": TensorProto.UINT8,
    }


def examine(file: Path, model: onnx.ModelProto, card: OnnxCard) -> Plan:
    """Compare a file with its card. Raises: UsageError, ModelError."""
    name = file.name
    opset = max(
        (entry.version for entry in model.opset_import if entry.domain in _DOMAINS), default=0
    )
    if opset < _OLDEST_OPSET:
        raise ModelError(
            f"{name} has opset {opset}, {_OLDEST_OPSET} is the oldest that can be wrapped. Convert"
            " it: onnx.version_converter."
        )
    for node in all_nodes(model.graph):
        if node.domain not in _DOMAINS:
            raise ModelError(
                f"{name} uses the operator {node.domain}::{node.op_type}, which is not ONNX's own."
                " Export it with standard operators only."
            )
    if model.functions:
        raise ModelError(
            f"{name} defines functions of its own ({model.functions[0].name}). Inline them first"
            " (onnx.inliner)."
        )
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ModelError(
            f"{name} has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}); an"
            " image fills one."
        )
    entry = inputs[0]
    kind = entry.type.tensor_type.elem_type
    dims = _dims(entry)
    shown = _shown(dims)
    if kind not in _types().values():
        from onnx import TensorProto

        raise ModelError(
            f"{name} takes {TensorProto.DataType.Name(kind).lower()}; float32, float16 and uint8"
            " can be fed."
        )
    if dims is None or len(dims) != 4:
        raise ModelError(
            f"{name} takes an input of shape {shown}; a batch of images has four dimensions."
        )
    card = _filled(file, card, dims, kind)
    recipe = _recipe(card)
    logits, classes = _scores(name, model.graph, card.logits)
    producers = {output: node for node in model.graph.node for output in node.output if output}
    ends_in = _ending(producers, logits)
    if classes == 1 and ends_in == "Softmax":
        raise UsageError(
            f"{name} ends in a Softmax over one class, which is 1.0 for every image. Export it"
            " without, for --scores sigmoid."
        )
    found = Scores.LOGITS if ends_in is None else Scores(ends_in.lower())
    scores = found if card.scores is None else card.scores
    if ends_in is not None and scores not in (Scores.SOFTMAX, found):
        raise UsageError(
            f"{name} ends in a {ends_in}, so its scores are probabilities already, not {scores}."
            f" Leave --scores {scores} out."
        )
    features = _features(name, model.graph, producers, logits, card.embedding)
    batch = dims[0] if isinstance(dims[0], int) else None
    card = replace(card, name=card.name or file.stem, logits=logits)
    return Plan(
        file,
        card,
        recipe,
        entry.name,
        kind,
        batch,
        scores,
        logits,
        classes,
        ends_in,
        features,
        _told(card, recipe, kind, shown),
    )


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
        values = ", ".join(
            f"{channel} {low:.4g} to {high:.4g}"
            for channel, (low, high) in zip("RGB", ends, strict=True)
        )
    return (
        f"input {TensorProto.DataType.Name(kind).lower()} {shown}, {card.layout}, {card.color}",
        f"images: {how}, the central {recipe.width}×{recipe.height} cut out; values fed: {values}",
    )


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(
                attribute.graphs
            ):
                yield from all_nodes(inner)


def _dims(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """Dimensions, open ones as a text; None where no shape is declared."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or "?"
        for dim in tensor.shape.dim
    ]


def _shown(dims: list[int | str] | None) -> str:
    return "unknown" if dims is None else f"({', '.join(map(str, dims))})"


def _filled(file: Path, card: OnnxCard, dims: list[int | str], kind: int) -> OnnxCard:
    """The card with layout, size and scale filled in. Raises: UsageError where it contradicts the
    file, or the file does not say.
    """
    name, shown = file.name, _shown(dims)
    fitting = [
        item
        for item, place in ((Layout.NCHW, 1), (Layout.NHWC, 3))
        if dims[place] == 3 or not isinstance(dims[place], int)
    ]
    if card.layout is not None and card.layout not in fitting:
        raise UsageError(
            f"{name} takes {shown}, which is not {card.layout} with 3 channels. Give another"
            " --layout."
        )
    if card.layout is None:
        sure = [item for item, place in ((Layout.NCHW, 1), (Layout.NHWC, 3)) if dims[place] == 3]
        if not fitting:
            raise ModelError(
                f"{name} takes {shown}: neither the second nor the last dimension is 3, for red,"
                " green and blue."
            )
        if len(sure) != 1:
            raise UsageError(
                f"{name} takes {shown}, which does not show where the channels are. Add --layout"
                " NCHW or --layout NHWC."
            )
        card = replace(card, layout=sure[0])
    height, width = dims[2:] if card.layout is Layout.NCHW else dims[1:3]
    sides = {side for side in (height, width) if isinstance(side, int)}
    if len(sides) > 1:
        raise ModelError(f"{name} takes images of {width}×{height}; only square ones can be fed.")
    if isinstance(card.size, str) or str(card.resize).startswith("pad"):
        raise UsageError(f"{name}: --size WxH and --resize pad cannot be wrapped yet.")
    size = card.size or next(iter(sides), None)
    if size is None:
        raise UsageError(
            f"{name} takes {shown}, images of any size. Add --size N, the one it was trained with."
        )
    if sides and size not in sides:
        raise UsageError(
            f"{name} takes images of {width}×{height}, --size {size} is asked for. Leave it out."
        )
    if kind == _types()["uint8"]:
        if card.mean is not None or card.std is not None or card.scale == 1:
            raise UsageError(
                f"{name} takes uint8, so it normalises by itself. Leave --mean, --std and --scale 1"
                " out."
            )
        return replace(card, size=size, scale=255)
    card = replace(
        card,
        size=size,
        scale=card.scale or 1,
        mean=card.mean or (0.0, 0.0, 0.0),
        std=card.std or (1.0, 1.0, 1.0),
    )
    for flag, values in (("--mean", card.mean), ("--std", card.std)):
        if card.scale == 1 and max(map(abs, values or ())) > 1:
            raise UsageError(
                f"{flag} {' '.join(f'{value:g}' for value in values or ())} is on the scale 0 to"
                " 255, --scale is 1: pixels from 0 to 1. Add --scale 255."
            )
    return card


def _recipe(card: OnnxCard) -> Recipe:
    size = card.size
    assert isinstance(size, int)
    resize: int | tuple[int, int] | None
    if card.crop is Crop.NONE:
        resize = (size, size)
        if card.resize not in (None, f"{size}x{size}"):
            raise UsageError(
                f"--crop none with --resize {card.resize}: without a crop every image must come out"
                f" as {size}x{size}, which is what the model takes. Leave --resize out, or the"
                " crop in."
            )
    elif card.resize is None:
        resize = round(size / _CROPPED)
    elif isinstance(card.resize, int):
        resize = card.resize
    else:
        resize = None if card.resize == "none" else box(card.resize)
    recipe = Recipe(size, size, resize, interpolation=card.interpolation, exif=card.exif)
    if problem := bundles.cropped_beyond(recipe):
        raise UsageError(
            f"--{problem}. Give a --resize of at least {size}, or leave it out; --crop none takes"
            " the whole image."
        )
    return recipe


def _scores(name: str, graph: onnx.GraphProto, asked: str | None) -> tuple[str, int | None]:
    """Pick the output that holds the scores: (n, classes), or with further dimensions of 1."""

    def classes(dims: list[int | str] | None) -> tuple[bool, int | None]:
        if dims is None or len(dims) < 2:
            return False, None
        rest = [dim for dim in dims[1:] if dim != 1]
        if not rest or (len(dims) == 2 and len(rest) == 1):
            known = rest[0] if rest else 1
            return True, known if isinstance(known, int) else None
        return len(rest) == 1 and isinstance(rest[0], int), (
            rest[0] if isinstance(rest[0], int) else None
        )

    listed = ", ".join(f"{value.name} {_shown(_dims(value))}" for value in graph.output)
    if asked is not None:
        value = next((value for value in graph.output if value.name == asked), None)
        if value is None:
            raise UsageError(f"--logits {asked}: {name} has no such output. It has {listed}.")
        dims = _dims(value)
        fits, count = classes(dims)
        if not fits and dims is not None and all(isinstance(dim, int) for dim in dims[1:]):
            raise UsageError(
                f"--logits {asked} has the shape {_shown(dims)}; scores are (n, classes)."
            )
        return asked, count
    fitting = [
        (value.name, classes(_dims(value))[1]) for value in graph.output if classes(_dims(value))[0]
    ]
    if len(fitting) != 1:
        which = "none of its outputs has" if not fitting else f"{len(fitting)} of its outputs have"
        raise UsageError(
            f"{name}: {which} the shape of scores, (n, classes): {listed}. Name the right one with"
            " --logits TENSOR."
        )
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
    name: str,
    graph: onnx.GraphProto,
    producers: Mapping[str, onnx.NodeProto],
    logits: str,
    asked: str | None,
) -> Features | None:
    """Find the embedding: what the last Gemm, MatMul or 1×1 convolution before the scores reads."""
    if asked is not None:
        if asked not in producers:
            raise UsageError(f"--embedding {asked}: {name} computes no tensor of that name.")
        return Features(asked, None, None, asked=True)
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
                if (
                    shape is None
                    or any(side != 1 for side in shape[2:])
                    or ("group" in attributes and attributes["group"].i != 1)
                ):
                    return None
                return Features(moving[0], shape[0], shape[1], asked=False)
            if shape is None or len(shape) != 2:
                return Features(moving[0], None, None, asked=False)
            turned = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
            rows, columns = (shape[0], shape[1]) if turned else (shape[1], shape[0])
            return Features(moving[0], rows, columns, asked=False)
        if len(moving) != 1 or node.op_type not in (*_PASSED, *_ARITHMETIC):
            return None
        tensor = moving[0]
    return None


def _constants(graph: onnx.GraphProto) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Names of the tensors that do not depend on the input, and the shapes of those whose shape is
    plain to see.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = set(shapes)
    for node in graph.node:
        if node.op_type == "Constant":
            constants.add(node.output[0])
            shapes.update(
                (node.output[0], tuple(attribute.t.dims))
                for attribute in node.attribute
                if attribute.name == "value"
            )
        elif node.input and all(item in constants for item in node.input if item):
            constants.update(node.output)
            if node.op_type in ("Identity", "Cast") and node.input[0] in shapes:
                shapes[node.output[0]] = shapes[node.input[0]]
    return constants, shapes


def assemble(model: onnx.ModelProto, plan: Plan) -> None:
    """Turn the custom model into the wrapped one, in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph, card = model.graph, plan.card
    if plan.batch is not None:
        _open_batch(graph, plan.batch)
    _rename(graph)
    for place, tensor in enumerate(graph.initializer):
        if (
            not tensor.raw_data and tensor.data_type != TensorProto.STRING
        ):  # as bundle.write counts and moves them
            graph.initializer[place].CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
            )
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
        steps.append(
            (
                "Gather",
                [weight("bgr", np.array([2, 1, 0], np.int64))],
                _OURS + "reordered",
                {"axis": 3},
            )
        )
    if not plan.takes_bytes:
        steps.append(("Cast", [], _OURS + "floats", {"to": TensorProto.FLOAT}))
    if card.layout is Layout.NCHW:
        steps.append(("Transpose", [], _OURS + "planes", {"perm": [0, 3, 1, 2]}))
    if not plan.takes_bytes:
        order = [2, 1, 0] if card.color is Color.BGR else [0, 1, 2]
        shape = (1, 3, 1, 1) if card.layout is Layout.NCHW else (1, 1, 1, 3)
        mean, std = (
            np.array([values[place] for place in order], np.float32).reshape(shape)
            for values in plan.normalisation
        )
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
        graph.node.append(
            helper.make_node(
                "Flatten", [_PREFIX + tensor], [_OURS + output], name=_OURS + output, axis=1
            )
        )
        graph.node.append(
            helper.make_node("Cast", [_OURS + output], [output], name=output, to=TensorProto.FLOAT)
        )
    kept = [tensor for tensor in graph.input if tensor.name != goal]
    for field in (graph.input, graph.output, graph.value_info, graph.quantization_annotation):
        del field[:]
    size = card.size
    graph.input.extend(
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", size, size, 3]), *kept]
    )
    graph.output.extend(
        helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", count])
        for output, _, count in wanted
    )
    others = [entry for entry in model.metadata_props if entry.key != bundles.DATA_SHA256]
    del model.metadata_props[:]
    model.metadata_props.extend(others)


def _rename(graph: onnx.GraphProto) -> None:
    """Put the prefix before every tensor's name, those of inner graphs included, so that none
    clashes with ours.
    """

    def prefixed(names: Any) -> list[str]:
        return [_PREFIX + name if name else name for name in names]

    for node in graph.node:
        for field in (node.input, node.output):
            names = prefixed(field)
            del field[:]
            field.extend(names)
        node.name = _PREFIX + node.name if node.name else node.name
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(
                attribute.graphs
            ):
                _rename(inner)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = _PREFIX + value.name
    for sparse in graph.sparse_initializer:
        sparse.values.name = _PREFIX + sparse.values.name


def _open_batch(graph: onnx.GraphProto, batch: int) -> None:
    """Let reshapes to a fixed batch keep whatever batch comes; whether that was all, the check run
    tells.
    """
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
