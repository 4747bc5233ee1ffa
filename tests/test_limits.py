"""Too little memory, too few threads or open files, and processes that wait for what never comes:
one clear error, in bounded time.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import helpers
from imagemill.errors import WorkerError
from imagemill.records import Settings
from imagemill.runner import run
from imagemill.system import processes
from imagemill.workers import supervisor

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))

import harness

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

STUCK_AT_START = """
if WORKER:
    after_import("imagemill.pipeline.backends", lambda module: time.sleep(3600))
"""
STUCK_AT_WORK = """
if WORKER:
    def stuck(module):
        stream = module.NullSession.stream
        def streamed(self, batches):
            if once(os.environ["STUCK"]):
                time.sleep(3600)
            return stream(self, batches)
        module.NullSession.stream = streamed
    after_import("imagemill.pipeline.backends.null", stuck)
"""

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]


def hooked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hook: str) -> None:
    for name, value in harness.hooks(
        tmp_path / "hooks", hook, STUCK=str(tmp_path / "stuck")
    ).items():
        monkeypatch.setenv(name, value)


def test_a_worker_that_never_starts_ends_the_job(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose thread could not start: it is killed once it uses no CPU time, and the
    third time the job ends with the reason.
    """
    hooked(monkeypatch, tmp_path, STUCK_AT_START)
    monkeypatch.setattr(supervisor, "WITHOUT_CPU_S", 1.0)
    with pytest.raises(
        WorkerError,
        match=r"3 times in a row; the last time it used no CPU time for 1 s while starting and was"
        " killed; limits",
    ):
        run.run(job(jpegs(2), preflight=False))


def test_a_worker_that_waits_for_ever_is_started_again(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has images to classify, decodes none and uses no CPU time: long before ten minutes are
    over it is killed, and the job finishes.
    """
    hooked(monkeypatch, tmp_path, STUCK_AT_WORK)
    monkeypatch.setattr(supervisor, "WITHOUT_CPU_S", 3.0)
    summary = run.run(job(jpegs(4), preflight=False))
    assert summary.ok == 4
    assert summary.devices[0].restarts >= 1  # more if it is not scheduled for as long


def test_too_little_memory_for_the_imports_is_one_clear_error(tmp_path: Path) -> None:
    """Even if the module that describes a shortage cannot be loaded either."""
    code = (
        "import sys; sys.modules['imagemill.system.processes'] = None\n"
        "from imagemill import cli\n"
        f"sys.exit(cli.main(['run', '.', '--output', {str(tmp_path / 'out')!r}]))"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env=helpers.environment(),
        cwd=tmp_path,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("raise the limits of this shell (ulimit -v).\n")


@pytest.mark.parametrize("kibibytes", [300_000, 450_000])
def test_a_small_limit_of_memory_is_one_clear_error(
    kibibytes: int, models_dir: Path, jpegs: Folders, tmp_path: Path
) -> None:
    """`ulimit -v`: the command works, or ends with one message and exit code 1; it was not
    interrupted, and there is no traceback.
    """
    limited = ("bash", "-c", f'ulimit -v {kibibytes}; exec "$@"', "limited")
    command = (
        "run",
        jpegs(4),
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "cpu:1",
        "--no-report",
        "--precision",
        "fp32",
    )
    result = helpers.imagemill_cli(
        *command, before=limited, env=helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    )
    assert result.code in (0, 1), result
    assert "Traceback" not in result.err
    assert result.code == 0 or result.err.splitlines()[-1].startswith(("imagemill: ", "  ")), (
        result.err
    )  # lines of a log are indented


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (
            ImportError("libtiff.so.6: failed to map segment from shared object"),
            "libtiff.so.6: failed to map segment from shared object",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
        (BlockingIOError(errno.EAGAIN, "again"), "resource temporarily unavailable"),
        (RuntimeError("something else"), None),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
    ],
)
def test_a_shortage_is_named_with_the_limits(error: Exception, what: str | None) -> None:
    """What is short, and the limits to raise; other errors stay what they are."""
    found = processes.shortage(error)
    assert (found is None) == (what is None)
    if found and what:
        assert found.startswith(f"{what}. Free some, or raise the limits of this shell (ulimit -v ")
        assert "ulimit -u " in found
        assert "ulimit -n " in found


def test_the_cpu_time_of_children_counts() -> None:
    """A worker that waits for its own program to compile a model does not hang."""
    import subprocess

    busy = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        try:
            helpers.until(
                lambda: (
                    (processes.cpu_ticks(process.pid) or 0) > 30 and helpers.running(process.pid)
                )
            )
        finally:
            for pid in (*harness.children(process.pid), process.pid):
                harness.kill(pid)
    assert processes.cpu_ticks(process.pid) is None
