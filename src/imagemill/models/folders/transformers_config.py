"""What a folder of transformers or optimum says: `config.json` and `preprocessor_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from imagemill.models.card import ModelCard, ReadCard
from imagemill.models.folders import json_file
from imagemill.models.folders.json_file import PREPROCESSOR, PROCESSOR, Document, numbered_labels
from imagemill.models.folders.processors import MODEL_TYPES, PROCESSORS, read_processor
from imagemill.records import Scores

_HEADLESS: Final = re.compile(r"\w+(?:Model|WithProjection|ForPreTraining)")
"""Classes of networks without a classifier."""
_PLAIN_RESNET: Final[Mapping[str, object]] = {
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
"""Settings of torchvision's ResNet. They are the defaults of transformers."""
_NEEDED: Final = ("resize", "mean", "std")
"""Flags that replace a processor."""
_FLAGS: Final = "--resize, --mean and --std"


class Config(Struct, frozen=True):
    """The keys of `config.json` that are read. None: missing or null."""

    model_type: str | None = None
    architectures: tuple[str, ...] | None = None
    id2label: dict[str, str | int] | None = None
    problem_type: str | None = None
    image_processor_type: str | None = None


class Types(Struct, frozen=True):
    """The keys that name the class of a processor."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None


def read_transformers(folder: Path, document: Document, given: Mapping[str, Any]) -> ReadCard:
    """Return what the files of a folder say.

    Args:
        folder: holds the other files.
        document: its `config.json`.
        given: fields of the card that the caller knows. With resize, mean and std no processor is
            needed.

    Raises:
        ModelError: a value makes no sense, or the class of the processor is missing or unknown.
    """
    config = document.record(Config)
    if all(given.get(name) is not None for name in _NEEDED):
        read = ReadCard(ModelCard())
    else:
        read = _read_processors(folder, document, config)
    return _with_outputs(read, document, config)


def architecture(document: Document) -> str:
    """Return the class of the network; empty if there is none."""
    return next(iter(document.record(Config).architectures or ()), "")


def is_plain_resnet(document: Document) -> bool:
    """Return whether the network is the ResNet that imagemill builds, not a variant of it whose
    parameters have the same shapes.
    """
    values = document.values
    return values.get("model_type") == "resnet" and all(
        values.get(key, plain) == plain for key, plain in _PLAIN_RESNET.items()
    )


def _with_outputs(read: ReadCard, document: Document, config: Config) -> ReadCard:
    """Fill in what the outputs of the network are. Raises: ModelError."""
    name = next(iter(config.architectures or ()), "")
    if _HEADLESS.fullmatch(name):
        return read.plus({"logits": "none"}, document.origin("architectures"))
    if config.id2label:
        labels = numbered_labels(document, "id2label", config.id2label)
        read = read.plus({"labels": labels}, document.origin("id2label"))
    match config.problem_type:
        case "multi_label_classification":
            read = read.plus({"scores": Scores.SIGMOID}, document.origin("problem_type"))
        case "single_label_classification" | None:
            pass
        case other:
            raise document.error(
                f"problem_type is {other[:100]!r}; it must be single_label_classification or"
                " multi_label_classification"
            )
    return read


def _read_processors(folder: Path, document: Document, config: Config) -> ReadCard:
    """Return what the files of a folder say about how images are prepared.

    Raises:
        ModelError: no file does, or the class of a processor is unknown, or two files disagree.
            Versions of transformers disagree which of them counts.
    """
    found = []
    if (file := json_file.inside(folder, PREPROCESSOR)) is not None:
        found.append(json_file.read(file))
    if (file := json_file.inside(folder, PROCESSOR)) is not None and "image_processor" in (
        whole := json_file.read(file)
    ).values:
        found.append(whole.inner("image_processor"))
    if not found:
        raise document.error(
            f"{PREPROCESSOR} is missing beside it, so how images are prepared is not known. Copy it"
            " from where the model is from. If you know the values, type: imagemill get-model NAME"
            f" --from FOLDER with {_FLAGS}"
        )
    read, *others = [read_processor(item, _class_of(item, document, config)) for item in found]
    if any(other.card != read.card for other in others):
        raise document.error(
            f"{PREPROCESSOR} and {PROCESSOR} beside it prepare images differently. Remove the one"
            " that the model was not trained with"
        )
    return read


def _class_of(found: Document, document: Document, config: Config) -> str:
    """Return the name of a processor among `PROCESSORS`.

    Args:
        found: the processor's document.
        document: `config.json`, which names the class if the processor's document does not.
        config: its keys.

    Raises:
        ModelError: its class is unknown.
    """
    types = found.record(Types)
    name, place = types.image_processor_type or types.feature_extractor_type, found
    if name is None:
        name, place = config.image_processor_type, document
    if name is None and config.model_type is not None:
        if config.model_type in MODEL_TYPES:
            return MODEL_TYPES[config.model_type]
        raise document.error(
            f"model_type is {config.model_type[:100]!r}, whose image processor is not known, and"
            f" {found.file.name} has no image_processor_type. Write it there. Known:"
            f" {', '.join(PROCESSORS)}, each followed by ImageProcessor"
        )
    if name is None:
        raise found.error(
            "image_processor_type is missing, and config.json has no model_type. Write one of them"
        )
    short = re.sub("(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?$", "", name)
    if short not in PROCESSORS:
        raise place.error(
            f"the image processor {name[:100]!r} is not known, so how images are prepared is not"
            f" either. If you know the values, type: imagemill get-model NAME --from FOLDER with"
            f" {_FLAGS}. Known: {', '.join(PROCESSORS)}, each followed by ImageProcessor"
        )
    return short
