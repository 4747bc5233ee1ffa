"""Find the two towers of a CLIP or SigLIP model: in a folder, or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from imagemill.errors import ModelError, UsageError, printable
from imagemill.models import hub
from imagemill.models.folders.json_file import CONFIG, PREPROCESSOR, PROCESSOR, WEIGHTS
from imagemill.models.zero_shot.text_tower import load_library
from imagemill.system import userdirs
from imagemill.system.messages import DownloadProgress, Notify

_TEXTS: Final = (
    *(CONFIG, PREPROCESSOR, PROCESSOR),
    *("tokenizer.json", "tokenizer_config.json"),
)
_IMAGE: Final = "vision_model.onnx"
_TEXT: Final = "text_model.onnx"


class Towers(Struct, frozen=True):
    """A folder with both towers of a model, and where it came from."""

    folder: Path
    name: str
    """What the user typed, with the commit if it is a repository of the Hub."""
    licence: str = "unknown"
    origin: Mapping[str, str | int | bool | None] = {}
    """What the Hub says about the files."""

    @property
    def image_file(self) -> Path:
        """The ONNX file of the image tower."""
        return self._file(_IMAGE)

    @property
    def text_file(self) -> Path:
        """The ONNX file of the text tower."""
        return self._file(_TEXT)

    def _file(self, name: str) -> Path:
        for file in (self.folder / "onnx" / name, self.folder / name):
            if file.is_file():
                return file
        raise ModelError(_missing(self.name, name))


def find(
    model: str,
    models_dir: Path,
    notify: Notify,
    progress: DownloadProgress | None,
    *,
    with_scale: bool = True,
) -> Towers:
    """Return the towers that `imagemill classes MODEL` means.

    Args:
        model: `hf:owner/name[@revision]`, or a folder.
        models_dir: where the Hub's files are kept.
        with_scale: whether a file that holds the scale is downloaded too.

    Raises:
        UsageError: there is no such folder, or a package is not installed.
        ModelError: the repository has no such towers.
        DownloadError: it cannot be downloaded.
    """
    load_library()  # before hundreds of megabytes are downloaded in vain

    def choose(repo: str, files: Mapping[str, hub.HubFile]) -> list[str]:
        return hub_files(repo, files, with_scale=with_scale)

    if hub.is_hub_name(model):
        found = hub.snapshot(model, models_dir, notify, progress, choose=choose)
        return Towers(found.folder, found.name, found.licence, found.origin)
    folder = userdirs.expand(model)
    if folder.is_dir():
        cached = hub.cached_snapshot(folder, models_dir, notify, choose=choose)
        if cached is not None:
            return Towers(cached.folder, cached.name, cached.licence, cached.origin)
        return Towers(folder, str(folder.absolute()))
    shown = printable(model)
    if hub.NAME.fullmatch(model):
        raise UsageError(
            f"{shown} is not a folder. If you mean the repository of the Hugging Face Hub, type"
            f" {hub.PREFIX}{shown}"
        )
    raise UsageError(f"{shown}: there is no such folder.")


def hub_files(repo: str, files: Mapping[str, hub.HubFile], *, with_scale: bool) -> list[str]:
    """Return the files of a repository that classes in words need, the image tower last.

    Raises:
        ModelError: the repository has no such towers.
    """
    towers = []
    for name in (_TEXT, _IMAGE):
        place = next((place for place in (f"onnx/{name}", name) if place in files), None)
        if place is None:
            raise ModelError(_missing(f"hf:{repo}", name))
        towers += [*(other for other in files if other.startswith(f"{place}_data")), place]
    holders = [name for name in files if name == WEIGHTS or Path(name).match("onnx/model*.onnx")]
    smallest = sorted(holders, key=lambda name: files[name].size)[: 1 if with_scale else 0]
    return [*(name for name in _TEXTS if name in files), *smallest, *towers]


def _missing(model: str, name: str) -> str:
    return (
        f"{printable(model)} has no onnx/{name}. Classes in words need a model whose towers are two"
        " ONNX files, such as hf:Xenova/clip-vit-base-patch32."
    )
