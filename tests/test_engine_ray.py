"""`--engine ray`: the local engine's rows bit for bit from several nodes, whatever dies; started
here and finished there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import helpers
import sample_images
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.pipeline.backends import devices
from imagemill.records import Bundle, Settings
from imagemill.runner import run
from imagemill.workers.ray.nodes import Node, places
from ray_nodes import Nodes, cluster, kill, parent
from s3 import Bucket

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
def nodes() -> Iterator[Nodes]:
    """A head and one more node, of one CPU each."""
    with cluster() as found:
        found.add()
        yield found


@pytest.fixture
def ray_start(nodes: Nodes, models_dir: Path, start: Start) -> Start:
    """Starts the command line on the cluster."""

    def call(*arguments: object, **env: str) -> Any:
        environment = nodes.environment(**({"IMAGEMILL_MODELS": str(models_dir)} | env))
        return start("run", *arguments, "--engine", "ray", "--no-preflight", env=environment)

    return call


@pytest.fixture
def ray_run(ray_start: Start) -> Run:
    """Runs it to its end."""
    return lambda *arguments, **env: helpers.finish(ray_start(*arguments, **env))


def arguments(output: Path | str, *more: object) -> tuple[object, ...]:
    return ("--output", output, "--model", "tiny", "--shard-size", 4, "--num-workers", 1, *more)


def two_at_work(start: Start, folder: Path, output: Path, *more: object, parts: int = 3) -> Any:
    """Start a run and wait until it is well under way on both nodes."""
    process = start(folder, *arguments(output, "--devices", "null", *more))
    helpers.until(
        lambda: len(helpers.parts(output)) >= parts and len(helpers.worker_pids(output)) >= 2,
        seconds=90,
        process=process,
    )
    return process


def log(output: Path) -> str:
    return (output / "logs" / "launcher.log").read_text()


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
    assert chatter == [], "of Ray nothing is heard"
    assert re.search(
        r"cpu#1 is on node 127\.0\.0\.\d+ \([0-9a-f]{8}\), with 1 CPUs", log(tmp_path / "ray")
    )


def test_the_photographs_on_two_nodes(
    ray_run: Run, photographs: Path, photographs_run: Any, lite0: Bundle, tmp_path: Path
) -> None:
    """All of them, by a trained model: the rows of a local run, bit for bit."""
    planned = OpenJob.open(photographs_run.output).frozen
    more = (
        "--model",
        "efficientnet_lite0",
        "--devices",
        "cpu",
        "--shard-size",
        planned.shard_size,
        "--json",
    )
    result = ray_run(
        photographs, "--output", tmp_path / "ray", *more, IMAGEMILL_MODELS=str(lite0.dir.parent)
    )
    assert result.code == 0, result
    harness.assert_complete(tmp_path / "ray")
    harness.assert_same(tmp_path / "ray", photographs_run.output)
    assert all(device["images"] for device in result.json["devices"])


# ── whatever dies ─────────────────────────────────────────────────────────────────────────────────


def test_modules_in_the_working_directory_are_never_executed(
    nodes: Nodes, start: Start, models_dir: Path, slow_folder: Path, tmp_path: Path
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
        slow_folder,
        *arguments(tmp_path / "out", "--devices", "null", "--limit", 4),
        "--engine",
        "ray",
    )
    result = helpers.finish(start(*command, env=environment, cwd=here))
    assert (result.code, (tmp_path / "sprung").exists()) == (0, False), result.err


def test_a_worker_and_then_its_actor_killed(
    ray_start: Start, slow_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL to a worker's process, then to the actor that watches the other: the job goes on to
    its end, both restarts are counted.
    """
    out = tmp_path / "out"
    process = two_at_work(ray_start, slow_folder, out, "--json")
    first, second = helpers.worker_pids(out)[:2]
    kill(first)
    helpers.until(lambda: len(helpers.worker_pids(out)) >= 3, process=process)
    kill(parent(second))
    result = helpers.finish(process)
    assert result.code == 0, result.err
    assert sum(device["restarts"] for device in result.json["devices"]) == 2
    assert f"(pid {first}) was killed by SIGKILL" in log(out)
    assert re.search(
        r"null#\d is lost, \d shards in flight: node 127\.0\.0\.\d+ \([0-9a-f]{8}\): The actor died",
        log(out),
    )
    assert not helpers.running(second), "a worker must end with its actor"
    assert harness.assert_complete(out).num_rows == 96
    assert {row["status"] for row in helpers.rows(out)} == {"ok"}


def test_a_node_killed_and_another_one_joining(
    nodes: Nodes, ray_start: Start, slow_folder: Path, tmp_path: Path
) -> None:
    """A power cut of one node in mid-run: the other does its shards; a node that joins takes part;
    one row per image in the end.
    """
    out = tmp_path / "out"
    doomed = nodes.add(node_name="doomed")
    process = two_at_work(ray_start, slow_folder, out, "--json")
    helpers.until(lambda: len(helpers.worker_pids(out)) == 3, process=process)
    nodes.kill(doomed)
    fresh = nodes.add(node_name="fresh")
    result = helpers.finish(process)
    nodes.remove(fresh)
    assert result.code == 0, result.err
    assert re.search(
        r"null#\d is lost, \d shards in flight: node doomed \([0-9a-f]{8}\) is gone or out of"
        r" sight: ",
        log(out),
    )
    assert re.search(r"null#\d is on node fresh \([0-9a-f]{8}\)", log(out))
    assert harness.assert_complete(out).num_rows == 96
    assert {row["status"] for row in helpers.rows(out)} == {"ok"}


def test_the_last_node_killed(
    start: Start, models_dir: Path, slow_folder: Path, tmp_path: Path
) -> None:
    """The job waits for another one, says so, and then ends with exit 1; with a new node the same
    command does the rest.
    """
    out = tmp_path / "out"
    hook = """
    if LAUNCHER:
        def impatient(module):
            module.WITHOUT_WORKERS_S = 3.0
        after_import("imagemill.workers.ray.placement", impatient)
    """
    with cluster(num_cpus=0) as nodes:
        only = nodes.add()
        hurried = harness.hooks(
            tmp_path / "hooks", hook, RAY_ADDRESS=nodes.address, IMAGEMILL_MODELS=str(models_dir)
        )
        options = (
            "run",
            slow_folder,
            *arguments(out, "--devices", "null", "--engine", "ray", "--no-preflight", "--json"),
        )
        process = start(*options, env=hurried)
        helpers.until(lambda: len(helpers.parts(out)) >= 3, seconds=90, process=process)
        nodes.kill(only)
        result = helpers.finish(process)
        assert result.code == 1, result
        assert (
            "imagemill: no node of the Ray cluster is left for a worker: waiting for one, 3 s at"
            " most\n" in result.err
        )
        assert re.search(
            r"imagemill: no node of the Ray cluster was there for a worker for 3 s\. Start nodes"
            r" \(`ray status` lists them\), "
            r"then repeat the command: finished parts are kept\.\n$",
            result.err,
        )
        before = helpers.parts(out)
        nodes.add()
        result = helpers.finish(start(*options, env=hurried))
    assert result.code == 0, result
    assert result.json["resumed_shards"] == len(before)
    assert before.items() <= helpers.parts(out).items()
    assert harness.assert_complete(out).num_rows == 96


def test_the_driver_killed(
    ray_start: Start, ray_run: Run, slow_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL to the launcher: the workers on the nodes end too; the same command does the rest and
    repeats no finished shard.
    """
    out = tmp_path / "out"
    process = two_at_work(ray_start, slow_folder, out)
    workers = helpers.worker_pids(out)
    process.kill()
    helpers.finish(process)
    helpers.until(lambda: not any(map(helpers.running, workers)), seconds=30)
    before = helpers.parts(out)
    assert 3 <= len(before) < 24
    result = ray_run(slow_folder, *arguments(out, "--devices", "null", "--json"))
    assert result.code == 0, result.err
    assert result.json["resumed_shards"] == len(before)
    after = helpers.parts(out)
    assert {name: after[name] for name in before} == before
    assert harness.assert_complete(out).num_rows == 96


def test_an_image_that_kills_its_decoder_is_a_row_on_a_cluster_too(
    tmp_path: Path, models_dir: Path, start: Start
) -> None:
    """Found by the heartbeat on its node, decoded alone by the next worker, named; its neighbours
    are ok.
    """
    files = {f"{seed:03d}.jpg": sample_images.jpeg(48, 40, seed=seed) for seed in range(10)} | {
        "005b.jpg": sample_images.jpeg() + b"imagemill-test-crash"
    }
    folder, out = helpers.fill(tmp_path / "images", files), tmp_path / "out"
    with cluster(env={"PYTHONPATH": helpers.FAULTY_DECODERS}) as nodes:
        env = nodes.environment(IMAGEMILL_MODELS=str(models_dir))
        result = helpers.finish(
            start(
                "run",
                folder,
                *arguments(out, "--devices", "null", "--json", "--engine", "ray"),
                env=env,
            )
        )
    assert result.code == 0, result.err
    assert result.json["failed_by_status"] == {"crashed_decoder": 1}
    assert [device["restarts"] for device in result.json["devices"]] == [1]
    assert helpers.by_path(out)["005b.jpg"]["status"] == "crashed_decoder"


# ── here and there ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", ["local", "ray"])
def test_started_on_one_engine_and_finished_on_the_other(
    ray_start: Start, start: Start, slow_folder: Path, tmp_path: Path, first: str
) -> None:
    """Ctrl-C in mid-run, then the same command with the other engine: exit 130 and 0, no finished
    shard repeated, `job.json` untouched.
    """
    out = tmp_path / "out"

    def begin(engine: str, *more: object) -> Any:
        if engine == "ray":
            return ray_start(slow_folder, *arguments(out, "--devices", "null", *more))
        return start("run", slow_folder, *arguments(out, "--devices", "null", *more))

    process = begin(first)
    helpers.until(lambda: len(helpers.parts(out)) >= 3, seconds=90, process=process)
    workers = helpers.worker_pids(out)
    process.send_signal(signal.SIGINT)
    result = helpers.finish(process)
    assert result.code == 130, result
    assert re.search(
        r"imagemill: stopped by SIGINT: \d+ shards are left\. Repeat the command to resume\.\n$",
        result.err,
    )
    assert not any(map(helpers.running, workers))
    before, frozen = helpers.parts(out), (out / "job.json").read_bytes()
    assert 3 <= len(before) < 24
    result = helpers.finish(begin("ray" if first == "local" else "local", "--json"))
    assert result.code == 0, result
    assert result.json["resumed_shards"] == len(before)
    after = helpers.parts(out)
    assert {name: after[name] for name in before} == before
    assert (out / "job.json").read_bytes() == frozen
    assert harness.assert_complete(out).num_rows == 96


def test_source_and_output_in_an_object_store(
    s3: Bucket,
    some_jpegs: dict[str, bytes],
    imagemill: Run,
    start: Start,
    models_dir: Path,
    tmp_path: Path,
) -> None:
    """Two nodes that share nothing but the store: the same parts as a local job's, byte for byte,
    and every worker's log beside them.
    """
    source = s3.fill(some_jpegs, "photos/")
    local = imagemill("run", source, *arguments(tmp_path / "local", "--devices", "null"))
    assert local.code == 0, local
    caches = [{"XDG_CACHE_HOME": str(tmp_path / f"cache-{number}")} for number in range(3)]
    with cluster(env=caches[0]) as nodes:
        nodes.add(env=caches[1])
        env = nodes.environment(IMAGEMILL_MODELS=str(models_dir), **caches[2])
        options = arguments(s3.url + "/job", "--devices", "null", "--engine", "ray", "--json")
        result = helpers.finish(start("run", source, *options, env=env))
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
        "report.html",
        "logs/launcher.log",
        "logs/null#0.log",
        "logs/null#1.log",
    }
    for folder in caches[:2]:
        (standing,) = (Path(folder["XDG_CACHE_HOME"]) / "imagemill" / "jobs").iterdir()
        assert len(plan.shards(standing / "plan")) == 10, (
            "each node fetched the plan into a folder of its own"
        )


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


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            (
                "class Block(importlib.abc.MetaPathFinder):\n            def find_spec(self, name,"
                ' path, target=None):\n                if name == "imagemill":\n                   '
                ' raise ImportError("No module named imagemill")\n        sys.meta_path.insert(0,'
                " Block())"
            ),
            r"node alien \([0-9a-f]{8}\) cannot import imagemill \(No module named imagemill\)\."
            r" Type there: \S+ -m pip install "
            r"'imagemill\[ray\]==",
        ),
        (
            (
                'def other(module):\n            module.__version__ = "0.0.9"\n       '
                ' after_import("imagemill.version", other)'
            ),
            r"node alien \([0-9a-f]{8}\) has imagemill 0\.0\.9, this machine has \S+: their answers"
            r" may differ\. "
            r"Install the same on both\.",
        ),
    ],
)
def test_a_node_with_another_imagemill_or_none_is_refused(
    nodes: Nodes, ray_run: Run, jpegs: Folders, tmp_path: Path, act: str, message: str
) -> None:
    """One line that names the node, both values, and what to type."""
    hook = f'\n    if any("default_worker" in word for word in sys.orig_argv):\n        {act}\n    '
    alien = nodes.add(node_name="alien", env=harness.hooks(tmp_path / "hooks", hook))
    result = ray_run(jpegs(8), *arguments(tmp_path / "out", "--devices", "null", "--shard-size", 1))
    nodes.remove(alien)
    assert result.code == 1
    assert re.search(rf"imagemill: {message}", result.err), result.err
    assert "Traceback" not in result.err


def test_a_node_that_joins_and_is_not_fit_is_left_out(
    nodes: Nodes, ray_start: Start, slow_folder: Path, tmp_path: Path
) -> None:
    """A job that is under way goes on without it, and says why."""
    hook = """
    if any("default_worker" in word for word in sys.orig_argv):
        def other(module):
            module.__version__ = "0.0.9"
        after_import("imagemill.version", other)
    """
    out = tmp_path / "out"
    longer = tmp_path / "longer"  # than it takes a node to join
    longer.mkdir()
    for path in slow_folder.glob("*.png"):
        for number in range(5):
            os.link(path, longer / f"{number}-{path.name}")
    process = two_at_work(ray_start, longer, out, "--json")
    alien = nodes.add(node_name="alien", env=harness.hooks(tmp_path / "hooks", hook))
    result = helpers.finish(process)
    nodes.remove(alien)
    assert result.code == 0, result
    assert re.search(
        r"imagemill: left out: node alien \([0-9a-f]{8}\) has imagemill 0\.0\.9, this machine has"
        r" \S+: .*\n",
        result.err,
    )
    assert result.err.count("left out") == 1
    assert harness.assert_complete(out).num_rows == 5 * 96


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
    """With RAY_ADDRESS=local, as where no cluster runs: it is said, the job ends well, and nothing
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


def test_without_ray_the_line_to_type_is_told(
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
    """Its YAML is what Ray's own launcher takes, as far as that can be told without a cloud."""
    import jsonschema
    import yaml
    from ray import autoscaler

    text = (helpers.PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    jsonschema.validate(
        config, json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    )
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize(("chosen", "sent"), [(None, "False"), ("1", "True")])
def test_usage_statistics_are_off_unless_the_user_turns_them_on(
    chosen: str | None, sent: str
) -> None:
    """In the launcher, and so in a cluster that it starts, whose processes inherit its
    environment.
    """
    program = (
        "from imagemill.workers.ray.cluster import load_ray; load_ray();"
        " from ray._common.usage import usage_lib as u; print(u.usage_stats_enabled())"
    )
    env = {
        name: value
        for name, value in helpers.environment().items()
        if name != "RAY_USAGE_STATS_ENABLED"
    }
    env |= {"RAY_USAGE_STATS_ENABLED": chosen} if chosen else {}
    result = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{sent}\n"
