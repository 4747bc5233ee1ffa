"""Documentation that drifts from the code fails here."""

from __future__ import annotations

import argparse
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import helpers
from imagemill import records
from imagemill.cli import make_parser
from imagemill.job import columns as columns_module
from imagemill.job.paths import JobPaths
from imagemill.pipeline.sources.base import IMAGE_SUFFIXES
from imagemill.runner import settings

README = (helpers.PROJECT / "README.md").read_text(encoding="utf-8")
OUTPUT = (helpers.PROJECT / "docs" / "output.md").read_text(encoding="utf-8")
DESIGN = (helpers.PROJECT / "docs" / "design.md").read_text(encoding="utf-8")
PAGES = sorted(
    [
        helpers.PROJECT / "README.md",
        helpers.PROJECT / "CONTRIBUTING.md",
        helpers.PROJECT / "benchmarks" / "README.md",
        *(helpers.PROJECT / "docs").rglob("*.md"),
    ]
)


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def flags(command: str) -> set[str]:
    return set(parsers()[command]._option_string_actions)


def block_after(text: str, heading: str) -> str:
    """The first fenced block below a heading."""
    return text.partition(f"\n{heading}\n")[2].split("```")[1].partition("\n")[2]


def listed_commands(block: str) -> list[tuple[str, set[str]]]:
    """Each `imagemill COMMAND` of a block, with the flags on its lines."""
    joined = re.sub(r"\n {10,}", " ", block)
    found = re.findall(
        r"^(?:\$ |\.venv/bin/|.*&& \.venv/bin/)?imagemill ([a-z-]+)(.*)$", joined, re.MULTILINE
    )
    return [
        (name, set(re.findall(r"(?<![\w-])--[a-z-]+", rest.partition(" #")[0])))
        for name, rest in found
    ]


def columns(text: str) -> list[tuple[list[str], str]]:
    """The table of columns: names and type of each line."""
    lines = re.findall(
        r"^\| (`[^|]*`) \| ([^|]*) \|",
        text.partition("| column")[2].partition("\n\n")[0],
        re.MULTILINE,
    )
    return [(re.findall(r"`(\w+)`", names), kind) for names, kind in lines]


def test_the_commands_of_the_readme_are_those_that_exist() -> None:
    """Every command is listed, and every listed command and flag exists."""
    listed = listed_commands(block_after(README, "## Commands"))
    assert {name for name, _ in listed} == set(parsers())
    for command, wanted in listed:
        assert wanted <= flags(command), f"{wanted - flags(command)} of `imagemill {command}`"


def test_every_extra_that_is_named_exists() -> None:
    """In messages, comments of scripts and on pages."""
    project = tomllib.loads((helpers.PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    files = [*PAGES, *(helpers.PROJECT / "src").rglob("*.py"), helpers.PROJECT / "Makefile"]
    named = {
        extra
        for file in files
        for group in re.findall(r"(?:imagemill|'\.)\[([a-z0-9_,]+)\]", file.read_text("utf-8"))
        for extra in group.split(",")
    }
    assert {"s3", "int8", "heif", "torch"} <= named
    assert named <= set(project["optional-dependencies"])


def test_the_page_of_options_is_what_the_parser_declares() -> None:
    """To write it again: `python docs/make_options.py`."""
    names = runpy.run_path(str(helpers.PROJECT / "docs" / "make_options.py"))
    assert names["PAGE"].read_text("utf-8") == names["page"]()


def test_the_extras_of_the_readme_are_those_that_exist() -> None:
    """Each with the command that installs it from a checkout, on every page: imagemill is not on
    PyPI, and no page sends people to an index of packages.
    """
    table = README.partition("| extra |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([\w-]+)` \|.*\| `pip install '\.\[([\w-]+)\]'` \|$", table, re.M)
    project = tomllib.loads((helpers.PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"dev"}
    assert {name for name, _ in listed} == extras
    assert all(name == installed for name, installed in listed)
    for page in PAGES:
        text = page.read_text("utf-8")
        assert "'imagemill[" not in text, page
        assert "index-url" not in text, page


def test_the_files_and_tests_of_the_design_exist() -> None:
    """Every path of a source file, and every test that protects a guarantee."""
    tests = "\n".join(file.read_text("utf-8") for file in helpers.PROJECT.glob("tests/**/*.py"))
    for name in re.findall(r"`(test_\w+)`", DESIGN):
        assert f"def {name}(" in tests, name
    paths = re.findall(r"(?:[a-z_]+/)+\w+\.(?:py|c)\b", DESIGN)
    assert len(paths) >= 30
    for path in paths:
        roots = (helpers.PROJECT, helpers.SOURCE_ROOT / "imagemill")
        assert any((root / path).is_file() for root in roots), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(helpers.PROJECT)))
def test_every_command_of_a_page_parses(page: Path) -> None:
    """Every `imagemill …` in a fenced block is accepted by the parser."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in re.findall(r"^(?:.*&& )?(?:\.venv/bin/)?imagemill ([a-z].*)$", block, re.M):
            words = re.split(r" {2,}| +#", line)[0].split()
            if not any(word[0] == "[" or word in ("DIR", "NAME", "…") for word in words):
                assert make_parser().parse_args(words).call, words


@pytest.mark.parametrize(
    "page", sorted((helpers.PROJECT / "docs").rglob("*.md")), ids=lambda page: page.name
)
def test_every_page_leads_back_and_a_long_one_lists_its_sections(page: Path) -> None:
    """A section of the list is a heading, and each heading is in the list, in order."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.M | re.S)
    top = text.partition("\n## ")[0]
    assert "README.md)" in top
    headings = re.findall(r"^## (.*)$", text, re.M)
    if len(headings) >= 4 and page.name != "options.md":
        assert re.findall(r"^- \[(.*)\]\(#", top, re.M)[: len(headings)] == headings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(helpers.PROJECT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """Files exist in the project, and anchors are headings of their page."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
        assert not anchor or anchor in slugs, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(helpers.PROJECT)))
def test_prose_is_at_most_100_columns_wide(page: Path) -> None:
    """Except tables, quotations, images and code."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.M | re.S)
    long = [line for line in prose.splitlines() if len(line) > 100]
    assert [line for line in long if not line.lstrip().startswith(("|", ">", "![", "- ["))] == []


def test_the_table_of_columns_is_the_schema() -> None:
    """Names in order, types, and which may be null."""
    reported = [(name, kind) for names, kind in columns(OUTPUT) for name in names]
    schema = [(field.name, str(field.type)) for field in columns_module._COLUMNS]
    assert [name for name, _ in reported] == [name for name, _ in schema] + ["logits", "embedding"]
    assert dict(reported)["index"].startswith(dict(schema)["index"])
    kinds = {names[0]: kind for names, kind in columns(OUTPUT)}
    assert kinds["class_id"].startswith("int32, string, float32")
    assert kinds["source"].startswith("string")
    assert kinds["top_k"].startswith("list of struct(class_id, label, probability)")
    assert [field.name for field in columns_module._TOP_K] == ["class_id", "label", "probability"]
    assert kinds["width"].startswith("int32")
    assert kinds["logits"].startswith("fixed-size list of float32")


def test_every_status_is_documented() -> None:
    """In the order of the code."""
    line = next(line for line in OUTPUT.splitlines() if line.startswith("| `status` |"))
    reported = [
        word
        for word in re.findall(
            r"`(\w+)`", line.partition("|")[2].partition("|")[2].rpartition("|")[0]
        )
        if word != "ok"
    ]
    assert reported == [status.value for status in records.Status if status != "ok"]


def test_the_fields_of_the_summary_are_those_of_the_design() -> None:
    """All of them, and no others."""
    paragraph = " ".join(DESIGN.partition("\n`summary.json`: ")[2].partition("\n\n")[0].split())
    head, _, devices = paragraph.partition("`devices` (list: ")
    reported = set(re.findall(r"`(\w+)`(?:,| \()", head)) - {"compute", "decode", "read", "write"}
    assert reported | {"devices"} == set(records.Summary.__struct_fields__)
    listed = devices.partition("). ")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(records.DeviceSummary.__struct_fields__)


def test_the_files_of_the_output_are_those_of_the_design(tmp_path: Path) -> None:
    """The list in docs/design.md is that of `JobPaths`."""
    paths = JobPaths(tmp_path)
    reported = {
        line.split()[0]
        for line in block_after(DESIGN, "## What is in the output folder?").splitlines()
        if line
    }
    ours = [
        paths.job,
        paths.plan / "*.parquet",
        paths.appended_document(2),
        paths.generation(2) / "*.parquet",
        paths.part(0),
        paths.logs,
        paths.summary,
        paths.pace,
        paths.manifest,
        paths.failed_list,
        paths.report,
        paths.retired,
        paths.score,
        paths.plan / "source-*",
        paths.quarantine,
        paths.lock,
    ]
    spelt = {
        f"DIR/{path.relative_to(tmp_path)}".replace("part-000000", "part-NNNNNN") for path in ours
    }
    assert {name.rstrip("/") for name in reported} == spelt


def test_the_readme_runs_code_within_its_first_twenty_lines() -> None:
    """A newcomer types one line and sees answers."""
    first = "\n".join(README.splitlines()[:20])
    assert "imagemill run " in first
    assert "pip install '.[hub]'" in first


def test_the_default_model_is_the_one_documented() -> None:
    """In the README and the code."""
    assert f"the default, `{settings.DEFAULT_MODEL}`" in README


def test_exit_codes_are_documented() -> None:
    """Those that errors carry."""
    from imagemill import errors

    codes = {
        getattr(errors, name).exit_code
        for name in ("ImagemillError", "UsageError", "WorkerError", "OutputError")
    }
    assert codes == {1, 2}
    table = OUTPUT.partition("| exit code | meaning |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) == ["0", "1", "2", "130, 143"]


def test_the_suffixes_of_images_are_those_that_are_planned() -> None:
    """The list in docs/sources.md is the program's own."""
    page = (helpers.PROJECT / "docs" / "sources.md").read_text(encoding="utf-8")
    listed = page.partition("These suffixes are those of images")[2].split("\n\n")[1]
    assert sorted(re.findall(r"`(\.\w+)`", listed)) == sorted(IMAGE_SUFFIXES)
