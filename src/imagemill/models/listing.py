"""The rows of `imagemill models`: what is published, what is in the models folder, and how each can
run on this machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct

from imagemill.errors import ModelError
from imagemill.models import bundle as bundles
from imagemill.models import published
from imagemill.models.published import Published
from imagemill.records import Bundle

OWN: Final = "own"
"""Family of everything that is not published here."""
_FAMILIES: Final = {
    "efficientnet_lite": "EfficientNet-Lite",
    "tf_efficientnet_lite": "EfficientNet-Lite",
    "resnet": "ResNet",
    "wide_resnet": "ResNet",
    "resnext": "ResNeXt",
}
"""Start of an architecture's name → its family."""
_BYTES_PER_PARAMETER: Final = 4
_SHOWN_LABELS: Final = 3


class How(StrEnum):
    """What `run --model NAME` does first."""

    HERE = "here"
    """Nothing: the model is in the models folder."""
    DAMAGED = "damaged"
    """It is refused: the model in the models folder is damaged."""
    INSTALLED = "installed"
    """The model is built from the weights of an installed package."""
    PACKAGE = "package"
    """It is refused: the package with the weights is not installed."""
    DOWNLOAD = "download"
    """The weights are downloaded."""


class ModelRow(Struct, frozen=True):
    """One line of `imagemill models`."""

    name: str
    family: str
    architecture: str
    alias: str | None
    """A shorter name with the same meaning."""
    classes: int | None
    """0: the network has no classifier, only an embedding. None: not known."""
    labels: tuple[str, ...]
    """The first ones, of a model that is not published here."""
    top1: float | None
    top5: float | None
    licence: str
    parameters: int
    """0 if not known."""
    home: str
    how: How
    needs: str | None
    """What is missing, in words: a command, or the size of the download."""
    bytes_on_disk: int | None
    """Of the whole bundle; None if it is not in the models folder."""
    origin: str | None
    """What the bundle on disk was made from, in words; None if it is not in the models folder."""
    typed: str | None
    """What `--model` is for the file or folder that the bundle was made from; None: the name."""
    verified: bool | None
    """Whether its weights had the published hash; None if it is not in the models folder."""

    def matches(self, word: str) -> bool:
        """Return whether a word is part of what identifies the model, in upper or lower case."""
        texts = (self.name, self.family, self.architecture, self.alias, self.licence, self.origin)
        return any(word.lower() in text.lower() for text in texts if text)


def listing(models_dir: Path) -> list[ModelRow]:
    """Return what is published, by family, and then what else is in the models folder.

    A damaged bundle has a row that says so.
    """
    here = dict(_on_disk(models_dir))
    rows = [_row(entry.name, entry, here.pop(entry.name, None), models_dir) for entry in _sorted()]
    return rows + [
        _row(name, published.find(name), found, models_dir) for name, found in here.items()
    ]


def family_of(architecture: str) -> str:
    """Return the family of an architecture: `resnext50_32x4d` is a ResNeXt."""
    names = [name for name in _FAMILIES if architecture.startswith(name)]
    return _FAMILIES[names[0]] if names else OWN


def network_types(word: str) -> list[str]:
    """Return the types of networks of transformers that run from a folder or the Hub, if a word is
    part of their name: `vit` gives `deit`, `vit` and others.
    """
    from imagemill.models.folders.processors import MODEL_TYPES

    return sorted(name for name in MODEL_TYPES if word.lower() in name)


def missing_extras() -> list[str]:
    """Return those of the extras `hub` and `export` that are not installed."""
    packages = {"hub": ("huggingface_hub",), "export": ("torch", "timm", "transformers")}
    return [
        extra
        for extra, names in packages.items()
        if not all(importlib.util.find_spec(name) for name in names)
    ]


def _sorted() -> list[Published]:
    """Return the published models by family; within a family in the order of the catalogue."""
    families = list(dict.fromkeys(_FAMILIES.values()))
    return sorted(
        published.PUBLISHED.values(),
        key=lambda entry: families.index(family_of(entry.architecture)),
    )


def _on_disk(models_dir: Path) -> Iterator[tuple[str, Bundle | None]]:
    """Yield each bundle of a folder with its name; None in place of a damaged one."""
    if not models_dir.is_dir():
        return
    for folder in sorted(models_dir.iterdir()):
        if not folder.name.startswith(".") and bundles.is_bundle(folder):  # a half made one may be
            # closed to other users
            try:
                yield folder.name, bundles.load(folder)
            except ModelError:
                yield folder.name, None


def _row(name: str, entry: Published | None, found: Bundle | None, models_dir: Path) -> ModelRow:
    folder = models_dir / name
    is_here = found is not None or bundles.is_bundle(folder)
    card = found.card if found else None
    origin = bundles.describe_origin(card) if card else "damaged" if is_here else None
    known = published.PUBLISHED.get(str(card.origin.get("published"))) if card else entry
    architecture = card.architecture if card else name.partition(".")[0]
    how, needs = _how(entry, is_here=is_here, is_sound=found is not None)
    aliases = (alias for alias, full in published.ALIASES.items() if full == name)
    return ModelRow(
        name=name,
        family=family_of(architecture),
        architecture=architecture,
        alias=next(aliases, None),
        classes=len(card.labels) if card else 1000 if entry else None,
        labels=() if card is None or entry else card.labels[:_SHOWN_LABELS],
        top1=card.top1 if card else entry.top1 if entry else None,
        top5=known.top5 if known else None,
        licence=card.licence if card else entry.licence if entry else "unknown",
        parameters=card.parameters if card else entry.parameters if entry else 0,
        home=entry.home if entry else "",
        how=how,
        needs=needs,
        bytes_on_disk=_bytes(folder) if is_here else None,
        origin=origin,
        typed=bundles.typed_source(found) if found else None,
        verified=card.origin.get("verified") is True if card else False if is_here else None,
    )


def _how(entry: Published | None, *, is_here: bool, is_sound: bool) -> tuple[How, str | None]:
    if is_here or entry is None:
        return (How.HERE if is_sound else How.DAMAGED), None
    if entry.package is None:
        megabytes = _BYTES_PER_PARAMETER * entry.parameters / 1e6
        return How.DOWNLOAD, f"downloads {megabytes:,.0f} MB"
    if importlib.util.find_spec(entry.package) is not None:
        return How.INSTALLED, None
    return How.PACKAGE, f"pip install {entry.package.replace('_', '-')}"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
