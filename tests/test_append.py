"""`--append`: images that arrived since a job was frozen become a further generation of its plan."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import helpers
import sample_images
from archive_files import pack
from imagemill import report
from imagemill.cli import make_parser
from imagemill.errors import JobMismatchError, OutputError, SourceError, UsageError
from imagemill.job import documents, plan
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.pipeline.backends import devices
from imagemill.records import Entry, Settings
from imagemill.runner import append as appending
from imagemill.runner import difference, model, resume, run
from imagemill.runner import freeze as freezing
from imagemill.system import cpu
from made_jobs import frozen_job
from test_run import Listener

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]

NULL = devices.resolve("null")


def freeze(settings: Settings) -> OpenJob:
    """Freeze a job and start no worker."""
    return frozen_job(settings, model.resolve_model(settings, Listener()))


def append(settings: Settings) -> tuple[OpenJob, difference.Difference, list[str]]:
    """Append to a job and start no worker. Returns the job as the next command finds it, what was
    found, and the messages.
    """
    listener = Listener()
    opened = resume.resume(
        replace(settings, append=True), OpenJob.open(settings.output), NULL, listener
    )
    opened, found = appending.append(replace(settings, append=True), opened, NULL, listener)
    again = OpenJob.open(settings.output)
    assert again.appended == opened.appended
    return again, found, listener.printed


def paths(job: OpenJob, generation: int | None = None) -> list[str]:
    """The planned paths of a job, or of one of its generations, in order."""
    shards = [
        shard
        for shard in job.shards
        if generation is None or job.generation_of(shard) is job.generations[generation - 1]
    ]
    return [row.path.decode() for shard in shards for row in job.rows(shard)]


def part_sums(output: Path) -> dict[str, str]:
    """Name → sha256 of every part."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in (output / "predictions").iterdir()
    }


def sound(output: Path) -> pa.Table:
    """The rows of a complete and sound job, in which nothing half-written is left."""
    assert OpenJob.open(output).verify() == ([], [])
    assert not list(output.rglob("*.tmp"))
    return helpers.table(output)


def grow(folder: Path, mark: str = "", later: int = 0) -> None:
    """Twenty more images, some of which sort first; five removed, one changed. `mark` and `later`
    make them others than those of a call before.
    """
    helpers.fill(
        folder,
        {
            f"{name}.jpg": sample_images.jpeg(30, 30, seed=seed)
            for seed, name in enumerate(
                [*(f"0/{mark}{n}" for n in range(5)), *(f"050{mark}{n}" for n in range(5))]
                + [f"z{mark}{n}" for n in range(10)]
            )
        },
    )
    for number in (3, 10, 50, 77, 99):
        (folder / f"{number - later:03d}.jpg").unlink()
    changed = folder / f"{42 + later:03d}.jpg"
    changed.write_bytes(changed.read_bytes() + b"more")


# ── whole jobs ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
def test_new_images_get_new_parts_and_nothing_existing_is_touched(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """A hundred images, then twenty more, five removed and one changed, twice: the parts of earlier
    generations keep their bytes, and each row is what a new job would give.
    """
    images, out = jpegs(100), tmp_path / "out"
    settings = job(images, append=True)
    assert run.run(settings).images == 100  # there is no job yet, so it is started
    first = part_sums(out)
    frozen = (out / "job.json").read_bytes()
    grow(images)
    listener = Listener()
    summary = run.run(settings, listener)
    assert (summary.images, summary.appended, summary.resumed_shards) == (120, 20, 4)
    assert (summary.changed_in_source, summary.missing_in_source) == (1, 5)
    assert listener.printed[:3] == [
        "20 new images: 0/0.jpg, 0/1.jpg, 0/2.jpg, 0/3.jpg, 0/4.jpg, 0500.jpg, 0501.jpg, 0502.jpg,"
        " 0503.jpg, 0504.jpg and 10 more",
        "1 image has another size than when planned: 042.jpg. Rows are kept. To classify changed"
        " images again, give them as sources to a run into another --output.",
        "5 images of the job are no longer in its sources: 003.jpg, 010.jpg, 050.jpg, 077.jpg,"
        " 099.jpg. Rows are kept.",
    ]
    second = part_sums(out)
    assert second.items() >= first.items()
    assert len(second) == len(first) + 1
    rows = sound(out).to_pylist()
    grow(images, "A", later=1)
    helpers.fill(images, {"later.jpg": b"broken"})
    summary = run.run(settings, Listener())
    assert (summary.images, summary.appended, summary.failed) == (141, 21, 1)
    assert (summary.changed_in_source, summary.missing_in_source) == (2, 10)
    assert part_sums(out).items() >= second.items()
    assert sound(out).to_pylist()[:120] == rows
    assert (out / "job.json").read_bytes() == frozen
    assert (out / "failed.txt").read_text() == f"{images}/later.jpg\n"
    assert documents.read_manifest(open_store(JobPaths(out))).parts.keys() == part_sums(out).keys()
    report.write(OpenJob.open(out))
    assert re.search(
        r"appended.*: 20 images.*: 21 images<", (out / "report.html").read_text(), re.S
    )
    status = OpenJob.open(out).status()
    assert (status.images, status.done, status.complete) == (141, 141, True)
    fresh = replace(settings, output=str(tmp_path / "fresh"), append=False)
    run.run(fresh)
    answers = {row["path"]: row for row in helpers.rows(tmp_path / "fresh")}
    for row in sound(out).to_pylist():
        if row["path"] in answers and row["path"] not in ("042.jpg", "043.jpg"):
            assert row | {"index": 0} == answers[row["path"]] | {"index": 0}


@pytest.mark.process
def test_the_command_line_appends_and_a_dry_run_lists_what_it_would(
    imagemill: Callable[..., helpers.Result], jpegs: Folders, tmp_path: Path
) -> None:
    """In one command for cron, which starts the job, too; nothing new is exit 0."""
    images, out = jpegs(8), tmp_path / "out"
    words = ("run", images, "--output", out, "--devices", "null", "--model", "tiny", "--append")
    assert imagemill(*words, "--dry-run").out.startswith("8 images, shards of")
    assert imagemill(*words, "--json").json["images"] == 8
    assert imagemill(*words, "--dry-run").out == "nothing to append\n"
    repeated = imagemill(*words, "--json")
    assert (repeated.code, repeated.json["appended"]) == (0, 0)
    assert "nothing to append: the job has all 8 listed images" in repeated.err
    jpegs(10)
    before = part_sums(out)
    planned = imagemill(*words, "--dry-run")
    assert planned.out == "2 images to append, shards of 32\n"
    assert "2 new images: 008.jpg, 009.jpg" in planned.err
    assert OpenJob.open(out).frozen.images == 8
    assert part_sums(out) == before
    assert imagemill(*words, "--json").json["appended"] == 2
    assert imagemill("verify", out).out == "complete and sound: 10 images, one row each\n"


@pytest.mark.process
def test_unfinished_images_of_earlier_generations_are_done_too(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Of the first one, and of an appended one."""
    settings = job(jpegs(10), shard_size=4)
    freeze(settings)
    jpegs(12)
    append(settings)
    jpegs(15)
    summary = run.run(replace(settings, append=True))
    assert (summary.images, summary.appended, summary.shards) == (15, 3, 5)
    assert [row["index"] for row in helpers.rows(tmp_path / "out")] == list(range(15))
    sound(tmp_path / "out")


@pytest.mark.process
def test_parts_carry_the_answer_id_of_their_generation(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another decoder needs --allow-mixed. Then each part is checked against its own generation."""
    settings, out = job(jpegs(4)), tmp_path / "out"
    run.run(settings)
    jpegs(6)
    for module in (appending, freezing, resume):
        monkeypatch.setattr(module, "DECODER", "another/1")
    with pytest.raises(
        JobMismatchError, match=r"decoder pillow\S+, this is decoder another/1.*mix"
    ):
        run.run(replace(settings, append=True))
    assert not OpenJob.open(out).appended
    run.run(replace(settings, append=True, allow_mixed=True))
    sound(out)
    parts = [out / "predictions" / f"part-{number:06d}.parquet" for number in (0, 1)]
    ids = [pq.read_schema(part).metadata[b"imagemill.answer_id"].decode() for part in parts]
    opened = OpenJob.open(out)
    assert ids == [opened.first.answer_id, opened.appended[0].answer_id]
    assert len(set(ids)) == 2
    jpegs(7)
    assert run.run(replace(settings, append=True)).images == 7  # as the last generation
    table = pq.read_table(parts[1])
    metadata = table.schema.metadata | {b"imagemill.answer_id": ids[0].encode()}
    (out / "manifest.json").unlink()
    pq.write_table(table.replace_schema_metadata(metadata), parts[1])
    assert f"has answer id {ids[0]}, the job has {ids[1]}" in {
        problem.what for problem in opened.verify()[0]
    }
    parts[0].unlink()
    for flags in ({}, {"append": True, "allow_mixed": True}):
        jpegs(8)
        with pytest.raises(JobMismatchError, match="Continue with imagemill"):
            run.run(replace(settings, **flags))
    assert OpenJob.open(out).frozen.images == 7  # or no version could finish the job


@pytest.mark.process
def test_a_source_that_was_processed_and_removed_is_not_missed(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Sources that are not named are left alone. They are needed only for remaining images."""
    january, february = jpegs(6, name="january"), jpegs(4, name="february")
    run.run(job(january))
    january.rename(tmp_path / "elsewhere")
    summary = run.run(job(february, append=True))
    assert (summary.images, summary.appended, summary.missing_in_source) == (10, 4, 0)
    assert OpenJob.open(tmp_path / "out").frozen.job.sources == (str(january), str(february))
    (tmp_path / "out" / "predictions" / "part-000000.parquet").unlink()
    with pytest.raises(SourceError, match="january cannot be read"):
        run.run(job(february))
    (tmp_path / "elsewhere").rename(january)
    assert run.run(job(february)).images == 10


@pytest.mark.process
def test_the_summary_of_a_smaller_job_is_not_taken_for_the_end(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """A launcher on another machine may have written it while images were appended."""
    settings, summary = job(jpegs(4)), tmp_path / "out" / "summary.json"
    run.run(settings)
    smaller = summary.read_bytes()
    jpegs(6)
    run.run(replace(settings, append=True))
    summary.write_bytes(smaller)
    assert run.run(settings).images == 6
    assert json.loads(summary.read_text())["images"] == 6


def test_appending_nothing_starts_no_worker(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an unfinished job, nothing is frozen either."""
    settings = job(jpegs(3))
    freeze(settings)
    opened, found, said = append(settings)
    assert (opened.appended, found.new.count) == ((), 0)
    assert said == ["nothing to append: the job has all 3 listed images"]
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {
        "job.json",
        "logs",
        "plan",
        "plan-00000-00000.parquet",
        "predictions",
    }


# ── which images are new ──────────────────────────────────────────────────────────────────────────


def test_images_and_shards_are_counted_on(job: Jobs, jpegs: Folders) -> None:
    """Over three generations; shards end where a generation ends."""
    settings = job(jpegs(5), shard_size=2)
    freeze(settings)
    jpegs(8, **{"0.jpg": b"x"})
    append(settings)
    jpegs(9)
    opened, _, _ = append(replace(settings, shard_size=None))
    assert paths(opened, 2) == ["0.jpg", "005.jpg", "006.jpg", "007.jpg"]
    assert paths(opened, 3) == ["008.jpg"]
    assert [shard.number for shard in opened.shards] == list(range(6))
    assert [(shard.first, shard.count) for shard in opened.shards] == [
        *((0, 2), (2, 2), (4, 1)),
        *((5, 2), (7, 2)),
        (9, 1),
    ]
    assert [opened.row(index).index for index in range(10)] == list(range(10))


@pytest.mark.parametrize("kind", ["list", "csv", "zip", "tar", "tar.gz", "parquet"])
def test_what_is_new_in_a_source_is_found_wherever_it_stands(
    job: Jobs, tmp_path: Path, kind: str
) -> None:
    """A list, table or archive that was written again, with new images first and in another order.
    A path that occurs once more is new once.
    """

    def write(names: list[str]) -> str:
        if kind == "parquet":
            images = [{"bytes": name.encode(), "path": name} for name in names]
            pq.write_table(pa.table({"image": images}), tmp_path / "source.parquet")
            return str(tmp_path / "source.parquet#image")
        if kind in ("list", "csv"):
            header = ["path"] * (kind == "csv")
            path = tmp_path / f"source.{kind}"
            path.write_text("".join(f"{line}\n" for line in [*header, *names]))
            return f"@{path}"
        return pack(tmp_path, kind, {name: name.encode() for name in names}, "source")

    many = kind in ("list", "csv", "parquet")
    source = write(["a.jpg", "b.jpg", "c.jpg"] + ["b.jpg"] * many)
    settings = replace(job(), sources=(source,))
    freeze(settings)
    write(["x.jpg", "c.jpg", "b.jpg", "y.jpg", "a.jpg"] + ["b.jpg", "b.jpg"] * many)
    opened, found, _ = append(settings)
    names = [path.rpartition("/")[2] for path in paths(opened, 2)]
    assert names == ["x.jpg", "y.jpg"] + ["b.jpg"] * many
    assert (found.changed.count, found.missing.count) == (0, 0)


def test_more_shards_of_a_data_set_are_added_wherever_they_are_named(
    job: Jobs, tmp_path: Path
) -> None:
    """As `shards/*.tar` with one more shard in the middle. Sources of the job keep their places."""
    a, b, c = (pack(tmp_path, "tar", {f"{n}.jpg": b"x"}, n) for n in "abc")
    settings = replace(job(), sources=(a, c))
    freeze(settings)
    opened, _, _ = append(replace(settings, sources=(a, b, c, b)))
    assert opened.frozen.job.sources == (a, c, b)
    assert [(row.source, row.path) for row in opened.all_rows()] == [
        (0, b"a.jpg"),
        (1, b"c.jpg"),
        (2, b"b.jpg"),
    ]
    assert opened.sources_of(opened.shards) == (a, c, b)
    assert opened.sources_of(opened.shards[1:]) == (b,)


def test_include_exclude_and_limit_are_those_of_each_command(job: Jobs, jpegs: Folders) -> None:
    """The limit counts listed images, so repeating it adds nothing. Images that a filter or a limit
    leaves out are not missing.
    """
    images = jpegs(6, **{"a.png": b"x", "b.png": b"x"})
    settings = job(images, limit=2, exclude=("*.png",))
    freeze(settings)
    for _ in range(2):
        opened, found, _ = append(replace(settings, limit=4))
        assert paths(opened) == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    opened, found, _ = append(replace(settings, limit=None, exclude=None, include=("*.png",)))
    assert paths(opened, 3) == ["a.png", "b.png"]
    assert found.missing.count == 0
    opened, found, _ = append(replace(settings, limit=None, exclude=None))
    assert paths(opened, 4) == ["004.jpg", "005.jpg"]
    assert [one.limit for one in opened.generations] == [2, 4, None, None]


def test_skipped_files_of_added_sources_are_counted_once(job: Jobs, jpegs: Folders) -> None:
    """And those of sources of the job are not counted again."""
    first, second = jpegs(2, name="a", **{"x.txt": b""}), jpegs(2, name="b", **{"y.md": b""})
    freeze(job(first))
    opened, _, _ = append(job(first, second))
    assert opened.frozen.skipped_by_suffix == {".txt": 1, ".md": 1}


def test_images_that_moved_are_not_new(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """The source may be given at its old or its new place."""
    images = jpegs(3)
    freeze(job(images))
    moved = ((str(images), str(tmp_path / "new")),)
    images.rename(tmp_path / "new")
    jpegs(4, name="new")
    for source in (images, tmp_path / "new"):
        opened, found, _ = append(job(source, moved=moved))
        assert (found.changed.count, found.missing.count) == (0, 0)
        assert opened.frozen.job.sources == (str(images),)
        assert paths(opened) == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]


paths_of_a_source = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([b"", b"a", b"b", b"a/b", b"\xff"])), max_size=12
)


@given(before=paths_of_a_source, now=paths_of_a_source, per_bucket=st.sampled_from([1, 3, 1000]))
def test_the_difference_is_that_of_two_multisets(
    before: list[tuple[int, bytes]],
    now: list[tuple[int, bytes]],
    per_bucket: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever the order, with repeated paths, and in any number of temporary files."""
    rows = [plan.PlannedRow(index, *row, 1) for index, row in enumerate(before)]
    job: Any = SimpleNamespace(
        frozen=SimpleNamespace(images=len(rows)), all_rows=lambda: rows, row=rows.__getitem__
    )
    spooled = tmp_path_factory.mktemp("spool") / "listing"
    plan.spool((Entry(*row, 2) for row in now), spooled)
    opened: list[Any] = [SimpleNamespace(name="first"), SimpleNamespace(name="second")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(difference, "_BUCKET_IMAGES", per_bucket)
        found = difference.compare(job, opened, {0, 1}, spooled, len(now))
    was, is_now = Counter(before), Counter(now)
    assert found.new.count == (is_now - was).total()
    assert found.missing.count == (was - is_now).total()
    assert found.changed.count == (was & is_now).total()
    assert Counter(row for row, new in zip(now, found.is_new, strict=True) if new) == is_now - was


def test_few_of_many_images_are_named(job: Jobs, jpegs: Folders) -> None:
    """The first ones of the plan, and how many more there are."""
    images = jpegs(1200)
    freeze(job(images))
    for path in images.glob("*[1-9].jpg"):
        path.unlink()
    _, found, said = append(job(images))
    assert found.missing.count == 1080
    assert ": 001.jpg, 002.jpg, 003.jpg," in said[1]
    assert said[1].endswith(" 011.jpg and 1,070 more. Rows are kept.")


# ── which commands continue a job ─────────────────────────────────────────────────────────────────


def test_the_first_and_the_last_command_continue_the_job(job: Jobs, jpegs: Folders) -> None:
    """Without --append. Any other selection is refused, and the message names --append."""
    first, second = jpegs(2, name="a"), jpegs(2, name="b")
    freeze(job(first, limit=1))
    opened, _, _ = append(job(second, first, exclude=("x",)))
    for settings in (job(first, limit=1), job(second, first, exclude=("x",))):
        assert resume.resume(settings, opened, NULL, Listener()).appended == opened.appended
    for settings, what in (
        (
            job(second),
            f"SOURCE {second} is asked for.*To add images of other sources, add --append",
        ),
        (job(first), "started with --limit 1, now no --limit"),
        (job(second, first), "started with --exclude x, now no --exclude"),
        (job(second, first, exclude=("x",), shard_size=7), "--shard-size 32, now --shard-size 7"),
    ):
        with pytest.raises(JobMismatchError, match=what):
            resume.resume(settings, opened, NULL, Listener())


def test_a_wrong_place_of_moved_images_is_refused_before_anything_is_added(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """As without --append."""
    freeze(job(jpegs(2)))
    jpegs(3)
    with pytest.raises(UsageError, match="--moved /nowhere=…: nothing in this job is there"):
        run.run(job(tmp_path / "images", append=True, moved=(("/nowhere", "/new"),)))
    assert OpenJob.open(tmp_path / "out").frozen.images == 2


def test_what_decides_answers_may_not_change(job: Jobs, jpegs: Folders) -> None:
    """With --append as without."""
    settings = job(jpegs(2), top_k=3)
    freeze(settings)
    with pytest.raises(JobMismatchError, match="--top-k 3, now --top-k 4"):
        append(replace(settings, top_k=4))


@pytest.mark.parametrize(
    ("what", "was", "now"),
    [("openvino", "1.0", "2.0"), ("vector units", "avx2", "avx512f"), ("torch", "1.0", "2.0")],
)
def test_other_libraries_and_processors_must_be_allowed(
    job: Jobs,
    jpegs: Folders,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    was: str,
    now: str,
) -> None:
    """They are compared with those of the last generation. Without new images nothing is."""
    value = was

    def units(_: object) -> list[str]:
        return [value if what == "vector units" else "sse"]

    monkeypatch.setattr(cpu, "vector_units", units)
    if what == "torch":  # the null device stands in for a GPU, whose libraries are in the answer id
        monkeypatch.setattr(devices, "fixed_facts", lambda *_: {what: value})
        monkeypatch.setattr(freezing, "fixed_facts", lambda *_: {what: value})
    elif what == "openvino":
        monkeypatch.setattr(devices, "versions_of", lambda _: {what: value})
    settings = job(jpegs(2))
    freeze(settings)
    value = now
    append(settings)
    jpegs(3)
    with pytest.raises(JobMismatchError, match=f"with {what} {was}, this is {what} {now}.*--allow"):
        append(settings)
    opened, _, _ = append(replace(settings, allow_mixed=True))
    assert (opened.appended[0].answer_id != opened.first.answer_id) == (what == "torch")
    jpegs(4)
    assert paths(append(settings)[0], 3) == ["003.jpg"]


# ── damage ────────────────────────────────────────────────────────────────────────────────────────


def test_a_generation_without_its_document_does_not_exist(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """What a killed launcher left of it is removed before the next one is made."""
    settings = job(jpegs(2))
    freeze(settings)
    jpegs(4)
    append(settings)
    (tmp_path / "out" / "appended" / "000002.json").unlink()
    (tmp_path / "out" / "plan" / "000002" / "plan-00000-00001.parquet").write_bytes(b"half")
    assert paths(OpenJob.open(tmp_path / "out")) == ["000.jpg", "001.jpg"]
    opened, _, _ = append(settings)
    assert paths(opened, 2) == ["002.jpg", "003.jpg"]


def test_parts_that_no_plan_knows_are_not_taken_for_new_ones(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Such as those of a generation whose document was removed: they would hold other images."""
    settings = job(jpegs(2))
    freeze(settings)
    jpegs(3)
    (tmp_path / "out" / "predictions" / "part-000001.parquet").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"part-000001.parquet does not belong.*--quarantine"):
        append(settings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"000002\.json is missing, although .* holds 000003\.json"),
        (lambda path: path.write_text("{"), r"000002\.json"),
        (lambda path: path.write_text('{"format": 9}'), r"000002\.json"),
        (
            lambda path: path.write_text(path.read_text().replace('"format": 2', '"format": 9')),
            "has format 9, this version of imagemill reads format 2",
        ),
    ],
)
def test_a_damaged_document_is_one_clear_error(
    job: Jobs, jpegs: Folders, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """A job without its generations would be another job."""
    settings = job(jpegs(1))
    freeze(settings)
    for count in (2, 3):
        jpegs(count)
        append(settings)
    damage(tmp_path / "out" / "appended" / "000002.json")
    with pytest.raises(OutputError, match=message):
        OpenJob.open(tmp_path / "out")


def test_a_missing_plan_of_a_generation_is_found(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """As that of the first one is."""
    settings = job(jpegs(1))
    freeze(settings)
    jpegs(2)
    append(settings)
    (tmp_path / "out" / "plan" / "000002" / "plan-00000-00000.parquet").unlink()
    with pytest.raises(OutputError, match="does not hold the 2 images"):
        _ = OpenJob.open(tmp_path / "out").shards


# ── the recipes of docs/append.md ─────────────────────────────────────────────────────────────────

DOCUMENT = (helpers.PROJECT / "docs" / "append.md").read_text()


def test_the_line_for_cron_is_a_command() -> None:
    """After the five fields of its time."""
    (line,) = (line for line in DOCUMENT.splitlines() if line.startswith("*/10 "))
    words = shlex.split(line.partition(" >>")[0])[5:]
    assert words[0] == "imagemill"
    assert make_parser().parse_args(words[1:]).append


@pytest.mark.process
def test_the_script_for_inotify_appends_once_for_images_that_arrive_together(
    tmp_path: Path,
) -> None:
    """And once at its start. A stand-in of inotifywait names three images and ends."""
    script = tmp_path / "append-on-arrival"
    script.write_text(DOCUMENT.partition("```bash\n")[2].partition("```")[0])
    for name, text in {
        "inotifywait": 'for n in 1 2 3; do echo "$5 CLOSE_WRITE $n.jpg"; done',
        "imagemill": f'echo "$@" >> {tmp_path}/calls',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", script, "my photos", "out"], env=environment, check=True, timeout=300)
    assert (tmp_path / "calls").read_text() == 2 * "run my photos --output out --append\n"
