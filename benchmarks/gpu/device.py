"""Proves imagemill on one NVIDIA GPU: right answers, targets of speed, faults. Takes some minutes.

    python benchmarks/gpu/device.py --images DIR --work DIR --out DIR --deadline 440
    python benchmarks/gpu/device.py --device cpu --tiny --work DIR --out DIR --deadline 60

The second form is the rehearsal: every stage, on the CPU, with a tiny network. Its figures mean
nothing.

Stages run in order of worth, each in a process of its own, until the deadline. A stage that fails
or takes too long costs no other one. --out gets results.json, rewritten after each stage, log.txt,
layers.csv, kernels.csv, agreement.parquet and trace.json.gz. The table of targets is printed at the
end. The exit code is 1 if a stage failed. `report.py` makes a page of results.json.

Needs imagemill with PyTorch; timm, ONNX Runtime, torchvision and pytest for the stages that compare
with them. `pack.py` collects what a machine without a network lacks. The card's settings are only
read.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from stage import Card, Stage, write_json  # noqa: E402
from targets import format_table, table  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """One stage of the script."""

    name: str
    function: str
    """Module and function."""
    cap: int
    """Seconds."""


STAGES = (
    Plan("S0", "limits.facts", 15),
    Plan("S1", "limits.limits", 20),
    Plan("S2", "jobs.prepare", 40),
    Plan("S3", "answers.conformance", 60),
    Plan("S5", "compute.sessions", 60),
    Plan("S6", "compute.peers", 100),
    Plan("S7", "compute.exactness", 40),
    Plan("S8", "answers.accuracy", 60),
    Plan("S10", "jobs.pipeline", 100),
    Plan("S11", "jobs.faults", 140),
    Plan("S4", "convolutions.convolutions", 45),
    Plan("S9", "answers.jpeg", 25),
    Plan("S12", "compute.autotuned", 300),
)
"""In order of worth. Those that --only names are run, and S0 to S2, on which the others depend."""
ALWAYS = ("S0", "S1", "S2")
_LIBRARIES = ("torch", "limits", "compute", "convolutions", "answers", "jobs")
"""Imported once, before the stages' processes are forked; none of them touches the GPU yet."""
_LEAST = 5.0
"""Seconds that a stage needs to begin."""


def main() -> int:
    """Run the stages and print the table."""
    asked = _arguments()
    if asked.device == "cpu":  # threads that wait for each other are slow beside other work
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.work = asked.work.resolve()  # the lists of paths that it writes are absolute
    asked.work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    results: dict[str, Any] = {
        "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": asked.device,
        "is_tiny": asked.tiny,
        "stages": {},
    }
    # The name is new each time, so that no job of an earlier call is resumed.
    with (
        tempfile.TemporaryDirectory(prefix="imagemill-gpu-", dir=asked.work) as work,
        (asked.out / "log.txt").open("w") as log,
        _watched_card(Path(work), asked.device) as card_log,
    ):
        for name in _LIBRARIES:
            importlib.import_module(name)
        for plan in STAGES:
            if asked.only and plan.name not in (*asked.only, *ALWAYS):
                continue
            before = {name: found["figures"] for name, found in results["stages"].items()}
            left = asked.deadline - (time.monotonic() - begun)
            cap = left if asked.tiny else min(plan.cap, left)
            stage = Stage(
                plan.name,
                Card(asked.device),
                asked.tiny,
                asked.images,
                Path(work),
                asked.out,
                time.monotonic() + cap,
                before,
            )
            found = _run(plan, stage, log, card_log)
            results["stages"][plan.name] = found
            figures = {name: one["figures"] for name, one in results["stages"].items()}
            results["targets"] = table(figures)
            results["seconds"] = round(time.monotonic() - begun, 1)
            write_json(asked.out / "results.json", results)
            print(f"{plan.name:4} {plan.function:28} {found['seconds']:6.1f} s  {found['status']}")
            for text in found["notes"]:
                print(f"     {text}")
            for text in found["errors"]:
                print("     " + text.rstrip().replace("\n", "\n     "), flush=True)
            if plan.name == "S0" and found["errors"]:
                break  # without the device, no stage can do anything
    print(format_table(results.get("targets", [])))
    if asked.tiny:
        print("This was a rehearsal on a tiny network: the figures above mean nothing.")
    return int(any(found["errors"] for found in results["stages"].values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of JPEG photographs")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", required=True, help="fast disk, or /dev/shm; 4 GB"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True)
    parser.add_argument("--deadline", type=float, metavar="S", default=440)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="S6,S8")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny network; no caps per stage")
    asked = parser.parse_args()
    names = [plan.name for plan in STAGES]
    if unknown := set(asked.only or ()) - set(names):
        parser.error(f"--only {','.join(sorted(unknown))}: the stages are {', '.join(names)}")
    if asked.device == "cpu" and not asked.tiny:
        parser.error("--device cpu needs --tiny: the CPU's figures are of no use here")
    if not asked.tiny and not asked.images:
        parser.error("--images is needed, except with --tiny")
    return asked


def _run(plan: Plan, stage: Stage, log: Any, card_log: Path) -> dict[str, Any]:
    """Run a stage in a process of its own and return what is kept of it."""
    begun, seen, used = time.monotonic(), _size(card_log), _cpu_s()
    if stage.left() < _LEAST:
        return _kept("not run: the deadline came first", 0.0)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(plan, stage, log))
    process.start()
    process.join(max(0.0, stage.left()))
    is_late = process.is_alive()
    with contextlib.suppress(ProcessLookupError):  # with all processes that it started
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()  # if it was not yet the head of a group
    process.join()
    seconds = time.monotonic() - begun
    kept = json.loads(stage.file.read_text()) if stage.file.exists() else {}
    if is_late:
        kept["status"] = "stopped at its limit; where it was is in log.txt"
    elif process.exitcode and not kept.get("errors"):
        kept["errors"] = [f"its process ended with exit code {process.exitcode}; see log.txt"]
    card = _card_state(card_log, seen)
    return _kept(seconds=seconds, cpu_s=_cpu_s() - used, card=card, **kept)


def _cpu_s() -> float:
    """Return the CPU time of all stages so far, with their processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kept(
    status: str = "",
    seconds: float = 0.0,
    cpu_s: float = 0.0,
    card: dict[str, float] | None = None,
    figures: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    errors: list[str] | None = None,
) -> dict[str, Any]:
    return {
        "status": status or ("FAILED" if errors else "ok"),
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "figures": figures or {},
        "notes": notes or [],
        "errors": errors or [],
        "card": card or {},
    }


def _child(plan: Plan, stage: Stage, log: Any) -> None:
    """Run a stage in this process, whose output is the log."""
    os.setsid()  # the stage's whole group can be killed
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, stage.left() - 1), exit=False)
    module, function = plan.function.split(".")
    stage.put()
    try:
        getattr(sys.modules[module], function)(stage)
    except BaseException:
        traceback.print_exc()
        stage.errors.append(traceback.format_exc())
        stage.put()
    sys.stdout.flush()
    os._exit(bool(stage.errors))  # libraries' threads must not keep it


# What nvidia-smi reads of the card meanwhile.

_ASKED = ("utilization.gpu", "clocks.sm", "power.draw", "memory.used")


@contextlib.contextmanager
def _watched_card(work: Path, device: str) -> Iterator[Path]:
    """Have nvidia-smi write a line every quarter of a second."""
    file = work / "card.csv"
    file.touch()
    if device == "cpu" or not shutil.which("nvidia-smi"):
        yield file
        return
    query = f"--query-gpu={','.join(_ASKED)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "250", "-i", "0"]
    with file.open("w") as goal:
        process = subprocess.Popen(command, stdout=goal, stderr=subprocess.DEVNULL)
        try:
            yield file
        finally:
            process.kill()
            process.wait()


def _size(file: Path) -> int:
    return file.stat().st_size


def _card_state(file: Path, start: int) -> dict[str, float]:
    """Return the means of what nvidia-smi wrote from a position on."""
    with file.open() as lines:
        lines.seek(start)
        rows = [line.split(",") for line in lines]
    whole = [row for row in rows if len(row) == len(_ASKED)]
    found: dict[str, float] = {}
    for name, column in zip(_ASKED, zip(*whole, strict=True), strict=False):
        with contextlib.suppress(ValueError):  # "[N/A]"
            values = [float(value) for value in column]
            found[name] = round(sum(values) / len(values), 1)
    return found


if __name__ == "__main__":
    sys.exit(main())
