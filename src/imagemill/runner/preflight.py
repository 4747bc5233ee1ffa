"""What a new job is going to be: a sample of its images, looked at by a child process while the
workers start.

The child reads and decodes images spread evenly over the plan, and tells of each; it may be killed
by any of them, or hang, and is ended when its time is up: what it told until then counts. It
hurries while the workers start, and gives way once they have images. What it takes then makes the
job look slower than it is, so the display is told of it and takes no rate from that time. How fast
the job computes is not probed, which would cost a second compilation: the job itself shows that
within seconds, and only then is its time foretold. So two lines come at once, two a little later,
and neither the workers nor the answers wait for them.

What it may cost is 2 % of the CPU time that the job takes at the very least: for its images to be
decoded, and for a model of its size to be computed by fast int8 units; nor may it last longer than
a twentieth of that job on all of its cores. Where the child's start alone costs more, the job is
small, and there is none.

parent                        child
Sample ──────────────────────►
      ◄─────────────────────── Looked     of each image
      ◄─────────────────────── Done
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from imagemill.display.pace import Pace
from imagemill.display.text import duration, statuses
from imagemill.job import plan
from imagemill.job.paths import JobPaths
from imagemill.pipeline import sources
from imagemill.pipeline.backends.devices import cores_here
from imagemill.pipeline.stopwatch import SHORT_S
from imagemill.records import (
    BadImage,
    Clock,
    DeviceSpec,
    Job,
    Preflight,
    Progress,
    Receipt,
    Saved,
    Shard,
    Status,
)
from imagemill.system import processes, storage

_log = logging.getLogger(__name__)

SHARE: Final = 0.02
"""Of the job's CPU time, at most."""
_LASTING: Final = 0.05
"""Of the job's own time, at most, so that a machine of many cores has told its rate before a tenth
of the job is over.
"""
_START_S: Final = 0.5
"""CPU time of starting the child: 0.33 to 0.4 s (Xeon, 2 cores, 2026-11)."""
_DECODING_S: Final = 0.002
"""CPU time of decoding an image at the least: JPEG files of 500 × 375, 2.1 ms (EPYC, 2 cores,
2026-11).
"""
_COMPUTING_S: Final = 0.6e-9
"""CPU time of computing an image at the least, for each parameter: resnext101_32x4d in int8 on one
core, 27 ms for 44 M parameters.
"""
_MOST: Final = 300
"""Images to look at."""
_MOST_REMOTE: Final = 24
"""Of these, that are asked of a server: each is a request that the job will make again."""
_FEWEST: Final = 10
"""Fewer say nothing about the rest."""
_PASSES: Final = 8
"""The sample is gone through that often, each time spread over the whole plan, so that one which is
ended early is spread as well.
"""
_DEADLINE_S: Final = 20.0
_NICE: Final = 10
"""Priority of the child once workers are ready."""
_LATELY: Final = 8
"""Images, by which it is judged whether the child mostly decodes."""
_SETTLED_S: Final = 3.0
"""After the first answers, before the rate is believed."""
_LEAST_SCALE, _MOST_SCALE = 0.25, 4.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What to look at."""

    job: Job
    images: int
    wanted: int
    cores: tuple[int, ...]
    budget_s: float
    """CPU time, the start included."""


@dataclass(frozen=True, slots=True)
class Looked:
    """One image."""

    status: Status
    read_s: float
    decode_s: float
    """CPU time."""


@dataclass(frozen=True, slots=True)
class Done:
    """The end."""

    cpu_s: float


def budget_s(images: int, parameters: int, devices: Sequence[DeviceSpec]) -> float:
    """CPU time that a preflight may cost, seconds; 0: there is to be none.

    Args:
        images: of the job.
        parameters: of its model.
        devices: of the job; those that are no processor cores compute without them.
    """
    on_cores = all(device.kind in ("cpu", "null") for device in devices)
    least_s = images * (_DECODING_S + (_COMPUTING_S * parameters if on_cores else 0.0))
    allowed = least_s * min(
        SHARE, _LASTING / max(1, len({core for device in devices for core in device.cores}))
    )
    return allowed if allowed > _START_S else 0.0


class Lookout:
    """Watches one invocation: starts the child, hears it, and says what the job is going to be. It
    raises nothing.

    Args:
        job: the frozen job, new.
        shards: all of the plan.
        devices: of the job.
        say: takes a line for the user.
    """

    def __init__(
        self,
        job: Job,
        shards: Sequence[Shard],
        devices: Sequence[DeviceSpec],
        say: Callable[[str], None],
    ) -> None:
        self._job, self._shards, self._say = job, shards, say
        self._images = sum(shard.count for shard in shards)
        self._threads = sum(job.num_workers or len(device.cores) for device in devices)
        self._pace = Pace(self._images, 0)
        self._first_answers: float | None = None
        self._looked: list[Looked] = []
        self._bytes = self._rows = 0
        self._foretold = False
        self._cpu_s = 0.0
        self._gives_way = False
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = time.monotonic() + _DEADLINE_S
        self.found: Preflight | None = None
        """What was said; None as long as nothing was."""
        budget = budget_s(self._images, job.card.parameters, devices)
        if budget:
            try:
                self._start(
                    Sample(job, self._images, min(_MOST, self._images), cores_here(devices), budget)
                )
            except OSError as error:
                _log.warning("no preflight: %s", error)

    def __enter__(self) -> Lookout:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, progress: Progress) -> None:
        """Hear what there is; say what can be said now."""
        if self._process is not None:
            self._give_way(progress)
            self._listen()
        if self.found is None or self._foretold:
            return
        estimate = self._pace.add(progress)
        if self._first_answers is None and estimate.state == "running":
            self._first_answers = progress.since_first_lease_s
        settled = (
            self._first_answers is not None
            and progress.since_first_lease_s >= self._first_answers + _SETTLED_S
        )
        if (
            settled
            and progress.since_first_lease_s >= SHORT_S
            and estimate.rate
            and estimate.left_s is not None
            and self._process is None
        ):
            self._foretell(estimate.rate, estimate.bottleneck, progress)

    @property
    def sampling(self) -> bool:
        """Whether the child takes of the cores' time: it runs, and does not mostly wait for what it
        reads.
        """
        lately = self._looked[-_LATELY:]
        return self._process is not None and sum(item.decode_s for item in lately) >= sum(
            item.read_s for item in lately
        )

    def receipt(self, receipt: Receipt) -> None:
        """A part was committed: what a row takes is known better now."""
        self._bytes, self._rows = self._bytes + receipt.bytes, self._rows + receipt.rows

    # The child.

    def _start(self, sample: Sample) -> None:
        ours, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                processes.command("imagemill.runner.preflight", theirs.fileno(), os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,
                env=processes.environment(),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection = ours
        with contextlib.suppress(OSError):  # dead already: the next look finds it so
            ours.send(sample)

    def _give_way(self, progress: Progress) -> None:
        """From the first worker that is ready on, the child gets what they leave."""
        if progress.ready and not self._gives_way and self._process is not None:
            self._gives_way = True
            with contextlib.suppress(OSError):  # dead already
                os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)

    def _listen(self) -> None:
        try:
            while self._connection.poll():
                match self._connection.recv():
                    case Looked() as looked:
                        self._looked.append(looked)
                    case Done(cpu_s):
                        self._cpu_s = cpu_s
                        self._sampled()
                        return
        except (EOFError, OSError):
            _log.warning("the preflight died of an image, after %d", len(self._looked))
            self._looked.append(Looked(Status.CRASHED_DECODER, 0.0, 0.0))
            self._sampled()
            return
        if time.monotonic() > self._deadline:
            _log.warning(
                "the preflight is ended after %d images: its time is up", len(self._looked)
            )
            self._sampled()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    # What is said.

    def _sampled(self) -> None:
        """The sample is complete, or as complete as it gets."""
        self._end()
        looked = self._looked
        if len(looked) < _FEWEST:
            return
        from imagemill.tuning import gate  # brings NumPy, which a repeated command can do without

        bad = Counter(item.status.value for item in looked if item.status is not Status.OK)
        decode_s = sum(item.decode_s for item in looked) / len(looked)
        low, high = gate.wilson(bad.total(), len(looked))
        self.found = Preflight(
            looked_at=len(looked),
            unreadable=dict(sorted(bad.items())),
            unreadable_low=round(low, 4),
            unreadable_high=round(high, 4),
            decode_only=round(self._threads / decode_s, 3) if decode_s else None,
            cpu_s=round(self._cpu_s, 3),
        )
        readable = (
            f"{100 * bad.total() / len(looked):.1f} % unreadable ({statuses(bad)})"
            if bad
            else "none unreadable"
        )
        within = f"{100 * low:.1f} to {100 * high:.1f} %" if bad else f"at most {100 * high:.1f} %"
        self._say(f"preflight: {len(looked)} of {self._images:,} images tried: {readable}")
        self._say(f"preflight: so {within} of all are likely to be unreadable")

    def _foretell(self, rate: float, bottleneck: str | None, progress: Progress) -> None:
        """The first seconds have shown how fast the job goes; where images bound it, those ahead
        may be larger or smaller.
        """
        assert self.found is not None
        self._foretold = True
        if bottleneck in ("read", "decode"):
            rate *= self._scale(progress.clock, bottleneck)
        done = sum(progress.devices.values())
        seconds = progress.since_first_lease_s + (self._images - done) / rate
        size = self._result_bytes()
        self.found = replace(
            self.found,
            images_per_second=round(rate, 3),
            seconds=round(seconds, 1),
            bottleneck=bottleneck,
            result_bytes=size,
        )
        bound = f", bounded by {bottleneck}" if bottleneck else ""
        self._say(f"preflight: about {duration(seconds)} in all, {rate:,.1f} images/s{bound}")
        alone = (
            [f"decoding alone {self.found.decode_only:,.0f} images/s"]
            if self.found.decode_only
            else []
        )
        room = [f"results of about {_size(size)}"] if size else []
        if alone or room:
            self._say(f"preflight: {', '.join([*alone, *room])}")

    def _scale(self, clock: Clock, bottleneck: str) -> float:
        """How much faster the images of the whole plan are to read or decode than those so far."""
        lately = getattr(clock, bottleneck) / max(clock.images, 1)
        everywhere = sum(getattr(item, f"{bottleneck}_s") for item in self._looked) / len(
            self._looked
        )
        return (
            min(_MOST_SCALE, max(_LEAST_SCALE, lately / everywhere))
            if lately and everywhere
            else 1.0
        )

    def _result_bytes(self) -> int | None:
        """Size of all parts: as the first of them are, else as they mostly are; None: how many
        features the model has is not known.
        """
        if self._rows:
            return round(self._bytes / self._rows * self._images)
        if Saved.EMBEDDING in self._job.save:
            return None
        ok = sum(item.status is Status.OK for item in self._looked) / len(self._looked)
        classes = len(self._job.card.labels)
        row = 25 + ok * (
            9 * min(self._job.top_k, classes)
            + (3.7 * classes if Saved.LOGITS in self._job.save else 0)
        )
        return round(self._images * row + 5_000 * len(self._shards))


def _size(size: int) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:,.3g} {unit}"
        size //= 1024
    return f"{size:,} TiB"


# ── the child ─────────────────────────────────────────────────────────────────────────────────────


def spread(images: int, wanted: int) -> list[int]:
    """Indices of `wanted` of so many images, spread evenly, in `_PASSES` ascending passes that are
    each spread evenly.
    """
    every = [(2 * number + 1) * images // (2 * wanted) for number in range(wanted)]
    return [index for start in range(_PASSES) for index in every[start::_PASSES]]


def look(sample: Sample) -> Iterator[Looked]:
    """Read and decode the sample, until the budget is spent."""
    from imagemill.pipeline.decoding.decode import decode  # heavy, and not for the launcher

    job = sample.job
    folder = JobPaths.of(job.output).plan
    shards = plan.shards(folder)
    firsts = [shard.first for shard in shards]
    opened = sources.open_all(job.sources, aside=folder, access=job.access)
    remote = 0
    shard: Shard | None = None
    rows: list[plan.PlannedRow] = []
    for index in spread(sample.images, sample.wanted):
        if time.process_time() > sample.budget_s:
            return
        holding = shards[bisect_right(firsts, index) - 1]
        if holding is not shard:
            shard, rows = holding, plan.read(folder, holding)
        row = rows[index - holding.first]
        if storage.is_url(row.path) or storage.is_url(job.sources[row.source].removeprefix("@")):
            remote += 1
            if remote > _MOST_REMOTE:
                return
        begun = fetched = time.perf_counter()
        decoding = time.thread_time()
        try:
            data = opened[row.source].fetch(row.path, row.locator, job.limits.max_bytes)
            fetched, decoding = time.perf_counter(), time.thread_time()
            status = decode(data, job.card.recipe, job.limits).status
        except BadImage as bad:
            status = bad.status
        yield Looked(status, fetched - begun, time.thread_time() - decoding)


def main() -> int:
    """Be the child. What goes wrong with it is nobody's loss: it ends, and the parent goes by what
    it told.
    """
    socket, parent = (int(argument) for argument in sys.argv[1:3])
    processes.end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with contextlib.suppress(OSError):  # where memory is short, this process is the first to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    warnings.simplefilter("ignore")
    connection = Connection(socket)
    sample = connection.recv()
    assert isinstance(sample, Sample)
    processes.keep_to(sample.cores)
    for looked in look(sample):
        connection.send(looked)
    connection.send(Done(time.process_time()))
    return 0
