"""`imagemill sort`: every chosen image is in the folder of its label once, originals stay as they
are, and the same command again comes to the same folders.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import helpers
import made_jobs
from imagemill import cli
from imagemill.arrange import names, sort
from imagemill.arrange.links import Link, Maker
from imagemill.arrange.sort import Choice, Sorted
from imagemill.errors import OutputError, UsageError
from imagemill.job.open_job import OpenJob
from imagemill.records import Status

LABELS = ("cat", "dog", "Cat", "a/b", "..", "new\nline", "x" * 300, "_failed", "crane", "crane")
FOLDERS = (
    "cat~0",
    "dog",
    "Cat~2",
    "a_b",
    "_",
    "new_line",
    "x" * 120,
    "_failed~7",
    "crane~8",
    "crane~9",
)


def answers(path: bytes) -> made_jobs.Answer:
    """`3-9.jpg` is class 3 with probability 0.9, `corrupt.jpg` is corrupt, `none.jpg` has no class."""
    name = os.path.basename(path).partition(b".")[0].decode()
    if name in list(Status):
        return Status(name)
    if name.startswith("none"):
        return -1, 0.0
    number, _, certain = name.partition("-")
    return int(number), float(f"0.{certain[0]}")


@pytest.fixture
def make(models_dir: Path, tmp_path: Path) -> Callable[..., OpenJob]:
    """Makes a finished job of files in folders `tmp_path/NAME`, or of other sources."""

    def made(*places: Path, **folders: list[str]) -> OpenJob:
        for folder, files in folders.items():
            helpers.fill(tmp_path / folder, {name: f"{folder}/{name}".encode() for name in files})
        settings = made_jobs.settings_of(
            *(tmp_path / folder for folder in folders),
            *places,
            output=tmp_path / "out",
            models_dir=models_dir,
        )
        return made_jobs.made_job(settings, made_jobs.tiny(models_dir), answers, LABELS)

    return made


def content(into: Path) -> dict[str, str]:
    """Relative path of each sorted file → its content, which is where it came from."""
    return {
        str(path.relative_to(into)): path.read_bytes().decode("latin-1")
        for path in into.rglob("*")
        if path.is_file() and path.name != sort.MANIFEST
    }


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Path → hash, modification time and mode of each file below a folder."""
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest(into: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((into / sort.MANIFEST).read_text("utf-8"), newline="")))


@pytest.mark.parametrize("link", list(Link))
def test_each_image_is_in_the_folder_of_its_label(
    make: Callable[..., OpenJob], tmp_path: Path, link: Link
) -> None:
    """By each kind of link, with the originals as they were; a second call makes nothing."""
    job = make(images=["1-9.jpg", "deep/0-8.jpg", "3-7.png", "corrupt.jpg", "none.jpg"])
    before = state(tmp_path / "images")
    done = sort.sort(job, tmp_path / "into", link=link)
    assert content(tmp_path / "into") == {
        "dog/1-9.jpg": "images/1-9.jpg",
        "cat~0/0-8.jpg": "images/deep/0-8.jpg",
        "a_b/3-7.png": "images/3-7.png",
    }
    made = tmp_path / "into" / "dog" / "1-9.jpg"
    original = tmp_path / "images" / "1-9.jpg"
    assert made.is_symlink() is (link is Link.SYMBOLIC)
    assert (made.lstat().st_ino == original.stat().st_ino) is (link is Link.HARD)
    assert done == Sorted(
        str(tmp_path / "into"),
        3,
        {"a_b": 1, "dog": 1, "cat~0": 1},
        made=3,
        link=link,
        left_out={"failed": 1, "without a label": 1},
    )
    assert sort.sort(job, tmp_path / "into", link=link) == replace(done, made=0)
    assert state(tmp_path / "images") == before


def test_hostile_labels_are_one_usable_folder_each() -> None:
    """No separator, no `..`, no line break, no endless name, nothing that differs only in case, and
    two classes with one label stay apart.
    """
    found = names.folders(enumerate(LABELS))
    assert tuple(found.values()) == FOLDERS
    assert len({name.casefold() for name in found.values()}) == len(LABELS)
    assert names.folders(
        [(0, "CON"), (1, "a."), (2, ""), (3, ".hidden"), (4, "é"), (5, "e\u0301")]
    ) == {
        0: "_CON",
        1: "a",
        2: "_",
        3: "hidden",
        4: "é~4",
        5: "é~5",
    }
    found = names.folders([(0, "crane"), (1, "crane"), (2, "crane~1")])
    assert len(set(found.values())) == 3, "an avoided name may be another label"


def test_equal_names_are_kept_apart(make: Callable[..., OpenJob], tmp_path: Path) -> None:
    """Also if they differ only in case, or if an image has the name that would avoid it."""
    job = make(a=["x/1-9.jpg", "y/1-9.jpg", "z/1-9.JPG"], b=["1-9.jpg", "1-9~1.jpg"])
    done = sort.sort(job, tmp_path / "into")
    assert content(tmp_path / "into") == {
        "dog/1-9.jpg": "a/x/1-9.jpg",
        "dog/1-9~~1.jpg": "a/y/1-9.jpg",
        "dog/1-9~2.JPG": "a/z/1-9.JPG",
        "dog/1-9~3.jpg": "b/1-9.jpg",
        "dog/1-9~1.jpg": "b/1-9~1.jpg",
    }
    folded = [name.casefold() for name in content(tmp_path / "into")]
    assert len(set(folded)) == len(folded) == done.images


def test_only_certain_images_and_failed_ones_if_asked(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    job = make(images=["1-9.jpg", "1-4.jpg", "corrupt.jpg", "missing.jpg"])
    done = sort.sort(job, tmp_path / "into", Choice(min_probability=0.5, failed=True))
    assert set(content(tmp_path / "into")) == {
        "dog/1-9.jpg",
        "_failed/corrupt/corrupt.jpg",
        "_failed/missing/missing.jpg",
    }
    assert done.left_out == {"less certain": 1}


def test_another_choice_removes_what_does_not_belong_any_more(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """And nothing that `sort` did not make."""
    job = make(images=["1-9.jpg", "0-4.jpg"])
    sort.sort(job, tmp_path / "into")
    helpers.fill(tmp_path / "into", {"dog/notes.txt": b"mine"})
    done = sort.sort(job, tmp_path / "into", Choice(min_probability=0.5))
    assert done.removed == 1
    assert content(tmp_path / "into") == {"dog/1-9.jpg": "images/1-9.jpg", "dog/notes.txt": "mine"}
    assert not (tmp_path / "into" / "cat~0").exists()
    sort.sort(job, tmp_path / "into", Choice(by="status"))
    assert set(content(tmp_path / "into")) == {"ok/1-9.jpg", "ok/0-4.jpg", "dog/notes.txt"}


@pytest.mark.parametrize(
    ("by", "folders"),
    [
        ("status", {"ok": 1, "corrupt": 1}),
        ("source", {"_SOURCE_images": 1}),
        ("class_id", {"1": 1}),
        ("width", {"40": 1}),
    ],
)
def test_by_another_column(
    make: Callable[..., OpenJob], tmp_path: Path, by: str, folders: dict[str, int]
) -> None:
    job = make(images=["1-9.jpg", "corrupt.jpg"])
    done = sort.sort(job, tmp_path / "into", Choice(by=by), dry_run=True)
    place = str(tmp_path).replace("/", "_").lstrip("_")
    assert done.folders == {name.replace("SOURCE", place): n for name, n in folders.items()}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("colour", "--by colour: the job has no such column. It has index, source"),
        ("probability", "--by probability: the column holds neither text nor whole numbers"),
        ("top_k", "--by top_k: the column holds neither text nor whole numbers"),
    ],
)
def test_an_unusable_column_is_refused(
    make: Callable[..., OpenJob], tmp_path: Path, by: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sort.sort(make(images=["1-9.jpg"]), tmp_path / "into", Choice(by=by))
    assert not (tmp_path / "into").exists()


def test_a_column_with_too_many_values_is_refused(
    make: Callable[..., OpenJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sort, "MAX_FOLDERS", 2)
    with pytest.raises(UsageError, match="--by index: the column has more than 2 values"):
        sort.sort(
            make(images=["1-9.jpg", "1-8.jpg", "1-7.jpg"]), tmp_path / "into", Choice("index")
        )


def test_images_in_archives_and_tables_are_copied_out(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """Each with its own bytes; a second call reads none of them."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("deep/1-9.jpg", b"zip")
    column = pa.array(
        [{"bytes": b"table", "path": "0-9.jpg"}, {"bytes": b"nameless", "path": "1-7"}]
    )
    pq.write_table(pa.table({"image": column}), tmp_path / "images.parquet")
    job = make(tmp_path / "images.zip", tmp_path / "images.parquet")
    done = sort.sort(job, tmp_path / "into", link=Link.SYMBOLIC)
    assert content(tmp_path / "into") == {
        "dog/1-9.jpg": "zip",
        "cat~0/0-9.jpg": "table",
        "dog/1-7": "nameless",
    }
    assert not any(path.is_symlink() for path in (tmp_path / "into").rglob("*"))
    (tmp_path / "images.zip").unlink()
    (tmp_path / "images.parquet").unlink()
    assert sort.sort(job, tmp_path / "into", link=Link.SYMBOLIC) == replace(done, made=0)


def test_images_that_are_gone_are_reported_and_not_in_the_manifest(
    make: Callable[..., OpenJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder and in an archive; the exit code is 1, and the others are sorted."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("1-9.jpg", b"zip")
    make(tmp_path / "images.zip", images=["0-9.jpg", "1-8.jpg"])
    (tmp_path / "images" / "0-9.jpg").unlink()
    (tmp_path / "images.zip").unlink()
    arguments = ["sort", str(tmp_path / "out"), "--into", str(tmp_path / "into")]
    assert cli.main([*arguments, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["images"], printed["unreadable"]) == (1, 2)
    assert printed["first_unreadable"][0].startswith("0-9.jpg: missing: ")
    assert [row["path"] for row in manifest(tmp_path / "into")] == ["1-8.jpg"]
    assert list(content(tmp_path / "into")) == ["dog/1-8.jpg"]


@pytest.mark.parametrize("link", [Link.HARD, Link.COPY])
def test_what_was_sorted_before_its_original_went_stays(
    link: Link, make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """The file in the folder is the image, so the same command goes on working."""
    job = make(images=["0-9.jpg", "1-8.jpg"])
    done = sort.sort(job, tmp_path / "into", link=link)
    before = content(tmp_path / "into")
    (tmp_path / "images" / "0-9.jpg").unlink()
    for _ in range(2):
        assert sort.sort(job, tmp_path / "into", link=link) == replace(done, made=0)
        assert content(tmp_path / "into") == before
        assert len(manifest(tmp_path / "into")) == 2
    (tmp_path / "into" / "cat~0" / "0-9.jpg").write_bytes(b"edited, and longer")
    sort.sort(job, tmp_path / "into", link=link)
    assert content(tmp_path / "into")["cat~0/0-9.jpg"] == "edited, and longer"


def job_of_cats(source: Path, models_dir: Path, unsure: bytes) -> OpenJob:
    """A finished job beside its source. Paths that begin with `unsure` have probability 0.5."""
    settings = made_jobs.settings_of(source, output=source.parent / "out", models_dir=models_dir)
    return made_jobs.made_job(
        settings,
        made_jobs.tiny(models_dir),
        lambda path: (0, 0.5 if path.startswith(unsure) else 0.9),
        LABELS,
    )


@pytest.mark.parametrize("link", list(Link))
def test_a_file_is_not_taken_for_another_image_whose_original_went(
    link: Link, models_dir: Path, tmp_path: Path
) -> None:
    """Names move between images of one name if fewer are chosen."""
    helpers.fill(tmp_path / "images", {"a/1.jpg": b"a", "b/1.jpg": b"b"})
    job = job_of_cats(tmp_path / "images", models_dir, unsure=b"a")
    assert sort.sort(job, tmp_path / "into", link=link).unreadable == 0
    assert content(tmp_path / "into") == {"cat~0/1.jpg": "a", "cat~0/1~1.jpg": "b"}
    (tmp_path / "images" / "b" / "1.jpg").unlink()
    again = sort.sort(job, tmp_path / "into", Choice(min_probability=0.8), link=link)
    assert (again.images, again.unreadable) == (0, 1)
    assert (manifest(tmp_path / "into"), content(tmp_path / "into")) == ([], {})


def test_a_name_that_means_another_image_gets_its_bytes(models_dir: Path, tmp_path: Path) -> None:
    """Two images of one name and size in a table; the first one is left out the second time."""
    image = [{"bytes": data, "path": "cat.png"} for data in (b"1st", b"2nd")]
    pq.write_table(pa.table({"image": image}), tmp_path / "t.parquet")
    job = job_of_cats(tmp_path / "t.parquet", models_dir, unsure=b"00000000")
    into = tmp_path / "into"
    sort.sort(job, into)
    sort.sort(job, into, Choice(min_probability=0.8))
    ((name, data),) = content(into).items()
    assert (data, [row["file"] for row in manifest(into)]) == ("2nd", [name])


def test_a_carriage_return_in_a_name_leads_to_no_file_of_others(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """The table of what was sorted is read back as it was written."""
    job = make(images=["a\rkeep/1-9.jpg"])
    sort.sort(job, tmp_path / "into")
    helpers.fill(tmp_path / "into", {"keep/1-9.jpg": b"mine"})
    assert sort.sort(job, tmp_path / "into").removed == 0
    assert content(tmp_path / "into")["keep/1-9.jpg"] == "mine"
    assert [row["path"] for row in sort._rows_before(tmp_path / "into")] == ["a\rkeep/1-9.jpg"]


def test_a_link_whose_original_went_is_removed(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    job = make(images=["0-9.jpg", "1-8.jpg"])
    sort.sort(job, tmp_path / "into", link=Link.SYMBOLIC)
    (tmp_path / "images" / "0-9.jpg").unlink()
    for _ in range(2):
        assert sort.sort(job, tmp_path / "into", link=Link.SYMBOLIC).unreadable == 1
        assert list(content(tmp_path / "into")) == ["dog/1-8.jpg"]


def test_the_manifest_says_where_each_image_is_and_why(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    sort.sort(make(images=["deep/1-9.jpg", "empty.jpg"]), tmp_path / "into", Choice(failed=True))
    source = str(tmp_path / "images")
    assert manifest(tmp_path / "into") == [
        {
            "file": "dog/1-9.jpg",
            "index": "0",
            "source": source,
            "path": "deep/1-9.jpg",
            "status": "ok",
            "class_id": "1",
            "label": "dog",
            "probability": "0.8999999761581421",
        },
        {
            "file": "_failed/empty/empty.jpg",
            "index": "1",
            "source": source,
            "path": "empty.jpg",
            "status": "empty",
            "class_id": "",
            "label": "",
            "probability": "",
        },
    ]


def test_a_name_that_is_not_utf_8_becomes_a_usable_one(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    hostile = os.fsencode(tmp_path / "images") + b"/1-9.\xff\n.jpg"
    with open(hostile, "wb") as file:
        file.write(b"hostile")
    sort.sort(make(tmp_path / "images"), tmp_path / "into")
    assert content(tmp_path / "into") == {"dog/1-9._xff_.jpg": "hostile"}


@pytest.mark.parametrize("inside", ["images/sorted", "out/sorted", "images", "linked/sorted"])
def test_a_folder_inside_a_source_or_the_job_is_refused(
    make: Callable[..., OpenJob], tmp_path: Path, inside: str
) -> None:
    """Also through a link, because the next run would list the sorted images as new ones."""
    job = make(images=["1-9.jpg"])
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    with pytest.raises(UsageError, match="is inside the "):
        sort.sort(job, tmp_path / inside)
    assert not (tmp_path / inside / sort.MANIFEST).exists()


def test_files_of_others_are_never_touched(make: Callable[..., OpenJob], tmp_path: Path) -> None:
    """A folder with other files is refused, and a file in the way is an error before anything is
    made.
    """
    job = make(images=["1-9.jpg", "0-9.jpg"])
    helpers.fill(tmp_path / "full", {"mine.txt": b"mine"})
    with pytest.raises(UsageError, match=r"is not empty and not made by `imagemill sort`"):
        sort.sort(job, tmp_path / "full")
    sort.sort(job, tmp_path / "into", Choice(min_probability=1.0))
    helpers.fill(tmp_path / "into", {"dog/1-9.jpg": b"mine"})
    with pytest.raises(OutputError, match="exists and was not made by"):
        sort.sort(job, tmp_path / "into")
    assert content(tmp_path / "into") == {"dog/1-9.jpg": "mine"}


def test_a_manifest_cannot_make_it_remove_files_elsewhere(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """By `..`, by an absolute path or through a link."""
    job = make(images=["1-9.jpg"])
    helpers.fill(tmp_path, {"precious/a.jpg": b"precious"})
    into = tmp_path / "into"
    sort.sort(job, into)
    (into / "link").symlink_to(tmp_path / "precious")
    text = (into / sort.MANIFEST).read_text()
    for file in ("../precious/a.jpg", str(tmp_path / "precious" / "a.jpg"), "link/a.jpg"):
        text += f"{file},9,s,p,ok,1,dog,0.9\n"
    (into / sort.MANIFEST).write_text(text)
    assert sort.sort(job, into).removed == 0
    assert (tmp_path / "precious" / "a.jpg").read_bytes() == b"precious"


def test_a_stop_at_any_file_is_continued(
    make: Callable[..., OpenJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it was at, the same call comes to the same folders, and a file that is there
    is whole.
    """
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("1-7.jpg", b"zip")
    job = make(tmp_path / "images.zip", images=["1-9.jpg", "1-8.jpg", "0-9.jpg"])
    before = state(tmp_path / "images")
    sort.sort(job, tmp_path / "whole", link=Link.COPY)
    replaced, left = os.replace, 0

    def stop(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(os, "replace", stop)
    for allowed in range(5):  # the manifest, and four files
        left = allowed
        into = tmp_path / f"into{allowed}"
        with pytest.raises(KeyboardInterrupt):
            sort.sort(job, into, link=Link.COPY)
        assert len(content(into)) == max(allowed - 1, 0)
        left = 100
        sort.sort(job, into, link=Link.COPY)
        assert content(into) == content(tmp_path / "whole")
        assert manifest(into) == manifest(tmp_path / "whole")
    assert state(tmp_path / "images") == before


def test_a_full_disk_and_a_read_only_target_are_one_clear_error(
    make: Callable[..., OpenJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(images=["1-9.jpg"])
    before = state(tmp_path / "images")

    def failing(number: int) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", failing(errno.ENOSPC))
        with pytest.raises(OutputError, match="The disk is full"):
            sort.sort(job, tmp_path / "into", link=Link.COPY)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", failing(errno.EROFS))
        with pytest.raises(OutputError, match="The file system is read-only"):
            sort.sort(job, tmp_path / "other")
    assert sort.sort(job, tmp_path / "into", link=Link.COPY).made == 1
    assert state(tmp_path / "images") == before


def test_hard_links_that_are_impossible_become_symbolic_ones(
    make: Callable[..., OpenJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(images=["1-9.jpg"])
    said: list[str] = []

    def impossible(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", impossible)
    done = sort.sort(job, tmp_path / "into", log=said.append)
    assert (done.link, done.made) == (Link.SYMBOLIC, 1)
    assert said[0].startswith("note: hard links are impossible here")


def test_a_job_that_is_not_finished_is_sorted_as_far_as_it_is(
    make: Callable[..., OpenJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so on stderr and is exit 1. The next call adds the rest."""
    job = make(images=[f"{number % 2}-{number + 1}.jpg" for number in range(8)])
    part = job.paths.part(1)
    data = part.read_bytes()
    part.unlink()
    arguments = ["sort", str(tmp_path / "out"), "--into", str(tmp_path / "into")]
    assert cli.main([*arguments, "--dry-run"]) == 1
    assert "then sort again to add the others" in capsys.readouterr().err
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "4 images sorted into 1 folder" in printed.out
    assert "not finished" not in printed.out
    assert printed.err == (
        f"imagemill: {tmp_path / 'out'} is not finished: 4 of 8 images have a row. Run the same"
        " `imagemill run` command again to finish it, then sort again to add the others.\n"
    )
    part.write_bytes(data)
    assert cli.main(arguments) == 0
    assert "8 images sorted into 2 folders" in capsys.readouterr().out
    assert len(content(tmp_path / "into")) == 8


def test_a_dry_run_writes_nothing(
    make: Callable[..., OpenJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(images=["1-9.jpg", "1-8.jpg", "0-9.jpg", "corrupt.jpg"])
    arguments = ["sort", str(tmp_path / "out"), "--into", str(tmp_path / "into"), "--dry-run"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == (
        f"3 images would be sorted into 2 folders: {tmp_path / 'into'}\n"
        "  2  dog\n"
        "  1  cat~0\n"
        "left out: 1 failed\n"
    )
    assert not (tmp_path / "into").exists()


def test_a_network_without_classes_is_refused_by_label(models_dir: Path, tmp_path: Path) -> None:
    helpers.fill(tmp_path / "images", {"1-9.jpg": b"x"})
    settings = made_jobs.settings_of(
        tmp_path / "images", output=tmp_path / "out", models_dir=models_dir
    )
    from imagemill.models import bundle

    headless = bundle.load(models_dir / "headless")
    frozen = made_jobs.frozen_job(replace(settings, model="headless", top_k=None), headless)
    with pytest.raises(UsageError, match="--by label: the model has no classes"):
        sort.sort(frozen, tmp_path / "into")


KILLED = """
import os, signal, sys
from imagemill import cli
replace, left = os.replace, int(sys.argv[1])
def kill(source, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
cli.main(["sort", *sys.argv[2:]])
"""


@pytest.mark.process
def test_sigkill_at_any_file_leaves_what_the_same_command_continues(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """And every original as it was."""
    job = make(images=["1-9.jpg", "0-9.jpg"])
    before, into = state(tmp_path / "images"), tmp_path / "into"
    for allowed in range(3):  # the manifest, and two files
        arguments = [str(allowed), job.paths.output, "--into", str(into), "--link", "hard"]
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, *arguments], env=helpers.environment(), check=False
        )
        assert killed.returncode == -signal.SIGKILL
        assert sort.sort(job, into, link=Link.HARD).images == 2
        assert set(content(into)) == {"dog/1-9.jpg", "cat~0/0-9.jpg"}
        shutil.rmtree(into)
    assert state(tmp_path / "images") == before


def test_a_killed_call_is_continued(make: Callable[..., OpenJob], tmp_path: Path) -> None:
    """What it left half done is not taken for somebody's file."""
    job = make(images=["1-9.jpg"])
    helpers.fill(tmp_path / "into", {f".{sort.MANIFEST}.17.tmp": b"file,in"})
    assert sort.sort(job, tmp_path / "into").made == 1


def test_a_copy_is_never_written_into_an_original(tmp_path: Path) -> None:
    """If a hard link of an earlier call is in the way, the copy replaces the link, not the file;
    also if a killed call left it under its temporary name.
    """
    helpers.fill(tmp_path, {"a.jpg": b"original"})
    source, target = os.fsencode(tmp_path / "a.jpg"), os.fsencode(tmp_path / "b.jpg")
    Maker(Link.HARD, lambda _: None, b".tmp").make(source, target)
    maker = Maker(Link.COPY, lambda _: None, b".tmp")
    maker.make(source, target)
    assert maker.made == 1
    assert (tmp_path / "b.jpg").stat().st_ino != (tmp_path / "a.jpg").stat().st_ino
    (tmp_path / ".tmp").hardlink_to(tmp_path / "a.jpg")
    maker.write(b"fetched", os.fsencode(tmp_path / "c.jpg"))
    assert (tmp_path / "a.jpg").read_bytes() == b"original"
    assert (tmp_path / "c.jpg").read_bytes() == b"fetched"


def test_no_label_gets_a_name_that_sort_needs() -> None:
    """Also where a file system ignores case."""
    found = names.folders([(3, "Sorted.csv"), (4, "_failed"), (5, "dog")])
    assert found == {3: "Sorted.csv~3", 4: "_failed~4", 5: "dog"}


def test_what_is_said_of_files_that_are_not_there(
    make: Callable[..., OpenJob], tmp_path: Path
) -> None:
    """It depends on whether the image could be read when it was classified."""
    job = make(images=["1-9.jpg", "0-9.jpg", "missing.jpg"])
    for name in ("0-9.jpg", "missing.jpg"):
        (tmp_path / "images" / name).unlink()
    outcome = sort.sort(job, tmp_path / "into", Choice(failed=True))
    assert sorted(outcome.first_unreadable) == [
        "0-9.jpg: missing: it was there when it was classified",
        "missing.jpg: missing: it could not be read either when it was classified",
    ]
