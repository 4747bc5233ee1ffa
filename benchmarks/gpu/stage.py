"""What a stage of device.py works with: where it computes, how long it may take, and where its
figures go.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from imagemill.models import bundle as bundles
from imagemill.pipeline.backends import BACKENDS, devices, open_session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, Precision, SessionSpec

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 0.6
"""How long a rate is measured, once."""


@dataclass(frozen=True)
class Card:
    """The device that is measured: the first NVIDIA GPU, or for the rehearsal the CPU with the
    stand-in for `torch.cuda` of the tests.
    """

    kind: str

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def place(self) -> str:
        """As PyTorch spells it."""
        return "cuda:0" if self.is_gpu else "cpu"

    @property
    def of_sessions(self) -> str:
        """The value of `--devices` for sessions."""
        return "cuda:0" if self.is_gpu else "cpu@torch"

    @property
    def of_jobs(self) -> tuple[str, ...]:
        """Device and precision of whole jobs. Those of the rehearsal use ONNX Runtime, which is
        imported in a tenth of PyTorch's time.
        """
        if self.is_gpu:
            return ("--devices", "cuda:0", "--precision", self.half)
        return ("--devices", "cpu@onnxruntime", "--precision", "fp32")

    @cached_property
    def cuda(self) -> Any:
        """`torch.cuda`, or the stand-in."""
        if self.is_gpu:
            import torch

            return torch.cuda
        import cuda_standin

        return cuda_standin.Cuda()

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return BACKENDS["torch"].kinds[self.kind]

    @property
    def half(self) -> Precision:
        """fp16 if the device computes in it, else bf16."""
        return Precision.FP16 if Precision.FP16 in self.precisions else Precision.BF16


@dataclass
class Stage:
    """One stage. Its figures are written to a file as they come, so that they are kept if it is
    stopped.
    """

    name: str
    card: Card
    is_tiny: bool
    """Whether this is a rehearsal: tiny networks, few images, and rates that mean nothing."""
    images: Path
    """The photographs that were given."""
    work: Path
    out: Path
    ends: float
    """When it is stopped, on the monotonic clock."""
    before: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Figures of the stages before this one, by stage."""
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def put(self, **figures: Any) -> None:
        """Keep figures. Those that are dicts are merged."""
        for name, value in figures.items():
            if isinstance(value, dict):
                self.figures.setdefault(name, {}).update(value)
            else:
                self.figures[name] = value
        print(self.name, json.dumps(figures, default=str), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Keep a line about what was not done, and why."""
        self.notes.append(text)
        print(self.name, text, flush=True)
        self._write()

    def attempt(self, what: str, call: Callable[[], None]) -> None:
        """Do a part of the stage. If it fails, its traceback is kept, and the stage goes on."""
        try:
            call()
        except Exception:
            self.errors.append(f"{what}: {traceback.format_exc()}")
            print(self.name, self.errors[-1], flush=True)
            self._write()

    @property
    def file(self) -> Path:
        return self.work / f"{self.name}.json"

    def _write(self) -> None:
        kept = {"figures": self.figures, "notes": self.notes, "errors": self.errors}
        write_json(self.file, kept)

    def figure(self, stage: str, name: str) -> Any:
        """Return a figure of an earlier stage, or None."""
        return self.before.get(stage, {}).get(name)

    def left(self) -> float:
        """Return the seconds until the stage is stopped."""
        return self.ends - time.monotonic()

    # The networks.

    @property
    def models(self) -> Path:
        return self.work / "models"

    @property
    def large(self) -> str:
        """The network whose speed is measured."""
        return "tiny" if self.is_tiny else "resnext101_32x4d"

    @property
    def trained(self) -> str:
        """A network with trained weights."""
        return "tiny" if self.is_tiny else "efficientnet_lite0"

    @property
    def batch(self) -> int:
        """Images in a batch where its size is not what is measured."""
        return 4 if self.is_tiny else 256

    def spec(self, model: str, precision: Precision, batch: int | None = None) -> SessionSpec:
        found = bundles.load(self.models / model)
        return SessionSpec(model_file(found), found.card, precision, batch or self.batch)

    def session(self, spec: SessionSpec) -> Any:
        (device,) = devices.resolve(self.card.of_sessions)
        return open_session(spec, device, Stopwatch())

    def runner(
        self, spec: SessionSpec, *, graph: bool = True, fused: bool = False, tf32: bool = False
    ) -> Any:
        """Return what computes a session's batches on a GPU, for settings that a session does not
        offer.
        """
        import runners
        import torch

        from imagemill.pipeline.backends.torch import cuda
        from imagemill.pipeline.backends.torch.program import Loaded, read

        if self.card.is_gpu:
            cuda.prepare()
            if tf32:
                allow_tf32()
        shape = shape_of(spec)
        program = read(Path(spec.model_file), spec.card.input, shape, ("logits",))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        loaded = Loaded(program, self.card.place, dtype[spec.precision])
        if fused:
            runners.use_cudnn(loaded)
        kind = cuda.CudaRunner if graph else runners.WithoutGraph
        return kind(loaded, shape, self.card.cuda, self.card.place)

    # Measuring.

    def seconds(self, call: Callable[[], Any], total: float = _SECONDS) -> float:
        """Return the seconds that a call takes, from the first to the last of as many as take
        `total` seconds.
        """
        call()
        self.synchronize()
        if self.is_tiny:
            return self._time(call, 1)
        return self._time(call, max(5, int(total / self._time(call, 3))))

    def _time(self, call: Callable[[], Any], count: int) -> float:
        self.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - begun) / count

    def synchronize(self) -> None:
        self.card.cuda.synchronize()

    def stream_rate(self, stream: Streaming, spec: SessionSpec, total: float = _SECONDS) -> float:
        """Return the images per second of a stream of batches, copies included."""
        batches = cycle(noise(spec))

        def compute(count: int) -> float:
            begun = time.perf_counter()
            deque(stream(islice(batches, count)), maxlen=0)
            return time.perf_counter() - begun

        warm = 2 if self.is_tiny else 8
        each = compute(warm) / warm
        count = warm if self.is_tiny else max(20, int(total / each))
        return round(count * spec.batch_size / compute(count), 1)

    def alternate(
        self, calls: Mapping[str, Callable[[], float]], rounds: int = 3
    ) -> dict[str, float]:
        """Return the medians of rates that are measured in turn."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(1 if self.is_tiny else rounds):
            for name, call in calls.items():
                found[name].append(call())
        print(self.name, json.dumps(found), flush=True)
        return {name: round(median(rates), 1) for name, rates in found.items()}

    # Commands.

    def imagemill(self, *arguments: object, code: int = 0, env: Any = None) -> Finished:
        """Run `imagemill ARGUMENTS`. Raises: RuntimeError if the exit code is another one."""
        return self.command("-m", "imagemill", *arguments, code=code, env=env)

    def command(self, *arguments: object, code: int | None = 0, env: Any = None) -> Finished:
        """Run Python. Raises: RuntimeError if the exit code is another one."""
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            env=self.environment() | (env or {}),
            check=False,
        )
        text = f"$ {' '.join(map(str, arguments))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        print(self.name, text, flush=True)
        if code is not None and done.returncode != code:
            raise RuntimeError(f"exit code {done.returncode}, expected {code}: {text}")
        return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - begun)

    def environment(self) -> dict[str, str]:
        """Return the environment of commands: the models folder is the stage's."""
        paths = [str(Path(bundles.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        joined = os.pathsep.join(filter(None, paths))
        return {**os.environ, "IMAGEMILL_MODELS": str(self.models), "PYTHONPATH": joined}


Streaming = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Any]]]
"""As a session's `stream`."""


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> Any:
        """The JSON object that it printed in its last line."""
        return json.loads(self.out.splitlines()[-1])


def model_file(model: Bundle) -> str:
    """Return the path of a bundle's ONNX file."""
    return str(model.dir / bundles.MODEL)


def shape_of(spec: SessionSpec) -> tuple[int, int, int, int]:
    """Return the shape of a batch."""
    return (spec.batch_size, spec.card.recipe.height, spec.card.recipe.width, 3)


def noise(spec: SessionSpec, count: int = 4) -> list[Batch]:
    """Return at most four batches of random pixels, always the same ones. Zeros would be faster
    than images.
    """
    shape = shape_of(spec)
    return [Batch(pixels, shape[0], ()) for pixels in _noise(shape)[:count]]


@lru_cache(maxsize=1)  # a batch of 256 takes 0.2 s
def _noise(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for _ in range(4)]


def in_batches(pixels: np.ndarray, size: int) -> Iterator[Batch]:
    """Yield pixels, uint8 (n, height, width, 3), in batches; the last one is filled with zeros."""
    for start in range(0, len(pixels), size):
        some = pixels[start : start + size]
        whole = np.zeros((size, *pixels.shape[1:]), np.uint8)
        whole[: len(some)] = some
        yield Batch(whole, len(some), ())


def stream_of(runner: Any) -> Streaming:
    """Return a session's `stream` for a runner: as many batches in flight as it takes."""
    from imagemill.records import Outputs

    def finish(batch: Batch, ticket: Any) -> tuple[Batch, Outputs]:
        (logits,) = runner.finish(ticket)
        return batch, Outputs(logits[: batch.filled])

    def stream(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        busy: deque[Any] = deque()
        for batch in batches:
            if len(busy) == runner.in_flight:
                yield finish(*busy.popleft())
            busy.append((batch, runner.start(batch.pixels)))
        while busy:
            yield finish(*busy.popleft())

    return stream


def allow_tf32() -> None:
    """Let PyTorch compute fp32 in TF32, which is its own default for convolutions."""
    import torch

    for place in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        place.fp32_precision = "tf32"


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file so that a reader finds the old or the new one, whole."""
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1, default=str))
    partial.replace(file)
