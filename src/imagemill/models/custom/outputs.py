"""Find what a graph returns: its scores, how they end, and its embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from imagemill.errors import UsageError, printable

if TYPE_CHECKING:
    import onnx

Dims = list[int | str]
"""A tensor's shape; an open dimension is a text."""

NO_SCORES: Final = "none"
"""`--logits none`: the model has no scores."""
_PASSED: Final = (
    *("Softmax", "Sigmoid", "LogSoftmax", "Identity", "Cast", "Flatten"),
    *("Reshape", "Squeeze", "Unsqueeze", "Dropout"),
)
"""Operators that may stand between the classifier's last layer and the scores, besides arithmetic
with a constant.
"""
_RESHAPING: Final = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ARITHMETIC: Final = ("Add", "Sub", "Mul", "Div")
_POOLED: Final = ("image_embeds", "pooler_output")
_TOKENS: Final = "last_hidden_state"
_EMBEDDINGS: Final = (*_POOLED, _TOKENS, "embedding", "embeddings", "features", "image_features")
_PROBABILITIES: Final = ("probabilities", "probability", "probs", "prob", "scores", "output")


class Head(Struct, frozen=True):
    """The output with the scores."""

    tensor: str | None
    """None: the model has no scores, only an embedding."""
    origin: str
    """How it was found."""
    classes: int | None = None
    """As the file declares them; None: it leaves them open."""
    ends_in: str | None = None
    """`Softmax` or `Sigmoid`, if that makes the scores."""
    labels: tuple[str, ...] | None = None
    """As a ZipMap names the classes."""


class Tokens(StrEnum):
    """How a tensor (n, tokens, features) becomes an embedding."""

    FIRST = "its first token"
    MEAN = "the mean of its tokens"


class Features(Struct, frozen=True):
    """The tensor with the embedding."""

    tensor: str
    classes: int | None = None
    """Rows of the layer that reads it; None if not known."""
    features: int | None = None
    """Its length; None if not known."""
    origin: str = "the input of the last layer"
    certain: bool = False
    """Named by the card or by the file, so that its shape need not be compared with the last
    layer's.
    """
    tokens: Tokens | None = None
    """None: the tensor is (n, features)."""


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from all_nodes(inner)


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that a node holds, for example the branches of an If."""
    return [
        inner
        for attribute in node.attribute
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)
    ]


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each tensor."""
    return {output: node for node in graph.node for output in node.output if output}


def live_nodes(graph: onnx.GraphProto, wanted: list[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the wanted tensors depend on, in the graph's order."""
    nodes = list(graph.node)
    made_by = {output: place for place, node in enumerate(nodes) for output in node.output}
    waiting, live = list(wanted), set()
    while waiting:
        place = made_by.get(waiting.pop())
        if place is None or place in live:
            continue
        live.add(place)
        waiting.extend(item for item in nodes[place].input if item)
        for inner in inner_graphs(nodes[place]):  # they read tensors of the outer graph by name
            waiting.extend(item for each in all_nodes(inner) for item in each.input if item)
            waiting.extend(value.name for value in inner.output)
    return [nodes[place] for place in sorted(live)]


def dims(value: onnx.ValueInfoProto) -> Dims | None:
    """Return a tensor's declared shape; None if no shape is declared."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        dim.dim_value
        if dim.HasField("dim_value") and dim.dim_value > 0
        else printable(dim.dim_param or "?", 40)
        for dim in tensor.shape.dim
    ]


def format_dims(shape: Dims | None) -> str:
    """Return a shape for a message, for example "(n, 3, 224, 224)"."""
    return "unknown" if shape is None else f"({', '.join(map(str, shape))})"


def _bare(name: str) -> str:
    """Return the last word of a tensor's name, without TensorFlow's ":0"."""
    return name.rsplit("/", 1)[-1].split(":", 1)[0].lower()


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


def find_head(name: str, graph: onnx.GraphProto, asked: str | None, origin: str) -> Head:
    """Find the output with the scores: (n, classes), also with further dimensions of 1.

    Args:
        name: the file's name, for messages.
        graph: the file's graph.
        asked: what the card names: any tensor of the graph, or `none`; None: find it.
        origin: where the card has that from.

    Raises:
        UsageError: the tensor does not exist or cannot be scores, or several outputs could be. The
        message lists them.
    """
    made_by = producers(graph)
    listed = ", ".join(f"{printable(value.name)} {_format_output(value)}" for value in graph.output)
    if asked == NO_SCORES:
        return Head(None, origin)
    if asked is not None:
        return _named(name, graph, asked, listed, origin)
    fitting = [
        value
        for value in graph.output
        if _classes(value)[0] and not _ends_with(made_by, value.name, ("TopK",))
    ]
    hidden = [value for value in graph.output if _bare(value.name) in (*_POOLED, _TOKENS)]
    if hidden and all(value in hidden for value in graph.output if _is_float(value)):
        return Head(None, f"the outputs are {', '.join(value.name for value in hidden)}")
    found = _choose(fitting, made_by)
    if found is None:
        tails = [head for value in graph.output if (head := _before_a_tail(value, made_by))]
        if tails:
            return max(tails, key=lambda head: head.labels is not None)
        which = "none of its outputs has" if not fitting else f"{len(fitting)} of its outputs have"
        raise UsageError(
            f"{name}: {which} the shape of scores, (n, classes): {listed}. Name the right one with"
            " --logits TENSOR, or write --logits none if the model has only an embedding."
        )
    value, origin = found
    return Head(value.name, origin, _classes(value)[1], ending(made_by, value.name))


def _named(name: str, graph: onnx.GraphProto, asked: str, listed: str, origin: str) -> Head:
    made_by = producers(graph)
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    if asked not in made_by:
        raise UsageError(f"--logits {asked}: {name} has no such output. It has {listed}.")
    count = None
    if (value := values.get(asked)) is not None:
        shape = dims(value)
        fits, count = _classes(value)
        if not fits and shape is not None and all(isinstance(dim, int) for dim in shape[1:]):
            raise UsageError(
                f"--logits {asked} has the shape {format_dims(shape)}; scores are (n, classes)."
            )
    return Head(asked, origin, count, ending(made_by, asked))


def _is_float(value: onnx.ValueInfoProto) -> bool:
    from onnx import TensorProto

    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type in kinds


def _format_output(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return f"({value.type.WhichOneof('value') or 'unknown'})".replace("_type", "")
    return format_dims(dims(value))


def _classes(value: onnx.ValueInfoProto) -> tuple[bool, int | None]:
    """Return whether a tensor has the shape of scores, and how many classes it declares."""
    shape = dims(value)
    if shape is None or len(shape) < 2 or not _is_float(value):
        return False, None
    rest = [dim for dim in shape[1:] if dim != 1]
    if not rest:
        return True, 1
    if len(rest) > 1:
        return False, None
    known = rest[0] if isinstance(rest[0], int) else None
    return known is not None or len(shape) == 2, known


def _choose(
    fitting: list[onnx.ValueInfoProto], made_by: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.ValueInfoProto, str] | None:
    """Return the one of several outputs that holds the scores, and why it was chosen."""
    if len(fitting) == 1:
        return fitting[0], "the only output of shape (n, classes)"
    named = [value for value in fitting if _bare(value.name) not in _EMBEDDINGS]
    endings = {value.name: ending(made_by, value.name) for value in fitting}
    rules: tuple[tuple[str, Callable[[onnx.ValueInfoProto], bool]], ...] = (
        ("by its name", lambda value: _bare(value.name) == "logits"),
        ("the only output that ends in {}", lambda value: endings[value.name] is not None),
        ("by its name", lambda value: _bare(value.name) in _PROBABILITIES),
        ("the only output of that shape that is no embedding", lambda _: True),
    )
    for origin, rule in rules:
        found = [value for value in named if rule(value)]
        if len(found) == 1:
            return found[0], origin.format(endings[found[0].name])
    return None


def _before_a_tail(
    value: onnx.ValueInfoProto, made_by: Mapping[str, onnx.NodeProto]
) -> Head | None:
    """Return the scores that a ZipMap or an ArgMax turns into names or a class number."""
    node = _ends_with(made_by, value.name, ("ZipMap", "ArgMax", "TopK"))
    shape = dims(value) or []
    if node is None or (node.op_type == "ArgMax" and any(dim != 1 for dim in shape[1:])):
        return None
    labels: tuple[str, ...] | None = None
    for attribute in node.attribute:
        if attribute.name == "classlabels_strings" and attribute.strings:
            labels = tuple(item.decode("utf-8", "replace") for item in attribute.strings)
    tensor = node.input[0]
    origin = f"what the {node.op_type} of output {printable(value.name)} reads"
    return Head(tensor, origin, len(labels) if labels else None, ending(made_by, tensor), labels)


def ending(made_by: Mapping[str, onnx.NodeProto], tensor: str) -> str | None:
    """Return `Softmax` or `Sigmoid` if the scores come from one, reshaped at most; else None."""
    node = _ends_with(made_by, tensor, ("Softmax", "Sigmoid"))
    return None if node is None else str(node.op_type)


def _ends_with(
    made_by: Mapping[str, onnx.NodeProto], tensor: str, kinds: tuple[str, ...]
) -> onnx.NodeProto | None:
    """Return the node of one of these kinds that makes a tensor, reshaped at most."""
    passed = set()
    while (node := made_by.get(tensor)) is not None and node.input and tensor not in passed:
        if node.op_type in kinds:
            return node
        if node.op_type not in _RESHAPING:
            return None
        passed.add(tensor)
        tensor = node.input[0]
    return None


# ── embedding ─────────────────────────────────────────────────────────────────────────────────────


def find_features(
    name: str, graph: onnx.GraphProto, head: Head, asked: str | None, origin: str
) -> Features | None:
    """Find the embedding: what the last Gemm, MatMul or 1×1 convolution before the scores reads;
    of a model without scores, the output with its features.

    Raises:
        UsageError: the tensor that the card names does not exist, or a model without scores has no
        output that is plainly its embedding.
    """
    made_by = producers(graph)
    if asked is not None:
        if asked not in made_by:
            raise UsageError(f"--embedding {asked}: {name} computes no tensor of that name.")
        return _as_features(graph, asked, origin)
    if head.tensor is None:
        return _of_a_headless_model(name, graph)
    known, shapes = constant_tensors(graph)
    tensor, passed = head.tensor, set()
    while (node := made_by.get(tensor)) is not None and tensor not in passed:
        passed.add(tensor)
        moving = [item for item in node.input if item and item not in known]
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            if len(moving) != 1 or moving[0] != node.input[0] or len(node.input) < 2:
                return None
            return _before_the_last_layer(node, moving[0], shapes.get(node.input[1]))
        if len(moving) != 1 or node.op_type not in (*_PASSED, *_ARITHMETIC):
            return None
        tensor = moving[0]
    return None


def _before_the_last_layer(
    node: onnx.NodeProto, tensor: str, shape: tuple[int, ...] | None
) -> Features | None:
    """Return the input of a layer as an embedding; `shape` is the shape of its weights."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Conv":
        grouped = "group" in attributes and attributes["group"].i != 1
        if shape is None or shape[2:] != (1, 1) or grouped:
            return None
        return Features(tensor, shape[0], shape[1])
    if shape is None or len(shape) != 2:
        return Features(tensor)
    turned = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
    rows, columns = (shape[0], shape[1]) if turned else (shape[1], shape[0])
    return Features(tensor, rows, columns)


def _as_features(graph: onnx.GraphProto, tensor: str, origin: str) -> Features:
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    shape = dims(values[tensor]) if tensor in values else None
    has_tokens = _bare(tensor) == _TOKENS and shape is not None and len(shape) == 3
    tokens = Tokens.FIRST if has_tokens else None
    return Features(tensor, origin=origin, certain=True, tokens=tokens)


def _of_a_headless_model(name: str, graph: onnx.GraphProto) -> Features:
    floats = [value for value in graph.output if _is_float(value)]
    named = {_bare(value.name): value for value in floats}
    for word in _EMBEDDINGS:
        shape = dims(named[word]) if word in named else None
        if shape is not None and (len(shape) != 4 or word != _TOKENS):
            return _as_features(graph, named[word].name, "by its name")
    fitting = [value for value in floats if _classes(value)[0]]
    if len(fitting) == 1:
        return _as_features(graph, fitting[0].name, "the only output of shape (n, features)")
    listed = ", ".join(f"{printable(value.name)} {_format_output(value)}" for value in graph.output)
    raise UsageError(
        f"{name}: none of its outputs is plainly the embedding, (n, features): {listed}. Name it"
        " with --embedding TENSOR."
    )


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the tensors that a graph holds, by name."""
    held = [
        (name, attribute.t)
        for node in graph.node
        if node.op_type == "Constant"
        for name in node.output
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return {**{tensor.name: tensor for tensor in graph.initializer}, **dict(held)}


def constant_tensors(graph: onnx.GraphProto) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the names of the tensors that do not depend on the input, and the shapes of those
    whose shape is known without running the graph.
    """
    shapes = {name: tuple(tensor.dims) for name, tensor in constants(graph).items()}
    known = set(shapes)
    for node in graph.node:
        if node.op_type == "Constant":
            known.update(node.output)
        elif node.input and all(item in known for item in node.input if item):
            known.update(node.output)
            if node.op_type in ("Identity", "Cast") and node.input[0] in shapes:
                shapes[node.output[0]] = shapes[node.input[0]]
    return known, shapes
