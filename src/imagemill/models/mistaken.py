"""What to type instead of a file or folder that is not what a command takes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from imagemill.errors import printable
from imagemill.models import published
from imagemill.system import userdirs

WEIGHTS: Final = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".th")
"""Suffixes of files with weights alone."""
LABELS: Final = "FILE has one label per line, in the order of the classes."
_CONFIG: Final = "config.json"
_CONFIG_KEYS: Final = ("model_type", "architectures", "pretrained_cfg", "architecture")
"""One of them is in every `config.json` of transformers and timm."""
_MAX_CONFIG_BYTES: Final = 16 * 2**20


def quoted(path: object) -> str:
    """Return a path as a shell takes it, on one line."""
    return printable(shlex.quote(str(path)))


def inside_model_folder(path: Path, flag: str = "--model ") -> str | None:
    """Return what is wrong with a part of a model folder: its `onnx/`, or an ONNX file in it, which
    do not say how images are prepared. None if it is no such part.

    Args:
        path: a file or a folder.
        flag: what goes before the folder in the command.
    """
    above = [path.parent, Path(os.path.normpath(path.parent / ".."))]
    for folder in above[:1] if path.is_dir() else above:
        if is_model_folder(folder) and path.exists():
            within = os.path.relpath(path if path.is_dir() else path.parent, folder)
            where = "" if within == "." else f" in {printable(within)}/"
            shown = printable(folder)
            return f"{shown} has {_CONFIG} and this network{where}. Use {flag}{quoted(folder)}."
    return None


def is_model_folder(folder: Path) -> bool:
    """Tell whether a folder has a `config.json` of transformers or timm."""
    try:
        if (folder / _CONFIG).stat().st_size > _MAX_CONFIG_BYTES:
            return False
        values = msgspec.json.decode((folder / _CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and any(key in values for key in _CONFIG_KEYS)


def for_wrap(typed: str, given: Mapping[str, object]) -> str | None:
    """Return what is wrong with what `imagemill wrap` is to wrap; None if it may be an ONNX file.

    Args:
        typed: what the user typed.
        given: fields of OnnxCard by name; None if not given. With mean, std and resize, a part of a
            model folder can be wrapped.
    """
    path, shown = userdirs.expand(typed), printable(typed)
    if path.is_dir():
        if is_model_folder(path) or (path / "card.json").is_file():
            return f"{shown} is a folder: use --model {quoted(typed)}."
        return inside_model_folder(path) or f"{shown} is a folder. Give an ONNX file."
    if typed.startswith("hf:"):
        return f"{shown} is a name of the Hugging Face Hub: use --model {quoted(typed)}."
    if not path.is_file():
        return f"{shown}: there is no such file."
    if path.suffix.lower() in WEIGHTS:
        return weights_file(path, typed)
    is_said = all(given.get(name) is not None for name in ("mean", "std", "resize"))
    has_card = path.with_suffix(".card.json").is_file()
    return None if is_said or has_card else inside_model_folder(path)


def weights_file(path: Path, typed: str) -> str:
    """Return how a file with weights becomes a model."""
    name = name_for(path.name)
    return (
        f"{printable(typed)} is a file with weights. Make a model of it: imagemill get-model {name}"
        f" --from {quoted(typed)} --labels FILE, then use --model {name}. {LABELS}"
    )


def name_for(text: str) -> str:
    """Return a model's name for a file, which no published model has.

    Example:
        >>> name_for("checkpoint_best.pth.tar")
        'checkpoint_best'
    """
    while (suffix := Path(text).suffix.lower()) in WEIGHTS:
        text = text[: -len(suffix)]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:100].strip("_.-") or "mine"
    return f"my-{name}" if published.find(name) is not None else name
