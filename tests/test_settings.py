"""Every setting is declared once, and all that derives from the declarations agrees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import helpers
from imagemill.cli import make_parser
from imagemill.errors import UsageError
from imagemill.records import Settings
from imagemill.runner.settings import (
    SETTINGS,
    check_setting,
    check_settings,
    make_settings,
)

DOCUMENTS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in (helpers.PROJECT / "README.md", *(helpers.PROJECT / "docs").rglob("*.md"))
)


def test_every_field_of_settings_is_declared() -> None:
    """And nothing else is."""
    assert set(SETTINGS) == set(Settings.__struct_fields__)


def test_a_command_without_options_means_the_defaults() -> None:
    """The command line and the Python API start from the same settings."""
    parsed = make_parser().parse_args(["run", "a", "b", "--output", "out"])
    assert make_settings(vars(parsed)) == Settings(sources=("a", "b"), output="out")


def test_every_flag_sets_its_setting() -> None:
    """As `imagemill run` is typed."""
    words = (
        "run a --output out --model m --models-dir d --devices cpu --precision fp32 --batch-size 1"
        " --batches-per-step auto --num-workers 2 --top-k 3 --min-probability 0.5 --labels l"
        " --save logits --save embedding --keep id,a=b --keep c --shard-size 4 --include *.jpg --exclude x --all-files --limit 5"
        " --preprocess card --background white --max-pixels 6 --max-bytes 7 --max-seconds 8"
        " --append --dry-run --retry-failed=timeout,missing --max-bad-fraction 0.5 --moved old=new"
        " --user-agent me --grace 9 --engine ray --allow-mixed --allow-inexact --log-dir logs --no-preflight"
        " --no-report"
    ).split()
    assert {setting.flag for setting in SETTINGS.values() if setting.flag.startswith("-")} <= {
        word.partition("=")[0] for word in words
    }
    assert make_settings(vars(make_parser().parse_args(words))) == Settings(
        ("a",),
        "out",
        *("m", "d", "cpu", "fp32", 1, None, 2, 3, 0.5, ("logits", "embedding"), ("id,a=b", "c"), 4),
        *(("*.jpg",), ("x",), True, 5, "card", "white", "l", 6, 7, 8.0, True, True),
        *(("timeout", "missing"), 0.5, 9.0, "logs", "ray", True, True, False, False),
        *((("old", "new"),), "me"),
    )


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("sources", "a", ("a",)),
        ("sources", [Path("a"), "b"], ("a", "b")),
        ("output", Path("out"), "out"),
        ("model", Path("m.onnx"), "m.onnx"),
        ("moved", {"old": Path("new")}, (("old", "new"),)),
        ("retry_failed", (), ()),
        ("save", None, None),
        ("min_probability", Path("t.csv"), "t.csv"),
        ("min_probability", 0, 0),
    ],
)
def test_keywords_are_taken_in_every_usual_form(name: str, given: Any, expected: Any) -> None:
    """Paths become strings, and one value a list of one."""
    settings = make_settings({"sources": "x", "output": "y", name: given, "progress": True})
    assert getattr(settings, name) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_workers", "2", "--num-workers 2: must be a whole number, not str."),
        ("max_seconds", "2", "--max-seconds 2: must be a number, not str."),
        ("grace_s", -1, "--grace -1: must be at least 0."),
        ("min_probability", 1.5, "--min-probability 1.5: must be from 0 to 1, or a CSV file."),
        ("min_probability", float("nan"), "--min-probability nan: must be from 0 to 1"),
        ("min_probability", [1], "--min-probability [1]: must be a number, not list."),
        ("preprocess", "crop", "--preprocess crop: not known. Known: card, center-crop."),
        ("user_agent", "\n", r"--user-agent '\n': must be printable ASCII characters"),
    ],
)
def test_a_value_of_the_python_api_is_checked_as_a_flag_is(
    name: str, value: Any, message: str
) -> None:
    """Types too, which the command line has parsed."""
    with pytest.raises(UsageError) as caught:
        check_setting(name, value)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("flag", [setting.flag for setting in SETTINGS.values()])
def test_every_flag_is_documented(flag: str) -> None:
    """In the README or in docs/."""
    assert flag in DOCUMENTS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": 2}, "--devices 2: must be a str, not int."),
        ({"model": 3}, "--model 3: must be a str, not int."),
        ({"include": 3}, "--include 3: must be a str, not int."),
        ({"sources": 3}, "SOURCE 3: must be a str, not int."),
        ({"user_agent": 3}, "--user-agent 3: must be a str, not int."),
        ({"moved": 3}, "--moved 3: must be a mapping from old to new places, both of them str."),
        ({"moved": {"a": 3}}, "--moved ('a', 3): must be a mapping"),
        ({"keep": {"a": 3}}, "--keep ('a', 3): must be a str, or a mapping from columns"),
        ({"keep": [3]}, "--keep 3: must be a str, or a mapping from columns"),
        ({"output": None}, "give an output: a folder or the URL of one."),
    ],
)
def test_values_of_a_wrong_type_are_errors_of_imagemill(
    given: dict[str, Any], message: str
) -> None:
    """Python callers get one line, and no exception of a library."""
    values: dict[str, Any] = {"sources": "a", "output": "out"}
    with pytest.raises(UsageError, match=re.escape(message)):
        check_settings(make_settings(values | given))
