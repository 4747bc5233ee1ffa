"""What the tests by fault share: hooks put into real processes from outside, process trees, and the
comparison of two outputs.

Nothing here needs pytest, so that the long runs in `benchmarks/` use it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import textwrap
from collections import Counter
from pathlib import Path

import onnx
import pyarrow as pa
from onnx import TensorProto, helper

import forked
import helpers
from imagemill.job import ledger
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle
from imagemill.records import Card, Recipe


def null_bundle(models_dir: Path, *, classes: int = 1000, size: int = 32) -> Path:
    """A bundle for the null device, which looks at its card alone."""
    value = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", size, size, 3])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["logits"])], "null", [value], [value]
    )
    graph.output[0].name = "logits"
    card = Card(
        name="null",
        architecture="none",
        labels=tuple(f"class {number}" for number in range(classes)),
        recipe=Recipe(size, size, size + 4),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        sha256="",
        licence="Apache-2.0",
        origin={"source": "random"},
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6
    )
    bundle.write(models_dir / "null", card, model)
    return models_dir


def hooks(folder: Path, *sources: str, **variables: str) -> dict[str, str]:
    """An environment in which every Python process runs these pieces of code before its `main`;
    production code knows nothing of it.

    Each piece is guarded by its author: `WORKER` and `LAUNCHER` say which process it is in. One
    that must act before an import needs real processes: `before=helpers.FRESH`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sitecustomize.py"
    file.write_text(_PROLOGUE + "\n".join(textwrap.dedent(source) for source in sources))
    paths = [
        str(helpers.SOURCE_ROOT),
        str(folder),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    ours = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TEST_HOOKS": str(file)}
    return {**os.environ, **ours, **variables}


_PROLOGUE = """\
import importlib.abc, importlib.util, os, signal, sys, time
WORKER = "imagemill.workers.worker" in sys.orig_argv
LAUNCHER = "imagemill" in sys.orig_argv


def once(marker):
    # True for the first process that asks, whatever becomes of it afterwards.
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class _After(importlib.abc.MetaPathFinder):
    # Calls `act(module)` right after a module was imported for the first time.
    def __init__(self, name, act):
        self.name, self.act, self.busy = name, act, False

    def find_spec(self, name, path, target=None):
        if name != self.name or self.busy:
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        run, act = spec.loader.exec_module, self.act

        def exec_module(module):
            run(module)
            act(module)

        spec.loader.exec_module = exec_module
        return spec


def after_import(name, act):
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _After(name, act))


"""


HOLD = """
def first_held():
    try:
        return int(os.readlink(os.environ["HOLD"]))
    except FileNotFoundError:
        return sys.maxsize


if WORKER:
    def hold(module):
        mark_image = module.Heartbeat.mark_image
        def held(self, slot, index, **options):
            while index >= first_held():
                time.sleep(0.005)
            mark_image(self, slot, index, **options)
        module.Heartbeat.mark_image = held
    after_import("imagemill.pipeline.heartbeat", hold)
"""


class Hold:
    """Workers that read no image from number `index` on, until `release`: a job is then in progress
    for as long as a test needs it, however slow the machine is. A worker that waits has no time
    limit.

    Start the job with `environment`. Shards of earlier images are committed, except that a batch
    may reach into later ones.
    """

    def __init__(self, folder: Path, index: int | None, *sources: str, **variables: str) -> None:
        self._link = folder / "hold"  # a link, because its target is written in one step
        self.environment = hooks(
            folder / "hold-hooks", HOLD, *sources, HOLD=str(self._link), **variables
        )
        if index is not None:
            self.at(index)

    def at(self, index: int) -> None:
        """Hold jobs at this image from now on."""
        self._link.with_name("next").symlink_to(str(index))
        self._link.with_name("next").replace(self._link)

    def release(self) -> None:
        """Let the workers read every image."""
        self._link.unlink(missing_ok=True)


def children(pid: int) -> list[int]:
    """Processes that this one, in any of its threads, started and that still exist."""
    found: list[int] = []
    gone = contextlib.suppress(FileNotFoundError, ProcessLookupError)
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with gone:
            for child in map(int, file.read_text().split()):
                with gone:
                    forks = Path(f"/proc/{child}/comm").read_text().strip() == forked.NAME
                    found += children(child) if forks else [child]
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False where the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def part_sums(output: Path) -> dict[str, str]:
    """Name → sha256 of every part."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((output / "predictions").glob("part-*.parquet"))
    }


def assert_complete(output: Path) -> pa.Table:
    """Every planned image has exactly one row, `verify` finds nothing, and nothing half-written
    lies about. Returns the rows.
    """
    job = OpenJob.open(output)
    problems, _ = job.verify()
    assert not problems, problems
    rows = helpers.table(output)
    planned = [row.index for shard in job.shards for row in job.rows(shard)]
    counts = Counter(rows["index"].to_pylist())
    assert counts == Counter(planned), (counts - Counter(planned), Counter(planned) - counts)
    assert len(planned) == job.frozen.images
    left = [str(path) for path in output.rglob("*.tmp")]
    assert not left, left
    return rows


def assert_same(output: Path, undisturbed: Path) -> None:
    """Two outputs of the same plan hold the same rows, bit for bit; so do their files."""
    ours, theirs = helpers.table(output), helpers.table(undisturbed)
    if not ours.equals(theirs):
        pairs = zip(ours.to_pylist(), theirs.to_pylist(), strict=True)
        raise AssertionError(next((one, other) for one, other in pairs if one != other))
    assert ours.schema.metadata == theirs.schema.metadata, (
        ours.schema.metadata,
        theirs.schema.metadata,
    )
    assert part_sums(output) == part_sums(undisturbed)


def assert_sound_so_far(output: Path) -> int:
    """Whatever parts there are, each is whole and its shard's. Returns how many there are; for
    looking at a job between two deaths.
    """
    job = OpenJob.find(str(output))
    if job is None:
        return 0
    problems = [problem for problem in job.verify()[0] if problem.damaged]
    assert not problems, problems
    return len(ledger.existing_parts(job.store))
