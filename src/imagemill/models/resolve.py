"""Find the model that `run --model` means.

what is typed                            where the model is
hf:owner/name[@revision]                 a repository of the Hugging Face Hub
net.onnx                                 an ONNX file
resnext101_32x4d, a name of your own     the models folder, or its publisher
folder                                   a bundle, or a folder of transformers or timm
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from imagemill.errors import DownloadError, ImagemillError, UsageError, printable
from imagemill.models import bundle as bundles
from imagemill.models import hub, mistaken, published
from imagemill.models.card import card_file
from imagemill.models.custom import wrap
from imagemill.models.folders import folder
from imagemill.models.folders.json_file import CONFIG
from imagemill.models.get import NAME, get, on_disk
from imagemill.models.listing import How, listing
from imagemill.records import Bundle
from imagemill.system import files, serialization, userdirs
from imagemill.system.messages import DownloadProgress, Notify

_HUB_PAGE: Final = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^?#]+)")


def resolve(
    model: str,
    models_dir: Path,
    *,
    notify: Notify = lambda _: None,
    progress: DownloadProgress | None = None,
) -> Bundle:
    """Return the bundle that `run --model` means; make it if it is not in the models folder.

    Args:
        model: the name of a model on disk, a bundle's folder, an ONNX file, a model folder, a
            repository of the Hub as `hf:owner/name`, or a published name.
        models_dir: one folder per model.

    Raises:
        UsageError: it is none of them. The message says what may have been meant.
        ModelError: as `get`, `hub.snapshot`, `wrap.bundle_for` and `folder.bundle_for`.
    """
    if hub.is_hub_name(model):
        return _from_hub(hub.snapshot(model, models_dir, notify, progress), models_dir, notify)
    path = userdirs.expand(model)
    if model.endswith(".onnx") and not path.is_dir():
        if not card_file(path).is_file() and (why := mistaken.inside_model_folder(path)):
            raise UsageError(why)
        if not path.is_file():
            raise UsageError(_unknown(model, path, models_dir))
        return wrap.bundle_for(path, models_dir, notify)
    if (
        re.fullmatch(NAME, model)
        and (found := on_disk(model, models_dir, explicit=False)) is not None
    ):
        return found
    if bundles.is_bundle(path):
        return bundles.load(path)
    if published.find(model) is not None:
        return _published(model, models_dir, notify, progress)
    if path.is_dir():
        return _from_folder(path, models_dir, notify)
    raise UsageError(_unknown(model, path, models_dir))


def get_from(
    name: str,
    source: str,
    models_dir: Path,
    *,
    given: Mapping[str, Any],
    notify: Notify = lambda _: None,
    progress: DownloadProgress | None = None,
) -> Bundle:
    """Return the bundle NAME of a model folder or a repository of the Hub; make it if missing.

    Args:
        name: of the bundle.
        source: a folder, or `hf:owner/name`. The Hub is asked for the newest commit.
        models_dir: one folder per model.
        given: fields of ModelCard by name, which replace what the folder says; None if not given.

    Raises:
        UsageError: the name cannot be used. ModelError: as `resolve`, or NAME is another model.
    """
    if not re.fullmatch(NAME, name):
        raise UsageError(mistaken.name_error(name))
    if published.find(name) is not None:
        raise UsageError(f"{name} is the name of published weights. Give another NAME.")
    if bundles.is_bundle(userdirs.expand(source)):
        raise UsageError(
            f"{printable(source)} is a model already: it has {bundles.CARD}. Use it as --model"
            f" {printable(source)}."
        )
    if hub.is_hub_name(source):
        found = hub.snapshot(source, models_dir, notify, progress, refresh=True)
        return _from_hub(found, models_dir, notify, name=name, given=given)
    return _from_folder(userdirs.expand(source), models_dir, notify, name=name, given=given)


def is_folder(source: str) -> bool:
    """Return whether `get-model NAME --from SOURCE` is for `get_from`."""
    return hub.is_hub_name(source) or userdirs.expand(source).is_dir()


def is_local(model: str, models_dir: Path) -> bool:
    """Return whether `resolve` needs no download of a published model."""
    return (
        hub.is_hub_name(model)
        or model.endswith(".onnx")
        or on_disk(model, models_dir, explicit=False) is not None
        or (userdirs.expand(model).is_dir() and published.find(model) is None)
    )


def _from_folder(
    path: Path,
    models_dir: Path,
    notify: Notify,
    *,
    name: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Bundle:
    """Return the bundle of a folder of transformers or timm."""
    if (cached := hub.cached_snapshot(path, models_dir, notify)) is not None:
        return _from_hub(cached, models_dir, notify, name=name, given=given)
    if not (path / CONFIG).is_file():
        if why := mistaken.inside_model_folder(path, "--model " if name is None else "--from "):
            raise UsageError(why)
        raise UsageError(
            f"{printable(path)} is a folder, but it has neither {bundles.CARD}, as folders"
            f" that imagemill made have, nor {CONFIG}, as folders of transformers and timm"
            f" have. {mistaken.ELSEWHERE}"
        )
    return folder.bundle_for(path, models_dir, notify, name=name, given=given)


def _from_hub(
    found: hub.Snapshot,
    models_dir: Path,
    notify: Notify,
    *,
    name: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Bundle:
    """Return the bundle of a repository's files. Messages name the repository, not its folder."""
    place, shown = printable(found.folder), f"{hub.PREFIX}{found.repo}"

    def tell(line: str) -> None:
        notify(line.replace(place, shown))

    origin = {**found.origin, "licence": found.licence}
    if (found.folder / CONFIG).is_file() or name or given:
        try:
            return folder.bundle_for(
                found.folder, models_dir, tell, name=name, origin=origin, given=given
            )
        except ImagemillError as error:
            error.args = (str(error).replace(place, shown),)
            raise
    made = wrap.bundle_for(found.folder / str(found.origin["file"]), models_dir, tell)
    card = replace(
        made.card,
        name=found.repo,
        licence=found.licence if made.card.licence == "unknown" else made.card.licence,
        origin={**found.origin, "wrapped": made.card.origin["wrapped"]},
    )
    files.write_whole(made.dir / bundles.CARD, serialization.encode(card))
    return replace(made, card=card)


def _published(
    model: str, models_dir: Path, notify: Notify, progress: DownloadProgress | None
) -> Bundle:
    try:
        return get(model, models_dir, notify=notify, progress=progress)
    except DownloadError as error:
        names = _installed(models_dir)
        if not names:
            raise
        verb = "is" if len(names) == 1 else "are"
        raise DownloadError(
            f"{error} {', '.join(names)} {verb} installed: use --model {names[0]}."
        ) from error


def _unknown(model: str, path: Path, models_dir: Path) -> str:
    """Return what to type instead of a model that does not exist."""
    shown = printable(model)
    if page := _HUB_PAGE.fullmatch(model):
        name = "/".join(page[1].strip("/").split("/")[:2])
        return f"--model {shown} is a web page. Type: --model {hub.PREFIX}{printable(name)}"
    if "://" in model:
        return f"--model {shown} is a URL. Download it, and give the file or folder."
    if path.is_file():
        if path.suffix.lower() in mistaken.WEIGHTS:
            return f"--model {mistaken.weights_file(path, model)}"
        return f"--model {mistaken.other_file(path, model)}"
    beside = mistaken.near(model)
    meant = mistaken.did_you_mean(beside)
    if path.suffix.lower() in (".onnx", *mistaken.WEIGHTS):
        return f"--model {shown}: there is no such file.{meant}"
    if hub.NAME.fullmatch(model):
        return (
            f"--model {shown} is not a folder.{meant} If you mean the repository of the Hugging"
            f" Face Hub, type: --model {hub.PREFIX}{shown}"
        )
    if "/" in model or "\\" in model or model.startswith("."):
        return f"--model {shown}: there is no such folder or file.{meant}"
    here = (row.name for row in listing(models_dir) if row.origin is not None)
    names = dict.fromkeys((*here, *published.ALIASES, *published.PUBLISHED))
    near = [name for name in sorted(names, key=len) if name.startswith(model.lower())][:3]
    near = near or difflib.get_close_matches(model.lower(), names, n=3, cutoff=0.6)
    meant = mistaken.did_you_mean(beside + near)
    return (
        f"No model is called {shown}.{meant} `imagemill models` lists the names; a folder, a file"
        " that ends in .onnx, or hf:owner/name works, too."
    )


def _installed(models_dir: Path) -> list[str]:
    """Name the models that need no download: sound bundles with trained weights, and what installed
    packages carry.
    """
    rows = [
        row for row in listing(models_dir) if row.licence != "none"
    ]  # as random weights have it
    return [row.name for how in (How.HERE, How.INSTALLED) for row in rows if row.how is how]
