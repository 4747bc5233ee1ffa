"""Make a classifier from a CLIP or SigLIP model and a list of labels.

    labels × templates ─► text tower, once ─► one normalised embedding per label
                                                       │
    image tower ─► image embedding ─► normalise ─► MatMul ─► scores

The result is an ordinary bundle. Its weights depend on labels and templates, so other labels or
templates are another model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from imagemill.errors import ModelError, UsageError, counted, printable
from imagemill.models import bundle as bundles
from imagemill.models.architectures.graph import Nodes
from imagemill.models.card import ReadCard
from imagemill.models.custom import wrap
from imagemill.models.folders import json_file
from imagemill.models.folders.transformers_config import read_transformers
from imagemill.models.zero_shot import scale as scales
from imagemill.models.zero_shot.family import Family, read_family
from imagemill.models.zero_shot.prompts import Prompts
from imagemill.models.zero_shot.text_tower import TextTower, tokenize
from imagemill.models.zero_shot.towers import Towers
from imagemill.records import Bundle, Scores
from imagemill.system import serialization
from imagemill.system.messages import Notify
from imagemill.system.openvino_library import new_core

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]

_VERSION: Final = 1
"""Of the way from texts to weights."""
_EMBEDDING: Final = "classes/embedding"
"""Tensor with the normalised embedding of an image."""
_LOGITS: Final = "classes/logits"
"""Output with the scores."""
_REPORT_S: Final = 10.0
"""Seconds between two lines about the text tower's progress."""


def make(
    towers: Towers,
    prompts: Prompts,
    output: Path,
    notify: Notify,
    *,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
) -> Bundle:
    """Make the bundle of a model whose classes are words, unless it is there.

    Args:
        towers: the model.
        prompts: labels and templates.
        output: the bundle's folder.
        notify: takes one line at a time: what was read, and where.
        logit_scale: what cosines are multiplied by, instead of what the files say.
        logit_bias: what is added then.

    Raises:
        UsageError: the output exists and is something else, or there is one label where a softmax
            needs two, or two labels are the same text to the model.
        ModelError: a file of the folder is missing, damaged, or does not fit the others.
    """
    family = read_family(towers.folder)
    kind = family.kind
    has_bias = kind.scores is Scores.SIGMOID
    if len(prompts.labels) == 1 and not has_bias:
        raise UsageError(
            "--labels has one label. The probability of a single class is always 1.0: add a label"
            " for everything else."
        )
    card = read_transformers(towers.folder, json_file.read(towers.folder / json_file.CONFIG), {})
    scale = scales.find(towers.folder, has_bias=has_bias, scale=logit_scale, bias=logit_bias)
    key = _key(towers, prompts, card, scale, family)
    if not bundles.is_free(output):
        return _existing(output, key, notify)
    model = wrap.parse(towers.image_file)
    wrap.load_external_data(towers.image_file, model)  # before the long work on the texts
    wanted = _features(towers.image_file, model, kind.image_output)
    notify(f"logit_scale: {scale.scale:.6g} ({scale.origin})")
    if has_bias:
        notify(f"logit_bias: {scale.bias:.6g} ({scale.origin})")
    notify(f"templates: {', '.join(printable(item, 60) for item in prompts.templates[:5])}")
    embeddings = embed(towers, family, prompts, notify)
    if wanted not in (None, embeddings.shape[1]):
        raise ModelError(
            f"{printable(towers.text_file)} makes {embeddings.shape[1]} numbers of a text,"
            f" {printable(towers.image_file)} makes {wanted} of an image. They belong to different"
            " models: get both again."
        )
    weights = np.ascontiguousarray(embeddings.T) * np.float32(scale.scale)
    _add_last_layer(model, kind.image_output, weights, scale.bias)
    values: dict[str, Any] = {
        "name": printable(output.absolute().name),
        "labels": prompts.labels,
        "scores": kind.scores,
        "logits": _LOGITS,
        "embedding": _EMBEDDING,
        "licence": towers.licence,
    }
    origins = {
        **{name: origin for name, origin in card.origins.items() if name not in values},
        "labels": "--labels",
        "scores": "config.json: model_type",
        **({"licence": "the Hub"} if towers.licence != "unknown" else {}),
    }
    origin = {
        **towers.origin,
        "source": "words",
        "model": towers.name,
        "text_sha256": bundles.sha256(towers.text_file),
        "templates": "\n".join(prompts.templates),
    }
    read = ReadCard(replace(card.card, **values), origins)
    made = wrap.build(wrap.Source(towers.image_file, model, read, key, origin), output)
    for line in made.lines:
        if not line.endswith(("(--logits)", "(--embedding)")):  # chosen here, not by the user
            notify(line)
    return made.bundle


def _features(file: Path, model: onnx.ModelProto, output: str) -> int | None:
    """Return the length of an image tower's embeddings; None if it is not known before it runs.

    Raises:
        ModelError: the tower has no such output, or it is not one embedding per image.
    """
    values = {value.name: value for value in model.graph.output}
    if output not in values:
        raise ModelError(
            f"{printable(file)} returns {printable(', '.join(values))}; an image tower of such a"
            f" model returns {output}. Export it again, with its projection."
        )
    dims = values[output].type.tensor_type.shape.dim
    if values[output].type.tensor_type.HasField("shape") and len(dims) != 2:
        raise ModelError(
            f"{printable(file)}: {output} has {len(dims)} dimensions; it must be (images,"
            " features)."
        )
    return (dims[1].dim_value if dims else 0) or _inferred(file, output)


def _inferred(file: Path, output: str) -> int | None:
    """Return the length that follows from the graph's weights; None if it does not."""
    try:
        model = new_core().read_model(str(file))
        last = model.output(output).get_partial_shape()[1]
    except RuntimeError:  # OpenVINO's own; running the wrapped model will tell what is wrong
        return None
    return last.get_length() if last.is_static else None


def _add_last_layer(model: onnx.ModelProto, output: str, weights: Array, bias: float) -> None:
    """Let an image tower return scores instead of embeddings, in place.

    Args:
        model: the image tower.
        output: its output with one embedding (n, features) per image.
        weights: float32 (features, classes): the classes' embeddings times the scale.
        bias: what is added to every score.
    """
    from onnx import TensorProto, helper

    graph, added = model.graph, Nodes()
    at = added.node("Cast", [output], "classes/float32", to=TensorProto.FLOAT)
    at = added.node("LpNormalization", [at], _EMBEDDING, axis=1, p=2)
    matrix = added.weight("classes/weights", weights)
    at = added.node("MatMul", [at, matrix], "classes/cosines" if bias else _LOGITS)
    if bias:
        # One per class: NNCF corrects the biases of a quantised layer class by class.
        biases = np.full(weights.shape[1], bias, np.float32)
        added.node("Add", [at, added.weight("classes/bias", biases)], _LOGITS)
    graph.node.extend(added.nodes)
    graph.initializer.extend(added.weights)
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(_LOGITS, TensorProto.FLOAT, ["n", weights.shape[1]])
    )


def embed(towers: Towers, family: Family, prompts: Prompts, notify: Notify) -> Array:
    """Return the embedding of every label: float32 (labels, features), each of length 1.

    Those of several templates are averaged, and made length 1 again.

    Raises:
        UsageError: two labels are the same text to the model, or `tokenizers` is not installed.
        ModelError: a file of the folder is missing, damaged, or does not fit the others.
    """
    total: Array | None = None
    keys = [0] * len(prompts.labels)
    tower = None
    clock = time.monotonic()
    for number, template in enumerate(prompts.templates):
        texts = prompts.of(template)
        tokens = tokenize(towers.folder, family, texts)
        if tokens.cut:
            notify(
                f"note: {len(tokens.cut):,} of {len(texts):,} texts have more than"
                f" {family.length} tokens, the rest is ignored:"
                f' "{printable(texts[tokens.cut[0]], 60)}"'
            )
        keys = [hash((key, *row)) for key, row in zip(keys, tokens.ids, strict=True)]
        tower = tower or TextTower(towers.text_file, family)
        done = number * len(texts)
        for places, found in tower.embed(tokens):
            if total is None:
                total = np.zeros((len(texts), found.shape[1]), np.float32)
            total[places] += found
            done += len(places)
            if time.monotonic() - clock > _REPORT_S:
                clock = time.monotonic()
                notify(f"text tower: {done:,} of {len(texts) * len(prompts.templates):,} texts")
    _check_distinct(prompts, keys)
    assert total is not None
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    if not lengths.all():
        raise ModelError(f"{printable(towers.text_file)}: the templates' embeddings cancel out.")
    normalised: Array = total / lengths
    return normalised


def _check_distinct(prompts: Prompts, keys: list[int]) -> None:
    """Refuse labels that the model cannot tell apart: they would share their probability."""
    seen: dict[int, str] = {}
    for label, key in zip(prompts.labels, keys, strict=True):
        if (other := seen.setdefault(key, label)) != label:
            raise UsageError(
                f'--labels: "{printable(other, 60)}" and "{printable(label, 60)}" are the same text'
                " to this model. Delete one, or change its words."
            )


def _key(
    towers: Towers, prompts: Prompts, card: ReadCard, scale: scales.Scale, family: Family
) -> str:
    """Return a hash of everything that decides the model."""
    graphs = (towers.image_file, towers.text_file)
    files = [file for graph in graphs for file in wrap.files_of(graph, wrap.parse(graph))]
    if (tokenizer := towers.folder / "tokenizer.json").is_file():
        files.append(tokenizer)
    return bundles.key_of(
        files,
        _VERSION,
        serialization.to_plain(family),
        serialization.to_plain(prompts),
        asdict(card.card),
        (scale.scale, scale.bias),
    )


def _existing(output: Path, key: str, notify: Notify) -> Bundle:
    """Return the bundle at `output` if it is the one that was asked for."""
    if bundles.is_bundle(output):
        found = bundles.load(output)
        if found.card.origin.get("wrapped") == key:
            notify(f"{printable(output)} is here already")
            return found
        raise UsageError(
            f"--output {printable(output)} holds another model ({found.card.name},"
            f" {counted(len(found.card.labels), 'class')}). Remove it, or give another folder."
        )
    raise UsageError(f"--output {printable(output)} is there already. Give a new folder.")
