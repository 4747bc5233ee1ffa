"""Find the model that `run --model` means."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill.errors import DownloadError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import published
from imagemill.models.custom import wrap
from imagemill.models.get import NAME, get, on_disk
from imagemill.models.listing import listing
from imagemill.records import Bundle
from imagemill.system import userdirs

if TYPE_CHECKING:
    from imagemill.models.checkpoints import download

Say = Callable[[str], None]
"""Takes one line for the user."""


def _silent(_: str) -> None:
    """Say nothing."""


def resolve(
    model: str, models_dir: Path, *, say: Say = _silent, progress: download.Progress | None = None
) -> Bundle:
    """Find the bundle that `run --model` means: a name on disk, a bundle's folder, an ONNX file
    with its card, or a published name, which is fetched.

    Raises:
        UsageError: it is none of them.
        ModelError: as `get`.
    """
    path = userdirs.expand(model)
    if model.endswith(".onnx") and not path.is_dir():
        return wrap.bundle_for(path, models_dir, say)
    if (
        re.fullmatch(NAME, model)
        and (found := on_disk(model, models_dir, explicit=False)) is not None
    ):
        return found
    if bundles.is_bundle(path):
        return bundles.load(path)
    if path.is_dir() and published.find(model) is None:
        raise UsageError(
            f"--model {model} is a folder, but not a model bundle: it has no {bundles.CARD}."
        )
    try:
        return get(model, models_dir, say=say, progress=progress)
    except DownloadError as error:
        names = _installed(models_dir)
        if not names:
            raise
        verb = "is" if len(names) == 1 else "are"
        raise DownloadError(
            f"{error} {', '.join(names)} {verb} installed: use --model {names[0]}."
        ) from error


def _installed(models_dir: Path) -> list[str]:
    """Name the models that need no download: sound bundles with trained weights, and what installed
    packages carry.
    """
    here = {row.name: row for row in listing(models_dir) if row.origin is not None}
    names = [
        name for name, row in here.items() if row.origin != "damaged" and row.licence != "none"
    ]  # as random weights have it
    for entry in published.PUBLISHED.values():
        package = entry.home.removeprefix("package:").partition("/")[0]
        if (
            entry.home.startswith("package:")
            and entry.name not in here
            and importlib.util.find_spec(package) is not None
        ):
            names.append(entry.name)
    return names
