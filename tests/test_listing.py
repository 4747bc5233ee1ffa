"""Sources without an image start no job, and what a listing could not find is said."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import archive_files
import helpers
import sample_images
from imagemill.display import observer
from imagemill.errors import SourceError
from imagemill.records import Settings
from imagemill.runner import dry_run, run
from s3 import Bucket

Jobs = Callable[..., Settings]
CLI = Callable[..., helpers.Result]
Folders = Callable[..., Path]


class Listener(observer.Watcher):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.printed: list[str] = []

    def notify(self, message: str) -> None:
        self.printed.append(message)


def write_empty_table(path: Path) -> None:
    pq.write_table(pa.table({"path": pa.array([], pa.string())}), path)


def write_table_without_images(path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)


EMPTY: dict[str, tuple[str, Callable[[Path], object], dict[str, Any], tuple[str, ...]]] = {
    "folder": (
        "in",
        lambda at: at.mkdir(),
        {},
        ("no images found in {at}, so no job was started. It is empty. Check the path",),
    ),
    "other suffixes": (
        "in",
        lambda at: helpers.fill(at, {"a.txt": b"", "b.TXT": b"", "c": b""}),
        {},
        ("Skipped: 1 (no suffix), 2 .txt. Add --all-files",),
    ),
    "hidden": (
        "in",
        lambda at: helpers.fill(at, {".a.jpg": b"x"}),
        {},
        ("Skipped: 1 hidden. Names that begin with a dot",),
    ),
    "filters": (
        "in",
        lambda at: helpers.fill(at, {"a.jpg": b"x", "b.jpg": b"x", ".c": b""}),
        {"include": ("*.png",)},
        ("Skipped: 1 hidden, 2 by --include or --exclude. Change --include or --exclude.",),
    ),
    "excluded folder": (
        "in",
        lambda at: helpers.fill(at, {"a/1.jpg": b"x"}),
        {"exclude": ("a/",)},
        ("Nothing is left after --include and --exclude. Change --include or --exclude.",),
    ),
    "broken link": (
        "in",
        lambda at: (at.mkdir(), (at / "disk").symlink_to("nowhere")),
        {},
        ("Skipped: 1 broken link. First broken link: {at}/disk. Mount the disk",),
    ),
    "all files": ("in", lambda at: at.mkdir(), {"all_files": True}, ("It is empty.",)),
    "zip": (
        "in.zip",
        lambda at: archive_files.pack(at.parent, "zip", {}, "in"),
        {},
        ("It is empty.",),
    ),
    "zip of archives": (
        "in.zip",
        lambda at: archive_files.pack(at.parent, "zip", {"a.tar": b"x"}, "in"),
        {},
        ("Skipped: 1 .tar. Archives and tables inside an archive are not opened. Unpack it.",),
    ),
    "tar": (
        "in.tar",
        lambda at: archive_files.pack(at.parent, "tar", {"a.cls": b"1"}, "in"),
        {},
        ("Skipped: 1 .cls.",),
    ),
    "tar.gz": (
        "in.tar.gz",
        lambda at: archive_files.pack(at.parent, "tar.gz", {"a.cls": b"1"}, "in"),
        {},
        ("Skipped: 1 .cls.",),
    ),
    "list": ("@in.txt", lambda at: at.write_bytes(b"\n\n"), {}, ("It is empty.",)),
    "filtered list": (
        "@in.txt",
        lambda at: at.write_bytes(b"a.jpg\n"),
        {"exclude": ("a*",)},
        ("1 by --include or --exclude",),
    ),
    "table": ("@in.csv", lambda at: at.write_bytes(b"path\n"), {}, ("It is empty.",)),
    "table of paths": ("@in.parquet", write_empty_table, {}, ("It is empty.",)),
    "table of images": ("in.parquet", write_table_without_images, {}, ("It is empty.",)),
    "shards": (
        "in",
        lambda at: helpers.fill(at, {"a-000.tar": b"x", "a-001.tar": b"x", "README.md": b"x"}),
        {},
        (
            "Skipped: 1 .md, 2 .tar. Archives and tables in a folder are sources of their own.",
            "such as {at}/*.tar, not the folder",
        ),
    ),
    "tables": (
        "in",
        lambda at: helpers.fill(at, {"train.parquet": b"x"}),
        {},
        ("such as {at}/*.parquet, not the folder",),
    ),
    "zips": (
        "in",
        lambda at: helpers.fill(at, {"train/1.zip": b"x"}),
        {},
        ("such as {at}/*.zip, not the folder",),
    ),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_sources_without_an_image_start_no_job(job: Jobs, tmp_path: Path, kind: str) -> None:
    """Exit 1 with what was skipped and why. Nothing is frozen, written or downloaded, and a dry run
    says the same.
    """
    source, make, changes, messages = EMPTY[kind]
    at = tmp_path / source.removeprefix("@")
    make(at)
    settings = job(
        Path("@" + str(at)) if source.startswith("@") else at,
        output=str(tmp_path / "new" / "out"),
        model="none.such",
        **changes,
    )
    texts = set()
    for call in (run.run, dry_run.dry_run):
        with pytest.raises(SourceError) as caught:
            call(settings)
        texts.add(str(caught.value))
        assert caught.value.exit_code == 2
    (text,) = texts
    for message in messages:
        assert message.format(at=at) in text
    if kind in ("shards", "tables", "zips"):
        assert "--all-files" not in text, "it would make a failed row of each shard"
    assert not (tmp_path / "new").exists()


def test_images_that_arrive_later_are_processed_by_the_same_command(
    job: Jobs, tmp_path: Path
) -> None:
    """An output folder that exists stays as it was, and nothing in it says that the job is
    finished.
    """
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="no images found"):
        run.run(job(tmp_path / "in"))
    assert list((tmp_path / "out").iterdir()) == []
    helpers.fill(tmp_path / "in", {"a.jpg": sample_images.jpeg()})
    assert run.run(job(tmp_path / "in")).images == 1


def test_an_empty_source_is_exit_2_and_one_line(imagemill: CLI, tmp_path: Path) -> None:
    """With nothing on stdout, also with --json."""
    (tmp_path / "in").mkdir()
    result = imagemill(
        "run",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null",
        "--json",
    )
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(
        f"imagemill: no images found in {tmp_path}/in, so no job was started."
    )
    assert not (tmp_path / "out").exists()


def test_an_empty_prefix_starts_no_job_in_an_object_store(s3: Bucket) -> None:
    """Nothing is written into the store either; shards below a prefix are named with braces, since
    no shell expands URLs.
    """
    source = s3.fill({"shards/a-000.tar": b"x"}, "in/")
    with pytest.raises(SourceError) as caught:
        run.run(Settings((source,), f"{s3.url}/out", model="tiny", devices="null"))
    assert f"such as '{source}/NAME-{{000000..000099}}.tar', not the prefix" in str(caught.value)
    assert s3.keys() == ["in/shards/a-000.tar"]


def test_one_empty_source_among_others_is_a_note(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """The job goes on with the others; the first empty one is named, and how many there are."""
    empty = [tmp_path / name for name in ("x", "y")]
    for folder in empty:
        folder.mkdir()
    listener = Listener()
    assert run.run(job(empty[0], jpegs(2)), listener).images == 2
    assert f"note: 1 source holds no images, first: {empty[0]}" in listener.printed
    found = dry_run.dry_run(job(jpegs(2), *empty, output=str(tmp_path / "out2")))
    assert found.notes == (f"note: 2 sources hold no images, first: {empty[0]}",)


def test_broken_links_are_reported_and_counted(
    imagemill: CLI, jpegs: Folders, tmp_path: Path
) -> None:
    """At the start, in the summary for people and in the JSON."""
    folder = jpegs(2)
    (folder / "disk1").symlink_to("/mnt/not mounted")
    (folder / "disk2").symlink_to("/mnt/not mounted")
    done = imagemill(
        "run", folder, "--output", tmp_path / "out", "--model", "tiny", "--devices", "null"
    )
    assert done.code == 0
    assert (
        f"imagemill: note: 2 links lead nowhere, first: {folder}/disk1. If its disk is not mounted,"
        " the images there are left out" in done.err
    )
    assert "skipped: 2 broken links" in done.out.splitlines()
    assert json.loads((tmp_path / "out" / "summary.json").read_bytes())["skipped_broken_links"] == 2


@pytest.mark.parametrize("count", [0, 2])
def test_a_list_that_can_be_read_only_once_is_read_once(
    job: Jobs, jpegs: Folders, tmp_path: Path, count: int
) -> None:
    """`@FILE` may be a pipe: no line is lost to the look whether there is an image at all. Without
    a line there is no job either.
    """
    lines = b"".join(bytes(path) + b"\n" for path in sorted(jpegs(2).iterdir())[:count])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(lines,), daemon=True)
    writer.start()
    settings = job(Path(f"@{tmp_path}/pipe"))
    if count:
        assert run.run(settings).ok == 2
    else:
        with pytest.raises(SourceError, match="no images found"):
            run.run(settings)
        assert not (tmp_path / "out" / "job.json").exists()
    writer.join()
