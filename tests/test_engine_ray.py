"""`--engine ray`: the local engine's rows bit for bit from several nodes, whatever dies; started
here and finished there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import helpers
import sample_images
from imagemill.errors import WorkerError
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.pipeline.backends import devices
from imagemill.records import Settings
from imagemill.runner import run
from imagemill.workers.ray import placement
from imagemill.workers.ray.nodes import Node, places
from ray_nodes import Nodes, cluster, kill, parent
from s3 import Bucket
from s3 import environment as s3_environment

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))

import harness

Start = Callable[..., Any]
Run = Callable[..., helpers.Result]
Folders = Callable[..., Path]

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> harness.Hold:
    """Of all workers, on the nodes and here. Their decoders crash if an image asks for it."""
    crash = Path(__file__).with_name("faulty_decoders") / "sitecustomize.py"
    source = f"exec(compile({crash.read_text()!r}, 'crash', 'exec'), {{'__name__': 'crash'}})"
    return harness.Hold(tmp_path_factory.mktemp("ray"), None, source)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The cache folders of the two nodes."""
    return tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def nodes(hold: harness.Hold, caches: tuple[Path, Path], s3_endpoint: str) -> Iterator[Nodes]:
    """A head and one more node, of one CPU each, which can use the S3 server."""
    known = hold.environment | s3_environment(s3_endpoint) | {"no_proxy": "127.0.0.1"}
    head, other = (known | {"XDG_CACHE_HOME": str(cache)} for cache in caches)
    with cluster(env=head) as found:
        found.add(env=other)
        yield found


@pytest.fixture
def ray_start(nodes: Nodes, hold: harness.Hold, models_dir: Path, start: Start) -> Iterator[Start]:
    """Starts the command line on the cluster."""

    def call(*arguments: object, **env: str) -> Any:
        environment = nodes.environment(**({"IMAGEMILL_MODELS": str(models_dir)} | env))
        return start("run", *arguments, "--engine", "ray", "--no-preflight", env=environment)

    yield call
    hold.release()


@pytest.fixture
def ray_run(ray_start: Start) -> Run:
    """Runs it to its end."""
    return lambda *arguments, **env: helpers.finish(ray_start(*arguments, **env))


def arguments(output: Path | str, *more: object) -> tuple[object, ...]:
    options = ("--shard-size", 4, "--batch-size", 2, "--num-workers", 1, "--no-report")
    return ("--output", output, "--model", "tiny", *options, *more)


def started(start: Start, folder: Path, output: Path, *more: object, workers: int = 2) -> Any:
    """Start a run that is held, and wait until it has committed parts and its workers are ready."""
    process = start(folder, *arguments(output, "--devices", "null", *more))
    helpers.until(
        lambda: len(helpers.parts(output)) >= 3 and len(helpers.worker_pids(output)) >= workers,
        process=process,
    )
    return process


def log(output: Path) -> str:
    file = output / "logs" / "launcher.log"
    return file.read_text() if file.exists() else ""


# ── which workers ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spec", "resources", "expected"),
    [
        ("auto", {"CPU": 8}, [("cpu", 0, {"num_cpus": 8})]),
        (
            "cpu:3",
            {"CPU": 8},
            [("cpu", 0, {"num_cpus": 3}), ("cpu", 0, {"num_cpus": 3}), ("cpu", 0, {"num_cpus": 2})],
        ),
        ("cpu:4", {"CPU": 1}, [("cpu", 0, {"num_cpus": 0.25})] * 4),
        ("cpu", {"GPU": 1}, []),
        ("cuda", {"CPU": 8, "GPU": 2}, [("cuda", 0, {"num_cpus": 4, "num_gpus": 1})] * 2),
        ("cuda:0,1,2", {"CPU": 2, "GPU": 2}, [("cuda", 0, {"num_cpus": 1, "num_gpus": 1})] * 2),
        ("cuda", {"CPU": 8}, []),
        (
            "ipu:2",
            {"CPU": 4, "ipu": 8},
            [("ipu", n, {"num_cpus": 2, "resources": {"ipu": 1}}) for n in range(2)],
        ),
        ("ipu:8", {"ipu": 1}, [("ipu", 0, {"num_cpus": 0, "resources": {"ipu": 1}})]),
        ("npu", {"CPU": 1, "npu": 1}, [("npu", 0, {"num_cpus": 1, "resources": {"npu": 1}})]),
        (
            "gpu",
            {"CPU": 2, "gpu": 2},
            [("gpu", n, {"num_cpus": 1, "resources": {"gpu": 1}}) for n in range(2)],
        ),
        ("auto", {"CPU": 16}, [("cpu", 0, {"num_cpus": 16})]),
        (
            "auto",
            {"CPU": 40},
            [
                ("cpu", 0, {"num_cpus": 14}),
                ("cpu", 0, {"num_cpus": 13}),
                ("cpu", 0, {"num_cpus": 13}),
            ],
        ),
        ("auto", {"GPU": 1}, []),
        (
            "cpu+cuda",
            {"CPU": 4, "GPU": 1},
            [("cpu", 0, {"num_cpus": 2}), ("cuda", 0, {"num_cpus": 2, "num_gpus": 1})],
        ),
    ],
)
def test_devices_mean_the_same_on_every_node(
    spec: str, resources: dict[str, float], expected: list[Any]
) -> None:
    """Kind, id and what Ray is asked for of each worker: whole CPUs, as Ray wants them, or parts of
    one.
    """
    found = places(Node("id", "name", resources), devices.parse(spec))
    assert [(place.kind, place.device(7).id, place.resources()) for place in found] == expected
    assert [(place.order, place.of) for place in found] == [
        (number, len(found)) for number in range(len(found))
    ]
    assert all(len(place.device(7).cores) == max(1, int(place.cpus)) for place in found)


# ── the same rows ─────────────────────────────────────────────────────────────────────────────────


def test_two_nodes_give_the_local_engines_rows_bit_for_bit(
    ray_run: Run, imagemill: Run, some_jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    """Good images and bad ones, logits included; also the parts' bytes, the ids and the counts;
    stdout is one JSON object.
    """
    bad = {
        "d/half.jpg": sample_images.half(sample_images.jpeg()),
        "d/empty.jpg": b"",
        "d/text.png": b"no image",
    }
    folder = helpers.fill(tmp_path / "images", some_jpegs | bad)
    local = imagemill(
        "run",
        folder,
        *arguments(tmp_path / "local", "--devices", "cpu", "--save", "logits", "--json"),
    )
    result = ray_run(
        folder, *arguments(tmp_path / "ray", "--devices", "cpu", "--save", "logits", "--json")
    )
    assert (local.code, result.code) == (0, 0), result
    harness.assert_complete(tmp_path / "ray")
    harness.assert_same(tmp_path / "ray", tmp_path / "local")
    counts = ("images", "ok", "failed", "failed_by_status", "shards", "precision")
    assert [result.json[name] for name in counts] == [local.json[name] for name in counts]
    assert [device["name"] for device in result.json["devices"]] == ["cpu#0", "cpu#1"]
    assert sum(device["images"] for device in result.json["devices"]) == 43
    ours, theirs = (OpenJob.open(tmp_path / name).frozen for name in ("ray", "local"))
    assert ours is not None
    assert theirs is not None
    assert (ours.devices, ours.backend, ours.job.answer_id, ours.job.plan_id) == (
        theirs.devices,
        theirs.backend,
        theirs.job.answer_id,
        theirs.job.plan_id,
    )
    assert "imagemill: Ray: 2 workers on 2 of 2 nodes" in result.err
    chatter = [
        line
        for line in result.err.splitlines()
        if not re.match(r"imagemill: |\d[\d,]* of \d", line)
    ]
    assert chatter == [], "Ray prints nothing"
    assert re.search(
        r"cpu#1 is on node 127\.0\.0\.\d+ \([0-9a-f]{8}\), with 1 CPUs", log(tmp_path / "ray")
    )


# ── whatever dies ─────────────────────────────────────────────────────────────────────────────────


def test_modules_in_the_working_directory_are_never_executed(
    nodes: Nodes, start: Start, models_dir: Path, small_jpegs: Path, tmp_path: Path
) -> None:
    """Neither by the command nor on the nodes, though Ray gives its workers the directory that it
    was started in to search.
    """
    trap = b"import os\nopen(os.environ['SPRUNG'], 'a').write(__file__)\nraise SystemExit(3)\n"
    here = helpers.fill(
        tmp_path / "here",
        {f"{name}.py": trap for name in ("ctypes", "mmap", "numpy", "PIL", "resource", "tempfile")},
    )
    environment = nodes.environment(
        IMAGEMILL_MODELS=str(models_dir), SPRUNG=str(tmp_path / "sprung")
    )
    command = (
        "run",
        small_jpegs,
        *arguments(tmp_path / "out", "--devices", "null", "--limit", 4),
        "--engine",
        "ray",
    )
    process = start(*command, env=environment, cwd=here, before=helpers.FRESH)
    result = helpers.finish(process)
    assert (result.code, (tmp_path / "sprung").exists()) == (0, False), result.err


def test_a_worker_and_then_its_actor_killed(
    ray_start: Start, hold: harness.Hold, small_jpegs: Path, tmp_path: Path
) -> None:
    """SIGKILL to a worker's process, then to the actor that watches the other: the job goes on to
    its end, both restarts are counted.
    """
    out = tmp_path / "out"
    hold.at(24)
    process = started(ray_start, small_jpegs, out, "--json")
    first, second = helpers.worker_pids(out)[:2]
    kill(first)
    helpers.until(lambda: len(helpers.worker_pids(out)) >= 3, process=process)
    kill(parent(second))
    hold.release()
    result = helpers.finish(process)
    assert result.code == 0, result.err
    assert sum(device["restarts"] for device in result.json["devices"]) == 2
    assert f"(pid {first}) was killed by SIGKILL" in log(out)
    assert re.search(
        r"null#\d is lost, \d shards in flight: node 127\.0\.0\.\d+ \([0-9a-f]{8}\): The actor died",
        log(out),
    )
    assert not helpers.running(second), "a worker must end with its actor"
    assert harness.assert_complete(out).num_rows == 48
    assert {row["status"] for row in helpers.rows(out)} == {"ok"}


def test_a_node_killed_and_others_joining(
    nodes: Nodes, ray_start: Start, hold: harness.Hold, small_jpegs: Path, tmp_path: Path
) -> None:
    """A power cut of one node in mid-run: the others do its shards. A node that joins takes part,
    and one that is not fit is left out with a message. One row per image in the end.
    """
    hook = """
    if any("default_worker" in word for word in sys.orig_argv):
        def other(module):
            module.__version__ = "0.0.9"
        after_import("imagemill.version", other)
    """
    out = tmp_path / "out"
    hold.at(24)
    doomed = nodes.add(node_name="doomed", env=hold.environment)
    process = started(ray_start, small_jpegs, out, "--json", workers=3)
    nodes.kill(doomed)
    joined = [
        nodes.add(node_name="fresh", env=hold.environment),
        nodes.add(node_name="alien", env=harness.hooks(tmp_path / "hooks", hook)),
    ]
    helpers.until(
        lambda: re.search(r"null#\d is on node fresh \([0-9a-f]{8}\)", log(out)),
        process=process,
    )
    printed = helpers.read_until(process, "left out")
    hold.release()
    result = helpers.finish(process)
    for node in joined:
        nodes.remove(node)
    assert result.code == 0, result.err
    assert re.search(
        r"null#\d is lost, \d shards in flight: node doomed \([0-9a-f]{8}\) is gone or out of"
        r" sight: ",
        log(out),
    )
    printed += result.err
    assert re.search(
        r"imagemill: left out: node alien \([0-9a-f]{8}\) has imagemill 0\.0\.9, this machine has"
        r" \S+: .*\n",
        printed,
    )
    assert printed.count("left out") == 1
    assert harness.assert_complete(out).num_rows == 48
    assert {row["status"] for row in helpers.rows(out)} == {"ok"}


def test_a_job_without_nodes_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a node, prints a message, and then ends with an error. A node that comes in time
    ends the wait.
    """
    times = iter((10.0, 309.0, 400.0, 1_000.0, 1_301.0))
    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: next(times)))
    messages: list[str] = []
    found = placement.Placement(lambda: [], devices.parse("null"), [], messages.append)
    (place,) = places(Node("id", "name", {"CPU": 1}), devices.parse("null"))
    slot = placement.Slot(place.device(0), place, step="turn")
    found.report({})
    found.report({})
    found.report({"null#0": slot})
    found.report({})
    assert (
        messages
        == ["no node of the Ray cluster is left for a worker: waiting for one, 300 s at most"] * 2
    )
    with pytest.raises(
        WorkerError,
        match=r"no node of the Ray cluster was there for a worker for 300 s\. Start nodes"
        r" \(`ray status` lists them\), then repeat the command: finished parts are kept\.$",
    ):
        found.report({})


def test_an_image_that_kills_its_decoder_is_a_row_on_a_cluster_too(
    tmp_path: Path, ray_run: Run
) -> None:
    """Found by the heartbeat on its node, decoded alone by the next worker, named; its neighbours
    are ok.
    """
    files = {f"{seed:03d}.jpg": sample_images.jpeg(48, 40, seed=seed) for seed in range(10)} | {
        "005b.jpg": sample_images.jpeg() + b"imagemill-test-crash"
    }
    folder, out = helpers.fill(tmp_path / "images", files), tmp_path / "out"
    result = ray_run(folder, *arguments(out, "--devices", "null", "--json"))
    assert result.code == 0, result.err
    assert result.json["failed_by_status"] == {"crashed_decoder": 1}
    # One, or two if Ray took the first death for a lost actor.
    assert sum(device["restarts"] for device in result.json["devices"]) in (1, 2)
    assert helpers.by_path(out)["005b.jpg"]["status"] == "crashed_decoder"


# ── here and there ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.large
def test_a_job_goes_from_one_engine_to_the_other(
    ray_start: Start, start: Start, hold: harness.Hold, models_dir: Path, tmp_path: Path
) -> None:
    """Started here and stopped by Ctrl-C; continued on Ray, where SIGKILL to the launcher ends the
    workers too; continued there and stopped; finished here. No finished shard is repeated, and
    `job.json` is untouched.
    """
    out = tmp_path / "out"
    files = {f"{seed:03d}.jpg": sample_images.jpeg(40, 36, seed=seed) for seed in range(96)}
    folder = helpers.fill(tmp_path / "images", files)
    here = hold.environment | {"IMAGEMILL_MODELS": str(models_dir)}

    def start_here(*arguments: object) -> Any:
        return start("run", *arguments, env=here)

    def interrupt(begin: Start, index: int, number: signal.Signals) -> helpers.Result:
        """Run up to an image, and send a signal."""
        earlier, signals = len(helpers.worker_pids(out)), log(out).count("Ctrl-C: finishing")
        hold.at(index)
        process = begin(folder, *arguments(out, "--devices", "null"))
        helpers.until(
            lambda: (
                len(helpers.parts(out)) >= index // 4 and len(helpers.worker_pids(out)) > earlier
            ),
            process=process,
        )
        workers = helpers.worker_pids(out)[earlier:]
        process.send_signal(number)
        if number == signal.SIGINT:
            helpers.until(lambda: log(out).count("Ctrl-C: finishing") > signals, process=process)
            hold.release()
        result = helpers.finish(process)
        helpers.until(lambda: not any(map(helpers.running, workers)))
        return result

    kept: dict[str, tuple[int, int]] = {}
    for begin, index, number in (
        (start_here, 12, signal.SIGINT),
        (ray_start, 40, signal.SIGKILL),
        (ray_start, 60, signal.SIGINT),
    ):
        result = interrupt(begin, index, number)
        if number == signal.SIGINT:
            assert result.code == 130
            assert result.err.endswith(" images left. Run the same command again to continue.\n")
        assert kept.items() <= helpers.parts(out).items()
        kept, frozen = helpers.parts(out), (out / "job.json").read_bytes()
        assert index // 4 <= len(kept) < 24
    hold.release()
    result = helpers.finish(start_here(folder, *arguments(out, "--devices", "null", "--json")))
    assert result.code == 0, result
    assert result.json["resumed_shards"] == len(kept)
    assert kept.items() <= helpers.parts(out).items()
    assert (out / "job.json").read_bytes() == frozen
    assert harness.assert_complete(out).num_rows == 96


@pytest.mark.large
def test_source_and_output_in_an_object_store(
    s3: Bucket,
    some_jpegs: dict[str, bytes],
    imagemill: Run,
    ray_run: Run,
    caches: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """Two nodes that share nothing but the store: the same parts as a local job's, byte for byte,
    and every worker's log beside them.
    """
    source = s3.fill(some_jpegs, "photos/")
    local = imagemill("run", source, *arguments(tmp_path / "local", "--devices", "null"))
    assert local.code == 0, local
    options = arguments(s3.url + "/job", "--devices", "null", "--json")
    result = ray_run(source, *options, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.code == 0, result
    keys = s3.keys()
    found = {
        key.rpartition("/")[2]: s3.get(key) for key in keys if key.startswith("job/predictions/")
    }
    assert found == {
        path.name: path.read_bytes() for path in (tmp_path / "local" / "predictions").iterdir()
    }
    names = {
        key
        for key in keys
        if key.startswith("job/") and "/predictions/" not in key and "/plan/" not in key
    }
    assert {name.removeprefix("job/") for name in names} == {
        "job.json",
        "summary.json",
        "manifest.json",
        "failed.txt",
        "logs/launcher.log",
        "logs/null#0.log",
        "logs/null#1.log",
    }
    for cache in caches:
        (standing,) = (cache / "imagemill" / "jobs").iterdir()
        assert len(plan.shards(standing / "plan")) == 10, (
            "each node fetched the plan into a folder of its own"
        )


@pytest.mark.large
def test_images_are_appended_on_a_cluster(
    s3: Bucket, some_jpegs: dict[str, bytes], imagemill: Run, ray_run: Run, tmp_path: Path
) -> None:
    """To a job in an object store that was finished here. Its nodes fetch the plan of all
    generations, and do not ask for a source that no remaining image needs.
    """
    monday, tuesday = (helpers.fill(tmp_path / day, some_jpegs) for day in ("mon", "tue"))
    output = s3.url + "/job"
    assert imagemill("run", monday, *arguments(output, "--devices", "null")).code == 0
    shutil.rmtree(monday)
    options = arguments(output, "--devices", "null", "--append", "--json")
    result = ray_run(tuesday, *options)
    assert result.code == 0, result
    assert (result.json["images"], result.json["appended"]) == (80, 40)
    sound = imagemill("verify", output)
    assert sound.out == "complete and sound: 80 images, one row each\n", sound


# ── what is not fit ───────────────────────────────────────────────────────────────────────────────


def test_a_path_that_is_only_local_is_named(
    nodes: Nodes, ray_run: Run, jpegs: Folders, tmp_path: Path
) -> None:
    """An output that on a node is another folder: which path, which node, and what to do; nothing
    is computed.
    """
    hook = """
    if any("default_worker" in word for word in sys.orig_argv):
        def elsewhere(module):
            module.JobPaths.launch = property(lambda self: self.root / "nowhere")
        after_import("imagemill.job.paths", elsewhere)
        def hurry(module):
            module._LOOK_S = 0.01
        after_import("imagemill.workers.ray.node_agent", hurry)
    """
    alien = nodes.add(node_name="alien", env=harness.hooks(tmp_path / "hooks", hook))
    result = ray_run(jpegs(8), *arguments(tmp_path / "out", "--devices", "null", "--shard-size", 1))
    nodes.remove(alien)
    assert result.code == 1
    assert re.search(
        rf"imagemill: --output {tmp_path}/out on node alien \([0-9a-f]{{8}}\) is not what it is on"
        r" the launcher's: "
        r"No such file or directory\. "
        r"Give an --output on storage that all nodes share, under the same path, or in an object"
        r" store \(s3://…\)\.\n$",
        result.err,
    ), result.err
    assert helpers.parts(tmp_path / "out") == {}


def test_a_node_without_imagemill_is_refused(
    nodes: Nodes, ray_run: Run, jpegs: Folders, tmp_path: Path
) -> None:
    """One line that names the node, and what to type."""
    hook = """
    if any("default_worker" in word for word in sys.orig_argv):
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "imagemill":
                    raise ImportError("No module named imagemill")
        sys.meta_path.insert(0, Block())
    """
    alien = nodes.add(node_name="alien", env=harness.hooks(tmp_path / "hooks", hook))
    result = ray_run(jpegs(8), *arguments(tmp_path / "out", "--devices", "null", "--shard-size", 1))
    nodes.remove(alien)
    assert result.code == 1
    assert re.search(
        r"imagemill: node alien \([0-9a-f]{8}\) cannot import imagemill \(No module named"
        r" imagemill\)\. Type there: \S+ -m pip install 'imagemill\[ray\]==",
        result.err,
    ), result.err
    assert "Traceback" not in result.err


def test_devices_that_no_node_offers_are_refused(
    ray_run: Run, jpegs: Folders, tmp_path: Path
) -> None:
    """What was asked for, what each node has, and how nodes are started that have it."""
    result = ray_run(jpegs(2), *arguments(tmp_path / "out", "--devices", "ipu:4"))
    assert result.code == 1
    assert re.search(
        r"imagemill: --devices ipu:4: no node of the Ray cluster offers that "
        r"\(127\.0\.0\.2 \([0-9a-f]{8}\): CPU 1; 127\.0\.0\.3 \([0-9a-f]{8}\): CPU 1\)\. Start"
        r" nodes that do \(`ray start --num-cpus N`",
        result.err,
    ), result.err
    assert not (tmp_path / "out" / "job.json").exists()


def test_without_a_cluster_one_is_started_here(
    start: Start, models_dir: Path, jpegs: Folders, tmp_path: Path
) -> None:
    """With RAY_ADDRESS=local, as if no cluster ran: a message says so, the job ends well, and nothing
    of Ray is left running.
    """
    env = helpers.environment(IMAGEMILL_MODELS=str(models_dir), RAY_ADDRESS="local")
    process = start(
        "run",
        jpegs(8),
        *arguments(tmp_path / "out", "--devices", "null", "--engine", "ray"),
        env=env,
    )
    result = helpers.finish(process)
    assert result.code == 0, result
    assert re.search(
        r"imagemill: no Ray cluster was named: one was started on this machine, for this job, with"
        r" \d+ CPUs\n",
        result.err,
    )
    assert harness.assert_complete(tmp_path / "out").num_rows == 8


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "ray://127.0.0.1:1",
            r"RAY_ADDRESS ray://127\.0\.0\.1:1: imagemill must run on a machine of the cluster\.",
        ),
        (
            "127.0.0.1:1",
            (
                r"RAY_ADDRESS 127\.0\.0\.1:1: no Ray cluster answers there\. Look with `ray status"
                r" --address 127\.0\.0\.1:1`\."
            ),
        ),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(
    start: Start, models_dir: Path, jpegs: Folders, tmp_path: Path, address: str, message: str
) -> None:
    """Before anything is listed."""
    env = helpers.environment(IMAGEMILL_MODELS=str(models_dir), RAY_ADDRESS=address)
    result = helpers.finish(
        start("run", jpegs(1), *arguments(tmp_path / "out", "--engine", "ray"), env=env)
    )
    assert result.code in (1, 2)
    assert re.search(rf"imagemill: {message}", result.err), result.err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_error_names_the_command_that_installs_it(
    job: Callable[..., Settings], jpegs: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a local run under another name."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        Exception,
        match=(
            r"--engine ray needs a package that is not installed\. Type: pip install"
            r" 'imagemill\[ray\]'"
        ),
    ):
        run.run(job(jpegs(1), engine="ray"))
    assert not os.path.exists(job().output)


def test_the_worked_cluster_of_the_documentation_is_one() -> None:
    """Its YAML is what Ray's own launcher takes, as far as that can be checked without a cloud."""
    import jsonschema
    import yaml
    from ray import autoscaler

    text = (helpers.PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    jsonschema.validate(
        config, json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    )
    assert config["head_node_type"] in config["available_node_types"]


def test_usage_statistics_are_off_unless_the_user_turns_them_on() -> None:
    """In the launcher, and so in a cluster that it starts, whose processes inherit its
    environment.
    """
    program = """
import os
os.environ.pop("RAY_USAGE_STATS_ENABLED", None)
from imagemill.workers.ray.cluster import load_ray
load_ray()
from ray._common.usage import usage_lib
print(usage_lib.usage_stats_enabled())
os.environ["RAY_USAGE_STATS_ENABLED"] = "1"
load_ray()
print(usage_lib.usage_stats_enabled())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=helpers.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "False\nTrue\n"
