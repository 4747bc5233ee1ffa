"""Runs one small job per place of the code. Its worker or launcher is killed as it first reaches
that place, and the end of each job is checked.

    python tests/faults/crash_lines.py record worker FOLDER         print the places to kill at
    python tests/faults/crash_lines.py crash worker FOLDER PLACE…   kill at each, and print it
                                                                    when the job ended well
    python tests/faults/crash_lines.py record launcher FOLDER       the same for the launcher
    python tests/faults/crash_lines.py record append FOLDER         the same for one that appends
    python tests/faults/crash_lines.py lines append FOLDER          more of its places

A place is `pipeline/sink.py:69`, a line about to be executed, or `system/files.py:124 return`, a
function about to return. Two kills between which nothing changed outside the process are the same
kill, so `record` prints one place for each state of the output folder, and all of `EVERY_PLACE`.
`lines` adds those of `MORE_PLACES`.

The workers are processes that really die of SIGKILL. They and their decoders are forked, because
importing their libraries once per place would take longer than everything else. FOLDER holds
`models` and `images`, and for `append` also `later`: the images that arrive after a first job has
ended. A copy of that job is appended to for each place.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

import forked
import imagemill
import imagemill.pipeline.backends.null
import imagemill.pipeline.decoding.isolated
import imagemill.pipeline.feed
import imagemill.pipeline.run_shards
import imagemill.pipeline.sink  # here, so that no worker has to import them
from imagemill.records import Settings, Summary
from imagemill.runner import run
from imagemill.system import processes
from imagemill.workers import worker

FUNCTIONS: dict[str, dict[str, set[str] | None]] = {
    "worker": {
        "pipeline/run_shards.py": None,
        "pipeline/sink.py": None,
        "system/files.py": {"write_whole", "sync"},
    },
    "launcher": {
        "runner/run.py": {"_carry_out"},
        "runner/freeze.py": {"freeze"},
        "job/plan.py": {"spool", "cut", "_shards"},
        "job/ledger.py": {"close"},
        "job/paths.py": {"sweep"},
        "job/lock.py": {"locked"},
        "system/files.py": {"write_whole", "sync", "make_folder"},
    },
    "append": {
        "runner/append.py": {"append", "_freeze"},
        "runner/difference.py": None,
        "runner/listing.py": {"list_again"},
        "runner/run.py": {"_run", "_carry_out"},
        "job/plan.py": {"spool", "cut", "_shards"},
        "job/paths.py": {"gather_indices"},
        "job/ledger.py": {"close"},
        "system/files.py": {"write_whole", "sync", "make_folder", "remove_folder", "clear_folder"},
    },
}
"""Process and file → the functions whose places count; None: all of them."""
EVERY_PLACE = ("pipeline/run_shards.py",)
"""Files all of whose lines count. Between those of `run_shards.py` a worker sends messages, which
the output folder does not show.
"""
MORE_PLACES = ("runner/append.py",)
PACKAGE = Path(imagemill.__file__).parent


class Forked:
    """What the launcher uses of `subprocess.Popen`, for a worker that is forked and traced."""

    visit: Callable[[str], None] = staticmethod(lambda _: None)

    def __init__(
        self, command: Sequence[str], *, stdout: Any, pass_fds: Sequence[int], **_: Any
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(stdout.fileno(), 2)
                keep = {2, SERVER.fileno(), *pass_fds}
                for descriptor in map(int, os.listdir("/proc/self/fd")):
                    if descriptor not in keep:
                        with contextlib.suppress(OSError):
                            os.close(descriptor)
                logging.getLogger("imagemill").handlers.clear()
                logging.getLogger("imagemill").propagate = True
                sys.argv = list(command[command.index("imagemill.workers.worker") :])
                trace(FUNCTIONS["worker"], Forked.visit)
                code = worker.main()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(status[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (600 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            time.sleep(0.001)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


SERVER = forked.Server()


def start(command: Sequence[str], **options: Any) -> Any:
    """Fork a worker, and have any other child, such as a worker's isolated decoder, forked."""
    is_worker = "imagemill.workers.worker" in command
    return (Forked if is_worker else SERVER.popen)(command, **options)


def trace(places: dict[str, set[str] | None], visit: Callable[[str], None]) -> None:
    """Call `visit` with each place as it is reached, on every thread."""

    prefix = f"{PACKAGE}{os.sep}"

    def local(frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename.removeprefix(prefix)
        if event == "line":
            visit(f"{name}:{frame.f_lineno}")
        elif event == "return":
            visit(f"{name}:{frame.f_code.co_firstlineno} return")
        return local

    def tracer(frame: FrameType, _event: str, _: object) -> Any:
        code = frame.f_code
        name = code.co_filename.removeprefix(prefix)
        if name not in places or not code.co_flags & inspect.CO_OPTIMIZED:
            return None
        functions = places[name]
        return local if functions is None or code.co_name in functions else None

    threading.settrace(tracer)
    sys.settrace(tracer)


def job(folder: Path, output: Path, *, append: bool = False) -> Summary:
    settings = Settings(
        sources=(str(folder / "images"),),
        output=str(output),
        model="null",
        models_dir=str(folder / "models"),
        devices="null:1",
        shard_size=4,
        num_workers=1,
        batch_size=4,
        append=append,
        report=False,
    )
    return run.run(settings)


def run_traced(process: str, folder: Path, output: Path, visit: Callable[[str], None]) -> int:
    """One job, `visit` called in its worker, or in its launcher, forked for it. Returns the
    restarts, or the launcher's exit code.
    """
    if process == "worker":
        Forked.visit = staticmethod(visit)
        return job(folder, output).devices[0].restarts
    if (pid := os.fork()) == 0:
        code = 1
        try:
            trace(FUNCTIONS[process], visit)
            job(folder, output, append=process == "append")
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_names(places: dict[str, set[str] | None]) -> None:
    """Raise if a file or function to kill in does not exist."""
    for name, functions in places.items():
        tree = ast.parse((PACKAGE / name).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if missing := (functions or set()) - defined:
            raise LookupError(f"{name} has no {', '.join(sorted(missing))}; change FUNCTIONS")


def state(output: Path) -> frozenset[tuple[object, ...]]:
    """Return name, identity, size and time of everything in a folder."""
    found = set()
    for folder, _, names in os.walk(output):
        for path in (folder, *(f"{folder}/{name}" for name in names)):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                found.add((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return frozenset(found)


def record(process: str, folder: Path, every: tuple[str, ...]) -> list[str]:
    """Return the places to kill at, in the order in which an undisturbed job reaches them, with all
    lines of the files in `every`. The others are compared with its output.
    """
    check_names(FUNCTIONS[process])
    output, places = folder / "undisturbed", folder / "places"
    if process == "append":
        job(folder, folder / "first")
        for path in (folder / "later").iterdir():
            path.rename(folder / "images" / path.name)
        shutil.copytree(folder / "first", output)
    seen: set[str] = set()
    states: set[frozenset[tuple[object, ...]]] = set()

    def visit(place: str) -> None:
        if place in seen:
            return
        seen.add(place)
        found = state(output)
        if found not in states or place.startswith(every):
            states.add(found)
            with places.open("a") as file:
                file.write(f"{place}\n")

    assert run_traced(process, folder, output, visit) == 0
    return places.read_text().splitlines()


def crash(process: str, folder: Path, place: str) -> None:
    """Raises: AssertionError unless the process was killed there, and the job came to the same end
    as the undisturbed one.
    """
    name = re.sub(r"[:/ ]", "-", place)
    output, marker = folder / f"out-{name}", folder / f"killed-{name}"

    def visit(reached: str) -> None:
        if reached == place and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if process == "append":
        shutil.copytree(folder / "first", output)
    ended = run_traced(process, folder, output, visit)
    assert marker.exists(), f"{place} was not reached"
    if process == "worker":
        assert ended == 1, f"{ended} restarts"
    else:
        assert ended == -signal.SIGKILL, f"exit code {ended}"
        job(folder, output, append=process == "append")
    harness.assert_complete(output)
    harness.assert_same(output, folder / "undisturbed")


def apart(act: Callable[[], object]) -> None:
    """Do something in a fork of this process, which itself so never has a thread: Arrow's do not
    survive a fork. Raises: SystemExit.
    """
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            print(act() or "", end="", flush=True)
            code = 0
        except BaseException:  # every one of them ends this fork, and nothing else
            traceback.print_exc()
        finally:
            os._exit(code)
    if status := os.waitpid(pid, 0)[1]:
        sys.exit(f"ended with {os.waitstatus_to_exitcode(status)}")


def main(arguments: Sequence[str]) -> int:
    mode, process, folder, *places = arguments
    for late in (
        "pandas",
        "imagemill.tuning.check_process",
        "imagemill.tuning.precisions",
        "imagemill.tuning.quantize",
        "imagemill.tuning.accuracy",
    ):
        with contextlib.suppress(
            ImportError
        ):  # what a job imports as it goes: here once, instead of in every fork
            importlib.import_module(late)
    if sys.platform == "linux":
        SERVER.beside()
    processes.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=start,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    if mode in ("record", "lines"):
        every = EVERY_PLACE + MORE_PLACES * (mode == "lines")
        apart(lambda: "".join(f"{place}\n" for place in record(process, Path(folder), every)))
    for place in places:
        apart(partial(crash, process, Path(folder), place))
        print(place, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
