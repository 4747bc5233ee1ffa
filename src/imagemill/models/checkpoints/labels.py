"""The names of the classes that a training program saved beside the state dict."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from imagemill.models.checkpoints.pickled import walk

KEYS: Final = (
    "class_names",
    "classes",
    "CLASSES",
    "idx_to_class",
    "idx2class",
    "id2label",
    "class_to_idx",
    "class2idx",
    "label2id",
    "label_names",
    "labels",
)
"""Where programs keep them. Of several the first that holds names is used."""
_DEEPEST: Final = 2
"""Mappings around the list, besides the outermost: `{"hyper_parameters": {"classes": […]}}`."""


class Labels(Struct, frozen=True):
    """Names of classes, in the order of the scores."""

    key: str
    """Where they were found: `hyper_parameters/classes`."""
    names: tuple[str, ...]


def find(root: dict[Any, Any]) -> Labels | None:
    """Return the names of the classes in what a checkpoint's pickle described; None if there are
    none.
    """
    found: dict[str, Labels] = {}
    tried = set[int]()  # a pickle may refer to one list or mapping a million times
    for path, mapping in walk(root, _DEEPEST):
        for key, value in mapping.items():
            if key in KEYS and key not in found and id(value) not in tried:
                tried.add(id(value))
                if names := _names(value):
                    found[key] = Labels(f"{path}/{key}" if path else key, names)
    return next((found[key] for key in KEYS if key in found), None)


def _names(value: object) -> tuple[str, ...]:
    """Return the names in a list, a mapping from numbers, or a mapping to numbers; () if it is none
    of them.
    """
    if isinstance(value, dict):
        pairs = list(value.items())
        if all(isinstance(name, str) and type(number) is int for name, number in pairs):
            pairs = [(number, name) for name, number in pairs]
        numbered = {int(key): name for key, name in pairs if _is_number(key)}
        if sorted(numbered) != list(range(len(pairs))):
            return ()
        value = [numbered[number] for number in range(len(pairs))]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return ()
    return tuple(value)


def _is_number(key: object) -> bool:
    return type(key) is int or (
        isinstance(key, str) and len(key) < 8 and key.isascii() and key.isdecimal()
    )
