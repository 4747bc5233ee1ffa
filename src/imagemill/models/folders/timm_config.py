"""How timm prepares an image: `config.json` with `pretrained_cfg`, as a `ModelCard`.

This follows `resolve_data_config` and `transforms_imagenet_eval` of timm 1.0.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from imagemill.errors import counted, printable
from imagemill.models.card import MAX_SIDE, ModelCard, ReadCard, as_size
from imagemill.models.folders.json_file import Document, numbered_labels
from imagemill.models.folders.processors import Mean, Number, Pair, Positive, Side, three
from imagemill.models.labels import MAX_LABELS, check_labels, imagenet_labels
from imagemill.records import Centre, Interpolation

_CROPPED: Final = 0.875
"""timm's default for `crop_pct`."""


class Pretrained(Struct, frozen=True):
    """`pretrained_cfg`. None: missing or null."""

    input_size: tuple[Side, Side, Side] | None = None
    fixed_input_size: bool | None = None
    interpolation: Interpolation | None = None
    crop_pct: Annotated[float, Meta(ge=0, le=100)] | None = None
    crop_mode: Literal["center", "squash", "border", ""] | None = None
    mean: tuple[Number, ...] | None = None
    std: tuple[Positive, ...] | None = None
    num_classes: Annotated[int, Meta(ge=0, le=MAX_LABELS)] | None = None
    label_names: tuple[str, ...] | dict[str, str] | None = None
    label_descriptions: dict[str, str] | None = None
    license: str | None = None
    architecture: str | None = None


class ModelArguments(Struct, frozen=True):
    """`model_args`: how the model was built."""

    img_size: Side | Pair | None = None
    in_chans: Side | None = None


class Config(Struct, frozen=True):
    """`config.json` without `pretrained_cfg`."""

    architecture: str | None = None
    num_classes: Annotated[int, Meta(ge=0, le=MAX_LABELS)] | None = None
    label_names: tuple[str, ...] | dict[str, str] | None = None
    label_descriptions: dict[str, str] | None = None
    labels: tuple[str, ...] | dict[str, str] | None = None
    model_args: ModelArguments | None = None


def is_timm(document: Document) -> bool:
    """Return whether a `config.json` is timm's."""
    values = document.values
    return "pretrained_cfg" in values or ("architecture" in values and "input_size" in values)


def architecture(document: Document) -> str:
    """Return timm's name of the architecture, without the tag; empty if there is none."""
    name = document.record(Config).architecture or _pretrained(document)[1].architecture or ""
    return name.partition(".")[0]


def plain_architecture(document: Document) -> str:
    """Return the name of the architecture; empty if it was built with arguments that change it."""
    arguments = document.values.get("model_args") or {}
    plain = {"in_chans": 3, "global_pool": "avg"}
    changed = any(
        key not in plain or value != plain[key]
        for key, value in arguments.items()
        if key not in ("num_classes", "img_size")
    )
    return "" if changed else architecture(document)


def read_timm(document: Document) -> ReadCard:
    """Return what a timm folder's `config.json` says.

    Raises:
        ModelError: a value makes no sense.
    """
    config = document.record(Config)
    inner, pretrained = _pretrained(document)
    read = ReadCard(ModelCard(centre=Centre.TORCHVISION), {"centre": "timm"})

    def take(*keys: str, **found: Any) -> None:
        """Take fields over; `keys` are those that they were read from."""
        nonlocal read
        said = [key for key in keys if getattr(pretrained, key)]
        origin = inner.origin(*said) if said else "timm's default"
        try:
            read = read.plus(found, origin)
        except ValueError as error:
            raise document.error(f"{inner.prefix}{keys[0]}: {error}") from None

    channels, height, width = _input_size(document, config, pretrained)
    share = pretrained.crop_pct or _CROPPED
    scaled = math.floor(width / share), math.floor(height / share)
    if not 1 <= min(scaled) <= max(scaled) <= MAX_SIDE:
        raise document.error(f"{inner.prefix}crop_pct is {share:g}; it must be about 1")
    take("input_size", size=as_size(width, height))
    resize: int | str = scaled[0]
    match pretrained.crop_mode:
        case "squash":
            resize = f"{scaled[0]}x{scaled[1]}"
        case "border":
            resize = f"pad {scaled[0]}x{scaled[1]}"
        case _ if width != height:
            raise document.error(
                f"{inner.prefix}input_size is {width}×{height} with crop_mode center, which is"
                " supported for square inputs only"
            )
    take("input_size", "crop_pct", "crop_mode", resize=resize)
    take("interpolation", interpolation=pretrained.interpolation or Interpolation.BICUBIC)
    default_mean, default_std = Mean.IMAGENET.value
    mean = three(document, "mean", pretrained.mean or default_mean, channels)
    take("mean", scale=1, mean=mean)
    take("std", std=three(document, "std", pretrained.std or default_std, channels))
    if pretrained.crop_mode == "border":
        levels = [min(255, max(0, round(255 * item))) for item in mean]
        take("mean", fill="#" + "".join(f"{item:02x}" for item in levels))
    if pretrained.license:
        take("license", licence=pretrained.license)
    count = pretrained.num_classes if config.num_classes is None else config.num_classes
    if count == 0:
        take("num_classes", logits="none")
    elif (found := _labels(document, config, inner, pretrained, count)) is not None:
        names, origin = found
        read = read.plus({"labels": names}, origin)
    return read


def _pretrained(document: Document) -> tuple[Document, Pretrained]:
    """Return `pretrained_cfg`. Old files have its keys at the top."""
    inner = document.inner("pretrained_cfg") if "pretrained_cfg" in document.values else document
    return inner, inner.record(Pretrained)


def _input_size(document: Document, config: Config, pretrained: Pretrained) -> tuple[int, int, int]:
    """Return channels, height and width. `model_args` counts as in timm."""
    channels, height, width = pretrained.input_size or (3, 224, 224)
    arguments = config.model_args or ModelArguments()
    if arguments.img_size and pretrained.fixed_input_size:
        side = arguments.img_size
        height, width = (side, side) if isinstance(side, int) else side
    channels = arguments.in_chans or channels
    if channels not in (1, 3):
        raise document.error(f"the model takes {channels} channels; images have 3, or 1")
    return channels, height, width


def _labels(
    document: Document,
    config: Config,
    inner: Document,
    pretrained: Pretrained,
    count: int | None,
) -> tuple[tuple[str, ...], str] | None:
    """Return the labels and where they came from; None: the classes have no names.

    A name is replaced by its description if there is one. Without names, 1,000 classes are those of
    ImageNet-1k, as in timm.
    """
    names, place, key = config.label_names or config.labels, document, "label_names"
    if not names:
        names, place = pretrained.label_names, inner
    if not names:
        if count == 1000:
            return imagenet_labels(), "ImageNet-1k, as timm takes 1,000 classes to be"
        return None
    if isinstance(names, dict):
        names = numbered_labels(place, key, names)
    if count is not None and count != len(names):
        raise document.error(f"{key} has {counted(len(names), 'label')}; num_classes is {count:,}")
    descriptions = config.label_descriptions or pretrained.label_descriptions or {}
    described = [descriptions.get(name, name) for name in names]
    keys = (key, "label_descriptions") if descriptions else (key,)
    where = f"{printable(place.file)}: {key}"
    return check_labels(where, described, may_be_blank=True), place.origin(*keys)
