"""The main job, end to end: images in, one row per image out, whatever they are."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from PIL import Image

import helpers
import sample_images
from imagemill.display import observer
from imagemill.errors import JobMismatchError, OutputError, SourceError, TooManyBadError, UsageError
from imagemill.job import documents, ledger, plan
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle
from imagemill.records import Bundle, Clock, Precision, Settings, Summary
from imagemill.runner import dry_run, resume, run, summarise
from imagemill.system import serialization
from imagemill.version import __version__
from imagemill.workers import protocol, supervisor
from tiny import CLASSES, LABELS, TINY_CARD, Finished, tiny_model

pytestmark = pytest.mark.process

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]
CLI = Callable[..., helpers.Result]


class Listener(observer.Watcher):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.printed: list[str] = []

    def notify(self, message: str) -> None:
        self.printed.append(message)


def problems(output: Path) -> list[ledger.Problem]:
    return OpenJob.open(output).verify()[0]


# ── the photographs ───────────────────────────────────────────────────────────────────────────────


def test_photographs_become_one_row_each(
    photographs: Path, photographs_run: Finished, imagemill: CLI
) -> None:
    """328 photographs, 328 rows, two processes, the two text files counted as skipped;
    `verify` agrees.
    """
    result = photographs_run.result
    assert result.code == 0, result.err
    summary = result.json
    assert (summary["images"], summary["ok"], summary["failed"], summary["failed_by_status"]) == (
        328,
        328,
        0,
        {},
    )
    assert summary["skipped_by_suffix"] == {".csv": 1, ".md": 1}
    assert [(device["name"], device["restarts"]) for device in summary["devices"]] == [
        ("cpu#0", 0),
        ("cpu#1", 0),
    ]
    assert sum(device["images"] for device in summary["devices"]) == 328
    rows = helpers.rows(photographs_run.output)
    assert [row["index"] for row in rows] == list(range(328))
    on_disk = sorted(
        str(path.relative_to(photographs))
        for folder in ("coco-sample", "imagenet-sample")
        for path in (photographs / folder).iterdir()
    )
    assert [row["path"] for row in rows] == on_disk
    for row in rows:
        with Image.open(photographs / row["path"]) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            assert (row["width"], row["height"]) == (image.size[::-1] if turned else image.size)
    verified = imagemill("verify", photographs_run.output)
    assert (verified.code, verified.out) == (0, "complete and sound: 328 images, one row each\n")


def test_efficientnet_lite0_answers_as_the_reference_does(
    photographs: Path, photographs_run: Finished
) -> None:
    """The same top-1 as PyTorch's on at least 196 of 200 photographs, and right on at least 0.885
    of them.
    """
    with (photographs / "labels.csv").open(newline="") as file:
        reference = {f"imagenet-sample/{line['file']}": line for line in csv.DictReader(file)}
    rows = [row for row in helpers.rows(photographs_run.output) if row["path"] in reference]
    assert len(rows) == len(reference) == 200
    agree = [
        row
        for row in rows
        if row["class_id"] == int(reference[row["path"]]["efficientnet_lite0_top1"])
    ]
    right = [row for row in rows if row["class_id"] == int(reference[row["path"]]["class_id"])]
    assert len(agree) >= 196
    assert len(right) / 200 >= 0.885
    off = sorted(
        abs(row["probability"] - float(reference[row["path"]]["efficientnet_lite0_probability"]))
        for row in agree
    )
    assert off[len(off) // 2] < 0.01  # the median; decoders differ in the last bit of a pixel


# ── hostile entries ───────────────────────────────────────────────────────────────────────────────


def hostile(folder: Path) -> dict[str, str]:
    """Write the whole list of hostile entries into a folder; returns path → expected status."""
    good = sample_images.photograph(90, 70, seed=5)
    files: dict[bytes, tuple[bytes, str]] = {
        b"empty.jpg": (b"", "empty"),
        b"text.png": (b"This is not an image.\n" * 20, "not_an_image"),
        b"half.jpg": (sample_images.half(sample_images.jpeg(320, 240)), "truncated"),
        b"wrong-sum.png": (sample_images.png_with_wrong_sum(), "corrupt"),
        b"cmyk.jpg": (sample_images.encode(good.convert("CMYK"), "JPEG"), "ok"),
        b"grey16.png": (
            sample_images.encode(Image.frombytes("I;16", (60, 50), bytes(range(250)) * 24), "PNG"),
            "ok",
        ),
        b"turned.jpg": (sample_images.jpeg(64, 48, orientation=6), "ok"),
        b"animated.gif": (sample_images.animated_gif(), "ok"),
        b"1x1.png": (sample_images.encode(sample_images.photograph(1, 1), "PNG"), "ok"),
        b"1x4000.png": (sample_images.encode(Image.new("RGB", (1, 4000), "red"), "PNG"), "ok"),
        b"not-utf8-\xff\xfe.jpg": (sample_images.jpeg(50, 40, seed=7), "ok"),
        b"new\nline and 'quote\".jpg": (sample_images.jpeg(50, 40, seed=8), "ok"),
        b"unreadable.jpg": (sample_images.jpeg(50, 40, seed=9), "read_error"),
    }
    for name, (data, _) in files.items():
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(data)
    (folder / "unreadable.jpg").chmod(0)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "above.jpg").symlink_to("..")
    os.mkfifo(folder / "fifo.png")
    expected = {
        name.decode("utf-8", "backslashreplace"): status for name, (_, status) in files.items()
    }
    return expected | {
        "loop.jpg": "read_error",
        "above.jpg": "read_error",
        "fifo.png": "read_error",
    }


def test_hostile_entries_are_rows_and_leave_their_neighbours_alone(
    jpegs: Folders, imagemill: CLI, tmp_path: Path
) -> None:
    """One row each with the right status, exit 0, and every neighbour bit for bit as in a run
    without them.
    """
    folder = jpegs(20)
    arguments = (
        "--model",
        "tiny",
        "--devices",
        "cpu:1",
        "--batch-size",
        "4",
        "--shard-size",
        "7",
        "--save",
        "logits",
        "--json",
    )
    assert imagemill("run", folder, "--output", tmp_path / "before", *arguments).code == 0
    expected = hostile(folder)
    result = imagemill(
        "run",
        folder,
        "--output",
        tmp_path / "after",
        *arguments,
        before=helpers.without_root_powers(),
    )
    assert result.code == 0, result.err
    before, after = helpers.by_path(tmp_path / "before"), helpers.by_path(tmp_path / "after")
    assert {path: row["status"] for path, row in after.items() if path not in before} == expected
    assert {path: row for path, row in after.items() if path in before} == before
    assert all(row["error"] is None or "\n" not in row["error"] for row in after.values())
    assert after["unreadable.jpg"]["error"] == "cannot be read: Permission denied"
    assert after["fifo.png"]["error"] == "is a FIFO, not a regular file"
    assert (after["turned.jpg"]["width"], after["turned.jpg"]["height"]) == (48, 64)
    assert (after["1x4000.png"]["width"], after["1x4000.png"]["height"]) == (1, 4000)
    failed = {
        status: list(expected.values()).count(status) for status in set(expected.values()) - {"ok"}
    }
    assert result.json["failed_by_status"] == failed
    assert imagemill("verify", tmp_path / "after").code == 0


def test_permissions_bind_the_wrapped_command(tmp_path: Path) -> None:
    """The test above can fail: without root's powers the file cannot be opened."""
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    import subprocess

    command = [
        *helpers.without_root_powers(),
        sys.executable,
        "-c",
        "import sys; open(sys.argv[1])",
        str(tmp_path / "secret"),
    ]
    assert b"PermissionError" in subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr


def test_every_hostile_image_has_the_status_it_should(job: Jobs, tmp_path: Path) -> None:
    """All the odd images that the tests know, through the whole pipeline at once; some are alone in
    their shard with others as bad.
    """
    made = {f"{name}.jpg": make() for name, make in sample_images.HOSTILE.items()}
    folder = helpers.fill(tmp_path / "hostile", {name: data for name, (data, _) in made.items()})
    summary = run.run(job(folder, shard_size=2, save=("logits",)))
    rows = helpers.by_path(tmp_path / "out")
    assert {path: row["status"] for path, row in rows.items()} == {
        name: status for name, (_, status) in made.items()
    }
    assert all(
        row["error"] and row["logits"] is None and row["top_k"] is None for row in rows.values()
    )
    assert (summary.ok, summary.failed) == (0, len(made))
    assert problems(tmp_path / "out") == []


# ── which images ──────────────────────────────────────────────────────────────────────────────────


def test_several_sources_are_one_job(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """Folders and single images, in the order they were given; rows name their source, paths are
    relative to it.
    """
    first, second = jpegs(3, "first"), jpegs(2, "second")
    run.run(job(second, first, first / "001.jpg"))
    found = [(row["source"], row["path"]) for row in helpers.rows(tmp_path / "out")]
    assert found == [(str(second), f"00{n}.jpg") for n in range(2)] + [
        (str(first), f"00{n}.jpg") for n in range(3)
    ] + [(str(first / "001.jpg"), "001.jpg")]


def test_an_image_that_is_a_source_is_named_in_its_row_and_found_again(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Its path is its name: of failed images too, in a dry run, and for `verify`. `failed.txt`
    names its whole path. A job of an older version, whose rows have no path, is sound.
    """
    folder = jpegs(1, **{"bad.jpg": b""})
    sources = tuple(str(folder / name) for name in ("000.jpg", "bad.jpg"))
    settings = Settings(sources=sources, output=str(tmp_path / "out"), model="tiny", devices="null")
    assert dry_run.dry_run(settings).first == ("000.jpg", "bad.jpg")
    run.run(settings)
    opened = OpenJob.open(tmp_path / "out")
    assert [row["path"] for row in helpers.rows(tmp_path / "out")] == ["000.jpg", "bad.jpg"]
    assert (tmp_path / "out" / "failed.txt").read_text() == f"{sources[1]}\n"
    assert opened.verify() == ([], [])
    assert run.run(settings).resumed_shards == 1
    (part,) = ledger.existing_parts(opened.store).values()
    opened.store.remove(opened.paths.manifest)  # it has the part's hash
    table = pq.read_table(part)
    place = table.schema.get_field_index("path")
    for paths in (["", ""], ["000.jpg", "b"]):
        pq.write_table(table.set_column(place, table.field(place), pa.array(paths)), part)
        damaged = [found.what for found in opened.verify()[0] if found.damaged]
        assert damaged == ["has other paths than the plan"]


def test_a_list_of_failed_images_is_a_source_again(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """`failed.txt` names every image without an answer, whatever its name, and `@failed.txt` runs
    them again.
    """
    folder = jpegs(2, **{"bad.jpg": b"", "new\nline.jpg": b"", '"quoted".jpg': b""})
    run.run(job(folder, output=str(tmp_path / "one")))
    listed = f"@{tmp_path / 'one' / 'failed.txt'}"
    summary = run.run(
        Settings(sources=(listed,), output=str(tmp_path / "two"), model="tiny", devices="null")
    )
    assert (summary.images, summary.failed_by_status) == (3, {"empty": 3})
    assert {Path(row["path"]).name for row in helpers.rows(tmp_path / "two")} == {
        "bad.jpg",
        "new\nline.jpg",
        '"quoted".jpg',
    }


def test_limit_takes_the_first(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """--limit N plans the first N in listing order."""
    assert run.run(job(jpegs(9), limit=4)).images == 4
    assert [row["path"] for row in helpers.rows(tmp_path / "out")] == [
        "000.jpg",
        "001.jpg",
        "002.jpg",
        "003.jpg",
    ]


def test_filters_and_hidden_entries_are_in_the_summary(job: Jobs, jpegs: Folders) -> None:
    """What was left out, and why, can be read afterwards."""
    summary = run.run(
        job(
            jpegs(6, **{".hidden.jpg": b"x", "notes.TXT": b"x", "README": b"x"}),
            exclude=("00[01].jpg",),
        )
    )
    found = (
        summary.images,
        summary.skipped_by_filter,
        summary.skipped_hidden,
        dict(summary.skipped_by_suffix),
    )
    assert found == (4, 2, 1, {"": 1, ".txt": 1})


def test_all_files_plans_files_of_any_suffix(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """--all-files: a text file is a row that says it is no image."""
    run.run(
        job(
            jpegs(1, **{"notes.txt": b"Dear diary,\n" * 9, "really": sample_images.jpeg()}),
            all_files=True,
        )
    )
    assert {row["path"]: row["status"] for row in helpers.rows(tmp_path / "out")} == {
        "000.jpg": "ok",
        "notes.txt": "not_an_image",
        "really": "ok",
    }


def test_an_output_inside_the_source_is_not_a_source(job: Jobs, jpegs: Folders) -> None:
    """Neither the first time, nor when the repeated command looks for new images."""
    folder = jpegs(3)
    settings = job(folder, output=str(folder / "out"), all_files=True)
    assert run.run(settings).images == 3
    assert run.run(settings).new_in_source == 0


def test_dry_run_writes_nothing(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """It lists and counts; the output folder does not even appear, and no model is needed."""
    found = dry_run.dry_run(job(jpegs(70, **{"x.txt": b""}), model="none.such", devices="null:2"))
    assert (found.images, found.shard_size, dict(found.skipped_by_suffix), found.first[:2]) == (
        70,
        32,
        {".txt": 1},
        ("000.jpg", "001.jpg"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_sub_folders_are_distributed_to_as_many_devices(
    job: Jobs, some_jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    """One sub-folder per device, two or more: shards end with the sub-folder, so that each device
    can take its own. Another number changes no answer, so no message mentions it.
    """
    folder = helpers.fill(tmp_path / "datasets", some_jpegs)
    listener = Listener()
    run.run(job(folder, devices="null:3", shard_size=10), listener)
    frozen = OpenJob.open(tmp_path / "out").frozen
    assert frozen.groups == 3
    assert [(s.group, s.count) for s in plan.shards(tmp_path / "out" / "plan")] == [
        (0, 10),
        (0, 4),
        (1, 10),
        (1, 3),
        (2, 10),
        (2, 3),
    ]
    assert listener.printed == []
    run.run(job(folder, devices="null:2", output=str(tmp_path / "out2")), listener)
    assert OpenJob.open(tmp_path / "out2").frozen.groups == 1
    shutil.rmtree(min(folder.iterdir()))
    run.run(job(folder, devices="null:2", output=str(tmp_path / "out3")), listener)
    assert OpenJob.open(tmp_path / "out3").frozen.groups == 2
    assert listener.printed == []


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


def test_top_k_never_exceeds_the_classes(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """--top-k 99 of ten classes keeps ten, most probable first, summing to one; labels survive
    whatever they hold.
    """
    run.run(job(jpegs(3), top_k=99, devices="cpu"))
    for row in helpers.rows(tmp_path / "out"):
        assert sorted(item["class_id"] for item in row["top_k"]) == list(range(CLASSES))
        assert [item["label"] for item in row["top_k"]] == [
            LABELS[item["class_id"]] for item in row["top_k"]
        ]
        assert sum(item["probability"] for item in row["top_k"]) == pytest.approx(1, abs=1e-5)
        assert row["top_k"][0] == {
            "class_id": row["class_id"],
            "label": row["label"],
            "probability": row["probability"],
        }


def test_saved_columns_hold_logits_and_embedding(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """--save adds fixed-size columns; the softmax of the logits is the probability."""
    import numpy as np

    run.run(
        job(jpegs(5, **{"bad.jpg": b""}), devices="cpu", save=("embedding", "logits"), shard_size=3)
    )
    table = helpers.table(tmp_path / "out")
    assert [str(table.schema.field(name).type) for name in ("logits", "embedding")] == [
        "fixed_size_list<element: float>[10]",
        "fixed_size_list<element: float>[32]",
    ]
    *good, bad = helpers.rows(tmp_path / "out")
    assert (bad["path"], bad["logits"], bad["embedding"]) == ("bad.jpg", None, None)
    for row in good:
        exponentials = np.exp(np.float64(row["logits"]) - max(row["logits"]))
        assert row["probability"] == pytest.approx(
            exponentials.max() / exponentials.sum(), rel=1e-6
        )


def test_center_crop_cuts_without_resizing(job: Jobs, tmp_path: Path) -> None:
    """--preprocess center-crop takes the middle of the image as it is; it is another answer id."""
    inner = sample_images.photograph(32, 32, seed=3)
    outer = Image.new("RGB", (132, 92), "white")
    outer.paste(inner, (50, 30))
    folder = helpers.fill(
        tmp_path / "p",
        {
            "inner.png": sample_images.encode(inner, "PNG"),
            "outer.png": sample_images.encode(outer, "PNG"),
        },
    )
    run.run(job(folder, preprocess="center-crop", save=("logits",), devices="cpu"))
    inner_row, outer_row = helpers.rows(tmp_path / "out")
    assert inner_row["logits"] == outer_row["logits"]
    with pytest.raises(
        JobMismatchError,
        match="was started with --preprocess center-crop, now --preprocess card is asked for",
    ):
        run.run(job(folder, preprocess="card", devices="cpu"))
    run.run(job(folder, output=str(tmp_path / "card"), save=("logits",), devices="cpu"))
    card_rows = helpers.rows(tmp_path / "card")
    assert card_rows[1]["logits"] != outer_row["logits"]


def test_nan_is_a_row(job: Jobs, jpegs: Folders, imagemill: CLI, tmp_path: Path) -> None:
    """An image for which the model returns NaN has an `invalid_output` row without answers,
    everything that counts statuses counts it, and the other images' rows are those of a job without
    it.
    """
    white = sample_images.encode(Image.new("RGB", (40, 40), "white"), "PNG")
    folder = jpegs(6, **{"white.png": white})
    asked: dict[str, Any] = {
        "model": "spoilt",
        "devices": "cpu",
        "save": ("logits", "embedding"),
        "batch_size": 4,
    }
    summary = run.run(job(folder, **asked))
    assert (summary.ok, summary.failed, dict(summary.failed_by_status)) == (
        6,
        1,
        {"invalid_output": 1},
    )
    found = helpers.by_path(tmp_path / "out")
    bad = found.pop("white.png")
    assert (bad["status"], bad["width"], bad["height"]) == ("invalid_output", 40, 40)
    assert (
        bad["error"]
        == "the model returned NaN or infinity for this image in fp32; this model cannot classify"
        " it; try another one"
    )
    assert [
        bad[name] for name in ("class_id", "label", "probability", "top_k", "logits", "embedding")
    ] == [None] * 6
    (folder / "white.png").unlink()
    run.run(job(folder, output=str(tmp_path / "without"), **asked))
    assert found == helpers.by_path(tmp_path / "without")
    assert (tmp_path / "out" / "failed.txt").read_text() == f"{folder / 'white.png'}\n"
    assert imagemill("report", tmp_path / "out").code == 0
    assert "invalid_output" in (tmp_path / "out" / "report.html").read_text()
    assert problems(tmp_path / "out") == []
    exported = imagemill("export", tmp_path / "out", "--to", "csv", "--columns", "path,status")
    assert '"white.png","invalid_output"' in exported.out
    (folder / "white.png").write_bytes(sample_images.jpeg())
    again = run.run(job(folder, **asked, retry_failed=("invalid_output",)))
    assert (again.ok, again.failed) == (7, 0)


@pytest.mark.parametrize("folder", [{}, {"broken.jpg": b"no image"}])
def test_a_model_that_answers_nan_for_everything_ends_the_job_before_the_first_image(
    job: Jobs,
    jpegs: Folders,
    imagemill: CLI,
    tmp_path: Path,
    models_dir: Path,
    folder: dict[str, bytes],
) -> None:
    """It is exit 1 with one clear error, whatever the images are, and no row."""
    bundle.write(
        tmp_path / "broken", replace(TINY_CARD, name="broken"), tiny_model(spoil="everything")
    )
    images = helpers.fill(tmp_path / "p", folder) if folder else jpegs(3)
    result = imagemill(
        "run",
        images,
        "--output",
        tmp_path / "out",
        "--devices",
        "cpu",
        "--json",
        "--model",
        tmp_path / "broken",
    )
    assert (result.code, result.out) == (1, "")
    assert (
        result.err.count(
            "imagemill: broken returns NaN or infinity in fp32 for every image: tried on"
        )
        == 1
    )
    assert "--precision fp32" not in result.err
    assert "Traceback" not in result.err
    assert list((tmp_path / "out" / "predictions").iterdir()) == []


def test_limits_make_rows(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """--max-pixels and --max-bytes: what is larger is a `too_large` row, undecoded and unread."""
    run.run(job(jpegs(1, **{"wide.png": sample_images.encode(sample_images.photograph(300, 200), "PNG"), "zeros.jpg": bytes(900_000)}),
                max_pixels=10_000, max_bytes=800_000))  # fmt: skip
    found = {row["path"]: (row["status"], row["width"]) for row in helpers.rows(tmp_path / "out")}
    assert found == {
        "000.jpg": ("ok", 48),
        "wide.png": ("too_large", 300),
        "zeros.jpg": ("too_large", None),
    }


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def started(job: Jobs, jpegs: Folders, tmp_path: Path) -> Settings:
    """A job of 12 images in 4 parts, of which two are missing, as after a crash."""
    settings = job(jpegs(12), shard_size=3, batch_size=5)
    run.run(settings)
    for name in ("part-000001.parquet", "part-000003.parquet"):
        (tmp_path / "out" / "predictions" / name).unlink()
    (tmp_path / "out" / "summary.json").unlink()
    return settings


def unsaid(settings: Settings, **changes: Any) -> Settings:
    return Settings(sources=settings.sources, output=settings.output, **changes)


def test_repeating_the_command_computes_what_is_missing_and_no_more(
    started: Settings, tmp_path: Path
) -> None:
    """Finished parts are the very same files afterwards; the rows are those of an undisturbed
    run.
    """
    before = helpers.parts(tmp_path / "out")
    listener = Listener()
    summary = run.run(started, listener)
    after = helpers.parts(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) == 4
    assert listener.printed == ["resuming: 6 of 12 images are done"]
    assert (summary.images, summary.shards, summary.resumed_shards) == (12, 4, 2)
    assert sum(device.images for device in summary.devices) == 6
    assert problems(tmp_path / "out") == []


def test_a_limit_that_is_changed_is_reported(started: Settings, tmp_path: Path) -> None:
    """It decides whether an image is answered, and holds for those that are left and for that start
    alone.
    """
    listener = Listener()
    run.run(replace(started, max_pixels=1), listener)
    assert "--max-pixels was 180,000,000 and is now 1, for the remaining images" in listener.printed
    assert [row["status"] for row in helpers.rows(tmp_path / "out")] == (
        ["ok"] * 3 + ["too_large"] * 3
    ) * 2
    again = Listener()
    run.run(replace(started, retry_failed=()), again)
    assert not any("max-pixels" in line for line in again.printed)
    assert {row["status"] for row in helpers.rows(tmp_path / "out")} == {"ok"}


def test_a_job_is_not_continued_with_another_decoder(
    started: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer id never stands for images that were decoded in two ways."""
    was, before = resume.DECODER, helpers.rows(tmp_path / "out")
    monkeypatch.setattr(resume, "DECODER", "other/9")
    monkeypatch.setattr(resume, "__version__", "99.0")
    with pytest.raises(JobMismatchError) as caught:
        run.run(unsaid(started))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{tmp_path}/out was started with decoder {was} (imagemill {__version__}), this is decoder"
        " other/9 (imagemill 99.0). Images may be decoded differently. Continue with imagemill"
        f" {__version__}, or give another --output."
    )
    assert helpers.rows(tmp_path / "out") == before
    monkeypatch.undo()
    run.run(unsaid(started))
    assert problems(tmp_path / "out") == []


def begun(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[protocol.Begin]:
    """Run a job; returns what its workers received as they started."""
    messages: list[protocol.Begin] = []
    send = supervisor.Supervisor.send

    def noting(self: supervisor.Supervisor, message: Any) -> None:
        messages.extend([message] if isinstance(message, protocol.Begin) else [])
        send(self, message)

    monkeypatch.setattr(supervisor.Supervisor, "send", noting)
    run.run(settings)
    return messages


def test_frozen_settings_need_not_be_given_again(
    started: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, devices, batch size and the rest come from job.json."""
    before = OpenJob.open(tmp_path / "out").frozen
    (begin,) = begun(unsaid(started), monkeypatch)
    assert begin.job == before.job
    assert (begin.job.session.card.name, begin.job.session.batch_size, begin.device.kind) == (
        "tiny",
        5,
        "null",
    )
    assert [row["index"] for row in helpers.rows(tmp_path / "out")] == list(range(12))
    assert problems(tmp_path / "out") == []


def test_what_may_differ_may_be_changed(
    started: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices, batch size and decoding threads change no answer: what is said now holds for what is
    left, and all else stays as it was.
    """
    before = OpenJob.open(tmp_path / "out").frozen
    logs = str(tmp_path / "logs")
    changes: dict[str, Any] = {"batch_size": 1, "num_workers": 2, "batches_per_step": 3}
    first, second = begun(unsaid(started, devices="null:2", log_dir=logs, **changes), monkeypatch)
    session = replace(before.job.session, batch_size=1, batches_per_step=3)
    expected = replace(before.job, log_dir=logs, num_workers=2, session=session)
    assert first.job == second.job == expected
    assert [one.device.name for one in (first, second)] == ["null#0", "null#1"]
    assert {row["status"] for row in helpers.rows(tmp_path / "out")} == {"ok"}
    assert problems(tmp_path / "out") == []


@pytest.mark.parametrize(("has_folder", "log_dir"), [(False, None), (True, "logs of mine")])
@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ({"second.zip": b"no archive" * 99}, {}),
        ({}, {"keep": ("label=mine",)}),
        ({}, {"moved": ("/nowhere=/else",)}),
        ({}, {"min_probability": "none.csv"}),
    ],
)
def test_a_refused_job_leaves_nothing(
    job: Jobs,
    jpegs: Folders,
    tmp_path: Path,
    more: dict[str, bytes],
    changes: dict[str, Any],
    has_folder: bool,
    log_dir: str | None,
) -> None:
    """Whatever is found wrong before it is frozen: neither a file nor a folder, but an empty folder
    that was there stays.
    """
    source, home = jpegs(3), tmp_path / "home"
    home.mkdir()
    helpers.fill(tmp_path / "more", more)
    output, logs = home / "deep" / "out", home / log_dir if log_dir else None
    if has_folder:
        output.mkdir(parents=True)
    before = sorted(home.rglob("*"))
    settings = job(source, output=str(output), log_dir=logs and str(logs), **changes)
    settings = replace(
        settings, sources=(*settings.sources, *(str(tmp_path / "more" / name) for name in more))
    )
    with pytest.raises((SourceError, UsageError)) as refused:
        run.run(settings)
    assert refused.value.exit_code == 2
    assert sorted(home.rglob("*")) == before
    run.run(job(source, output=str(output)))
    assert len(helpers.rows(output)) == 3


def test_parts_of_a_lost_job_survive_a_refusal(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """Whatever the folder held before stays, even where the job's own document is gone."""
    run.run(job(jpegs(3), output=str(tmp_path / "out")))
    for path in (tmp_path / "out").iterdir():
        if path.name not in ("predictions", "plan", "logs", ".lock"):
            path.unlink()
    before = helpers.parts(tmp_path / "out")
    with pytest.raises(SourceError):
        run.run(job(jpegs(3), output=str(tmp_path / "out"), keep=("label=mine",)))
    assert helpers.parts(tmp_path / "out") == before != {}


def test_the_command_of_status_continues_a_job(
    job: Jobs, jpegs: Folders, tmp_path: Path, imagemill: Callable[..., helpers.Result]
) -> None:
    """With what selects its images; other settings stay as they are."""
    folder = tmp_path / "my photographs"
    shutil.copytree(jpegs(9), folder)
    settings = job(
        folder, shard_size=2, limit=6, exclude=("00[12].jpg", "x y"), top_k=2, output="its output"
    )
    with contextlib.chdir(tmp_path):
        count = run.run(settings).images
        next(Path("its output", "predictions").glob("*.parquet")).unlink()
        Path("its output", "summary.json").unlink()
        line = imagemill("status", "its output").out.splitlines()[1]
    words = shlex.split(line.removeprefix("to continue: ").strip("`"))
    assert words[:2] == ["imagemill", "run"]
    result = imagemill(*words[1:], "--json")
    assert (result.code, result.json["images"]) == (0, count)
    assert result.json["resumed_shards"] == result.json["shards"] - 1


SAME_SOURCES = "Give the same sources in the same order to continue this job"


@pytest.mark.parametrize(
    ("change", "was", "now", "remedy"),
    [
        ({"limit": 5}, "no --limit", "--limit 5", "Leave out --limit to continue this job"),
        (
            {"shard_size": 4},
            "--shard-size 3",
            "--shard-size 4",
            "Leave it out or give the old value to continue this job",
        ),
        (
            {"include": ("*.jpg",)},
            "no --include",
            "--include '*.jpg'",
            "Leave out --include to continue this job",
        ),
        (
            {"exclude": ("*.png", "b")},
            "no --exclude",
            "--exclude '*.png' --exclude b",
            "Leave out --exclude to continue this job",
        ),
        (
            {"all_files": True},
            "no --all-files",
            "--all-files",
            "Leave out --all-files to continue this job",
        ),
        (
            {"sources": ("/",)},
            "SOURCE /",
            "SOURCE /",
            "If the sources have moved, add --moved OLD=NEW. To add images of other sources, add"
            " --append. " + SAME_SOURCES,
        ),
        (
            {"model": "tiny2"},
            "--model tiny (",
            "--model tiny2 (",
            "Leave it out or give the old value to continue this job",
        ),
        (
            {"top_k": 3},
            "--top-k 5",
            "--top-k 3",
            "Leave it out or give the old value to continue this job",
        ),
        (
            {"save": ("logits",)},
            "no --save",
            "--save logits",
            "Leave it out or give the old value to continue this job",
        ),
        (
            {"precision": "bf16"},
            "--precision fp32",
            "--precision bf16",
            "Leave it out or give the old value to continue this job",
        ),
        (
            {"preprocess": "center-crop"},
            "--preprocess card",
            "--preprocess center-crop",
            "Leave it out or give the old value to continue this job",
        ),
        (
            {"devices": "cpu"},
            "backend null",
            "backend openvino",
            "Leave it out or give the old value to continue this job",
        ),
    ],
)
def test_a_flag_that_would_change_the_job_is_refused_with_both_values(
    started: Settings, tmp_path: Path, change: dict[str, Any], was: str, now: str, remedy: str
) -> None:
    """Nothing is touched; the message says what to do. Wrong usage, so exit 2."""
    before = helpers.parts(tmp_path / "out")
    with pytest.raises(JobMismatchError) as caught:
        run.run(Settings(**({"sources": started.sources, "output": started.output} | change)))
    message = str(caught.value)
    assert f"was started with {was}" in message
    assert f", now {now}" in message
    assert message.endswith(f" is asked for. {remedy}, or give another --output.")
    assert caught.value.exit_code == 2
    assert helpers.parts(tmp_path / "out") == before


SELECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"limit": 4}, "--limit 4"),
    ({"include": ("00[0-3].jpg",)}, "--include '00[0-3].jpg'"),
    ({"exclude": ("00[4-9].jpg", "01*")}, "--exclude '00[4-9].jpg' --exclude '01*'"),
    ({"all_files": True}, "--all-files"),
]


@pytest.mark.parametrize(("selection", "spelt"), SELECTIONS)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_selection_that_was_given_first_must_be_given_again(
    job: Jobs,
    jpegs: Folders,
    tmp_path: Path,
    selection: dict[str, Any],
    spelt: str,
    is_finished: bool,
) -> None:
    """Without it the command means other images: they must not be passed over with "finished
    already" and exit 0.
    """
    folder = jpegs(6, **{"010.jpg": sample_images.jpeg()})
    settings = job(folder, shard_size=2, **selection)
    count = run.run(settings).images
    if not is_finished:
        (tmp_path / "out" / "predictions" / "part-000000.parquet").unlink()
    flag = spelt.split(maxsplit=1)[0]
    with pytest.raises(JobMismatchError) as caught:
        run.run(job(folder))
    text = (
        f"was started with {spelt}, now no {flag} is asked for. Add {spelt} to continue this job,"
        " or give another --output."
    )
    assert str(caught.value) == f"{tmp_path}/out {text}"
    assert caught.value.exit_code == 2
    assert run.run(settings).images == count


def test_another_value_of_a_selection_is_refused_and_another_order_is_not(
    job: Jobs, jpegs: Folders
) -> None:
    """The message holds what to type to continue the job."""
    folder = jpegs(4)
    run.run(job(folder, limit=2, include=("a*", "0*")))
    with pytest.raises(
        JobMismatchError,
        match=r"with --limit 2, now --limit 3 is asked for\. Write --limit 2 to continue this job",
    ):
        run.run(job(folder, limit=3, include=("a*", "0*")))
    with pytest.raises(
        JobMismatchError, match=r"Write --include '0\*' --include 'a\*' to continue this job"
    ):
        run.run(job(folder, limit=2, include=("0*",)))
    assert run.run(job(folder, limit=2, include=("0*", "a*"))).images == 2


def test_saying_the_same_again_is_no_change(started: Settings) -> None:
    """Explicit flags that agree with the frozen job resume it, in any spelling of the same."""
    same = {
        "model": "tiny",
        "limit": None,
        "shard_size": 3,
        "top_k": 5,
        "precision": "auto",
        "preprocess": "card",
    }
    assert run.run(unsaid(started, **same)).images == 12


def test_a_finished_job_says_so_and_names_new_images(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Nothing is computed; what is new, changed or missing since the plan was frozen is named."""
    settings = job(jpegs(5))
    run.run(settings)
    before = helpers.parts(tmp_path / "out")
    jpegs(7, **{"0/first.jpg": b"x", "notes.txt": b"x"})
    (tmp_path / "images" / "002.jpg").unlink()
    listener = Listener()
    summary = run.run(settings, listener)
    assert listener.printed == [
        "already finished",
        (
            "3 images are new in the source since the plan was frozen: 0/first.jpg, 005.jpg,"
            " 006.jpg. Add --append to classify them."
        ),
        "1 image of the job is no longer in its sources: 002.jpg. Rows are kept.",
    ]
    assert (summary.new_in_source, summary.resumed_shards, summary.images_per_second) == (
        3,
        1,
        None,
    )
    assert helpers.parts(tmp_path / "out") == before


def test_an_image_that_vanished_since_the_plan_is_a_row(started: Settings, tmp_path: Path) -> None:
    """The plan is frozen: what is gone is `missing`, never left out."""
    (tmp_path / "images" / "004.jpg").unlink()
    assert run.run(started).failed_by_status == {"missing": 1}


def test_preprocessing_that_the_model_has_anyway_may_be_repeated(
    job: Jobs, jpegs: Folders, tiny: Bundle, tmp_path: Path
) -> None:
    """Of a model that is never resized, `card` and `center-crop` are the same."""
    model = tmp_path / "cropped"
    shutil.copytree(tiny.dir, model)
    card = replace(tiny.card, recipe=replace(tiny.card.recipe, resize=None))
    (model / "card.json").write_bytes(serialization.encode(card))
    folder = jpegs(1)
    for preprocess in ("card", "center-crop", "card"):
        assert run.run(job(folder, model=str(model), preprocess=preprocess)).ok == 1


def test_minimum_probabilities_that_differ_a_little_differ(job: Jobs, jpegs: Folders) -> None:
    folder = jpegs(1)
    run.run(job(folder, min_probability=0.12345671))
    with pytest.raises(JobMismatchError, match=r"0\.12345671, now --min-probability 0\.12345679"):
        run.run(job(folder, min_probability=0.12345679))


def test_retry_failed_computes_bad_images_again(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """Only shards that hold such a row; repaired images become ok. A status that is not among them
    leaves all as it was.
    """
    folder = jpegs(8, **{"a.jpg": b"", "b.jpg": b"not an image at all" * 9})
    run.run(job(folder, shard_size=3))
    before = helpers.parts(tmp_path / "out")
    (folder / "a.jpg").write_bytes(sample_images.jpeg())
    assert run.run(job(folder, retry_failed=("timeout",))).failed == 2
    assert helpers.parts(tmp_path / "out") == before
    (tmp_path / "out" / "score.json").write_text("{}")
    assert (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(TooManyBadError):
        run.run(job(folder, retry_failed=("empty",), max_bad_fraction=0.0))
    assert not (tmp_path / "out" / "manifest.json").exists(), "verify would call new parts damaged"
    summary = run.run(job(folder, retry_failed=("empty",)))
    assert not (tmp_path / "out" / "score.json").exists(), "it was about other rows"
    assert summary.failed_by_status == {"not_an_image": 1}
    after = helpers.parts(tmp_path / "out")
    assert [name for name in before if after[name] != before[name]] == ["part-000002.parquet"]
    assert problems(tmp_path / "out") == []


@pytest.mark.parametrize("save", [(), ("logits", "embedding")])
def test_a_retry_never_replaces_a_row_that_is_ok(
    job: Jobs, jpegs: Folders, tmp_path: Path, save: tuple[str, ...]
) -> None:
    """Whatever became of the image since: an unmounted disk costs no answer."""
    asked: dict[str, Any] = {"shard_size": 5, "devices": "cpu", "save": save}
    folder = jpegs(8, **{"a.jpg": b"", "b.jpg": b""})
    run.run(job(folder, **asked))
    before = helpers.by_path(tmp_path / "out")
    (folder / "a.jpg").write_bytes(sample_images.jpeg())
    for place, path in enumerate(sorted(folder.glob("0*.jpg"))):
        path.write_bytes(b"other content") if place % 2 else path.unlink()
    summary = run.run(job(folder, **asked, retry_failed=()))
    after = helpers.by_path(tmp_path / "out")
    assert (summary.ok, summary.failed_by_status) == (9, {"empty": 1})
    assert (before.pop("a.jpg")["status"], after.pop("a.jpg")["status"]) == ("empty", "ok")
    assert after == before
    assert problems(tmp_path / "out") == []
    shutil.move(folder, tmp_path / "unmounted")
    folder.mkdir()
    assert run.run(job(folder, **asked, retry_failed=())).ok == 9


def test_too_many_bad_images_stop_the_job_and_it_can_go_on(job: Jobs, jpegs: Folders) -> None:
    """--max-bad-fraction counts over the whole job; without it the same command goes on."""
    folder = jpegs(6, **{f"bad{number}.jpg": b"" for number in range(6)})
    with pytest.raises(
        TooManyBadError, match=r"of 12 images failed, more than --max-bad-fraction 0\.25 allows"
    ):
        run.run(job(folder, shard_size=2, max_bad_fraction=0.25))
    assert run.run(job(folder)).failed_by_status == {"empty": 6}


def test_many_other_sources_are_one_short_message(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """As from `photos/*.jpg` after an image has come: the first that differs, not all of them."""
    paths = sorted(map(str, jpegs(60).iterdir()))
    run.run(job(*paths[:30], *paths[31:]))
    message = (
        f"was started with 59 × SOURCE (no. 31: {paths[31]}), now 60 × SOURCE (no. 31: {paths[30]})"
        " is asked for. If the sources have moved, add --moved OLD=NEW."
    )
    with pytest.raises(JobMismatchError, match=re.escape(message)):
        run.run(job(*paths))
    with pytest.raises(JobMismatchError, match=r"now 58 × SOURCE \(no\. 59: none\)"):
        run.run(job(*paths[:30], *paths[31:59]))


@pytest.mark.parametrize("command", [run.run, dry_run.dry_run])
def test_a_foreign_output_is_refused(
    job: Jobs, jpegs: Folders, tmp_path: Path, command: Callable[[Settings], object]
) -> None:
    """Not empty and not ours: nothing is written, and the message names what is in it. A dry run
    says the same.
    """
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    with pytest.raises(
        OutputError,
        match=(
            r"is not empty and not an imagemill job \(it holds 'thesis\.doc'\)\. Give a new"
            r" folder\."
        ),
    ):
        command(job(jpegs(1)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.doc"]
    with pytest.raises(
        OutputError, match=r"thesis\.doc is a file, or is inside one\. Give a folder\."
    ):
        command(job(jpegs(1), output=str(tmp_path / "out" / "thesis.doc")))


SYSTEM_FILES = (
    *(
        ".DS_Store",
        "._.DS_Store",
        ".Spotlight-V100/x",
        ".fseventsd/x",
        ".Trashes/x",
        "Thumbs.db",
        "thumbs.db",
        "desktop.ini",
    ),
    *(
        "Desktop.ini",
        "$RECYCLE.BIN/x",
        "System Volume Information/x",
        "lost+found/x",
        ".snapshot/x",
        ".snapshots/x",
        ".Trash-1000/x",
    ),
    *(
        ".nfs00000000031a2b3c0000001d",
        ".fuse_hidden0000a1b2",
        "@eaDir/x",
        "#recycle/x",
        ".directory",
    ),
)


def test_files_that_systems_make_by_themselves_are_no_strangers(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """A folder that a file manager has shown, a mounted disk's root, a share: each is as good as
    empty, and they stay as they are.
    """
    out = helpers.fill(tmp_path / "out", dict.fromkeys(SYSTEM_FILES, b"x"))
    settings = job(jpegs(3))
    assert run.run(settings).images == 3
    helpers.fill(out, {f"{folder}/.DS_Store": b"x" for folder in ("plan", "predictions", "logs")})
    assert (run.run(settings).images, problems(out)) == (3, [])
    assert all((out / name).read_bytes() == b"x" for name in SYSTEM_FILES)
    for number, name in enumerate(
        (".DS_Store.jpg", "my lost+found", "snapshot", "_DS_Store", "nfs123")
    ):
        other = helpers.fill(tmp_path / str(number), {name: b"x"})
        with pytest.raises(OutputError, match=re.escape(f"(it holds {name!r})")):
            run.run(replace(settings, output=str(other)))


def test_a_link_to_a_missing_folder_is_an_output(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """The folder that it leads to is made, also through a second link and for a folder below it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "disk" / "job")
    (tmp_path / "above").symlink_to(tmp_path / "disk" / "jobs")
    settings = job(jpegs(2))
    for output, folder in (("out", "job"), ("above/a/b", "jobs/a/b")):
        run.run(replace(settings, output=str(tmp_path / output)))
        assert problems(tmp_path / "disk" / folder) == []
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["out", "out/below"])
def test_a_link_to_a_disk_that_is_not_mounted_is_no_output(
    name: str, job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """One line names the link and where it leads, before anything is done. Results would fill the
    wrong disk.
    """
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "folder")
    where = re.escape(
        f"{tmp_path}/out is a link to {tmp_path}/disk/folder, and {tmp_path}/disk does not exist."
        " Mount its disk, or give"
    )
    with pytest.raises(OutputError, match=where):
        run.run(job(jpegs(2), output=str(tmp_path / name), model="no such model"))
    assert not (tmp_path / "disk").exists()
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OutputError, match="Too many levels of symbolic links"):
        run.run(job(jpegs(2), output=str(tmp_path / name), model="no such model"))


def test_a_start_that_was_cut_short_is_repeated(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """Before job.json is there nothing counts: a half-written plan and temporary files are swept
    away.
    """
    out = tmp_path / "out"
    helpers.fill(
        out,
        {
            "plan/plan-00000-00000.parquet": b"half",
            "plan/.listing.arrow.tmp": b"x",
            ".job.json.77.tmp": b"{",
            "logs/l.log": b"",
        },
    )
    (out / "predictions").mkdir()
    assert run.run(job(jpegs(3))).images == 3
    assert not list(out.rglob("*.tmp"))
    assert problems(out) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 99}',
        b'{"format": 1}',
        b'{"format": 2}',
        b'{"format": 2, "job": []}',
        b"\xff",
    ],
)
def test_a_damaged_job_is_one_clear_error(
    job: Jobs, jpegs: Folders, tmp_path: Path, content: bytes
) -> None:
    """Whatever is in job.json: no traceback, nothing overwritten."""
    helpers.fill(tmp_path / "out", {"job.json": content})
    with pytest.raises(
        OutputError,
        match=(
            r"out/job\.json (cannot be read: .+\. Give another --output\.|has format (None|1|99),"
            r" this version of)"
        ),
    ):
        run.run(job(jpegs(1)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "job.json": content
    }


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("images", "12", "images: expected `int`, got `str`"),
        ("job limits max_pixels", "many", "job.limits.max_pixels: expected `int`, got `str`"),
        ("filters include", [1], "filters.include[0]: expected `str`, got `int`"),
        ("job limits", None, "job.limits: expected `object`, got `null`"),
    ],
)
def test_a_value_of_the_wrong_type_in_job_json_is_named(
    started: Settings, tmp_path: Path, path: str, value: Any, problem: str
) -> None:
    """With file, key and both types, before anything is done."""
    file = tmp_path / "out" / "job.json"
    plain = json.loads(file.read_bytes())
    *parents, key = path.split()
    place = plain
    for parent in parents:
        place = place[parent]
    place[key] = value
    file.write_text(json.dumps(plain))
    with pytest.raises(OutputError) as caught:
        run.run(unsaid(started))
    assert str(caught.value) == f"{file} cannot be read: {problem}. Give another --output."


def test_a_job_that_cannot_be_read_is_not_taken_for_none(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """The system refuses to read job.json: one clear error, and nothing is started beside it."""
    (tmp_path / "out" / "job.json").mkdir(parents=True)
    with pytest.raises(
        OutputError, match=r"out/job\.json cannot be read: Is a directory\. Fix the cause and run"
    ):
        run.run(job(jpegs(1)))
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["job.json"]


def test_logs_go_where_they_were_sent_also_on_resume(
    started: Settings, jpegs: Folders, job: Jobs, tmp_path: Path
) -> None:
    """--log-dir holds one file per process; a resumed job finds it again, even if it was removed
    meanwhile.
    """
    settings = job(
        jpegs(6, "more"),
        output=str(tmp_path / "two"),
        log_dir=str(tmp_path / "elsewhere"),
        shard_size=3,
    )
    run.run(settings)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {
        "launcher.log",
        "null#0.log",
    }
    for path in (tmp_path / "elsewhere").iterdir():
        path.unlink()
    (tmp_path / "elsewhere").rmdir()
    (tmp_path / "two" / "predictions" / "part-000001.parquet").unlink()
    run.run(unsaid(settings))
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {
        "launcher.log",
        "null#0.log",
    }


def test_a_source_that_is_gone_ends_a_resume_before_it_begins(
    started: Settings, tmp_path: Path
) -> None:
    """An outage of the storage is one error, not a job full of `missing` rows."""
    from imagemill.errors import SourceError

    source = tmp_path / "moving"
    shutil.copytree(started.sources[0], source)
    settings = replace(started, sources=(str(source),), output=str(tmp_path / "two"))
    run.run(settings)
    (tmp_path / "two" / "predictions" / "part-000000.parquet").unlink()
    source.rename(tmp_path / "away")
    with pytest.raises(SourceError, match="cannot be read: No such file or directory"):
        run.run(settings)
    (tmp_path / "away").rename(source)
    assert run.run(settings).failed == 0


def test_a_model_that_changed_on_disk_is_refused(
    started: Settings, tiny: Any, tmp_path: Path
) -> None:
    """A resumed job that has something left checks the weights it was frozen with; one that has not
    needs none.
    """
    folder = tmp_path / "models" / "tiny"
    shutil.copytree(tiny.dir, folder)
    settings = Settings(
        sources=started.sources,
        output=str(tmp_path / "two"),
        model="tiny",
        models_dir=str(folder.parent),
        devices="null",
    )
    run.run(settings)
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(200)
        file.write(b"\0\1\2")
    from imagemill.errors import ModelError

    assert run.run(unsaid(settings)).complete
    (tmp_path / "two" / "predictions" / "part-000000.parquet").unlink()
    with pytest.raises(
        ModelError, match=r"model\.onnx has the sha256 [0-9a-f]{64}, its card says [0-9a-f]{64}"
    ):
        run.run(unsaid(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1."),
        ({"top_k": -1}, "--top-k -1: must be at least 1."),
        ({"shard_size": 0}, "--shard-size 0: must be at least 1."),
        ({"limit": 0}, "--limit 0: must be at least 1."),
        ({"limit": 10**23}, "--limit 100000000000000000000000: must be at most 281474976710656."),
        (
            {"max_pixels": 10**20},
            "--max-pixels 100000000000000000000: must be at most 281474976710656.",
        ),
        ({"shard_size": 2.5}, "--shard-size 2.5: must be a whole number, not float."),
        ({"num_workers": 257}, "--num-workers 257: must be at most 256."),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction 1.5: must be from 0 to 1."),
        ({"max_bad_fraction": float("nan")}, "--max-bad-fraction nan: must be from 0 to 1."),
        ({"max_seconds": 0.0}, "--max-seconds 0.0: must be more than 0."),
        ({"max_seconds": float("nan")}, "--max-seconds nan: must be more than 0."),
        ({"save": ("pixels",)}, "--save pixels: not known. Known: logits, embedding."),
        ({"retry_failed": ("ok",)}, "--retry-failed ok: not known. Known: missing, empty,"),
        (
            {"precision": "fp64"},
            "--precision fp64: not known. Known: auto, fp32, fp16, bf16, int8.",
        ),
        (
            {"precision": "fp16"},
            "--precision fp16: null@null does not compute in it. Use --precision fp32 or bf16.",
        ),
        ({"devices": "cpu:0"}, "cpu:N takes one number from 1 to 512, not 0."),
        (
            {"devices": "cpu+null"},
            (
                "--devices mixes the backends null and openvino, whose answers differ in the last"
                " bits. Add --allow-mixed."
            ),
        ),
        ({"model": "no such model"}, "No model is called no such model."),
        ({"sources": ()}, "give at least one SOURCE"),
        ({"sources": ("a", "")}, "SOURCE '': is empty. If it comes from a variable of the shell,"),
        ({"output": " "}, "--output ' ': is empty."),
        ({"top_k": True}, "--top-k True: must be a whole number, not bool."),
        ({"min_probability": True}, "--min-probability True: must be a number, not bool."),
        ({"all_files": "no"}, "--all-files no: must be True or False, not 'no'."),
        ({"engine": "spark"}, "--engine spark: not known. Known: local, ray."),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    job: Jobs, jpegs: Folders, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """The message names flag and value; the output folder does not hold a job afterwards."""
    with pytest.raises(UsageError) as caught:
        run.run(
            Settings(
                **{**{f: getattr(job(jpegs(1)), f) for f in Settings.__struct_fields__}, **change}
            )
        )
    assert message in str(caught.value)
    assert not (tmp_path / "out" / "job.json").exists()


def test_a_source_that_is_not_there_is_one_clear_error(job: Jobs, tmp_path: Path) -> None:
    """And with the source put right the same command works: nothing half-begun is in its way."""
    with pytest.raises(
        SourceError, match=r"source .*/none cannot be read: No such file or directory"
    ):
        run.run(job(tmp_path / "none"))
    helpers.fill(tmp_path / "none", {"a.jpg": sample_images.jpeg()})
    assert run.run(job(tmp_path / "none")).images == 1


# ── what it says afterwards ───────────────────────────────────────────────────────────────────────


def test_the_summary_on_disk_is_the_one_returned(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """summary.json holds the fields that the design names, and rates that add up."""
    summary = run.run(job(jpegs(20), devices="null:2", shard_size=3))
    on_disk = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert documents.read_summary(OpenJob.open(tmp_path / "out").store) == summary
    named = """images ok failed failed_by_status skipped_by_suffix shards resumed_shards seconds images_per_second model precision
        bottleneck devices""".split()
    assert set(named) <= set(on_disk)
    assert set(on_disk["devices"][0]) == {
        "name",
        "images",
        "images_per_second",
        "restarts",
        "clock",
        "retired",
        "busy",
    }
    assert on_disk["images_per_second"] == pytest.approx(20 / on_disk["seconds"], rel=0.05)
    assert (on_disk["bottleneck"], on_disk["advice"].partition(":")[0]) == (
        None,
        "too short to find the bottleneck",
    )


def clock(**sums: float) -> Clock:
    return Clock(**{"images": 100, **sums})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sums", "bottleneck"),
    [
        (
            {"starved": 8, "read": 1, "decode": 9, "decode_wall": 9, "compute": 1, "write": 1},
            "decode",
        ),
        (
            {"starved": 8, "read": 9, "decode": 1, "decode_wall": 1, "compute": 1, "write": 1},
            "read",
        ),
        # On a busy machine reading waits for cores as decoding does; measured beside 13 other
        # processes.
        (
            {
                "starved": 9.93,
                "read": 6.25,
                "decode": 2,
                "decode_wall": 7.42,
                "compute": 0.04,
                "write": 1.08,
                "session_cpu": 0.17,
            },
            "decode",
        ),
        (
            {
                "starved": 9.93,
                "read": 7.5,
                "decode": 2,
                "decode_wall": 7.42,
                "compute": 0.04,
                "write": 1.08,
                "session_cpu": 0.17,
            },
            "decode",
        ),
        (
            {
                "starved": 8,
                "read": 40,
                "decode": 2,
                "decode_wall": 7.42,
                "compute": 1,
                "write": 1,
                "session_cpu": 3,
            },
            "read",
        ),
        ({"starved": 1, "read": 9, "decode": 1, "compute": 8, "write": 1}, "compute"),
        ({"starved": 1, "read": 9, "decode": 1, "compute": 2, "write": 5}, "write"),
    ],
)
def test_the_bottleneck_is_what_the_loop_waited_for(
    sums: dict[str, float], bottleneck: str
) -> None:
    """The longest of three waits; starving is put down to reading or decoding. Advice comes with
    it.
    """
    found, rates, advice = summarise.judge([clock(**sums)], 100, 10.0, 2)
    assert found == bottleneck
    assert rates["achieved"] == 10.0
    assert rates["decode_only"] == pytest.approx(
        100 * 2 / (sums["read"] + sums["decode"]), abs=0.001
    )
    assert advice


@pytest.mark.parametrize(("cores", "more"), [(2, "more cores"), (0, "more devices")])
def test_more_devices_are_no_advice_if_they_share_the_same_cores(cores: int, more: str) -> None:
    """A second CPU device brings no core."""
    sums = {"starved": 1, "read": 1, "decode": 1, "compute": 8, "write": 1, "session_cpu": 8}
    _, _, advice = summarise.judge([clock(**sums)], 100, 10.0, 2, cores=cores)
    assert advice == f"a smaller model, a faster precision or {more} would help"


def test_devices_with_a_clock_of_their_own_say_how_fast_they_compute() -> None:
    """However long the loop waited for them. Decoding is the bottleneck here, so the cores that
    they would need are named. A device that was retired has computed nothing.
    """
    sums = {"starved": 8, "read": 1, "decode": 31, "decode_wall": 31, "compute": 1, "write": 1}
    cards = [clock(**sums, device=2.0, transfer=0.5) for _ in range(2)]
    for clocks in (cards, [*cards, Clock()]):
        found, rates, advice = summarise.judge(clocks, 210, 10.0, 8, failed=10)
        assert found == "decode"
        assert rates["compute_only"] == 200 * 2 / 4.0
        assert rates["transfer_only"] == 200 * 2 / 1.0
        assert rates["decode_only"] == 200 * 8 / 64.0
        assert advice is not None
        assert advice.endswith("; the devices need 32 such cores to be fed with these images")


def test_devices_without_a_clock_of_their_own_are_judged_by_the_loops_waits() -> None:
    """Cores and transfers are not mentioned."""
    sums = {"starved": 8, "read": 1, "decode": 31, "decode_wall": 31, "compute": 1, "write": 1}
    _, rates, advice = summarise.judge([clock(**sums)], 100, 10.0, 8)
    assert set(rates) == {"achieved", "decode_only", "compute_only"}
    assert rates["compute_only"] == 100.0
    assert "such cores" not in str(advice)


def test_on_shared_cores_the_rates_add_up() -> None:
    """EfficientNet-Lite0 in int8 on two cores with AMX waits for images because it takes the
    decoders' time. `bench` says 776 and 755.
    """
    sums = clock(
        starved=6.92,
        read=2.29,
        decode=6.39,
        decode_wall=7.1,
        compute=0.69,
        write=0.2,
        session_cpu=8.36,
        images=3280,
    )
    found, rates, _ = summarise.judge([sums], 3280, 8.52, 2, cores=2)
    assert found == "compute"
    assert 1 / rates["achieved"] == pytest.approx(
        1 / rates["decode_only"] + 1 / rates["compute_only"], rel=1e-3
    )
    assert rates["compute_only"] == pytest.approx(785, abs=1)
    _, with_failures, _ = summarise.judge([sums], 3280, 8.52, 2, failed=1640, cores=2)
    assert with_failures["compute_only"] == pytest.approx(rates["compute_only"] / 2, rel=1e-3), (
        "a row that failed was not computed"
    )


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_other_processes_do_not_change_the_bottleneck(share: float) -> None:
    """Our threads get only a share of the cores, so everything takes longer. A tiny model is not
    bounded by compute for that.
    """
    tiny = clock(
        starved=9 / share,
        read=0.2 / share,
        decode=9,
        decode_wall=9 / share,
        compute=0.07,
        write=1,
        session_cpu=0.1,
    )
    heavy = clock(
        starved=0.5,
        read=0.1,
        decode=1,
        decode_wall=1 / share,
        compute=9 / share,
        write=0.1,
        session_cpu=18,
    )
    light = clock(
        starved=9 / share,
        read=0.2 / share,
        decode=6,
        decode_wall=6 / share,
        compute=1,
        write=0.2,
        session_cpu=8,
    )
    assert [
        summarise.judge([one], 100, 10.0 / share, 2, cores=2)[0] for one in (tiny, heavy, light)
    ] == ["decode", "compute", "compute"]


def test_few_decoding_threads_are_the_bound_where_cores_idle() -> None:
    """One thread on eight cores decodes all the time; what the session could compute on them
    follows from its CPU time.
    """
    sums = clock(starved=9, read=0.1, decode=9, decode_wall=9, compute=1, write=0, session_cpu=2)
    found, rates, _ = summarise.judge([sums], 100, 10.0, 1, cores=8)
    assert found == "decode"
    assert rates["compute_only"] == 400


@pytest.mark.parametrize(("cores", "rate"), [(0, 100.0), (2, 400.0)])
def test_storage_that_cores_wait_for_does_not_change_what_they_could_compute(
    cores: int, rate: float
) -> None:
    """For a device of its own the time counts in which it had images; for cores the session's CPU
    time.
    """
    sums = clock(starved=8, read=15, decode=1, decode_wall=1, compute=1, write=1, session_cpu=0.5)
    found, rates, _ = summarise.judge([sums], 100, 10.0, 2, cores=cores)
    assert found == "read"
    assert rates["compute_only"] == rate


def test_a_job_of_a_few_seconds_is_too_short_to_tell() -> None:
    """No bottleneck is named below five seconds; the line that names it says so instead."""
    sums = clock(starved=1, read=0, decode=3, decode_wall=3, compute=3, write=0)
    assert summarise.judge([sums], 100, 5.0, 2)[0] == "compute"
    found, rates, advice = summarise.judge([sums], 100, 4.9, 2)
    assert (found, advice) == (None, "too short to find the bottleneck: 4.9 s, less than 5 s")
    assert rates["achieved"] == pytest.approx(100 / 4.9, abs=0.001)


def test_where_nothing_ran_nothing_is_judged() -> None:
    """A resumed job with nothing left has no rate and no bottleneck."""
    assert summarise.judge([], 0, 0.0, 2) == (None, {}, None)


def test_summary_type_is_what_run_returns(job: Jobs, jpegs: Folders) -> None:
    """The Python API gives records, not dicts; enumerations come back as themselves from disk."""
    summary = run.run(job(jpegs(1)))
    assert isinstance(summary, Summary)
    frozen = OpenJob.open(Path(summary.output)).frozen
    assert frozen.job.session.precision is Precision.FP32
    assert frozen.job.session.card.labels == LABELS


@pytest.mark.parametrize("source", ["random", "file"])
def test_a_model_with_random_weights_says_so_at_the_end(
    source: str, tiny: Bundle, jpegs: Folders, imagemill: CLI, tmp_path: Path
) -> None:
    """Its rows look like any others."""
    shutil.copytree(tiny.dir, tmp_path / "model")
    card = json.loads((tmp_path / "model" / bundle.CARD).read_text())
    (tmp_path / "model" / bundle.CARD).write_text(
        json.dumps(card | {"origin": {"source": source, "seed": 0, "verified": False}})
    )
    done = imagemill(
        "run",
        jpegs(3),
        "--output",
        tmp_path / "out",
        "--model",
        tmp_path / "model",
        "--devices",
        "null",
    )
    assert done.code == 0
    assert done.err.count("note: tiny has random weights: its predictions mean nothing") == (
        source == "random"
    )


def test_a_repeated_command_makes_the_report_that_an_interruption_left_out(
    jpegs: Folders, imagemill: CLI, tmp_path: Path
) -> None:
    command = (
        "run",
        jpegs(3),
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null",
    )
    assert imagemill(*command).code == 0
    report = tmp_path / "out" / "report.html"
    report.unlink()
    assert imagemill(*command, "--no-report").code == 0
    assert not report.exists()
    assert imagemill(*command).code == 0
    assert report.exists()


def test_each_process_has_its_log(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """launcher.log and one file per device, with the device's cores and rate."""
    run.run(job(jpegs(80), devices="null:2"))
    logs = tmp_path / "out" / "logs"
    assert {path.name for path in logs.iterdir()} == {"launcher.log", "null#0.log", "null#1.log"}
    assert re.search(r"device null#0, cores \[\d", (logs / "null#0.log").read_text())
