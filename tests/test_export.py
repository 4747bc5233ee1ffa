"""`imagemill export`: a job's rows in plan order, as CSV or JSON lines, and nothing lost on the
way.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import helpers
import sample_images
from imagemill.errors import OutputError, PartError, UsageError
from imagemill.job import export, lock
from imagemill.job.export import Form
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.records import Settings
from imagemill.runner import run

pytestmark = pytest.mark.process

CLI = Callable[..., helpers.Result]
HOSTILE = (
    "=1+1.jpg",
    "a,b.jpg",
    'say "cheese".jpg',
    "new\nline.jpg",
    "\rreturn.jpg",
    "crème\u2028brûlée.jpg",
    "tab\t.jpg",
    "'.jpg",
    "\\N.jpg",
)


@pytest.fixture(scope="module")
def finished(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job with hostile names, two images without an answer, and logits and embeddings;
    five parts.
    """
    folder = tmp_path_factory.mktemp("export")
    files = {
        name: sample_images.jpeg(40, 40, seed=number) for number, name in enumerate(HOSTILE)
    } | {
        "empty.jpg": b"",
        "text.png": b"text" * 50,
    }
    source = helpers.fill(folder / "images", files)
    settings = Settings(
        (str(source),),
        str(folder / "out"),
        "tiny",
        str(models_dir),
        "null",
        shard_size=3,
        save=("logits", "embedding"),
    )
    run.run(settings)
    return folder / "out"


def exported(output: Path, form: Form, **options: Any) -> str:
    return b"".join(export.export(OpenJob.open(output), form, **options)).decode()


def test_json_lines_hold_every_row_as_it_is(finished: Path) -> None:
    """Each line is the row that Parquet holds, float32 for float32, in plan order; nothing in a
    name breaks a line.
    """
    text = exported(finished, Form.JSONL)
    lines = text.splitlines()  # by every line break that Unicode knows
    assert lines == text.split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    expected = helpers.rows(finished)
    assert [row["index"] for row in found] == list(range(11))
    assert found == [narrowed(row) for row in expected]
    assert {row["path"] for row in found} >= set(HOSTILE)
    assert [row["logits"] for row in found if row["status"] != "ok"] == [None, None]


def narrowed(value: Any) -> Any:
    """Floats as their shortest form that is the same float32."""
    if isinstance(value, dict):
        return {name: narrowed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [narrowed(item) for item in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def test_csv_survives_a_round_trip(finished: Path) -> None:
    """The csv module, pandas and Arrow's own reader find the same cells; lists are JSON; a leading
    equals sign stays.
    """
    text = exported(finished, Form.CSV)
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    expected = [narrowed(row) for row in helpers.rows(finished)]
    assert list(found[0]) == list(expected[0])
    assert len(found) == len(expected)
    for cells, row in zip(found, expected, strict=True):
        for name in ("source", "path", "status", "error", "label"):
            assert cells[name] == (row[name] or "")
        for name in (
            "index",
            "class_id",
            "probability",
            "width",
            "height",
            "top_k",
            "logits",
            "embedding",
        ):
            assert (json.loads(cells[name]) if cells[name] else None) == row[name]
    import pandas

    frame = pandas.read_csv(io.StringIO(text, newline=""), keep_default_na=False, na_values=[])
    assert list(frame["path"]) == [row["path"] for row in expected]


def test_columns_are_chosen_and_ordered(finished: Path) -> None:
    """--columns picks and orders; a column named twice comes once; one that is not there is a wrong
    usage, with those that are.
    """
    assert exported(finished, Form.CSV, columns=["status", "index", "status"]).splitlines()[:2] == [
        '"status","index"',
        '"ok",0',
    ]
    assert json.loads(exported(finished, Form.JSONL, columns=["path"]).splitlines()[0]) == {
        "path": "\rreturn.jpg"
    }
    with pytest.raises(
        UsageError,
        match=(
            r"^--columns index,nme: the job has no column 'nme'. It has index, source, path, .*,"
            r" embedding\.$"
        ),
    ):
        exported(finished, Form.CSV, columns=["index", "nme"])


def test_no_row_of_one_nullable_column_is_lost(finished: Path) -> None:
    """Readers of CSV pass over empty lines: a null that is all of a row is an empty string."""
    cells = list(
        csv.reader(io.StringIO(exported(finished, Form.CSV, columns=["class_id"]), newline=""))
    )
    assert len([row for row in cells if row]) == 12
    assert [row[0] for row in cells[1:]] == [
        "" if row["class_id"] is None else str(row["class_id"]) for row in helpers.rows(finished)
    ]


def test_a_job_without_finished_rows_is_a_header(
    finished: Path, copy_of: Callable[[Path], Path]
) -> None:
    """With --partial, of columns in CSV, and nothing at all in JSON lines."""
    out = copy_of(finished)
    for path in (out / "predictions").iterdir():
        path.unlink()
    (out / "summary.json").unlink()
    assert exported(out, Form.JSONL, partial=True) == ""
    assert exported(out, Form.CSV, partial=True).startswith('"index","source","path","status"')
    assert exported(out, Form.CSV, partial=True).count("\n") == 1


def test_an_unfinished_job_is_refused_unless_partial(
    finished: Path, copy_of: Callable[[Path], Path]
) -> None:
    """One clear message with both numbers; with --partial what is there, in plan order, and the
    numbers reported.
    """
    out = copy_of(finished)
    JobPaths(out).part(1).unlink()
    (out / "summary.json").unlink()
    with pytest.raises(
        OutputError,
        match=rf"^{out} is not finished: 8 of 11 images have a row. Run the same .* --partial",
    ):
        exported(out, Form.CSV)
    waits = "Wait until the `imagemill run` that is at work has finished, or add --partial"
    with lock.locked(JobPaths(out)), pytest.raises(OutputError, match=waits):
        exported(out, Form.CSV)
    messages: list[str] = []
    rows = exported(
        out, Form.JSONL, columns=["index"], partial=True, notify=messages.append
    ).splitlines()
    assert [json.loads(row)["index"] for row in rows] == [0, 1, 2, 6, 7, 8, 9, 10]
    assert messages == [
        f"{out} is not finished: 8 of 11 images have a row. Run the same `imagemill run` command"
        " again to finish it. These rows are exported in plan order."
    ]


def test_a_damaged_part_is_one_message_and_no_file(
    finished: Path, copy_of: Callable[[Path], Path], imagemill: CLI
) -> None:
    """The file that was asked for does not appear, nor does anything half-written beside it."""
    out = copy_of(finished)
    JobPaths(out).part(2).write_bytes(b"rubbish")
    goal = out.parent / "goal"
    goal.mkdir()
    result = imagemill("export", out, "--to", "csv", "--output", goal / "rows.csv")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"imagemill: {JobPaths(out).part(2)} is damaged: ")
    assert result.err.count("\n") == 1
    assert list(goal.iterdir()) == []
    with pytest.raises(PartError):
        exported(out, Form.JSONL)


def test_a_part_without_a_column_is_damaged(
    finished: Path, copy_of: Callable[[Path], Path]
) -> None:
    """All parts of a job have the columns of its settings; one that has not is no part of it."""
    out = copy_of(finished)
    path = JobPaths(out).part(0)
    pq.write_table(pq.read_table(path).drop_columns(["logits"]), path)
    with pytest.raises(PartError, match=r"is damaged: .*logits"):
        exported(out, Form.CSV)


def test_the_command_writes_to_stdout_or_to_a_file(
    finished: Path, imagemill: CLI, tmp_path: Path
) -> None:
    """The same bytes; nothing but them on stdout; a custom file of that name is replaced whole."""
    result = imagemill("export", finished, "--to", "jsonl", "--columns", "index,path,label")
    assert (result.code, result.err) == (0, "")
    goal = tmp_path / "rows.jsonl"
    goal.write_text("old")
    written = imagemill(
        "export", finished, "--to", "jsonl", "--columns", "index,path,label", "--output", goal
    )
    assert (written.code, written.out, written.err) == (0, "", "")
    assert goal.read_text() == result.out
    assert [json.loads(line)["index"] for line in result.out.splitlines()] == list(range(11))


def test_mistakes_are_one_line(finished: Path, imagemill: CLI, tmp_path: Path) -> None:
    """A folder that is no job, none at all, no --to, an unknown column, a goal that is no file."""
    for arguments, code, text in (
        ((tmp_path, "--to", "csv"), 2, "is not an imagemill job: it has no job.json."),
        ((tmp_path / "nowhere", "--to", "csv"), 2, "is not an imagemill job: it does not exist."),
        ((finished,), 2, "the following arguments are required: --to"),
        ((finished, "--to", "xml"), 2, "invalid choice: 'xml'"),
        ((finished, "--to", "csv", "--columns", "nme"), 2, "the job has no column 'nme'"),
        (
            (finished, "--to", "csv", "--output", tmp_path),
            1,
            "is not a regular file. Name a file, or leave it out",
        ),
        ((finished, "--to", "csv", "--output", tmp_path / "none" / "rows.csv"), 1, "cannot write"),
    ):
        result = imagemill("export", *arguments)
        assert (result.code, result.out) == (code, ""), result
        assert text in result.err
        assert result.err.count("\n") == 1


def test_a_reader_that_has_enough_ends_it_cleanly(
    finished: Path, models_dir: Path, copy_of: Callable[[Path], Path]
) -> None:
    """`imagemill export … | head -1`: no traceback, no complaint, while far more is still to come
    than a pipe holds.
    """
    out = copy_of(finished)
    many = pa.concat_tables([pq.read_table(JobPaths(out).part(0))] * 2_000)
    pq.write_table(many, JobPaths(out).part(0))
    command = [sys.executable, "-W", "error", "-m", "imagemill", "export", str(out), "--to", "csv"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=helpers.environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b'"index","source"')
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(60)) == (b"", 0)
    process.stderr.close()


def test_rows_are_made_in_pieces(finished: Path, copy_of: Callable[[Path], Path]) -> None:
    """However large a part is, no piece holds more than 1,024 rows of it, and the rows are the
    same.
    """
    out = copy_of(finished)
    path = JobPaths(out).part(0)
    pq.write_table(pa.concat_tables([pq.read_table(path)] * 1_000), path)
    job = OpenJob.open(out)
    for form in Form:
        pieces = [
            piece.count(b"\n") for piece in export.export(job, form, columns=["index", "logits"])
        ]
        assert max(pieces) == 1_024
        assert sum(pieces) == 3_000 + 8 + (form is Form.CSV)


def test_a_job_of_other_columns_says_which(finished: Path) -> None:
    """What the job saves decides what can be asked for."""
    job = OpenJob.open(finished)
    session = replace(job.frozen.job.session, save=())
    frozen = replace(job.frozen, job=replace(job.frozen.job, session=session))
    with pytest.raises(UsageError, match="no column 'logits'"):
        export.export(replace(job, first=frozen), Form.CSV, columns=["logits"])


def test_a_part_under_another_ones_name_is_not_exported(
    finished: Path, copy_of: Callable[[Path], Path]
) -> None:
    """Else some rows would come twice, and others not at all."""
    out = copy_of(finished)
    (out / "predictions" / "part-000002.parquet").write_bytes(
        (out / "predictions" / "part-000001.parquet").read_bytes()
    )
    with pytest.raises(
        PartError, match=r"part-000002\.parquet is shard 1 under another shard's name"
    ):
        exported(out, Form.CSV)


def test_a_job_without_its_plan_is_not_exported_as_an_empty_one(
    imagemill: CLI, finished: Path, copy_of: Callable[[Path], Path]
) -> None:
    """Nor does it get an empty report."""
    out = copy_of(finished)
    for path in (out / "plan").glob("*.parquet"):
        path.unlink()
    for command in (("export", out, "--to", "csv"), ("report", out), ("status", out)):
        result = imagemill(*command)
        assert (result.code, result.out) == (1, "")
        assert "plan does not hold the 11 images of job.json. Start again" in result.err


@pytest.mark.process
def test_a_closed_standard_output_is_one_clear_line(finished: Path) -> None:
    done = subprocess.run(
        f"exec {sys.executable} -m imagemill export {finished} --to csv >&-",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "imagemill: standard output is closed. Give --output FILE.\n",
    )
