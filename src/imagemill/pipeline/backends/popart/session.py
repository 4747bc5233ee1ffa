"""Graphcore IPUs by PopART, one a process.

    this process                                        program.py, on the Poplar SDK's own Python
    batches ─ table ─► slot's input ── run(slot) ───►  session.run: batches_per_step batches at once
    outputs ◄───────── slot's outputs ◄─ done(slot) ──  anchors copied

Two slots lie in a file that both processes map: one is filled and emptied here while the IPU is at
the other. program.py describes the messages. fp16 means that everything behind the card's
normalisation boundary, its input and outputs included, is computed in it.

Environment: `IMAGEMILL_POPART_PYTHON`, the interpreter of the SDK (else `python3`, as found on the
PATH), and `IMAGEMILL_POPART_MEMORY_PROPORTION`, how much of a tile's memory each convolution may
use while it computes (else PopART's own choice).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import DeviceError, DeviceLostError, ImagemillError, ModelError, UsageError
from imagemill.pipeline.backends.base import Found, make_outputs, names_of_outputs
from imagemill.pipeline.backends.popart import ipu_graph
from imagemill.pipeline.backends.popart.program import map_slots
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, DeviceSpec, Outputs, Precision, SessionSpec
from imagemill.system import files, processes

_log = logging.getLogger(__name__)

PYTHON_VARIABLE: Final = "IMAGEMILL_POPART_PYTHON"
MEMORY_VARIABLE: Final = "IMAGEMILL_POPART_MEMORY_PROPORTION"
BATCHES_PER_STEP: Final = 8
"""Used if the specification does not set it."""
SLOTS: Final = 2
PATIENCE_S = 10.0
"""How long an IPU is waited for that is not free yet."""
_PROGRAM: Final = Path(__file__).with_name("program.py")
_LOOK_S: Final = 120.0
_CLOSE_S: Final = 10.0
_REMEDY: Final = (
    "Install Graphcore's Poplar SDK, source the enable.sh of its poplar and of its popart folder"
    " in this shell, and name the Python that its popart wheel is installed for: export"
    f" {PYTHON_VARIABLE}=/path/to/python3."
)


class _Step(Struct):
    """The batches of one run of the IPU. Every batch has its place, whether an image of it is
    filled or not.
    """

    slot: int
    batches: list[Batch] = []

    @property
    def is_run(self) -> bool:
        """Whether there is anything to compute."""
        return any(batch.filled for batch in self.batches)


class PopartSession:
    """See the module's docstring."""

    def __init__(self, spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> None:
        self._name = device.name
        self._model = spec.model_file
        self._clock = clock
        height, width = spec.card.recipe.height, spec.card.recipe.width
        self._shape = (spec.batch_size, height, width, 3)
        self._steps = spec.batches_per_step or BATCHES_PER_STEP
        self._names = names_of_outputs(spec)
        half = spec.precision is Precision.FP16
        proportion = _memory_proportion()
        cut = ipu_graph.cut(Path(spec.model_file), spec.card, spec.batch_size, self._names)
        self._channels_last, self._order = cut.channels_last, cut.order
        self._table = cut.table.astype(np.float16 if half else np.float32)
        image = (height, width, 3) if cut.channels_last else (3, height, width)
        cache = Path(spec.cache_dir or "", "popart")
        self._process: subprocess.Popen[bytes] | None = None
        with files.in_memory("imagemill-ipu") as file:
            file.write(cut.model)
            file.flush()
            parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
            self._process = _start(str(file.fileno()), str(parent), descriptors=(file.fileno(),))
            try:
                self.versions: dict[str, str] = self._answer("here")
                can_keep = spec.cache_dir and files.can_be_written(cache)
                order = {
                    "model_bytes": len(cut.model),
                    "opset": cut.opset,
                    "convolutions": cut.convolutions,
                    "memory_proportion": proportion,
                    "half": half,
                    "cache": str(cache) if can_keep else None,
                    "slot_shape": (self._steps, spec.batch_size, *image),
                    "slots": SLOTS,
                    "synthetic": spec.synthetic,
                    "patience_s": PATIENCE_S,
                }
                self._notify(order)
                self._slots = map_slots(file.fileno(), order, self._answer("ready"))
            except BaseException:
                if self._process is not None:
                    self._process.kill()  # it may be compiling, which takes minutes
                self.close()
                raise
        _log.info(
            "compiled %s for %s: %d batches of %d a step",
            spec.model_file,
            device.name,
            self._steps,
            spec.batch_size,
        )

    @staticmethod
    def found(kind: str) -> Found:  # noqa: ARG004 - the question that all sessions are asked
        """See `Found`. How many IPUs are free is known only to those who attach to them."""
        try:
            process = _start()
        except DeviceError as error:
            return Found((), str(error))
        try:
            said, _ = process.communicate(timeout=_LOOK_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Found((), f"{_python()} did not import popart within {_LOOK_S:.0f} s. {_REMEDY}")
        message = _parsed(said)
        if "here" not in message:
            ended = f"{_python()} ended with exit code {process.returncode}"
            return Found((), f"{message.get('text') or ended}. {_REMEDY}")
        here = f"PopART {message['here']['popart']} of {_python()}"
        return Found((f"{here}; each process attaches to an IPU that is free",))

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        """See `Session.stream`. A step is run when it has all its batches, or none comes any
        more.
        """
        free, busy = deque(range(SLOTS)), deque[_Step]()
        step: _Step | None = None
        try:
            for batch in batches:
                if step is None:
                    if not free:
                        free.append(busy[0].slot)
                        yield from self._finish(busy)
                    step = _Step(free.popleft())
                if batch.filled:
                    self._normalise(batch.pixels, self._slots[step.slot][0][len(step.batches)])
                step.batches.append(batch)
                if len(step.batches) == self._steps:
                    self._run(step)
                    busy.append(step)
                    step = None
            if step is not None:
                self._run(step)
                busy.append(step)
            while busy:
                yield from self._finish(busy)
        finally:
            # The stream was broken off: what the program still says belongs to no other.
            with contextlib.suppress(ImagemillError):
                for late in busy:
                    if late.is_run:
                        self._answer("done")

    def _normalise(self, pixels: NDArray[np.uint8], goal: NDArray[Any]) -> None:
        for channel, colour in enumerate(self._order):
            place = goal[..., channel] if self._channels_last else goal[:, channel]
            # `raise` would buffer it.
            np.take(self._table[channel], pixels[..., colour], out=place, mode="clip")

    def _run(self, step: _Step) -> None:
        if step.is_run:
            self._notify({"run": step.slot})

    def _finish(self, busy: deque[_Step]) -> Iterator[tuple[Batch, Outputs]]:
        """The batches of the oldest step with their outputs."""
        step = busy.popleft()
        if step.is_run:
            begun = time.perf_counter()
            self._answer("done")
            self._clock.add("compute", time.perf_counter() - begun)
        count = self._shape[0]
        found = []
        for place, batch in enumerate(step.batches):
            rows = slice(place * count, place * count + batch.filled)
            values = (array[rows].copy() for array in self._slots[step.slot][1])
            found.append((batch, make_outputs(self._names, values)))
        yield from found  # only now, when the slot may be filled again

    # The program.

    def _notify(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead: waiting for its answer tells more
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self, wanted: str) -> Any:
        """Wait for the program's next message. Raises: ImagemillError, if it is another than the
        wanted one.
        """
        if self._process is None:
            raise DeviceError(f"{self._name}: the session is closed")
        assert self._process.stdout is not None
        message = _parsed(self._process.stdout.readline())
        if wanted in message:
            return message[wanted]
        code = self._end()
        kind, text = message.get("error"), str(message.get("text", ""))
        if kind == "device":
            taken = "gc-monitor shows which are taken, and by whom."
            fewer = f"Ask for fewer with --devices ipu:N; {taken}"
            remedy = _REMEDY if "popart" in text else fewer
            raise DeviceError(f"{self._name}: {text}. {remedy}")
        if kind == "model":
            raise ModelError(f"{self._model} cannot be compiled for {self._name}: {text}")
        if kind == "memory":
            given = os.environ.get(MEMORY_VARIABLE)
            raise ModelError(
                f"{self._model} in batches of {self._shape[0]} does not fit into the memory of"
                f" {self._name}: {text}. Use a smaller --batch-size, or"
                f" {'lower' if given else 'set'}"
                f" {MEMORY_VARIABLE}{f', now {given}' if given else ' to 0.3'}."
            )
        how = f"failed ({text})" if text else processes.describe_exit(code)
        raise DeviceLostError(f"{self._name}: its program {how}. Its last output is in the log.")

    def _end(self) -> int:
        """Close the program's input, which ends it, and wait for that. Returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code

    def close(self) -> None:
        """See `Session.close`. The program detaches from its IPU and ends."""
        self._end()


def _python() -> str:
    """The interpreter of the SDK."""
    return os.environ.get(PYTHON_VARIABLE) or shutil.which("python3") or "python3"


def _start(*arguments: str, descriptors: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """Start the program. Raises: DeviceError."""
    # The package's folder may hold libraries too, which belong to another Python.
    environment = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONWARNINGS"):
        environment.pop(name, None)
    paths = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if paths := [path for path in paths if path not in ("", processes.PACKAGE_PARENT)]:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [_python(), "-u", str(_PROGRAM), *arguments]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=environment,
        )
    except OSError as error:
        raise DeviceError(f"{_python()} cannot be started: {error.strerror}. {_REMEDY}") from error


def _parsed(line: bytes) -> dict[str, Any]:
    """One message of the program's; empty where it died, or is no program of ours."""
    try:
        message = json.loads(line or b"{}")
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _memory_proportion() -> float | None:
    """What `IMAGEMILL_POPART_MEMORY_PROPORTION` says. Raises: UsageError."""
    text = os.environ.get(MEMORY_VARIABLE)
    if not text:
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(f"{MEMORY_VARIABLE}={text}: must be a number above 0, and 1 at most.")
    return share
