"""Make a classifier from a CLIP or SigLIP model and a list of labels.

    labels × templates ─► text tower, once ─► one normalised embedding per label
                                                       │
    image tower ─► image embedding ─► normalise ─► MatMul ─► scores

The result is an ordinary bundle. Its weights depend on labels and templates, so other labels or
templates are another model.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from imagemill.errors import ModelError, UsageError, counted, printable
from imagemill.models import bundle as bundles
from imagemill.models.card import ReadCard
from imagemill.models.custom import wrap
from imagemill.models.folders import json_file
from imagemill.models.folders.transformers_config import read_transformers
from imagemill.models.zero_shot import last_layer
from imagemill.models.zero_shot import scale as scales
from imagemill.models.zero_shot.family import Family, read_family
from imagemill.models.zero_shot.prompts import Prompts
from imagemill.models.zero_shot.text_tower import TextTower, tokenize
from imagemill.models.zero_shot.towers import Towers
from imagemill.records import Bundle, Scores
from imagemill.system import serialization
from imagemill.system.messages import Notify

Array = NDArray[np.float32]

_VERSION: Final = 1
"""Of the way from texts to weights."""
_PREFIX: Final = "classes/"
"""Of the tensors of the last layer."""
_REPORT_S: Final = 10.0
_WITH_DATA_BESIDE: Final = 2**26
"""Bytes. A larger graph holds its weights itself, and is not searched for files beside it."""
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
    model = wrap.load(towers.image_file)
    wanted = last_layer.features(towers.image_file, model, kind.image_output)
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
    last_layer.add(model, kind.image_output, weights, scale.bias)
    values: dict[str, Any] = {
        "name": printable(output.absolute().name),
        "labels": prompts.labels,
        "scores": kind.scores,
        "logits": last_layer.LOGITS,
        "embedding": last_layer.EMBEDDING,
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
    files = [towers.folder / "tokenizer.json"]
    for graph in (towers.image_file, towers.text_file):
        files.append(graph)
        if graph.stat().st_size < _WITH_DATA_BESIDE:
            names = wrap.external_files(graph, wrap.parse(graph))
            files += [graph.parent / name for name in names]
    values = [
        _VERSION,
        [bundles.sha256(file) for file in files if file.is_file()],
        serialization.to_plain(family),
        prompts.labels,
        prompts.templates,
        asdict(card.card),
        (scale.scale, scale.bias),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


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
