"""The ledger: plan against parts. `verify` finds whatever is wrong, and `run` heals it."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import replace

import helpers
import made_jobs
import sample_images
from imagemill.display import observer
from imagemill.errors import OutputError, PartError
from imagemill.job import documents, ledger
from imagemill.job.lock import locked
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.records import Settings, Status
from imagemill.runner import run

pytestmark = pytest.mark.process

SOUND: list[tuple[int | None, str]] = []
Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def finished(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A finished job of 10 images, one of them bad, in 4 parts; never to be changed: copy it."""
    folder = tmp_path_factory.mktemp("ledger")
    files = {f"{number}.jpg": sample_images.jpeg(40, 40, seed=number) for number in range(9)} | {
        "bad.jpg": b""
    }
    source = helpers.fill(folder / "images", files)
    settings = Settings(
        sources=(str(source),),
        output=str(folder / "out"),
        model="tiny",
        models_dir=str(models_dir),
        devices="null",
        shard_size=3,
    )
    run.run(settings)
    return settings


@pytest.fixture
def out(finished: Settings, copy_of: Copy) -> Path:
    """A copy of the finished job, to be damaged."""
    return copy_of(Path(finished.output))


def found(out: Path) -> list[tuple[int | None, str]]:
    return [(problem.shard, problem.what) for problem in OpenJob.open(out).verify()[0]]


def part(out: Path, number: int) -> Path:
    return JobPaths(out).part(number)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a part again, well-formed, but otherwise than it was; and have the manifest vouch for
    it, as a liar would.
    """
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)
    manifest = path.parents[1] / "manifest.json"
    plain = json.loads(manifest.read_bytes())
    plain["parts"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(plain))


def test_a_finished_job_is_sound(out: Path) -> None:
    """Nothing is found where nothing is wrong."""
    assert found(out) == SOUND


def test_a_missing_part_is_found(out: Path) -> None:
    """By its shard."""
    part(out, 2).unlink()
    assert found(out) == [(2, "is missing")]


def test_one_row_too_few_is_found(out: Path) -> None:
    """With both numbers."""
    rewrite(part(out, 1), lambda table: table.slice(0, 2))
    assert found(out) == [(1, "has 2 rows, its shard has 3 images")]


def test_a_duplicated_row_is_found(out: Path) -> None:
    """With the right number of rows, but one image twice and another not at all."""
    rewrite(part(out, 1), lambda table: table.take([0, 1, 1]))
    assert found(out) == [(1, "has image 4 twice")]


def test_rows_in_another_order_are_found(out: Path) -> None:
    """A part is in plan order."""
    rewrite(part(out, 0), lambda table: table.take([2, 1, 0]))
    assert found(out) == [(0, "has other images than its shard, or another order")]


def test_an_answer_under_another_name_is_found(out: Path) -> None:
    """Paths are held against the plan."""
    rewrite(
        part(out, 0),
        lambda table: table.set_column(
            2, table.schema.field("path"), [table["path"].take([1, 0, 2])]
        ),
    )
    assert found(out) == [(0, "has other paths than the plan")]


OK, BAD = 0, 3
"""Parts of `finished` without and with a failed row."""


@pytest.mark.parametrize(
    ("number", "column", "values"),
    [
        (OK, "label", [None, None, None]),
        (OK, "label", ["tench", None, "hen"]),
        (OK, "error", [None, "is broken", None]),
        (OK, "status", ["ok", "corrupt", "ok"]),
        (BAD, "error", [None]),
        (BAD, "label", ["tench"]),
        (BAD, "status", ["ok"]),
    ],
)
def test_a_row_that_contradicts_itself_is_found(
    out: Path, number: int, column: str, values: list[str | None]
) -> None:
    """An ok row has an answer and no error, a failed one has an error and no answer: one cell that
    says otherwise is enough.
    """

    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.schema.field(place), pa.array(values, pa.string()))

    assert pq.read_table(part(out, BAD))["status"].to_pylist() == ["empty"]
    rewrite(part(out, number), change)
    assert found(out) == [
        (number, "has a row whose status, error and answer contradict each other")
    ]


@pytest.mark.parametrize("column", ["source", "label", "path"])
def test_text_that_is_not_utf8_is_found(out: Path, column: str) -> None:
    """Readers of the part would stumble over it: it is one clear problem of this part, never a
    traceback.
    """

    def spoil(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(column)
        return table.set_column(
            place,
            table.schema.field(place),
            pa.array([b"\xff"] * 3, pa.binary()).cast(pa.string(), safe=False),
        )

    rewrite(part(out, 0), spoil)
    ((shard, what),) = found(out)
    assert (shard, what.startswith("cannot be read: ")) == (0, True)
    assert "UTF8" in what
    assert "\n" not in what


def test_a_flipped_bit_in_a_number_is_found_without_a_manifest(out: Path) -> None:
    """The part reads as ever, with another probability in it: only the checksum of the page
    tells.
    """
    path = part(out, 0)
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    column = pq.read_metadata(path).row_group(0).column(table.schema.names.index("probability"))
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    changed = pq.read_table(path)
    assert changed.drop_columns("probability").equals(table.drop_columns("probability"))
    assert changed["probability"] != table["probability"]
    (out / "manifest.json").unlink()
    (manifest, _), (shard, what) = found(out)
    assert (manifest, shard) == (None, 0)
    assert what.startswith("cannot be read: ")
    assert "CRC checksum" in what


@pytest.mark.parametrize("name", ["plan_id", "answer_id"])
def test_the_manifest_of_another_job_condemns_no_part(out: Path, name: str) -> None:
    """It is named, and what it says of the parts counts for nothing: `--quarantine` moves none of
    the sound ones.
    """
    manifest = out / "manifest.json"
    plain = json.loads(manifest.read_bytes())
    for record in plain["parts"].values():
        record["sha256"] = "0" * 64
    manifest.write_text(json.dumps(plain | {name: "feedfeedfeedfeed"}))
    before = helpers.parts(out)
    problems, moved = OpenJob.open(out).verify(quarantine=True)
    assert [(problem.shard, problem.what) for problem in problems] == [
        (None, "belongs to another job")
    ]
    assert moved == []
    assert helpers.parts(out) == before


def test_damage_to_one_part_is_reported_beside_that_of_others(out: Path) -> None:
    """A missing part does not end the search."""
    part(out, 0).unlink()
    part(out, 1).write_bytes(b"rubbish")
    rewrite(part(out, 2), lambda table: table.slice(1))
    assert [shard for shard, _ in found(out)] == [0, 1, 2]
    assert [problem.damaged for problem in OpenJob.open(out).verify()[0]] == [
        False,
        True,
        True,
    ]


def test_another_shards_part_is_found(out: Path) -> None:
    """A part under the name of another."""
    shutil.copy(part(out, 0), part(out, 1))
    rewrite(part(out, 1), lambda table: table)
    assert found(out) == [(1, "is shard 0 under another shard's name")]


def test_a_part_of_another_job_is_found(out: Path) -> None:
    """Its answer id gives it away, and both are named."""
    frozen = OpenJob.open(out).frozen
    rewrite(
        part(out, 1),
        lambda table: table.replace_schema_metadata(
            {**table.schema.metadata, b"imagemill.answer_id": b"feedfeedfeedfeed"}
        ),
    )
    assert found(out) == [
        (1, f"has answer id feedfeedfeedfeed, the job has {frozen.job.answer_id}")
    ]


def test_an_extra_part_is_found(out: Path) -> None:
    """A part that no shard of the plan wants would be read by every tool."""
    shutil.copy(part(out, 0), part(out, 4))
    assert found(out) == [(4, "does not belong to any shard of this plan")]


def test_an_unfinished_job_is_not_sound(out: Path) -> None:
    """Without summary and manifest the ledger was never closed."""
    (out / "summary.json").unlink()
    (out / "manifest.json").unlink()
    assert [what for _, what in found(out)] == [
        "is missing: the job is not finished",
        "is missing: the job is not finished",
    ]


@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        (None, b"", "Expecting value: line 1 column 1 (char 0)"),
        (None, b"[]", "expected `object`, got `array`"),
        (None, b"{}", "object missing required field `"),
        ("plan_id images", 1.5, ": expected `"),
        ("parts devices", 7, ": expected `"),
    ],
)
def test_a_damaged_document_is_found_and_written_again(
    finished: Settings, out: Path, name: str, key: str | None, value: Any, problem: str
) -> None:
    """`verify` names file, key and types, and repeating the run writes the document again."""
    path = out / name
    sound = json.loads(path.read_bytes())
    if key is None:
        path.write_bytes(value)
    else:
        key = key.split()[name == "summary.json"]
        path.write_text(json.dumps(sound | {key: value}))
        problem = key + problem
    (what,) = [what for _, what in found(out)]
    assert what.startswith(f"cannot be read: {problem}")
    assert what.endswith(". Repeat the run to write it again")
    (out / "summary.json").unlink(missing_ok=True)
    run.run(replace(finished, output=str(out)))
    assert found(out) == SOUND


def test_a_damaged_summary_is_written_again(finished: Settings, out: Path) -> None:
    """The repeated run takes the job for unfinished and closes it."""
    before = helpers.parts(out)
    (out / "summary.json").write_text('{"images": "many"}')
    run.run(replace(finished, output=str(out)))
    assert found(out) == SOUND
    assert helpers.parts(out) == before


@examples(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), number=st.integers(0, 3))
def test_a_flipped_bit_in_any_byte_is_damage(
    finished: Settings,
    tmp_path_factory: pytest.TempPathFactory,
    place: float,
    bit: int,
    number: int,
) -> None:
    """In whichever byte of whichever part."""
    out = tmp_path_factory.mktemp("flip") / "out"
    shutil.copytree(finished.output, out)
    path = part(out, number)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    assert [shard for shard, _ in found(out)] == [number]


@examples(max_examples=30)
@given(length=st.floats(0, 1, exclude_max=True))
def test_a_part_cut_short_is_found_even_without_a_manifest(
    finished: Settings, tmp_path_factory: pytest.TempPathFactory, length: float
) -> None:
    """At whatever length, and never as a traceback."""
    out = tmp_path_factory.mktemp("cut") / "out"
    shutil.copytree(finished.output, out)
    (out / "manifest.json").unlink()
    data = part(out, 0).read_bytes()
    part(out, 0).write_bytes(data[: int(length * len(data))])
    assert [shard for shard, _ in found(out)] == [None, 0]


def test_quarantine_and_run_heal(finished: Settings, out: Path) -> None:
    """Damaged parts are moved away with their summary; the same command computes them, and only
    them, again.
    """
    original = {
        path.name: path.read_bytes() for path in (Path(finished.output) / "predictions").iterdir()
    }
    part(out, 0).write_bytes(b"rubbish")
    shutil.copy(part(out, 2), part(out, 9))
    part(out, 3).unlink()
    before = helpers.parts(out)
    problems, moved = OpenJob.open(out).verify(quarantine=True)
    assert [problem.shard for problem in problems] == [9, 0, 3]
    assert sorted(path.name.split(".")[0] for path in moved) == ["part-000000", "part-000009"]
    assert all(path.parent == out / "quarantine" and path.is_file() for path in moved)
    assert found(out) != SOUND
    summary = run.run(Settings(sources=finished.sources, output=str(out)))
    assert (summary.images, summary.resumed_shards) == (10, 2)
    assert found(out) == SOUND
    after = helpers.parts(out)
    assert {name: after[name] for name in ("part-000001.parquet", "part-000002.parquet")} == {
        name: before[name] for name in ("part-000001.parquet", "part-000002.parquet")
    }
    assert {path.name: path.read_bytes() for path in (out / "predictions").iterdir()} == original


def test_quarantine_waits_for_no_running_job(out: Path) -> None:
    """Parts are not moved under the feet of a run."""
    part(out, 0).write_bytes(b"rubbish")
    with (
        locked(JobPaths(out)),
        pytest.raises(OutputError, match="is in use by another imagemill run"),
    ):
        OpenJob.open(out).verify(quarantine=True)
    assert part(out, 0).is_file()


def test_the_manifest_can_be_rebuilt_from_the_parts(finished: Settings, out: Path) -> None:
    """No file but the parts records progress: without manifest and summary the repeated command
    computes nothing and writes both.
    """
    before, manifest = helpers.parts(out), (out / "manifest.json").read_bytes()
    (out / "manifest.json").unlink()
    (out / "summary.json").unlink()
    summary = run.run(Settings(sources=finished.sources, output=str(out)))
    assert (summary.images, summary.failed_by_status, summary.images_per_second) == (
        10,
        {"empty": 1},
        None,
    )
    assert (out / "manifest.json").read_bytes() == manifest
    assert helpers.parts(out) == before
    assert found(out) == SOUND


@pytest.mark.parametrize("damage", ["rubbish", "other job", "short"])
def test_the_ledger_does_not_close_over_a_damaged_part(
    finished: Settings, out: Path, damage: str
) -> None:
    """A resumed run names the part and the way out instead of finishing over it."""
    (out / "summary.json").unlink()
    part(out, 3).unlink()
    if damage == "rubbish":
        part(out, 1).write_bytes(b"PAR1 rubbish")
    elif damage == "other job":
        rewrite(
            part(out, 1),
            lambda table: table.replace_schema_metadata({b"imagemill.answer_id": b"0"}),
        )
    else:
        rewrite(part(out, 1), lambda table: table.slice(1))
    with pytest.raises(PartError, match=r"part-000001\.parquet .*imagemill verify --quarantine"):
        run.run(Settings(sources=finished.sources, output=str(out)))
    assert not (out / "summary.json").exists()


def test_temporary_and_foreign_files_are_no_parts(finished: Settings, out: Path) -> None:
    """What a killed worker left half-written counts for nothing and is swept away; other people's
    files stay.
    """
    predictions = out / "predictions"
    part(out, 0).rename(predictions / ".part-000000.parquet.123.tmp")
    (predictions / "notes.txt").touch()
    assert found(out) == [(0, "is missing")]
    run.run(Settings(sources=finished.sources, output=str(out)))
    assert found(out) == SOUND
    assert sorted(path.name for path in predictions.iterdir())[0] == "notes.txt"
    assert not list(predictions.glob(".*"))


def test_status_counts_what_is_there(out: Path) -> None:
    """Reads only; a job with a missing part is not complete, and the failures so far are
    counted.
    """
    part(out, 0).unlink()
    before = sorted(path for path in out.rglob("*"))
    status = OpenJob.open(out).status()
    assert (status.images, status.done, status.shards, status.shards_done) == (10, 7, 4, 3)
    assert (status.failed_by_status, status.running, status.complete) == (
        {"empty": 1},
        False,
        False,
    )
    with locked(JobPaths(out)):
        assert OpenJob.open(out).status().running
    assert sorted(path for path in out.rglob("*")) == before


def test_a_plan_that_lost_images_is_found(out: Path) -> None:
    """The job's own count is held against the plan: a plan file that is gone does not make a
    smaller job complete.
    """
    for path in (out / "plan").glob("*.parquet"):
        path.unlink()
    assert found(out) == [(None, "does not hold the 10 images of job.json")]
    parts = sorted((out / "predictions").iterdir())
    OpenJob.open(out).verify(quarantine=True)
    assert sorted((out / "predictions").iterdir()) == parts, "there is nothing to hold them against"


def test_a_part_that_cannot_be_read_now_is_not_damaged(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or store that fails once must not move a sound part to quarantine, nor be blamed on
    the file that was to be written.
    """
    job = OpenJob.open(out)
    real = type(job.store).read

    def read(store: Any, path: Path) -> bytes:
        if path == part(out, 1):
            raise OSError(errno.EIO, "no answer")
        return real(store, path)

    monkeypatch.setattr(type(job.store), "read", read)
    monkeypatch.setattr(
        type(job.store), "open", lambda store, path: pa.BufferReader(read(store, path))
    )
    message = r"part-000001\.parquet cannot be read: no answer\. Repeat the command when it can"
    for reading in (
        lambda: ledger.examine(job.store, 1),
        lambda: list(ledger.tables(job.store, [1], ["index"])),
        lambda: job.close([], lambda _, path: path),
    ):
        with pytest.raises(PartError, match=message):
            reading()
    part(out, 2).write_bytes(b"rubbish")
    problems, moved = job.verify(quarantine=True)
    assert [(found.shard, found.damaged) for found in problems] == [(1, False), (2, True)]
    assert problems[0].what == "cannot be read: no answer"
    assert [path.stem.partition(".")[0] for path in moved] == ["part-000002"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            pa.ArrowMemoryError(),
            "cannot be read: not enough memory. Repeat the command when it can",
        ),
        (OSError("Couldn't deserialize thrift: no"), "is damaged: Couldn't deserialize thrift: no"),
        (pa.ArrowInvalid("no Parquet"), "is damaged: no Parquet"),
        (FileNotFoundError(errno.ENOENT, "gone"), "is missing. Run `imagemill verify"),
    ],
    ids=["memory", "thrift", "arrow", "gone"],
)
def test_what_a_part_is_said_to_be(
    out: Path, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what reading says of the bytes is damage; Arrow's own OSError has no number."""
    job = OpenJob.open(out)

    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(type(job.store), "open", fail)
    with pytest.raises(PartError, match=re.escape(f"part-000001.parquet {message}")):
        list(ledger.tables(job.store, [1], ["index"]))


def test_the_manifest_has_the_sha256_of_every_part(out: Path) -> None:
    """As any other tool computes it."""
    manifest = documents.read_manifest(OpenJob.open(out).store)
    assert manifest is not None
    assert {name: record.sha256 for name, record in manifest.parts.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (out / "predictions").iterdir()
    }


def test_failed_images_are_named_where_a_line_can_name_them(
    models_dir: Path, tmp_path: Path
) -> None:
    """Folders, lists and single files are spelt as before; members of a zip or tar and rows of a
    table are counted instead.
    """
    folder = helpers.fill(tmp_path / "images", {"a/bad.jpg": b"", "good.jpg": sample_images.jpeg()})
    (tmp_path / "list.txt").write_text("images/a/bad.jpg\nimages/good.jpg\n")
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.write(folder / "a" / "bad.jpg", "a/bad.jpg")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(folder / "a" / "bad.jpg", "a/bad.jpg")
    pq.write_table(pa.table({"image": [b"", b"text" * 9]}), tmp_path / "some.parquet")
    sources = (
        folder,
        f"@{tmp_path / 'list.txt'}",
        tmp_path / "some.{zip,tar,parquet}",
        folder / "a" / "bad.jpg",
    )
    settings = Settings(
        tuple(map(str, sources)),
        str(tmp_path / "out"),
        "tiny",
        str(models_dir),
        "null",
        shard_size=4,
        report=False,
    )
    messages: list[str] = []

    class Listener(observer.Watcher):
        def notify(self, message: str) -> None:
            messages.append(message)

    assert run.run(settings, Listener()).failed == 7
    assert (tmp_path / "out" / "failed.txt").read_text() == f"{folder}/a/bad.jpg\n" * 3
    assert messages == [
        "4 failed images are in archives or tables: not in failed.txt, but --retry-failed processes"
        " them again"
    ]
    assert found(tmp_path / "out") == SOUND


@pytest.mark.parametrize(
    "name",
    ["part-000001 (1).parquet", "part-1.parquet", "extra.parquet", "more/part-000001.parquet"],
)
def test_rows_that_a_reader_would_take_for_the_jobs_are_found(
    finished: Settings, out: Path, name: str
) -> None:
    """Programs that read the folder read a copy beside a part too; `verify` names it, and
    quarantine moves it alone away.
    """
    copy = out / "predictions" / name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(part(out, 1).read_bytes())
    assert found(out) == [
        (None, "is not a part of this job, but readers of the folder would read its rows too")
    ]
    _, moved = OpenJob.open(out).verify(quarantine=True)
    assert len(moved) == 1
    assert not copy.exists()
    run.run(Settings(sources=finished.sources, output=str(out)))
    assert found(out) == SOUND


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:500], lambda data: data[:-1], lambda data: data + b"x"],
    ids=["cut", "-1", "+1"],
)
def test_a_finished_job_with_a_part_of_another_size_does_not_end_well(
    finished: Settings, out: Path, change: Callable[[bytes], bytes]
) -> None:
    """The command that finds nothing to do looks at the parts' sizes, smaller or larger, which
    costs next to nothing.
    """
    before = part(out, 2).read_bytes()
    part(out, 2).write_bytes(change(before))
    size = len(change(before))
    message = (
        f"part-000002.parquet has {size:,} bytes, {len(before):,} were committed. Run `imagemill"
        f" verify --quarantine {out}`"
    )
    with pytest.raises(PartError, match=re.escape(message)):
        run.run(Settings(sources=finished.sources, output=str(out)))


def test_failed_files_are_listed_also_behind_failed_members_of_archives(
    models_dir: Path, tmp_path: Path
) -> None:
    """One shard holds both, in any order: failed.txt leaves out what no line can name, and nothing
    else. Odd names are quoted.
    """
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("bad.jpg", b"")
    names = ("a.jpg", "carriage\rreturn.jpg", "line\nbreak.jpg", "z.jpg")
    folder = helpers.fill(
        tmp_path / "images", dict.fromkeys(names, b"") | {"good.jpg": sample_images.jpeg()}
    )
    sources = tuple(map(str, (folder, tmp_path / "some.zip", folder)))
    run.run(
        Settings(
            sources,
            str(tmp_path / "out"),
            "tiny",
            str(models_dir),
            "null",
            shard_size=100,
            report=False,
        )
    )
    listed = [
        f"{folder}/a.jpg",
        json.dumps(f"{folder}/carriage\rreturn.jpg"),
        json.dumps(f"{folder}/line\nbreak.jpg"),
        f"{folder}/z.jpg",
    ]
    assert (tmp_path / "out" / "failed.txt").read_bytes().decode() == "".join(
        f"{line}\n" for line in listed * 2
    )
    tally = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert tally["failed_by_status"] == {"empty": 9}


def test_rows_come_with_the_columns_that_were_asked_for(out: Path) -> None:
    """In that order, from all parts in plan order; a part without such a column is one clear error,
    as is one that is another's.
    """
    opened = OpenJob.open(out)

    def rows(*columns: str) -> list[dict[str, object]]:
        tables = opened.tables(opened.shards, columns)
        return [row for _, table in tables for row in table.to_pylist()]

    assert [list(row) for row in rows("status", "index")] == [["status", "index"]] * 10
    assert [row["index"] for row in rows("index")] == list(range(10))
    with pytest.raises(
        PartError,
        match=(
            r"part-000000\.parquet is damaged: .*Run `imagemill verify --quarantine .*out`, then"
            r" repeat the run"
        ),
    ):
        rows("nothing")
    part(out, 2).write_bytes(b"rubbish")
    with pytest.raises(
        PartError,
        match=r"part-000002\.parquet is damaged: .*[^.]\. Run `imagemill verify --quarantine .*out`",
    ):
        list(opened.tables(opened.shards[2:3], ["index"]))
    shutil.copy(part(out, 0), part(out, 1))
    with pytest.raises(
        PartError,
        match=r"part-000001\.parquet is shard 0 under another shard's name\. Run `imagemill verify",
    ):
        rows("index")


def test_images_that_an_extra_would_read_are_counted(models_dir: Path, tmp_path: Path) -> None:
    """By extra, from the errors of the rows."""
    helpers.fill(tmp_path / "images", dict.fromkeys(("a.heic", "b.jpg", "c.jxl", "d.heic"), b"x"))
    settings = made_jobs.settings_of(
        tmp_path / "images", output=tmp_path / "out", models_dir=models_dir
    )
    job = made_jobs.made_job(settings, made_jobs.tiny(models_dir), lambda _: Status.UNSUPPORTED)
    needs = "{} needs a package that is not installed: pip install 'imagemill[{}]'"
    errors = [
        needs.format("HEIC", "heif"),
        "pip install imagemill[x].jpg",
        needs.format("JPEG XL", "jxl"),
        needs.format("HEIC", "heif"),
    ]
    part = job.store.paths.part(0)
    table = pq.read_table(part)
    place = table.schema.get_field_index("error")
    pq.write_table(table.set_column(place, table.field(place), pa.array(errors)), part)
    assert job.close([], lambda *_: b"").extras == {"heif": 2, "jxl": 1}
