"""The rows of `imagemill models`: what is published, and what is in the models folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imagemill.errors import ModelError
from imagemill.models import bundle as bundles
from imagemill.models import published
from imagemill.models.published import Published
from imagemill.records import Bundle


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `imagemill models`."""

    name: str
    architecture: str
    top1: float | None
    top5: float | None
    licence: str
    parameters: int
    home: str
    bytes_on_disk: int | None
    """Of the whole bundle; None where it is not here."""
    origin: str | None
    """What the bundle on disk was made from, in words; None where it is not here."""
    verified: bool | None
    """Whether its weights had the published hash; None where it is not here."""


def listing(models_dir: Path) -> list[Row]:
    """List what is published, and what else is in the models folder; damaged bundles are listed as
    such.
    """
    here: dict[str, Bundle | str] = {}
    if models_dir.is_dir():
        for folder in sorted(models_dir.iterdir()):
            if bundles.is_bundle(folder) and not folder.name.startswith("."):  # half made
                try:
                    here[folder.name] = bundles.load(folder)
                except ModelError:
                    here[folder.name] = "damaged"
    rows = []
    for entry in published.PUBLISHED.values():
        rows.append(_row(entry.name, entry, models_dir, here.pop(entry.name, None)))
    return rows + [
        _row(name, published.find(name), models_dir, bundle) for name, bundle in here.items()
    ]


def _row(name: str, entry: Published | None, models_dir: Path, bundle: Bundle | str | None) -> Row:
    size = (
        sum(file.stat().st_size for file in (models_dir / name).rglob("*") if file.is_file())
        if bundle is not None
        else None
    )
    home = entry.home if entry else ""
    if isinstance(bundle, Bundle):
        card = bundle.card
        known = published.PUBLISHED.get(str(card.origin.get("published")))
        top5 = known.top5 if known else None
        verified = card.origin.get("verified") is True
        return Row(
            name,
            card.architecture,
            card.top1,
            top5,
            card.licence,
            card.parameters,
            home,
            size,
            bundles.describe_origin(card),
            verified,
        )
    architecture = name.partition(".")[0]
    return Row(
        name,
        architecture,
        entry.top1 if entry else None,
        entry.top5 if entry else None,
        entry.licence if entry else "unknown",
        entry.parameters if entry else 0,
        home,
        size,
        bundle,
        None if bundle is None else False,
    )
