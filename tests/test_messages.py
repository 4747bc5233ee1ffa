"""Messages give advice that fits, and name paths in one form."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from imagemill.display import results
from imagemill.errors import (
    CheckpointError,
    ModelError,
    OutputError,
    SourceError,
    UsageError,
    counted,
)
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.models import get
from imagemill.models.checkpoints import checkpoint
from imagemill.pipeline import sources
from imagemill.pipeline.sources import kinds, objects
from imagemill.records import Summary
from imagemill.system import files


@pytest.fixture
def dangling(tmp_path: Path) -> Path:
    """A link to nowhere."""
    link = tmp_path / "link"
    link.symlink_to("/nowhere/x")
    return link


def test_your_own_damaged_file_has_no_publisher(tmp_path: Path) -> None:
    """The advice is to copy it again, or to save its weights alone."""
    file = tmp_path / "mine.pth"
    file.write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match=r"Copy or download the file again, or save the w"):
        checkpoint.read(file)


@pytest.mark.parametrize("name", ["mine.pth", "model.weird", "folder"])
def test_get_model_of_an_existing_file_does_not_call_it_an_unknown_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows how to make a model of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.pth").touch()
    (tmp_path / "model.weird").touch()
    with pytest.raises(UsageError, match=re.escape(f"--from {name}.")):
        get.get(name, tmp_path / "models")


def test_a_required_source_is_not_to_be_left_out() -> None:
    """The advice is what to give instead."""
    with pytest.raises(UsageError, match=r"Give a folder, an image or a list \(@FILE\)\."):
        kinds.refuse_file("x", b"\1\2")


def test_an_odd_key_is_not_the_networks_fault() -> None:
    """The advice is to rename the object."""
    error = OSError(errno.EINVAL, "the key has an empty part")
    assert str(objects.cannot_read("s3://b/a//x.jpg", error)).endswith(
        "the key has an empty part. Rename the object, or copy it to another key."
    )


def test_a_link_to_nowhere_is_called_so(dangling: Path) -> None:
    """As a source, a list and a folder of models; it is not "File exists"."""
    where = re.escape(f"{dangling} is a link to /nowhere/x, which does not exist.")
    for source in (str(dangling), f"@{dangling}"):
        with pytest.raises(SourceError, match=r"it is a link to /nowhere/x, which does not exist"):
            sources.check([source])
    with pytest.raises(ModelError, match=where):
        get.get("resnet18.x", dangling, random_seed=1)


def test_a_file_in_the_way_of_a_folder_is_called_so(tmp_path: Path) -> None:
    """As a folder, and as the folder above it."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=re.escape(f"{tmp_path / 'file'} is a file, not a f")):
            files.make_folder(path)


def test_a_missing_folder_of_a_file_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Its folder does not exist\. Make it, or give another"):
        files.write_whole(tmp_path / "none" / "report.html", b"")


def test_paths_of_a_job_are_shown_without_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link is still left the way the system does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    shown = [JobPaths.of(path).output for path in ("./a//b/../c/", "link/../out")]
    assert shown == [str(tmp_path / "a" / "c"), str(tmp_path / "link" / ".." / "out")]
    assert os.path.realpath(shown[1]) == str(tmp_path / "deep" / "out")
    with pytest.raises(
        OutputError, match=re.escape(f"{tmp_path / 'none'} is not an imagemill job")
    ):
        OpenJob.open("./x/../none")


def test_one_is_singular() -> None:
    """Numbers above a thousand have separators."""
    shown = [
        counted(number, noun) for number, noun in ((1, "image"), (0, "image"), (2000, "class"))
    ]
    assert shown == ["1 image", "0 images", "2,000 classes"]
    summary = Summary(1, 1, 0, {}, {}, 1, 0, 0.1, 10.0, "tiny", "fp32", None, (), "out")
    summary = replace(summary, rates={"achieved": 10.0})
    assert results.format_summary(summary).startswith("1 image: 1 ok, 0 failed")
