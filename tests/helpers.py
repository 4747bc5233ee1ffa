"""What tests share that is not a fixture: the command line as a child process, folders of images,
and the rows of an output.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forked
import imagemill
from imagemill import cli

SOURCE_ROOT = Path(imagemill.__file__).resolve().parents[1]
FRESH = ("env",)
"""In front of an interpreter it changes nothing, but what follows is no fork."""
PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Result:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON value."""
        return json.loads(self.out)


def environment(**changes: str) -> dict[str, str]:
    """Ours, with this very imagemill importable by a child."""
    paths = [str(SOURCE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **changes}


def faulty_decoders() -> dict[str, str]:
    """Variables of processes whose decoders crash or hang if an image asks for it."""
    hooks = Path(__file__).with_name("faulty_decoders") / "sitecustomize.py"
    path = f"{hooks.parent}{os.pathsep}{environment()['PYTHONPATH']}"
    return {"PYTHONPATH": path, "TEST_HOOKS": str(hooks)}


def start(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    before: tuple[str, ...] = (),
) -> Any:
    """Start `imagemill ARGUMENTS` with its outputs in pipes; `before` is put in front of the
    interpreter. Without it the process is a fork, if that can be, whose libraries are imported.
    """
    words = [os.fsdecode(_argument(argument)) for argument in arguments]
    env = env or environment()
    if not before and (started := forked.start(words, env, cwd)):
        return started
    command = [
        *before,
        sys.executable,
        "-W",
        "error",
        "-m",
        "imagemill",
        *words,
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=cwd,
    )


def finish(process: Any, timeout: float = 300) -> Result:
    """Wait for a started command line."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(
        process.returncode,
        out.decode("utf-8", "backslashreplace"),
        err.decode("utf-8", "backslashreplace"),
    )


def read_until(process: Any, text: str) -> str:
    """Read what a started command line prints to stderr until it contains `text`; return it."""
    found = b""
    while text.encode() not in found:
        piece = os.read(process.stderr.fileno(), 65_536)
        assert piece, found
        found += piece
    return found.decode()


def imagemill_cli(*arguments: object, **options: Any) -> Result:
    """Run `imagemill ARGUMENTS` to its end, in a process of its own."""
    return finish(start(*arguments, **options))


def imagemill_here(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Result:
    """Run `imagemill ARGUMENTS` in this process, which saves its start and its imports."""
    streams = [
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
        for _ in range(2)
    ]
    before = signal.getsignal(signal.SIGTERM)
    variables = dict(os.environ)
    try:
        os.environ.update(env or {})
        for name in os.environ.keys() - (env or variables).keys():
            del os.environ[name]
        with (
            contextlib.chdir(cwd or Path.cwd()),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            code = cli.main([os.fsdecode(_argument(argument)) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.environ.clear()
        os.environ.update(variables)
    return Result(code, *(stream.buffer.getvalue().decode() for stream in streams))  # type: ignore[attr-defined]


def _argument(argument: object) -> str | bytes:
    return argument if isinstance(argument, str | bytes) else str(argument)


def fill(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a folder; names may hold slashes."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def table(output: Path) -> pa.Table:
    """All rows of an output, in the order of its parts."""
    return pa.concat_tables(
        pq.read_table(pa.BufferReader(path.read_bytes()))
        for path in sorted((output / "predictions").glob("part-*.parquet"))
    )


def rows(output: Path) -> list[dict[str, Any]]:
    """The same as dicts."""
    found: list[dict[str, Any]] = table(output).to_pylist()
    return found


def by_path(output: Path) -> dict[str, dict[str, Any]]:
    """Rows by path, without their index and source, which depend on the neighbours by right."""
    found = {
        row["path"]: {name: value for name, value in row.items() if name not in ("index", "source")}
        for row in rows(output)
    }
    assert len(found) == len(rows(output))
    return found


def parts(output: Path) -> dict[str, tuple[int, int]]:
    """Name → (inode, mtime) of every part on disk: a part that was written again has another."""
    found = {}
    for path in (output / "predictions").glob("part-*.parquet"):
        stat = path.stat()
        found[path.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def until(condition: Callable[[], Any], seconds: float = 300, process: Any = None) -> Any:
    """Wait until a condition holds and return its value; give up after a while, or when the process
    has ended.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, finish(process)
        time.sleep(0.005)
    return value


def worker_pids(output: Path) -> list[int]:
    """Process ids of the workers of a run, in the order in which they became ready, from the
    launcher's log.
    """
    log = output / "logs" / "launcher.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [
        int(line.rpartition("(pid ")[2].rstrip(")")) for line in lines if " is ready (pid " in line
    ]


def running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def capture_log(name: str, caplog: pytest.LogCaptureFixture, patch: pytest.MonkeyPatch) -> None:
    """Let `caplog` see a module's messages, whatever this process has made of the loggers above."""
    logger = logging.getLogger(name)
    caplog.set_level(logging.WARNING, name)
    patch.setattr(logger, "handlers", [caplog.handler])
    patch.setattr(logger, "propagate", False)
    patch.setattr(logger, "disabled", False)  # libraries that configure logging may set it


def without_root_powers() -> tuple[str, ...]:
    """What to put in front of a command so that file permissions bind it, also as root.

    Root reads everything because of two capabilities. A wrapper drops them for good before it
    becomes the command; so the kernel answers as it does to another user, while the interpreter and
    the clone need not be readable by one.
    """
    if os.geteuid() != 0:
        return ()
    program = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
        sys.exit(f"cannot drop capability {capability}: errno {ctypes.get_errno()}")
os.execv(sys.argv[1], sys.argv[1:])
"""
    return (sys.executable, "-c", program)


def assert_alike(first: Path, second: Path) -> None:
    """Two outputs have the same labels, and embeddings that differ in their last digits at most."""
    for one, other in zip(rows(first), rows(second), strict=True):
        assert [one[name] for name in ("path", "status", "label")] == [
            other[name] for name in ("path", "status", "label")
        ]
        if one["status"] == "ok":
            assert np.allclose(one["embedding"], other["embedding"], atol=1e-4)
