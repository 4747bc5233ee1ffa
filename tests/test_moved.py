"""Sources that moved: `--moved OLD=NEW` changes where bytes are read, and nothing else."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import helpers
import imagemill
import sample_images
from archive_files import pack, tar
from imagemill import cli, run
from imagemill.errors import JobMismatchError, SourceError, UsageError
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import sources
from imagemill.records import Access, Settings
from imagemill.runner import run as runner
from imagemill.workers.ray import provisioning
from s3 import Bucket
from test_run import Listener

Jobs = Callable[..., Settings]
OPTIONS: dict[str, Any] = {"shard_size": 2, "preflight": False}


def fill(place: Path) -> list[str]:
    """Fill a folder with sources of every kind that lies on a disk; returns them."""
    images = {f"{number}.jpg": sample_images.jpeg(40, 30, seed=number) for number in range(4)}
    helpers.fill(place, {f"folder/{name}": data for name, data in images.items()})
    pack(place, "zip", images)
    pack(place, "tar", images)
    (place / "packed.tar.gz").write_bytes(gzip.compress(tar(images)))
    (place / "list.txt").write_text(
        f"folder/0.jpg\n{place}/folder/1.jpg\nfile://{place}/folder/2.jpg\n{place}/folder/3.jpg\n"
    )
    (place / "table.csv").write_text(
        f"url\nfolder/0.jpg\n{place}/folder/1.jpg\nfolder/2.jpg\nfolder/3.jpg\n"
    )
    cells = [
        {"bytes": images["0.jpg"], "path": "0.jpg"},
        *({"bytes": None, "path": f"folder/{number}.jpg"} for number in (1, 2, 3)),
    ]
    pq.write_table(pa.table({"image": cells}), place / "table.parquet")
    names = [
        "folder",
        "images.zip",
        "images.tar",
        "packed.tar.gz",
        "@list.txt",
        "@table.csv#url",
        "table.parquet#image",
        "folder/0.jpg",
    ]
    return [f"@{place}/{name[1:]}" if name.startswith("@") else f"{place}/{name}" for name in names]


def unfinish(output: Path) -> None:
    """Remove every second part, as if the job had been stopped."""
    for part in sorted((output / "predictions").glob("part-*"))[::2]:
        part.unlink()


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_job_goes_on_where_its_sources_are_now(names: str, job: Jobs, tmp_path: Path) -> None:
    """Folders, archives, lists with the paths in them, tables and single files: named as they were
    or as they are, the rows are the same, `source` included, and so is the plan.
    """
    old, new, output = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    old.mkdir()
    given = fill(old)
    first = runner.run(job(*given, **OPTIONS))
    assert (first.images, first.failed) == (29, 0)
    rows, plan_id = (
        helpers.rows(output),
        json.loads((output / "job.json").read_bytes())["job"]["plan_id"],
    )
    unfinish(output)
    old.rename(new)
    if names == "new":
        given = [source.replace(str(old), str(new), 1) for source in given]
    listener = Listener()
    summary = runner.run(job(*given, moved=((str(old), f"{new}/"),), **OPTIONS), listener)
    assert 0 < summary.resumed_shards < summary.shards
    assert helpers.rows(output) == rows
    frozen = OpenJob.open(str(output)).frozen
    assert (frozen.job.plan_id, frozen.job.access) == (plan_id, Access())
    (new / "folder" / "9.jpg").write_bytes(sample_images.jpeg())
    finished = runner.run(job(*given, moved=((str(old), str(new)),), **OPTIONS), listener)
    assert finished.new_in_source == 1


def test_commands_that_read_images_again_find_them_at_their_new_place(
    job: Jobs, jpegs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The thumbnails of the report, and the images to sort."""
    folder, out = jpegs(3), tmp_path / "out"
    runner.run(job(folder, report=True, **OPTIONS))
    folder.rename(tmp_path / "moved")
    (tmp_path / "truth.csv").write_text(
        "path,label\n" + "".join(f"{p.name},0\n" for p in (tmp_path / "moved").iterdir())
    )
    moved = ("--moved", f"{folder}={tmp_path / 'moved'}")
    truth = ("--truth", f"@{tmp_path / 'truth.csv'}")
    for arguments in (("report", out), ("score", out, *truth)):
        assert cli.main([*map(str, arguments), *moved]) == 0
        page = (out / "report.html").read_text("utf-8")
        assert "No thumbnail" not in page and page.count("data:image/") >= 3
    assert cli.main(["sort", str(out), "--into", str(tmp_path / "into"), *moved]) == 0
    assert len(list((tmp_path / "into").rglob("*.jpg"))) == 3
    (out / "report.html").write_text("")
    imagemill.score(out, truth[1], moved={str(folder): str(tmp_path / "moved")})
    assert (out / "report.html").read_text("utf-8").count("data:image/") >= 3
    assert cli.main(["report", str(out), "--moved", "/nowhere=/else"]) == 2
    assert "nothing in this job is there" in capsys.readouterr().err


def test_a_new_job_is_named_after_the_old_places(
    job: Jobs, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """`moved` may be given from the beginning: rows name the old place. From Python it is a dict;
    its places may be relative to here.
    """
    folder = jpegs(3)
    summary = run(
        "/mnt/gone/photos",
        tmp_path / "out",
        model="tiny",
        devices="null",
        report=False,
        moved={"/mnt/gone/photos": folder},
    )
    assert summary.ok == 3
    assert {row["source"] for row in helpers.rows(tmp_path / "out")} == {"/mnt/gone/photos"}


def test_single_files_and_the_longest_old_place_count(tmp_path: Path) -> None:
    """A place is moved with all below it, and no neighbour whose name begins like it; of two that
    fit the longer one counts.
    """
    access = Access(
        sources.resolve_moved(
            [
                ("/a", "/n"),
                ("/a/b/", "s3://bucket/b/"),
                ("s3://old", "/disk"),
                ("file:///c%20d", "/e"),
            ]
        )
    )
    places = {
        "/a/x": "/n/x",
        "/ab/x": "/ab/x",
        "/a/b/x": "s3://bucket/b/x",
        "/a/b": "s3://bucket/b",
        "s3://old/k": "/disk/k",
        "/c d": "/e",
    }
    assert {old: access.at(old.encode()).decode() for old in places} == places
    assert Access(sources.resolve_moved([("/", "/n")])).at(b"/x") == b"/n/x"


def test_sources_in_stores_move_too(s3: Bucket, job: Jobs, tmp_path: Path) -> None:
    """A prefix to another bucket's, with a list whose URLs are in it, or to a folder."""
    images = {f"{number}.jpg": sample_images.jpeg(40, 30, seed=number) for number in range(4)}
    s3.fill(images, "old/")
    (tmp_path / "urls.txt").write_text("".join(f"{s3.url}/old/{name}\n" for name in images))
    given = (f"{s3.url}/old", f"@{tmp_path / 'urls.txt'}")
    runner.run(job(*given, **OPTIONS))
    rows = helpers.rows(tmp_path / "out")
    unfinish(tmp_path / "out")
    for name, data in images.items():
        s3.remove(f"old/{name}")
        s3.fill({name: data}, "new/")
    with pytest.raises(
        SourceError, match=r"none below it\. .*If it has moved, add --moved OLD=NEW\."
    ):
        runner.run(job(*given, **OPTIONS))
    runner.run(job(*given, moved=((f"{s3.url}/old/", f"{s3.url}/new/"),), **OPTIONS))
    assert helpers.rows(tmp_path / "out") == rows
    unfinish(tmp_path / "out")
    folder = helpers.fill(tmp_path / "folder", images)
    listener = Listener()
    for _ in range(2):
        runner.run(job(*given, moved=((f"{s3.url}/old", str(folder)),), **OPTIONS), listener)
        assert helpers.rows(tmp_path / "out") == rows
    assert not any("new in the source since" in line for line in listener.printed)


def test_without_moved_the_command_says_that_it_exists(
    job: Jobs, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """Both ways of going on after a move, under the old name and under the new one, lead to it."""
    old = jpegs(4)
    runner.run(job(old, **OPTIONS))
    unfinish(tmp_path / "out")
    new = old.rename(tmp_path / "new")
    with pytest.raises(
        SourceError, match=r"No such file or directory.*If it has moved, add --moved OLD=NEW\."
    ):
        runner.run(job(old, **OPTIONS))
    with pytest.raises(JobMismatchError, match=r"If the sources have moved, add --moved OLD=NEW\."):
        runner.run(job(new, **OPTIONS))


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_an_old_place_where_nothing_was_is_an_error(
    kind: str, job: Jobs, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """A typing error would leave every image `missing`. Nothing is frozen, and a started job is not
    touched.
    """
    folder = jpegs(2)
    (tmp_path / "list.txt").write_text(f"{folder}/000.jpg\n")
    source = folder if kind == "folder" else f"@{tmp_path / 'list.txt'}"
    wrong = job(source, moved=((f"{folder}x", "/elsewhere"),), **OPTIONS)
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"--moved {folder}x=…: nothing in this job is there"):
            runner.run(wrong)
        assert not (tmp_path / "out" / "job.json").exists()
    runner.run(job(source, **OPTIONS))
    rows = helpers.rows(tmp_path / "out")
    with pytest.raises(UsageError, match="nothing in this job is there"):
        runner.run(wrong)
    assert helpers.rows(tmp_path / "out") == rows


def test_moved_needs_two_places(
    imagemill: Callable[..., helpers.Result], job: Jobs, jpegs: Callable[..., Path]
) -> None:
    """Anything else is one line and exit code 2."""
    folder = jpegs(1)
    result = imagemill("run", folder, "--output", "out", "--moved", "/a")
    assert (result.code, "/a: write OLD=NEW" in result.err, "Traceback" in result.err) == (
        2,
        True,
        False,
    )
    for moved, text in (
        ((("", "/b"),), "--moved =/b: write --moved OLD=NEW, with a path or URL on both sides"),
        ((("/a", ""),), "--moved /a=: write --moved OLD=NEW, with a path or URL on both sides"),
        ((("/a", "/b"), ("/a/", "/c")), "--moved /a/=/c: /a/ is given twice"),
        ((("file://nas/a", "/b"),), "is another machine"),
    ):
        with pytest.raises(UsageError, match=text):
            runner.run(job(folder, moved=moved))


def test_nodes_of_a_cluster_read_where_the_sources_are_now(
    job: Jobs, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """The job that travels to a node says it, and the node's check finds the images there."""
    old = jpegs(4)
    runner.run(job(old, **OPTIONS))
    new = old.rename(tmp_path / "new")
    frozen = OpenJob.open(str(tmp_path / "out")).frozen
    shards = plan.shards(tmp_path / "out" / "plan")
    assert provisioning.sample_images(frozen.job, shards) == ()
    moved = pickle.loads(pickle.dumps(replace(frozen.job, access=Access(((str(old), str(new)),)))))
    assert len(provisioning.sample_images(moved, shards)) == 2
    sources.check(moved.sources, moved.access)


def test_a_folder_called_like_an_archive_is_still_a_folder_elsewhere(tmp_path: Path) -> None:
    """Its failed images have lines, and `sort` links them."""
    (tmp_path / "new").mkdir()
    source = str(tmp_path / "photos.zip")
    access = Access(sources.resolve_moved([(source, str(tmp_path / "new"))]))
    assert sources.as_line([source], 0, b"1.jpg", access) == f"{source}/1.jpg".encode()
    assert sources.as_line([source], 0, b"1.jpg") is None, "it is gone, so its name decides"
