"""`--keep`: columns of the sources are in the rows, whatever the source and whatever became of the
image.
"""

from __future__ import annotations

import datetime
import decimal
import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import helpers
import made_jobs
import sample_images
from archive_files import pack, tar
from imagemill.cli import make_parser
from imagemill.display.observer import Watcher
from imagemill.errors import JobMismatchError, SourceError, UsageError
from imagemill.job import documents, export
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.read import read
from imagemill.pipeline.sources import kept, samples
from imagemill.pipeline.sources.base import Skipped
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Filters, Kept, KeptType, Lease, Limits, Recipe, Settings, Status
from imagemill.report import figures
from imagemill.runner import append, dry_run, freeze, listing, resume, run
from imagemill.runner.settings import check_settings, make_settings
from imagemill.scoring import score
from s3 import Bucket
from tiny import TINY_CARD

NULL = devices.resolve("null")
JPEG = sample_images.jpeg(20, 20, seed=1)
Make = Callable[..., OpenJob]


@pytest.fixture
def settings(models_dir: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings of a job that keeps columns."""

    def made(*sources: Path | str, keep: Any = ("id",), **given: Any) -> Settings:
        found = made_jobs.settings_of(*sources, output=tmp_path / "out", models_dir=models_dir)
        return replace(found, keep=keep, **given)

    return made


@pytest.fixture
def make(settings: Callable[..., Settings], models_dir: Path) -> Make:
    """Makes a finished job of sources, without a worker; images named `bad…` are corrupt."""

    def made(*sources: Path | str, keep: Any = ("id",), **given: Any) -> OpenJob:
        return made_jobs.made_job(
            settings(*sources, keep=keep, **given),
            made_jobs.tiny(models_dir),
            lambda path: Status.CORRUPT if b"bad" in path else (1, 0.5),
        )

    return made


def csv(folder: Path, text: str, name: str = "table.csv") -> str:
    """Write a table, and return the source."""
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return f"@{folder / name}"


def table(folder: Path, columns: Mapping[str, Any], name: str = "t", **options: Any) -> Path:
    """Write a Parquet table."""
    pq.write_table(pa.table(columns), folder / f"{name}.parquet", **options)
    return folder / f"{name}.parquet"


def values(job: OpenJob, *names: str) -> list[tuple[Any, ...]]:
    """The values of some columns of `predictions/`, in plan order."""
    rows = helpers.table(Path(job.paths.output)).select(list(names)).to_pylist()
    return [tuple(row.values()) for row in rows]


def assert_sound(job: OpenJob) -> None:
    """Nothing is wrong with the parts of a job that has no summary."""
    assert {problem.what for problem in job.verify()[0]} == {"is missing: the job is not finished"}


def types(job: OpenJob) -> dict[str, str]:
    """The types of the kept columns in every part."""
    found = [
        {kept.name: str(pq.read_schema(part).field(kept.name).type) for kept in job.first.job.keep}
        for part in (Path(job.paths.output) / "predictions").iterdir()
    ]
    assert all(one == found[0] for one in found)
    return found[0]


# ── every kind of source ──────────────────────────────────────────────────────────────────────────


def test_a_csv_list_gives_text(make: Make, tmp_path: Path) -> None:
    """Zeros in front stay, an empty cell is null, bytes that are not UTF-8 are shown; failed images
    and empty paths have their values, too.
    """
    source = csv(
        tmp_path,
        'path,id,caption\na.jpg,0017,"one, two"\nbad.jpg,2,caf\udce9\n,3,\nb.jpg,,"line\nbreak"\n',
    )
    job = make(f"{source}#path", keep=("id,caption=text",))
    assert types(job) == {"id": "string", "text": "string"}
    assert values(job, "path", "status", "id", "text") == [
        ("a.jpg", "ok", "0017", "one, two"),
        ("bad.jpg", "corrupt", "2", "caf\\xe9"),
        ("", "ok", "3", None),
        ("b.jpg", "ok", None, "line\nbreak"),
    ]
    assert helpers.table(Path(job.paths.output)).column_names[-3:] == ["height", "id", "text"]


def test_an_empty_text_of_a_parquet_table_is_kept(make: Make, tmp_path: Path) -> None:
    file = table(tmp_path, {"path": ["a.jpg", "b.jpg"], "caption": ["", None]})
    job = make(f"@{file}#path", keep=("caption",))
    assert values(job, "path", "caption") == [("a.jpg", ""), ("b.jpg", None)]


@pytest.mark.parametrize("kind", ["list", "images"])
def test_parquet_keeps_types(make: Make, tmp_path: Path, kind: str) -> None:
    """As int64, double, bool or text; what has another type but a text form becomes text. Row
    groups do not matter, neither do columns with a dot.
    """
    n = 5000
    columns = {
        "id": pa.array([None, *range(1, n)], pa.int16()),
        "wide": pa.array([2**63 - 1] * n, pa.int64()),
        "real": pa.array([0.1, None, float("nan"), *[2.0] * (n - 3)], pa.float32()),
        "half": pa.array(np.full(n, 0.5, np.float16)),
        "flag": [True, False, None] + [True] * (n - 3),
        "a.b": pa.array(["x", "y", None] + ["x"] * (n - 3)).dictionary_encode(),
        "a": pa.array(["outer"] * n, pa.large_string()),
        "when": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5, 6)] * n, pa.timestamp("ns")),
        "day": [datetime.date(2024, 1, 2)] * n,
        "price": [decimal.Decimal("1.50")] * n,
        "big": pa.array([2**64 - 1] * n, pa.uint64()),
        "nothing": pa.nulls(n),
    }
    images = {
        "path": [f"{number}.jpg" for number in range(n)],
        "image": [{"bytes": b"", "path": f"{number}.jpg"} for number in range(n)],
    }
    file = table(tmp_path, {**images, **columns}, row_group_size=1300)
    source = f"@{file}#path" if kind == "list" else f"{file}#image"
    job = make(source, keep=tuple(columns), shard_size=1024)
    whole, real, text = "int64", "double", "string"
    assert list(types(job).values()) == [
        *(whole, whole, real, real, "bool", text, text),
        *(text, text, text, text, text),
    ]
    rows = values(job, *columns)
    assert [row[0] for row in rows] == [None, *range(1, n)]
    assert rows[0][2] == pytest.approx(0.1)
    assert [rows[1][2], np.isnan(rows[2][2]), rows[3][2]] == [None, True, 2.0]
    assert rows[1][3:6] == (0.5, False, "y")
    assert rows[2][4:7] == (None, None, "outer")
    assert rows[0][7:] == (
        *("2024-01-02 03:04:05.000006000", "2024-01-02", "1.50"),
        *("18446744073709551615", None),
    )
    assert {row[1] for row in rows} == {2**63 - 1}


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_sample_of_a_webdataset_gives_its_json_and_cls(
    make: Make, tmp_path: Path, kind: str
) -> None:
    """To each of its images, before or behind it, whatever its folder; a sample without them gives
    null. Only that of the sample counts.
    """
    files = {
        "a/1.cls": b"17\n",
        "a/1.jpg": JPEG,
        "a/1.json": b'{"id": 1, "cls": "from json", "score": 2, "ok": true, "x": {"y": 1}}',
        "a/2.json": '{"id": null, "caption": "größer", "score": 0.5}'.encode(),
        "a/2.left.jpg": JPEG,
        "a/2.right.jpg": JPEG,
        "b/2.jpg": JPEG,
        "b/3.CLS": b"-1",
        "b/3.bad.jpg": b"no image",
        "b/3.seg.json": b"[not read",
        "b/4.jpg": JPEG,
        "b/4.json": b"[1, 2]",
    }
    source = pack(tmp_path, kind, files)
    job = make(source, keep=("id,caption", "score,ok,cls=true_class"))
    assert types(job) == {
        **{"id": "int64", "caption": "string", "score": "double"},
        **{"ok": "bool", "true_class": "int64"},
    }
    assert values(job, "path", "id", "caption", "score", "ok", "true_class") == [
        ("a/1.jpg", 1, None, 2.0, True, 17),
        ("a/2.left.jpg", None, "größer", 0.5, None, None),
        ("a/2.right.jpg", None, "größer", 0.5, None, None),
        ("b/2.jpg", None, None, None, None, None),
        ("b/3.bad.jpg", None, None, None, None, -1),
        ("b/4.jpg", None, None, None, None, None),
    ]
    # The images are read as without --keep: members that were read for it, too.
    given = replace(made_jobs.settings_of(source, output=tmp_path, models_dir=tmp_path))
    for all_files in (False, True):
        asked = replace(given, all_files=all_files)
        plain, keeping = (
            list(listing.listing(asked, listing.Skipped(), keeper, None))
            for keeper in (kept.NOTHING, kept.Keeper({"id": "id"}))
        )
        assert [replace(entry, kept=b"") for entry in keeping] == plain
        assert len(plain) == (len(files) if all_files else 6)


def test_sources_of_all_kinds_are_one_job(make: Make, tmp_path: Path) -> None:
    """Sources that have no columns, or not this one, give null."""
    folder = helpers.fill(tmp_path / "folder", {"f.jpg": JPEG})
    job = make(
        folder,
        csv(tmp_path, "path,other\nfolder/f.jpg,1\n"),
        pack(tmp_path, "zip", {"1.jpg": JPEG, "1.json": b'{"id": 3}'}),
        pack(tmp_path, "tar", {"1.jpg": JPEG, "1.json": b'{"id": 4}'}),
        f"@{table(tmp_path, {'path': ['folder/f.jpg'], 'id': [5]})}",
    )
    assert [value for (value,) in values(job, "id")] == [None, None, None, 4, 5]


def test_tables_and_archives_in_an_object_store_give_their_columns(
    s3: Bucket, tmp_path: Path
) -> None:
    """Read with range requests; two columns of a table at once."""
    names = [f"{number}.jpg" for number in range(3000)]
    columns = {"id": [str(number) for number in range(3000)], "path": names}
    images = {"image": [{"bytes": b"x", "path": name} for name in names], **columns}
    s3.fill(
        {
            "a.csv": b"path,id\na.jpg,1\n",
            "b.parquet": table(tmp_path, images, row_group_size=2000).read_bytes(),
            "c.tar": tar({"1.jpg": JPEG, "1.json": b'{"id": "c"}'}),
        }
    )
    given = (f"@{s3.url}/a.csv", f"{s3.url}/b.parquet", f"@{s3.url}/b.parquet", f"{s3.url}/c.tar")
    opened = sources.open_all(given, keeper=kept.Keeper({"id": "id"}))
    found = [
        [json.loads(entry.kept)[0] for entry in source.entries(Filters(), Skipped())]
        for source in opened
    ]
    assert found == [["1"], columns["id"], columns["id"], ["c"]]


def test_a_row_that_failed_while_decoding_keeps_its_values(
    settings: Callable[..., Settings], models_dir: Path, tmp_path: Path
) -> None:
    """From the plan through reading and decoding, with shards in any order."""
    helpers.fill(tmp_path, {"a.jpg": JPEG, "bad.jpg": b"no image"})
    lines = [f"{name},{number}" for number, name in enumerate(["a.jpg", "bad.jpg", "no.jpg"] * 5)]
    source = csv(tmp_path, "\n".join(["path,id", *lines]))
    job = made_jobs.frozen_job(settings(source), made_jobs.tiny(models_dir))
    shards = list(job.shards)
    random.Random(1).shuffle(shards)
    with Feed(Recipe(8, 8, 8), Limits(), 4, 1, None, Stopwatch()) as feed:
        images = read([Lease(shard) for shard in shards], job.first.job)
        rows = [row for batch in feed.batches(images) for row in batch.rows]
    assert {row.index: json.loads(row.kept) for row in rows} == {n: [str(n)] for n in range(15)}
    assert {row.status for row in rows} == {Status.OK, Status.NOT_AN_IMAGE, Status.MISSING}


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["label"], "a column 'label' of its own.*--keep label=NEW"),
        (["id,Path"], "--keep Path: imagemill has a column 'path' of its own.*--keep Path=NEW"),
        (["id=embedding"], "--keep id=embedding: imagemill has a column 'embedding'"),
        (["id,caption=ID"], "--keep caption=ID: the column 'id' has this name already"),
        (["id", "id=x"], "--keep id=x: the column 'id' is given twice"),
        (["id,,x"], "write --keep COLUMN or --keep COLUMN=NEW"),
        (["id="], "write --keep COLUMN or --keep COLUMN=NEW"),
        ([("id", "a\nb")], r"--keep id=a\\nb: write"),
    ],
)
def test_names_that_cannot_be_kept_are_refused(keep: list[Any], message: str) -> None:
    """Before anything is read; with what to write instead."""
    with pytest.raises(UsageError, match=message):
        run.run(Settings(("/nowhere",), "/nowhere/out", keep=tuple(keep)))


def test_keep_is_written_in_every_usual_form() -> None:
    """Repeated, with commas, and from Python as a mapping, whose names may have any character."""
    parsed = make_parser().parse_args(
        "run a --output o --keep id,b=c --keep label=truth --keep x".split()
    )
    assert kept.resolve_kept(parsed.keep) == {"id": "id", "b": "c", "label": "truth", "x": "x"}
    for keep in ("id,label=truth", ["id", "label=truth"], {"id": "id", "label": "truth"}):
        given = make_settings({"sources": "a", "output": "o", "keep": keep})
        check_settings(given)
        assert kept.resolve_kept(given.keep or ()) == {"id": "id", "label": "truth"}
    assert kept.resolve_kept([("a=b,c", "d")]) == {"a=b,c": "d"}


def test_a_column_that_no_source_has_ends_the_command(
    settings: Callable[..., Settings], models_dir: Path, tmp_path: Path
) -> None:
    """Before the job starts, with the columns there are; for a dry run, too."""
    archive = pack(tmp_path, "tar", {"1.jpg": JPEG, "1.json": b'{"caption": "x"}'})
    source = csv(tmp_path, "path,label_id\na.jpg,1\n")
    for is_dry in (False, True):
        given = settings(source, archive, keep=("lable",), dry_run=is_dry)
        with pytest.raises(
            SourceError,
            match=r"--keep lable: no source has this column\. The columns are path, label_id, caption",
        ):
            dry_run.dry_run(given) if is_dry else made_jobs.frozen_job(
                given, made_jobs.tiny(models_dir)
            )
        assert not (tmp_path / "out" / "job.json").exists()
    folder = helpers.fill(tmp_path / "folder", {"f.jpg": JPEG})
    with pytest.raises(
        SourceError,
        match=r"--keep id: no source has this column\. Folders and lists of paths have none",
    ):
        dry_run.dry_run(settings(folder))


def test_a_column_that_a_table_lacks_ends_the_command_before_a_model_is_looked_for(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Looking for it may download it."""
    given = settings(csv(tmp_path, "path,label_id\na.jpg,1\n"), keep=("x",), model="unknown")
    with pytest.raises(SourceError, match="--keep x: no source has this column"):
        run.run(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [b"x"]}, "holds binary there. Only text, numbers and booleans"),
        ({"id": [[1]]}, "holds list.* there. Only text"),
        ({"id": [{"a": 1}]}, "holds struct of a there"),
        ({"id": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8()))}, "holds map.* there"),
        ({"id": ["x" * (kept.MAX_TEXT + 1)]}, "a text of 32,769 characters. At most 32,768"),
    ],
)
def test_columns_of_tables_that_cannot_be_kept_are_refused(
    settings: Callable[..., Settings], tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    """As list and as table of images. One line names the column and the source."""
    file = table(tmp_path, {"path": ["a.jpg"], "image": [b"x"], **columns})
    for source in (f"@{file}#path", f"{file}#image"):
        with pytest.raises(SourceError, match=rf"--keep id: source .*{file.name}.*{message}"):
            dry_run.dry_run(settings(source))


def test_two_columns_of_one_name_are_refused(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """If they are kept."""
    source = csv(tmp_path, "path,id,id\na.jpg,1,2\n")
    assert dry_run.dry_run(settings(source, keep=None)).images == 1
    with pytest.raises(SourceError, match=r"table\.csv has several columns 'id'"):
        dry_run.dry_run(settings(source))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.json": b'{"id": [1]}'}, "sample 1 holds a list. Only text, numbers"),
        ({"1.json": b'{"id": {"a": 1}}'}, "sample 1 holds an object"),
        ({"1.cls": b"3", "1.json": b'{"id": {}}'}, "sample 1 holds an object"),
        ({"1.json": b'{"id": 9223372036854775808}'}, "more than 64 bits"),
        ({"1.json": b"{"}, "source .*images.tar, member 1.json is not JSON: Expecting"),
        ({"1.json": b"{}" + b" " * 2**20}, "member 1.json has 1,048,578 bytes. --keep reads at"),
        (
            {"1.json": b'{"id": 1}', "2.jpg": JPEG, "2.json": b'{"id": "x"}'},
            "whole numbers in source .*sample 1, and text in .*sample 2",
        ),
    ],
)
def test_values_of_a_webdataset_that_cannot_be_kept_are_refused(
    settings: Callable[..., Settings], tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    """One line names the sample, or the member if it cannot be read."""
    source = pack(tmp_path, "tar", {"1.jpg": JPEG, **files})
    with pytest.raises(SourceError, match=message):
        dry_run.dry_run(settings(source))
    assert dry_run.dry_run(settings(source, keep=None)).images >= 1


def test_an_archive_that_is_cut_inside_a_json_is_said_to_be_cut(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """And not to hold bad JSON."""
    file = Path(pack(tmp_path, "tar", {"1.jpg": JPEG, "1.json": b'{"id": "' + b"x" * 600 + b'"}'}))
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b'"id"') + 100])
    with pytest.raises(SourceError, match=r"is cut short: it ends at byte .* member 1\.json"):
        dry_run.dry_run(settings(file))


def test_a_sample_without_end_is_refused(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are held in memory."""
    monkeypatch.setattr(samples, "_MAX_IMAGES", 3)
    source = pack(tmp_path, "tar", {f"2024.{number}.jpg": JPEG for number in range(4)})
    with pytest.raises(SourceError, match=r"more than 3 images are one sample.*2024\.3\.jpg"):
        dry_run.dry_run(settings(source))


def test_one_column_with_two_types_is_refused(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """In tables whole numbers and floats are two types, because ids would lose digits. A column
    without values has no type.
    """
    first = table(tmp_path, {"path": ["a.jpg"], "id": [1]}, "first")
    for name, column, what in [("a", ["x"], "text"), ("b", [1.5], "floats")]:
        second = table(tmp_path, {"path": ["a.jpg"], "id": column}, name)
        with pytest.raises(
            SourceError,
            match=rf"--keep id: .* whole numbers in source @.*first.* and {what} in source @.*{name}",
        ):
            dry_run.dry_run(settings(f"@{first}#path", f"@{second}#path"))
    empty = table(tmp_path, {"path": ["a.jpg"], "id": pa.nulls(1)}, "empty")
    assert dry_run.dry_run(settings(f"@{empty}#path", f"@{first}#path")).images == 2


# ── the frozen job ────────────────────────────────────────────────────────────────────────────────


def test_another_keep_is_refused_on_resume(
    settings: Callable[..., Settings], make: Make, tmp_path: Path
) -> None:
    """It may be left out, and its order does not matter."""
    source = csv(tmp_path, "path,id,caption\na.jpg,1,x\n")
    job = make(source, keep=("id,caption=text",))
    for keep in (None, ("caption=text", "id")):
        again = resume.resume(settings(source, keep=keep), job, NULL, Watcher())
        assert again.first.job.keep == (
            Kept("id", "id", KeptType.TEXT),
            Kept("caption", "text", KeptType.TEXT),
        )
    for keep, now in [(("id",), "--keep id"), ((), "no --keep")]:
        with pytest.raises(
            JobMismatchError,
            match=f"started with --keep caption=text --keep id, now {now} is asked for",
        ):
            resume.resume(settings(source, keep=keep), job, NULL, Watcher())
    without = replace(job, first=replace(job.first, job=replace(job.first.job, keep=())))
    with pytest.raises(JobMismatchError, match="started with no --keep, now --keep id is"):
        resume.resume(settings(source), without, NULL, Watcher())


def test_kept_columns_are_part_of_the_answer_id(make: Make, tmp_path: Path) -> None:
    """So a part with other columns is not taken for one of this job. Without any, the id is that
    of earlier versions.
    """
    source = csv(tmp_path, "path,id,caption\na.jpg,1,x\n")
    ids = set()
    for number, keep in enumerate([None, ("id",), ("caption=id",), ("id=x",)]):
        job = make(source, keep=keep, output=str(tmp_path / str(number)))
        ids.add(job.first.answer_id)
        first = job.first
        assert freeze.answer_id(first.job, None, first.backend, {}) == first.answer_id
        assert_sound(job)
    assert len(ids) == 4


def test_appended_rows_have_the_columns_with_their_types(
    settings: Callable[..., Settings], make: Make, tmp_path: Path
) -> None:
    """From the sources of the job, from others, and null from those without the column. Another
    type is refused, and so are floats, which JSON would allow in a new job.
    """

    def source(name: str, text: str) -> str:
        return pack(tmp_path, "tar", {f"{name}.jpg": JPEG, f"{name}.json": text.encode()}, name)

    first = source("a", '{"id": 1}')
    job = make(first)
    folder = helpers.fill(tmp_path / "folder", {"f.jpg": JPEG})
    given = settings(first, source("b", '{"id": 2}'), folder, keep=None, append=True)
    job, _ = append.append(given, resume.resume(given, job, NULL, Watcher()), NULL, Watcher())
    assert documents.read_frozen(job.store) == job.first
    for shard in job.shards[1:]:
        made_jobs.write_part(job, shard, lambda _: (1, 0.5))
    assert values(job, "path", "id") == [("a.jpg", 1), ("b.jpg", 2), ("f.jpg", None)]
    assert types(job) == {"id": "int64"}
    assert_sound(job)
    for text, what in [('{"id": 1.5}', "floats"), ('{"id": "x"}', "text")]:
        given = settings(source("c", text), keep=None, append=True)
        with pytest.raises(SourceError, match=f"whole numbers in the job, and {what} in source"):
            append.append(given, job, NULL, Watcher())


# ── what is done with the rows ────────────────────────────────────────────────────────────────────


def test_other_commands_know_the_columns(make: Make, tmp_path: Path) -> None:
    """`export`, `score --truth column:` and the report's search."""
    right, wrong = TINY_CARD.labels[1], TINY_CARD.labels[2]
    files = {
        "a.jpg": JPEG,
        "a.json": f'{{"label": "{right}", "a.b": 0.5}}'.encode(),
        "b.jpg": JPEG,
        "b.json": f'{{"label": "{wrong}", "a.b": NaN}}'.encode(),
        "bad.jpg": JPEG,
        "bad.json": f'{{"label": "{wrong}"}}'.encode(),
    }
    job = make(pack(tmp_path, "tar", files), keep=('label=my "truth"', "a.b"))
    name = 'my "truth"'
    exported = partial(export.export, job, columns=["a.b", name], partial=True)
    lines = b"".join(exported(export.Form.JSONL)).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"a.b": 0.5, name: right},
        {"a.b": None, name: wrong},
        {"a.b": None, name: wrong},
    ]
    assert b"".join(exported(export.Form.CSV)).startswith(b'"a.b","my ""truth"""\n0.5,')
    row = figures.read_rows(job, [0, 2])[0]
    assert dict(row.kept) == {name: right, "a.b": "0.5"}
    found = score.score(job, f"column:{name}")
    assert (found.top1.value, found.top1.images) == (pytest.approx(1 / 3), 3)
    with pytest.raises(UsageError, match="no source of the job is a table, and its rows do not"):
        score.score(job, "column:label")


@pytest.mark.process
def test_the_command_line_keeps_columns(
    imagemill: Callable[..., helpers.Result], tmp_path: Path
) -> None:
    """Through a worker, and a repeated command says that the job is finished."""
    helpers.fill(tmp_path, {"a.jpg": JPEG, "b.jpg": b"no image"})
    source = csv(tmp_path, "path,id,label\na.jpg,1,cat\nb.jpg,2,dog\nc.jpg,3,hen\n")
    words = ("run", source, "--output", tmp_path / "out", "--devices", "null", "--model", "tiny")
    refused = imagemill(*words, "--keep", "id,label")
    assert refused.code == 2
    assert "--keep label=NEW" in refused.err
    for _ in range(2):
        assert imagemill(*words, "--keep", "id,label=truth", "--json").json["images"] == 3
    assert [(row["status"], row["id"], row["truth"]) for row in helpers.rows(tmp_path / "out")] == [
        ("ok", "1", "cat"),
        ("not_an_image", "2", "dog"),
        ("missing", "3", "hen"),
    ]
    by = imagemill("sort", tmp_path / "out", "--into", tmp_path / "sorted", "--by", "truth")
    assert by.code == 0
    assert (tmp_path / "sorted" / "cat" / "a.jpg").read_bytes() == JPEG
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert '<span class="quiet">truth</span> <bdi>cat</bdi>' in report


def test_values_of_a_hard_linked_member_are_those_of_the_first(make: Make, tmp_path: Path) -> None:
    """As tar writes files that a tool made one to save space."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in (("0.jpg", JPEG), ("0.json", b'{"id": "x"}'), ("1.jpg", JPEG)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        linked = tarfile.TarInfo("1.json")
        linked.type, linked.linkname = tarfile.LNKTYPE, "0.json"
        archive.addfile(linked)
    job = make(tmp_path / "s.tar", keep=("id",))
    assert values(job, "path", "id") == [("0.jpg", "x"), ("1.jpg", "x")]
