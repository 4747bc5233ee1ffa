"""What `--background` promises: a colour under transparent images, the same for a whole job."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import helpers
import imagemill as package
import sample_images
from imagemill import api
from imagemill.errors import UsageError
from imagemill.runner.settings import parse_colour

CLI = Callable[..., helpers.Result]
ICON = Path(__file__).with_name("cases") / "icon_black_circle_on_transparent.png"


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    files = {
        "icon.png": ICON.read_bytes(),
        "photograph.jpg": sample_images.jpeg(),
        "plain.png": sample_images.encode(sample_images.photograph(40, 30), "PNG"),
    }
    return helpers.fill(tmp_path / "icons", files)


def test_a_background_changes_transparent_images_alone(
    icons: Path, tmp_path: Path, imagemill: CLI
) -> None:
    """`--background` changes the answers to transparent images, no others, and so the answer id.
    This icon on black is as without alpha.
    """
    rows, ids = {}, {}
    for name, flags in {
        "none": (),
        "black": ("--background", "black"),
        "white": ("--background", "white"),
    }.items():
        ended = imagemill(
            "run", icons, "--output", tmp_path / name, "--model", "tiny", "--devices", "cpu", *flags
        )
        assert ended.code == 0, ended.err
        rows[name] = {
            path: row["probability"] for path, row in helpers.by_path(tmp_path / name).items()
        }
        ids[name] = json.loads((tmp_path / name / "job.json").read_text())["job"]["answer_id"]
    assert rows["none"] == rows["black"]
    assert rows["white"]["icon.png"] != rows["none"]["icon.png"]
    assert {path for path in rows["white"] if rows["white"][path] != rows["none"][path]} == {
        "icon.png"
    }
    assert len(set(ids.values())) == 3


def test_a_job_keeps_its_background(icons: Path, tmp_path: Path, imagemill: CLI) -> None:
    """A job resumes with its background unsaid or spelt otherwise; another one is exit code 2, with
    both values named.
    """
    command = ("run", icons, "--output", tmp_path / "out", "--model", "tiny", "--devices", "null")
    assert imagemill(*command, "--background", "white").code == 0
    assert imagemill(*command).code == 0
    assert imagemill(*command, "--background", "#FFF").code == 0
    refused = imagemill(*command, "--background", "rgb(0, 0, 255)")
    assert (refused.code, refused.out) == (2, "")
    assert (
        "was started with --background #ffffff, now --background #0000ff is asked for"
        in refused.err
    )


def test_a_background_cannot_be_added_later(icons: Path, tmp_path: Path, imagemill: CLI) -> None:
    """A job that was started without a background refuses one."""
    command = ("run", icons, "--output", tmp_path / "out", "--model", "tiny", "--devices", "null")
    assert imagemill(*command).code == 0
    refused = imagemill(*command, "--background", "white")
    assert refused.code == 2
    assert "was started with no --background, now --background #ffffff is asked for" in refused.err


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("white", "#ffffff"),
        ("#1a2B3c", "#1a2b3c"),
        ("#fff", "#ffffff"),
        ("hsl(0, 100%, 50%)", "#ff0000"),
        ("#0000ffff", "#0000ff"),
    ],
)
def test_colours_are_those_of_pillow(text: str, colour: str) -> None:
    """Any spelling that Pillow's ImageColor knows is a colour, and is kept in one spelling."""
    assert parse_colour(text) == colour


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("whiet", "not a colour"),
        ("", "not a colour"),
        ("#12345", "not a colour"),
        ("#ff000080", "must be opaque"),
        ("#" * 200, "not a colour"),
    ],
)
def test_what_is_no_colour_is_exit_2(
    text: str, words: str, icons: Path, tmp_path: Path, imagemill: CLI
) -> None:
    """A colour that is not known or not opaque is one line, before anything is listed or
    written.
    """
    refused = imagemill(
        "run", icons, "--output", tmp_path / "out", "--model", "tiny", "--background", text
    )
    assert refused.code == 2
    assert (
        refused.err
        == f"imagemill: --background {text}: {words}. Give a name such as white, or #rrggbb.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA"])
def test_a_pillow_image_is_blended_as_its_file_is(models_dir: Path, mode: str) -> None:
    """Transparent Pillow images of any mode answer as the PNG of what they display."""
    with Image.open(ICON) as opened:
        icon = opened.convert("RGBA")
    shown = icon.convert("LA").convert("RGBA") if mode in ("LA", "La") else icon
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    image = {
        "RGBA": lambda: icon,
        "LA": lambda: icon.convert("LA"),
        "La": lambda: icon.convert("LA").convert("La"),
        "RGBa": lambda: icon.convert("RGBa"),
        "PA": lambda: icon.convert("PA"),
    }[mode]()
    with package.load("tiny", models_dir=models_dir, background="white") as classifier:
        given, file = classifier.predict([image, buffer.getvalue()])
    if mode == "PA":  # a palette has other colours, but the same transparency
        assert given.status == "ok"
    else:
        assert given.top_k == file.top_k


def test_a_classifier_has_a_background(models_dir: Path) -> None:
    """`load(background=…)` answers as `run --background` does."""
    answers = {}
    for background in (None, "black", "white"):
        with package.load("tiny", models_dir=models_dir, background=background) as classifier:
            answers[background] = classifier.predict(ICON)[0].probability
    assert answers[None] == answers["black"] != answers["white"]
    with pytest.raises(UsageError, match="--background whiet: not a colour"):
        api.load("tiny", models_dir=models_dir, background="whiet")
