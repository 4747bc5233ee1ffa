"""Options that several commands have, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from imagemill.runner.settings import GROUPS, SETTINGS, SHORT, Setting

Call: TypeAlias = Callable[[argparse.Namespace], int]
"""Does what a command is for, and returns the exit code."""
Command: TypeAlias = Callable[[str, Call, str], argparse.ArgumentParser]
"""Adds a command to the parser: its name, what it calls, and its help."""

MODELS_DIR: Final = {"models_dir": SETTINGS["models_dir"]}
ACCESS: Final = {name: SETTINGS[name] for name in ("moved", "user_agent")}
"""Of commands that read the images of a job again."""
JOB: Final[Mapping[str, Any]] = {"metavar": "DIR", "help": "output folder or URL of a job"}
"""Of the argument `dir`."""
JSON: Final[Mapping[str, Any]] = {"action": "store_true", "help": "print one JSON object"}
"""Of `--json`."""


def add_settings(sub: argparse.ArgumentParser, settings: Mapping[str, Setting]) -> None:
    """Add the options of some settings, in groups if they are many."""
    are_many = len(settings) > 12
    for title, names in GROUPS.items():
        named = [name for name in names if name in settings]
        group = sub.add_argument_group(title) if named and title and are_many else sub
        for name in named:
            setting = settings[name]
            is_option = setting.flag.startswith("-")
            options: dict[str, Any] = {
                "dest": name if is_option else None,
                "help": setting.help,
                "metavar": setting.metavar if is_option else setting.flag,
                "type": setting.kind.parse,
                "action": "append" if setting.kind.is_list and not setting.options else None,
            }
            given = {key: value for key, value in options.items() if value is not None}
            flags = [SHORT[name]] if name in SHORT else []
            flags.append(setting.flag if is_option else name)
            group.add_argument(*flags, **given, **setting.options)


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() else text


_PREPROCESSING: Final[Mapping[str, Mapping[str, Any]]] = {
    "mean": {
        "type": float,
        "nargs": 3,
        "metavar": ("R", "G", "B"),
        "help": "mean to subtract; red green blue, whatever --color is",
    },
    "std": {
        "type": float,
        "nargs": 3,
        "metavar": ("R", "G", "B"),
        "help": "divisor; red green blue, whatever --color is",
    },
    "scale": {
        "type": int,
        "metavar": "1|255",
        "help": "range of the pixels that --mean and --std apply to: 0 to 1 (default) or 0 to 255",
    },
    "color": {
        "metavar": "RGB|BGR",
        "help": "order of the model's channels (default: RGB)",
    },
    "size": {
        "type": _number_or_text,
        "metavar": "N|WxH",
        "help": "width and height of the input (default: from the file)",
    },
    "resize": {
        "type": _number_or_text,
        "metavar": "N|WxH|pad|none",
        "help": "resize the short side to N, or both sides to WxH, or fit the image into the input"
        " and fill the rest (pad), or none",
    },
    "crop": {
        "metavar": "center|none",
        "help": "use the centre of the resized image, or all of it (default: center)",
    },
    "fill": {
        "metavar": "#RRGGBB",
        "help": "colour around an image smaller than the input (default: #000000)",
    },
    "centre": {
        "metavar": "LIBRARY",
        "help": "whose centre to cut out if the number of pixels is odd: torchvision (default) or"
        " transformers",
    },
    "interpolation": {
        "metavar": "FILTER",
        "help": "nearest, box, bilinear, hamming, bicubic, lanczos (default: bilinear)",
    },
    "exif": {
        "action": argparse.BooleanOptionalAction,
        "help": "rotate images as their EXIF orientation says (default: yes)",
    },
    "scores": {
        "metavar": "KIND",
        "help": "output of the model: logits, softmax (probabilities), or sigmoid (one independent"
        " probability per class) (default: as the graph ends, else logits)",
    },
    "labels": {
        "metavar": "FILE",
        "help": "file with one label per line, in the order of the classes (default: from the file,"
        " else numbers)",
    },
    "licence": {
        "metavar": "NAME",
        "help": "licence of the weights (default: from the file)",
    },
}
"""Flags of `add_preprocessing`; each is a field of `ModelCard`."""


def add_preprocessing(sub: argparse._ActionsContainer) -> None:
    """Add the flags that say how an image becomes the model's input and what its scores mean."""
    for name, options in _PREPROCESSING.items():
        sub.add_argument(f"--{name}", **options)


def given_preprocessing(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of `add_preprocessing` say, by field of ModelCard."""
    return {name: getattr(parsed, name) for name in _PREPROCESSING}


def probability(text: str) -> float:
    """Return a number from 0 to 1. Raises: ArgumentTypeError."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


probability.__name__ = "number"  # in argparse's messages
