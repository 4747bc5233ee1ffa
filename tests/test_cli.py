"""The command line: what it prints where, how it exits, and how it speaks of mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import helpers
import sample_images
from imagemill import cli
from imagemill.display.results import format_summary
from imagemill.job import lock
from imagemill.job.paths import JobPaths
from imagemill.records import Summary

pytestmark = pytest.mark.process

CLI = Callable[..., helpers.Result]
Folders = Callable[..., Path]
TINY = ("--model", "tiny", "--devices", "null")
HEAVY = {
    "numpy",
    "pyarrow",
    "openvino",
    "onnx",
    "onnxruntime",
    "PIL",
    "simplejpeg",
    "rich",
    "safetensors",
    "nncf",
    "multiprocessing",
}


@pytest.mark.parametrize("argument", ["", "--help", "run --help"])
def test_importing_and_help_load_no_heavy_library(argument: str) -> None:
    """So help answers at once."""
    program = f"""
import contextlib, sys, imagemill
if {argument!r}:
    from imagemill import cli
    with contextlib.suppress(SystemExit):
        cli.main({argument.split()!r})
print(*sys.modules, file=sys.stderr)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        text=True,
        env=helpers.environment(),
    ).stderr
    assert "imagemill" in loaded.split()
    assert not HEAVY & set(loaded.split())


def test_json_prints_exactly_one_object(imagemill: CLI, jpegs: Folders, tmp_path: Path) -> None:
    """The summary on stdout and nothing else, for a new job, a finished one and a dry run;
    everything said goes to stderr.
    """
    command = ("run", jpegs(5), "--output", tmp_path / "out", *TINY, "--json")
    dry = imagemill(*command, "--dry-run")
    assert (dry.code, dry.json["images"], (tmp_path / "out").exists()) == (0, 5, False)
    new = imagemill(*command)
    assert (new.code, new.json) == (0, json.loads((tmp_path / "out" / "summary.json").read_bytes()))
    again = imagemill(*command)
    assert (again.code, again.json["resumed_shards"], again.json["images"]) == (0, 1, 5)
    assert "already finished" in again.err
    for result in (dry, new, again):
        assert result.out.count("\n") == 1


def test_the_aggregate_goes_to_stdout_and_progress_to_stderr(
    imagemill: CLI, jpegs: Folders, tmp_path: Path
) -> None:
    """For people: counts, rates, what bounded the job, and where the results are. No escape codes
    where there is no terminal.
    """
    result = imagemill(
        "run", jpegs(5, **{"bad.jpg": b"", "x.txt": b""}), "--output", tmp_path / "out", *TINY
    )
    assert result.code == 0
    first, *lines = result.out.splitlines()
    assert first == "6 images: 5 ok, 1 failed (1 empty)"
    assert lines[0] == "skipped: 1 .txt"
    assert lines[-3:] == [
        f"report: {tmp_path}/out/report.html",
        f"results: {tmp_path}/out/predictions",
        f"as CSV: `imagemill export {tmp_path}/out --to csv`",
    ]
    assert not any(line.startswith("bottleneck") for line in lines)
    assert "6 of 6 images (100 %), finished" in result.err
    assert "\x1b" not in result.out + result.err


def test_dry_run_for_people(imagemill: CLI, jpegs: Folders, tmp_path: Path) -> None:
    """One line; nothing is written."""
    result = imagemill(
        "run", jpegs(5, **{"x.txt": b"", "y": b""}), "--output", tmp_path / "out", "--dry-run"
    )
    assert (result.code, result.out) == (
        0,
        "5 images, shards of 32; skipped: 1 (no suffix), 1 .txt\n",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "imagemill: the following arguments are required: COMMAND. See `imagemill --help`."),
        (("walk",), "imagemill: argument COMMAND: invalid choice: 'walk'"),
        (
            ("run",),
            (
                "imagemill run: the following arguments are required: SOURCE, -o/--output. See"
                " `imagemill run --help`."
            ),
        ),
        (
            ("run", "x", "--output", "y", "--top-k", "many"),
            "imagemill run: argument --top-k: invalid int value: 'many'.",
        ),
        (
            ("run", "x", "--output", "y", "--batch-size", "big"),
            "imagemill run: argument --batch-size: invalid number value: 'big'.",
        ),
        (
            ("run", "x", "--output", "y", "--outp", "z"),
            "imagemill: unrecognized arguments: --outp z.",
        ),
        (
            ("run", "x", "--output", "y", "--top-k", "0"),
            "imagemill: --top-k 0: must be at least 1.",
        ),
        (
            ("run", "x", "--output", "y", "--devices", "tpu"),
            "imagemill: --devices tpu: 'tpu' is not a kind of device.",
        ),
        (
            ("run", "x", "--output", "y", "--model", "nonesuch"),
            "imagemill: No model is called nonesuch.",
        ),
        (("run", "ftp://x/y", "--output", "y"), "imagemill: source ftp://x/y"),
        (("get-model", "nonesuch"), "imagemill: No model is called nonesuch."),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    imagemill: CLI, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Nothing is done, nothing is on stdout, and there is no traceback."""
    helpers.fill(tmp_path, {"x/a.jpg": b"x"})
    result = imagemill(*arguments, cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1
    assert not (tmp_path / "y" / "job.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", "6"), "unknown option --batch_size; use instead: --batch-size"),
        (
            ("--batches_per_step=10",),
            "unknown option --batches_per_step; use instead: --batches-per-step",
        ),
        (("--num_workers", "4"), "unknown option --num_workers; use instead: --num-workers"),
        (
            ("--data-dir", "x", "--bogus"),
            "unknown option --data-dir; use instead: the SOURCE argument of `imagemill run`",
        ),
        (("--num_ipus", "8"), "unknown option --num_ipus; use instead: --devices ipu:N"),
        (
            ("--data_dir", "datasets/"),
            "unknown option --data_dir; use instead: the SOURCE argument of `imagemill run`",
        ),
        (("--log_path", "logs"), "unknown option --log_path; use instead: --log-dir"),
        (("--model_name", "resnext101_32x4d"), "unknown option --model_name; use instead: --model"),
    ],
)
def test_the_spellings_of_graphcores_example_are_known(
    imagemill: CLI, arguments: tuple[str, ...], message: str
) -> None:
    """The error names the flag that it has here."""
    for given in (("run", "images", "--output", "out", *arguments), ("run", *arguments)):
        result = imagemill(*given)
        assert result.code == 2
        assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("run", "none", "--output", "out", *TINY),
            2,
            "imagemill: source {here}/none cannot be read: No such file or directory.",
        ),
        (
            ("run", "empty", "--output", "out", *TINY),
            2,
            "imagemill: no images found in {here}/empty",
        ),
        (
            ("run", "images", "--output", ".", *TINY),
            2,
            "imagemill: --output {here} is not empty and",
        ),
        (("run", "images", "--output", "out", *TINY, "--top-k", "0"), 2, "imagemill"),
        (
            ("run", "images", "--output", "out", *TINY, "--labels", "none.txt"),
            2,
            "imagemill: ",
        ),
        (
            ("run", "@list.csv", "--output", "out", *TINY, "--keep", "a=b=c"),
            2,
            "imagemill: --keep a=b=c: write --keep COLUMN or --keep COLUMN=NEW.",
        ),
        (
            ("run", "none", "--output", "out", "--model", "tiny", "--devices", "ipu:8"),
            1,
            "imagemill: --devices ipu:8: ",
        ),
        (
            ("status", "none"),
            2,
            "imagemill: {here}/none is not an imagemill job: it does not exist.",
        ),
        (("verify", "."), 2, "imagemill: {here} is not an imagemill job: it has no job.json."),
        (("get-model", "resnext50_32x4d.mine", "--from", "none.pth"), 1, "imagemill: "),
    ],
)
def test_failures_are_one_line_and_wrong_input_is_exit_2(
    imagemill: CLI, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    """One clear message on stderr, nothing on stdout, no traceback, and nothing left behind. A
    wrong command, or an input that is wrong or missing, is exit 2; what else fails is exit 1.
    """
    (tmp_path / "empty").mkdir()
    helpers.fill(tmp_path, {"images/a.jpg": sample_images.jpeg(), "list.csv": b"path,a\nx.jpg,1\n"})
    result = imagemill(*arguments, cwd=tmp_path)
    assert (result.code, result.out) == (code, "")
    assert not (tmp_path / "out").exists()
    assert result.err.startswith(message.format(here=tmp_path))
    assert "Traceback" not in result.err


@pytest.mark.parametrize("closed", [(0, 1), (0, 2), (1, 2), (0, 1, 2), (2,)])
def test_streams_that_the_caller_closed_cost_nothing(
    imagemill: CLI, jpegs: Folders, tmp_path: Path, closed: tuple[int, ...]
) -> None:
    """As some daemons do: files that are opened later do not get their numbers, and messages never
    go to stdout.
    """
    closing = " ".join(f"{number}>&-" for number in closed)
    command = ("run", jpegs(6), "--output", tmp_path / "out", *TINY, "--json")
    before = ("sh", "-c", f'exec "$@" {closing}', "sh")
    result = imagemill(*command, before=before)
    assert result.code == 0, result.err
    assert len(helpers.rows(tmp_path / "out")) == 6
    assert 1 in closed or result.json["ok"] == 6


def test_a_command_does_not_replace_files_of_the_job(
    imagemill: CLI, jpegs: Folders, tmp_path: Path
) -> None:
    """Nor does it write into the data set; the report, and other names, are free."""
    out = tmp_path / "out"
    assert imagemill("run", jpegs(3), "--output", out, *TINY).code == 0
    before = helpers.parts(out)
    csv = ("export", out, "--to", "csv", "--output")
    for name in ("job.json", "predictions/x.parquet", "plan/x", "logs/x", "failed.txt", "./.lock"):
        for command in (csv, ("report", out, "--output")):
            result = imagemill(*command, out / name)
            assert (result.code, result.err) == (
                2,
                f"imagemill: --output {out / name}: the job needs this name. Give another file.\n",
            )
    for command in ((*csv, out / "rows.csv"), ("report", out, "--output", out / "report.html")):
        assert [imagemill(*command).code for _ in range(2)] == [0, 0]
    assert helpers.parts(out) == before
    assert imagemill("verify", out).code == 0


def test_status_of_a_job_that_is_being_listed(imagemill: CLI, tmp_path: Path) -> None:
    """It is not said to be none."""
    out = tmp_path / "out"
    out.mkdir()
    with lock.locked(JobPaths(out)):
        result = imagemill("status", out)
    assert result.code == 2
    assert "is not an imagemill job yet: an `imagemill run` is listing its images." in result.err


def test_verify_and_status_speak_json_and_exit_codes(
    imagemill: CLI, jpegs: Folders, tmp_path: Path
) -> None:
    """0 only if sound; --quarantine says where the damage went; then the same run command heals."""
    out = tmp_path / "out"
    command = ("run", jpegs(6), "--output", out, *TINY, "--shard-size", "2", "--json")
    assert imagemill(*command).code == 0
    sound = imagemill("verify", out, "--json")
    assert (sound.code, sound.json) == (
        0,
        {"sound": True, "images": 6, "problems": [], "moved": []},
    )
    (out / "predictions" / "part-000001.parquet").write_bytes(b"rubbish")
    bad = imagemill("verify", out, "--quarantine", "--json")
    assert (
        bad.code,
        [problem["shard"] for problem in bad.json["problems"]],
        len(bad.json["moved"]),
    ) == (1, [1], 1)
    reported = imagemill("verify", out)
    assert reported.code == 1
    assert reported.out == (
        "not finished, 1 part missing: run the same command again to continue\n"
    )
    status = imagemill("status", out, "--json")
    assert (status.code, status.json["done"], status.json["complete"]) == (0, 4, False)
    assert imagemill("status", out).out.splitlines() == [
        "4 of 6 images saved (66 %), not finished",
        f"to continue: `imagemill run {command[1]} --output {out}`",
    ]
    assert imagemill(*command).json["resumed_shards"] == 2
    assert imagemill("verify", out).code == 0
    assert "6 of 6 images saved (100 %), finished\n" in imagemill("status", out).out


def test_a_changed_flag_is_exit_2(imagemill: CLI, jpegs: Folders, tmp_path: Path) -> None:
    """Wrong usage, with both values named."""
    command = ("run", jpegs(2), "--output", tmp_path / "out", *TINY)
    assert imagemill(*command).code == 0
    result = imagemill(*command, "--top-k", "3")
    assert (result.code, result.out) == (2, "")
    assert (
        "was started with --top-k 5, now --top-k 3 is asked for. Leave it out or give the old value to continue this job"
        in result.err
    )


def test_names_that_no_terminal_can_show_do_no_harm(
    imagemill: CLI, jpegs: Folders, tmp_path: Path
) -> None:
    """An output folder whose name is not UTF-8, printed on a terminal that knows ASCII alone: exit
    0, and the rows exist.
    """
    out = os.path.join(os.fsencode(tmp_path), b"out-\xff\xc3\xbc")
    env = helpers.environment(
        IMAGEMILL_MODELS=os.environ["IMAGEMILL_MODELS"],
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
        PYTHONUTF8="0",
    )
    folder = jpegs(3, **{"ü.txt": b"", "x.ü": b""})
    result = imagemill("run", folder, "--output", out, *TINY, env=env)
    assert result.code == 0, result.err
    assert "3 images: 3 ok" in result.out
    assert len(helpers.rows(Path(os.fsdecode(out)))) == 3
    assert imagemill("verify", out, env=env).code == 0
    again = imagemill("run", folder, "--output", out, *TINY, "--json", env=env)
    assert (again.code, again.json["images"]) == (0, 3)


def test_a_reader_that_has_seen_enough_is_no_error(jpegs: Folders, tmp_path: Path) -> None:
    """`imagemill models | head -1` ends quietly."""
    command = f"{sys.executable} -m imagemill models | head -n 1"
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, env=helpers.environment(), check=True
    )
    assert found.stderr == b""


def test_models_and_devices_speak_json(imagemill: CLI) -> None:
    """What can be had, what is here, and what to type."""
    models = imagemill("models", "--json")
    rows = {row["name"]: row for row in models.json["models"]}
    assert rows["efficientnet_lite0"]["licence"] == "Apache-2.0"
    assert rows["tiny"]["bytes_on_disk"] > 0
    assert imagemill("models").out.startswith("In the models folder ")
    assert [row["name"] for row in imagemill("models", "WSL", "--json").json["models"]] == [
        name for name in rows if "_wsl_" in name or "_swsl_" in name
    ]
    assert imagemill("devices", "--json").json["devices"][0]["devices"] == "cpu"
    assert imagemill("devices").out.startswith("cpu ")


def test_the_demo_shows_real_answers(imagemill: CLI, tmp_path: Path) -> None:
    """Images and trained model that install with the package; the one that is broken on purpose is
    a row.
    """
    result = imagemill("demo", "--output", tmp_path / "demo", "--models-dir", tmp_path / "models")
    assert result.code == 0, result.err
    assert "11 images: 10 ok, 1 failed (1 truncated)" in result.out
    rows = helpers.by_path(tmp_path / "demo")
    shown = {
        "camera.jpg": "tripod",
        "chelsea.jpg": "Egyptian cat",
        "chelsea_turned.jpg": "Egyptian cat",
        "coffee.webp": "espresso",
        "coffee_cmyk.jpg": "espresso",
        "dam.jpg": "dam",
        "frying_pan.jpg": "frying pan",
        "goldfish.jpg": "goldfish",
        "screwdriver.jpg": "screwdriver",
        "volleyball.png": "volleyball",
    }
    assert {path: row["label"] for path, row in rows.items() if row["label"]} == shown
    assert rows["broken_on_purpose.jpg"]["status"] == "truncated"
    assert all(path in result.out for path in rows)


def test_a_terminal_gets_a_live_display(jpegs: Folders, tmp_path: Path) -> None:
    """On a terminal stderr renews itself in place; stdout is still the aggregate alone."""
    import pty

    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "imagemill",
        "run",
        str(jpegs(30)),
        "--output",
        str(tmp_path / "out"),
        *TINY,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=helpers.environment(TERM="xterm")
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65_536)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    out = process.communicate()[0]
    assert process.returncode == 0
    assert b"\x1b[" in shown
    assert b"null#0" in shown
    assert out.startswith(b"30 images: 30 ok")


def run_tiny(
    models_dir: Path, images: Path, output: Path, **streams: object
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "imagemill",
        "run",
        str(images),
        "--output",
        str(output),
        *TINY,
    ]
    env = helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.DEVNULL, **streams)  # type: ignore[call-overload]


@pytest.mark.usefixtures("tiny")
def test_a_job_goes_on_when_nobody_reads_stderr_any_more(
    models_dir: Path, tmp_path: Path, jpegs: Folders
) -> None:
    """Exit 0 means that every image has its row: a reader of the progress that goes away changes
    nothing.
    """
    process = run_tiny(
        models_dir, jpegs(), tmp_path / "out", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "out" / "summary.json").is_file()


@pytest.mark.usefixtures("tiny")
def test_a_result_that_cannot_be_printed_is_one_line(
    models_dir: Path, tmp_path: Path, jpegs: Folders
) -> None:
    """A full device behind stdout: exit 1, no traceback, and the job is whole."""
    with Path("/dev/full").open("w") as full:
        process = run_tiny(
            models_dir, jpegs(), tmp_path / "out", stdout=full, stderr=subprocess.PIPE
        )
        _, err = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "cannot be printed" in err
    assert (tmp_path / "out" / "summary.json").is_file()


def test_an_old_spelling_is_looked_for_among_the_arguments_of_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` may be called with arguments of its own, whatever the process was started with."""
    monkeypatch.setattr(sys, "argv", ["pytest", "--model_name", "x"])
    for given, expected in (
        (
            ["run", "x", "--output", "y", "--batch_size=6"],
            "unknown option --batch_size; use instead: --batch-size",
        ),
        (["run", "x", "--output", "y", "--bogus"], "unrecognized arguments: --bogus"),
        (["run"], "the following arguments are required: SOURCE, -o/--output"),
    ):
        with pytest.raises(SystemExit):
            cli.main(given)
        assert expected in capsys.readouterr().err


def test_an_unknown_option_of_partition_is_the_one_that_is_named(imagemill: CLI) -> None:
    """And not one that it knows, though other commands spell it otherwise."""
    result = imagemill(
        "partition", "--data-dir", "x", "--partitions", "3", "--output", "y", "--bogus"
    )
    assert result.code == 2
    assert "unrecognized arguments: --bogus" in result.err
    assert "use instead" not in result.err


def test_made_up_answers_are_called_so(imagemill: CLI, jpegs: Folders, tmp_path: Path) -> None:
    """The null device has a class and a probability for every image; nobody should take them for
    answers.
    """
    done = imagemill("run", jpegs(2), "--output", tmp_path / "out", *TINY)
    assert (
        "note: the null device computes nothing: its predictions are made up"
        in done.out.splitlines()
    )


def test_a_list_may_begin_with_a_byte_order_mark(
    imagemill: CLI, jpegs: Folders, tmp_path: Path
) -> None:
    """As Windows' editors write it: it is no part of the first name."""
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbf" + b"".join(bytes(path) + b"\r\n" for path in sorted(jpegs(2).iterdir()))
    )
    done = imagemill(
        "run", f"@{tmp_path / 'list.txt'}", "--output", tmp_path / "out", *TINY, "--json"
    )
    assert (done.json["images"], done.json["ok"]) == (2, 2)


def test_no_part_of_the_work_is_shown_slower_than_the_whole() -> None:
    """What decoding or computing alone would make is estimated; of a job of a few images it may
    come out below what was achieved.
    """
    rates = {"achieved": 125.0, "decode_only": 954.4, "compute_only": 95.9}
    summary = Summary(
        2,
        2,
        0,
        {},
        {},
        1,
        0,
        0.02,
        125.0,
        "tiny",
        "fp32",
        "decode",
        (),
        "out",
        rates=rates,
        advice="do nothing",
    )
    line = "images/s: achieved 125.0, decode only 954.4"
    assert line in format_summary(summary, verbose=True).splitlines()
    assert "achieved" not in format_summary(summary)


@pytest.mark.process
def test_neither_launcher_nor_worker_imports_pandas(
    jpegs: Callable[..., Path],
    imagemill: Callable[..., helpers.Result],
    models_dir: Path,
    tmp_path: Path,
) -> None:
    """pyarrow imports it to ask one question: 0.2 s and 53 MiB in each process."""
    env = helpers.environment(PYTHONPROFILEIMPORTTIME="1", IMAGEMILL_MODELS=str(models_dir))
    done = imagemill("run", jpegs(), "--output", tmp_path / "out", "--model", "tiny", env=env)
    for text in (done.err, (tmp_path / "out" / "logs" / "cpu#0.log").read_text()):
        imported = {
            line.rpartition("|")[2].strip()
            for line in text.splitlines()
            if line.startswith("import time:")
        }
        assert "pyarrow" in imported
        assert "pandas.core" not in imported


@pytest.mark.parametrize(
    "arguments",
    [
        ("sort", "out", "--into", ""),
        ("run", "", "--output", "out"),
        ("run", "photos", "--output= "),
        ("quantize", "tiny", "--images", ""),
        ("models", "--models-dir", ""),
        ("partition", "--data-dir", "", "--partitions", "2", "--output", "out"),
    ],
)
def test_a_blank_argument_is_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes from a variable that is not set, and would mean the current folder."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "is empty. If it comes from a variable of the shell, that is not set." in error
