"""JSON documents are checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from imagemill.errors import ModelError, OutputError
from imagemill.records import Limits, Recipe, Status
from imagemill.system import serialization


@dataclass(frozen=True, slots=True)
class Document:
    limits: Limits
    recipe: Recipe
    folder: str
    names: tuple[str, ...] = ()
    counts: dict[int, float] | None = None
    status: Status = Status.OK


DOCUMENT = Document(
    Limits(1, 2, 3.5), Recipe(resize=(3, 4)), "a/b", ("x", "\udc80"), {7: 1.0}, Status.EMPTY
)


def test_a_record_survives_the_round_trip():
    data = serialization.encode(DOCUMENT)
    assert serialization.decode(data, Document, "job.json", OutputError) == DOCUMENT
    assert data.isascii()
    assert data.endswith(b"}\n")


def test_free_form_values_are_kept():
    """Notes of a model card hold any JSON value."""
    notes = {"variants": {"int8": [1, "damaged", None]}}

    @dataclass(frozen=True, slots=True)
    class Noted:
        notes: Mapping[str, object]

    assert serialization.from_plain(Noted, {"notes": notes}) == Noted(notes)


def test_values_of_the_wrong_type_are_refused():
    plain = {"max_pixels": "many", "max_bytes": None, "max_seconds": [1]}
    with pytest.raises(ValueError, match=r"^max_pixels: expected `int`, got `str`$"):
        serialization.from_plain(Limits, plain)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"max_bytes": 2', b'"max_bytes": null', "limits.max_bytes: expected `int`, got `null`"),
        (b'"max_pixels": 1', b'"max_pixels": true', "limits.max_pixels: expected `int`, got"),
        (b'"x",', b"1,", "names[0]: expected `str`, got `int`"),
        (b'"bilinear"', b'"cubist"', "recipe.interpolation: invalid enum value 'cubist'"),
        (b'"a/b"', b"5", "folder: expected `str`, got `int`"),
        (b'"folder"', b'"fold"', "object missing required field `folder`"),
        (b'"limits": {', b'"limits": [{', "job.json cannot be read: Expecting"),
        (b"{", b"[" * 100_000 + b"{", "job.json cannot be read: "),
    ],
)
def test_the_message_names_the_file_and_the_key(old, new, message):
    data = serialization.encode(DOCUMENT)
    assert old in data
    with pytest.raises(ModelError) as caught:
        serialization.decode(
            data.replace(old, new, 1), Document, "job.json", ModelError, "Write it again."
        )
    assert message in str(caught.value)
    assert str(caught.value).startswith("job.json cannot be read: ")
    assert str(caught.value).endswith(". Write it again.")


def test_unknown_keys_are_ignored():
    data = serialization.encode(DOCUMENT).replace(b"{", b'{"new": 1,', 1)
    assert serialization.decode(data, Document, "job.json", OutputError) == DOCUMENT
