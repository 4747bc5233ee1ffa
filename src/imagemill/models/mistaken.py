"""What to type instead of a file or folder that is not what a command takes."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from imagemill.errors import ModelError, counted, printable, quoted
from imagemill.models import published
from imagemill.models.folders import json_file
from imagemill.models.folders.json_file import CONFIG
from imagemill.system import userdirs

WEIGHTS: Final = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".th")
"""Suffixes of files with weights alone."""
ELSEWHERE: Final = "Unpack an archive. Export a model of another framework to ONNX."
LABELS: Final = "FILE has one label per line, in the order of the classes."
_CONFIG_KEYS: Final = ("model_type", "architectures", "pretrained_cfg", "architecture")
"""One of them is in every `config.json` of transformers and timm."""
_MAX_ENTRIES: Final = 10_000
"""Of a folder that is searched for names."""
_MAX_NEAR: Final = 3
_SHOWN_LABELS: Final = 5


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
            return f"{shown} has {CONFIG} and this network{where}. Use {flag}{quoted(folder)}."
    return None


def is_model_folder(folder: Path) -> bool:
    """Tell whether a folder has a `config.json` of transformers or timm."""
    try:
        values = json_file.read(folder / CONFIG).values
    except ModelError:
        return False
    return any(key in values for key in _CONFIG_KEYS)


def for_wrap(typed: str, given: Mapping[str, object]) -> str | None:
    """Return what is wrong with what `imagemill wrap` is to wrap; None if it may be an ONNX file.

    Args:
        typed: what the user typed.
        given: fields of ModelCard by name; None if not given. With mean, std and resize, a part of
            a model folder can be wrapped.
    """
    path, shown = userdirs.expand(typed), printable(typed)
    if path.is_dir():
        if is_model_folder(path) or (path / "card.json").is_file():
            return f"{shown} is a folder: use --model {quoted(typed)}."
        return inside_model_folder(path) or f"{shown} is a folder. Give an ONNX file."
    if typed.startswith("hf:"):
        return f"{shown} is a name of the Hugging Face Hub: use --model {quoted(typed)}."
    if not path.is_file():
        return f"{shown}: there is no such file.{did_you_mean(near(typed))}"
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
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", _stem(text))[:100].strip("_.-") or "mine"
    return f"my-{name}" if published.find(name) is not None else name


def label_count(
    where: str,
    labels: Sequence[str],
    model: str,
    classes: int,
    own: Sequence[str] | None = None,
) -> str:
    """Return what is wrong with labels that do not fit a model.

    Args:
        where: the file or the key that the labels are from; `--labels FILE` if that was given.
        labels: as they were given.
        model: what the message calls the model.
        classes: how many it has.
        own: labels that the model's own files name.

    Example:
        >>> label_count("two.txt", "ab", "best.onnx", 3)
        'two.txt has 2 labels, but best.onnx has 3 classes. Give one label per class, in the order…'
    """
    counts = (counted(len(labels), "label"), counted(classes, "class"))
    is_flag, place = where.startswith("--labels"), where.removeprefix("--labels ")
    if place == "--labels":
        place = "the file of --labels"
    text = (
        f"{printable(place)} has {counts[0]}, but {model} has {counts[1]}. Give one label per"
        " class, in the order of the classes"
    )
    if not own or len(own) != classes or tuple(own) == tuple(labels):
        return f"{text}." if is_flag else f"{text}, with --labels FILE."
    more = ", …" if len(own) > _SHOWN_LABELS else ""
    shown = ", ".join(printable(label, 40) for label in own[:_SHOWN_LABELS])
    return f"{text}, or omit --labels: it names them itself ({shown}{more})."


def name_error(name: str) -> str:
    """Return what is wrong with a model's name, and a name to use instead."""
    return (
        f"{printable(name)} cannot be the name of a model. Choose a name of letters, digits, _, ."
        f" and -, for example {name_for(name)}."
    )


def other_file(path: Path, typed: str) -> str:
    """Return what to type instead of a file that is no model and has no weights."""
    shown, suffix = printable(typed), path.suffix.lower()
    if suffix == ".onnx":
        return f"{shown}: its name must end in .onnx, in small letters. Rename it."
    if suffix in (".txt", ".csv"):
        return (
            f"{shown} is a text file, not a model. A file of labels is given to `imagemill"
            f" get-model` or `imagemill wrap`: --labels {quoted(typed)}."
        )
    if suffix == ".json" and (
        path.with_name("card.json").is_file() or is_model_folder(path.parent)
    ):
        return f"{shown} describes a model. Give its folder: --model {quoted(path.parent)}."
    return (
        f"{shown} is a file, but not a model: a model is an ONNX file (.onnx), a folder, or"
        f" hf:owner/name. {ELSEWHERE} Files with weights ({', '.join(WEIGHTS)}) become one with"
        " imagemill get-model NAME --from FILE."
    )


def near(typed: str) -> list[str]:
    """Return the models beside a path that does not exist whose names are like its name: `the
    folder my-vit`, `the file best.onnx`.
    """
    path = userdirs.expand(typed)
    wanted, found = path.name.lower(), dict[str, list[str]]()
    head = typed[: len(typed) - len(path.name)] if typed.endswith(path.name) else ""
    try:
        with os.scandir(path.parent) as entries:
            for entry in itertools.islice(entries, _MAX_ENTRIES):
                if kind := _kind(entry):
                    text = f"the {kind} {printable(head + entry.name)}"
                    for key in {entry.name.lower(), _stem(entry.name).lower()}:
                        found.setdefault(key, []).append(text)
    except OSError:
        return []
    keys = [wanted] if wanted in found else difflib.get_close_matches(wanted, found, cutoff=0.75)
    return sorted({text for key in keys for text in found[key]})[:_MAX_NEAR]


def did_you_mean(names: Sequence[str]) -> str:
    """Return a question that ends a message; nothing if there are no names."""
    return f" Did you mean {' or '.join(names)}?" if names else ""


def _kind(entry: os.DirEntry[str]) -> str | None:
    """Return what an entry is if it may be a model or become one."""
    if entry.is_dir():
        folder = Path(entry.path)
        is_model = (folder / "card.json").is_file() or is_model_folder(folder)
        return "folder" if is_model else None
    return "file" if entry.name.lower().endswith((".onnx", *WEIGHTS)) else None


def _stem(name: str) -> str:
    """Return a file's name without suffixes of models."""
    while (suffix := Path(name).suffix).lower() in (".onnx", *WEIGHTS):
        name = name[: -len(suffix)]
    return name
