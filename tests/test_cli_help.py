"""`--help`, suggestions for mistyped words, and completion in shells."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from imagemill import cli
from imagemill.cli import make_parser
from imagemill.records import Limits
from imagemill.runner.settings import GROUPS, SETTINGS


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command that argparse ends."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_each_setting_is_in_one_group() -> None:
    assert Counter(name for names in GROUPS.values() for name in names) == Counter(list(SETTINGS))


def test_the_help_of_run_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = answer(capsys, "run", "--help")
    titles = re.findall(r"^([a-z, ]+):$", out, re.M)
    assert [title for title in titles if title in GROUPS] == [title for title in GROUPS if title]


def test_the_help_names_the_limits_that_hold_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(answer(capsys, "run", "--help")[1].split())
    for value in (Limits().max_pixels, Limits().max_bytes, f"{Limits().max_seconds:g}"):
        assert f"(default: {value}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu", "x"), "Did you mean run?"),
        (("exprot", "x"), "Did you mean export?"),
        (("run", "x", "-o", "y", "--devcies=cpu"), "--devcies=cpu. Did you mean --devices?"),
        (("run", "x", "-o", "y", "--modle", "z"), "Did you mean --model?"),
        (("export", "x", "--to", "cvs"), "Did you mean csv?"),
        (("run", "x", "--otput", "y"), "unrecognized arguments: --otput. Did you mean --output?"),
    ],
)
def test_a_mistyped_word_gets_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = answer(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "choose from" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("source", ["my photos", "https://example.com/a.jpg", "s3://bucket/a"])
def test_a_source_without_a_command_gets_the_command(
    source: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my photos").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(capsys, source)
    assert code == 2
    assert f"Did you mean `imagemill run {shlex.quote(source)} --output DIR`?" in err


@pytest.mark.parametrize("arguments", [("run", "x", "-o", "y", "--quick"), ("zzz",)])
def test_a_word_that_is_like_no_other_gets_no_suggestion(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert "Did you mean" not in answer(capsys, *arguments)[2]


def test_short_options_are_those_of_run() -> None:
    parser = make_parser()
    parsed = parser.parse_args(["run", "images", "-o", "out", "-m", "tiny"])
    assert (parsed.output, parsed.model) == ("out", "tiny")


def test_narrow_terminals_and_no_color_get_plain_narrow_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = answer(capsys, "run", "--help")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 60


@pytest.mark.process
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("ru",), {"run"}),
        (("run", "--dev"), {"--devices"}),
        (("run", "--engine"), {"--engine"}),
        (("export", "x", "--to", "c"), {"csv"}),
    ],
)
def test_bash_completes_commands_options_and_values(
    capsys: pytest.CaptureFixture[str], typed: tuple[str, ...], expected: set[str]
) -> None:
    code, script, _ = answer(capsys, "--print-completion", "bash")
    assert code == 0
    words = " ".join(("imagemill", *typed))
    ask = (
        f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; COMP_LINE='{words}';"
        " COMP_POINT=${#COMP_LINE}; _shtab_imagemill; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
    )
    assert {word.strip() for word in done.stdout.split()} == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_all_commands(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    code, script, _ = answer(capsys, "--print-completion", shell)
    assert code == 0
    assert all(command in script for command in ("run", "get-model", "partition"))
