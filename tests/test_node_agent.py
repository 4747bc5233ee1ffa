"""One device on a node: what it checks before it begins, how the model comes to it, and that its
worker is the one of a local run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import helpers
import sample_images
from imagemill.errors import DeviceError, ModelError, OutputError, WorkerError
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.records import DeviceSpec, Job, Lease, Settings, Shard
from imagemill.runner import run
from imagemill.system import files
from imagemill.workers import protocol
from imagemill.workers.protocol import Died
from imagemill.workers.ray import node_agent, provisioning
from imagemill.workers.ray.messages import Assignment, Identity, ModelFile, Restart
from imagemill.workers.ray.node_agent import NodeAgent
from imagemill.workers.ray.nodes import Node, Place

pytestmark = pytest.mark.process

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]
Orders = Callable[..., Assignment]

DEVICE = DeviceSpec("null#0", "null", "null", (0,))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(node_agent, "_LOOK_S", 0.0)


@pytest.fixture
def left(tmp_path: Path) -> Callable[[], list[Shard]]:
    """The shards of the job that `order` has frozen."""
    return lambda: plan.shards(tmp_path / "out" / "plan")


def place_on(cpus: int, processes: int = 1, index: int = 0) -> Place:
    node = Node("01234567", "alien (01234567)", {"CPU": cpus})
    return Place(node, "null", "null", index, index, processes, cpus / processes)


@pytest.fixture
def order(job: Jobs, jpegs: Folders, tmp_path: Path) -> Orders:
    """Freezes a job of twelve images, takes its parts away again, and makes the order for one
    device of it.
    """
    settings = job(jpegs(12), shard_size=4)
    run.run(settings)
    paths = JobPaths(tmp_path / "out")
    (tmp_path / "done").mkdir()
    for part in paths.predictions.iterdir():
        part.rename(tmp_path / "done" / part.name)
    frozen = OpenJob.open(paths.root).frozen
    files.write_whole(paths.launch, b"the launch")

    def make(**changes: Any) -> Assignment:
        values: dict[str, Any] = {
            "job": frozen.job,
            "device": DEVICE,
            "place": place_on(512),
            "launch": "the launch",
            "plan_nonces": ("",),
            "sources": frozen.job.sources,
            "model": provisioning.model_files(frozen.job),
            "samples": provisioning.sample_images(frozen.job, plan.shards(paths.plan)),
        }
        return Assignment(**(values | changes))

    return make


@pytest.fixture
def opened() -> Iterator[Callable[..., NodeAgent]]:
    """Makes node agents that end with the test."""
    made: list[NodeAgent] = []

    def make(*arguments: Any) -> NodeAgent:
        made.append(NodeAgent(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def exchange(one: NodeAgent, wanted: type, *first: Any) -> list[Any]:
    """Exchange messages until one of a kind has come; return all that came."""
    found: list[Any] = []
    messages = first

    def turned() -> bool:
        nonlocal messages
        report = one.turn(messages, 0.05)
        messages = ()
        found.extend(report.messages)
        return any(isinstance(message, wanted) for message in report.messages)

    helpers.until(turned)
    return found


def test_a_node_agent_commits_the_parts_of_a_local_run(
    order: Orders, opened: Callable[..., NodeAgent], left: Any, tmp_path: Path
) -> None:
    """Lease by lease, by the same worker process; a killed one is reported, and started again when
    that is asked for.
    """
    one = opened(order())
    (ready,) = exchange(one, protocol.Ready)
    assert isinstance(ready, protocol.Ready)
    assert [type(message) for message in exchange(one, protocol.Want, Lease(left()[0]))] == [
        protocol.Want
    ]
    ended = exchange(one, protocol.Idle, protocol.Pause())
    assert [message.receipt.shard for message in ended if isinstance(message, protocol.Done)] == [0]
    assert one.turn((), 0.0).status.rows == 4
    one._worker._child.kill()  # type: ignore[union-attr]
    (died,) = exchange(one, Died)
    assert (died.reason, died.timed_out) == ("was killed by SIGKILL", ())
    assert "null#0.log" in died.log_tail
    exchange(one, protocol.Ready, Restart())
    for shard in left()[1:]:
        exchange(one, protocol.Want, Lease(shard))
        exchange(one, protocol.Idle, protocol.Pause())
    one.end()
    parts = {path.name: path.read_bytes() for path in (tmp_path / "out" / "predictions").iterdir()}
    assert parts == {path.name: path.read_bytes() for path in (tmp_path / "done").iterdir()}


def test_an_output_that_is_another_folder_is_refused(order: Orders, tmp_path: Path) -> None:
    """Which path, which node, why, and what to do: where the launch's file is missing, and where
    another launch's lies.
    """
    remedy = (
        r"Give an --output on storage that all nodes share, under the same path, or in an object"
        r" store \(s3://…\)\."
    )
    where = (
        rf"--output {tmp_path}/out on node alien \(01234567\) is not what it is on the launcher's"
    )
    with pytest.raises(OutputError, match=rf"{where}: it holds another launch\. {remedy}"):
        NodeAgent(order(launch="a later launch"))
    made = order()
    JobPaths(tmp_path / "out").launch.unlink()
    with pytest.raises(OutputError, match=rf"{where}: No such file or directory\. {remedy}"):
        NodeAgent(made)


def test_sources_that_are_not_the_launchers_are_refused(order: Orders, tmp_path: Path) -> None:
    """A folder that is not there, an image that is missing in it, and one that is another image."""
    made, folder = order(), tmp_path / "images"
    remedy = (
        r"Put it on storage that all nodes share, under the same path, or into an object store"
        r" \(s3://…\)\."
    )
    differs = rf"source {folder} on node alien \(01234567\) is not what it is on the launcher's"
    kept = (folder / "000.jpg").read_bytes()
    (folder / "000.jpg").write_bytes(sample_images.jpeg(seed=99))
    with pytest.raises(WorkerError, match=rf"{differs}: 000\.jpg is another image\. {remedy}"):
        NodeAgent(made)
    (folder / "000.jpg").unlink()
    with pytest.raises(WorkerError, match=rf"{differs}: 000\.jpg: .*\. {remedy}"):
        NodeAgent(made)
    (folder / "000.jpg").write_bytes(kept)
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        WorkerError, match=rf"node alien \(01234567\): source {folder} cannot be read: .* {remedy}"
    ):
        NodeAgent(made)


def test_images_that_the_launcher_cannot_read_are_no_sample(
    order: Orders, left: Any, tmp_path: Path
) -> None:
    """They are rows like any others, and say nothing about a node."""
    made = order()
    assert len(made.samples) == 3
    (tmp_path / "images" / "000.jpg").unlink()
    assert [sample.path for sample in provisioning.sample_images(made.job, left())] == [
        b"004.jpg",
        b"008.jpg",
    ]


def with_model(job: Job, file: Path) -> Job:
    return replace(job, session=replace(job.session, model_file=str(file)))


def test_a_model_that_a_node_does_not_have_comes_once_and_is_checked(
    order: Orders, opened: Callable[..., NodeAgent], tmp_path: Path
) -> None:
    """It is in the node's cache by its hash afterwards, where the next agent finds it; other
    bytes are refused, with both hashes.
    """
    made = order()
    content = memoryview(Path(made.job.session.model_file).read_bytes())
    there = replace(made, job=with_model(made.job, tmp_path / "not here" / "model.onnx"))
    assert opened(there).lacks_model
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(
        ModelError,
        match=(
            rf"model\.onnx came to node alien \(01234567\) with the sha256 {wrong}, the job's is"
            rf" {made.model[0].sha256}\. Repeat"
        ),
    ):
        NodeAgent(there, [memoryview(b"other")])
    assert not opened(there, [content]).lacks_model
    (found,) = (tmp_path / "cache" / "imagemill" / "delivered").glob("*/model.onnx")
    assert found.read_bytes() == content
    again = opened(there)
    assert not again.lacks_model
    assert (again._job.session.model_file, again._job.session.cache_dir) == (
        str(found),
        str(found.parent / "compiled"),
    )  # type: ignore[union-attr]
    exchange(again, protocol.Ready)
    found.write_bytes(b"damaged since")
    assert opened(there).lacks_model


def test_a_variants_weights_travel_with_it(tmp_path: Path, order: Orders) -> None:
    """OpenVINO's two files, and the weights of a model above 2 GiB."""
    job = order().job
    for name in ("int8-abc.xml", "int8-abc.bin", "big.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(name.encode())

    def files(name: str) -> list[str]:
        return [file.name for file in provisioning.model_files(with_model(job, tmp_path / name))]

    assert files("int8-abc.xml") == ["int8-abc.xml", "int8-abc.bin"]
    assert files("big.onnx") == ["big.onnx", "model.onnx.data"]
    assert provisioning.model_files(with_model(job, tmp_path / "int8-abc.xml"))[1] == ModelFile(
        "int8-abc.bin", hashlib.sha256(b"int8-abc.bin").hexdigest()
    )


@pytest.mark.parametrize(
    ("cpus", "processes", "index", "cores", "expected", "floating"),
    [
        (4, 1, 0, 4, (10, 11, 12, 13), False),
        (4, 2, 1, 2, (12, 13), False),
        (8, 3, 2, 2, (13,), False),
        (2, 1, 0, 2, (10, 11), True),
        (1, 2, 1, 1, (10,), True),
    ],
)
def test_a_worker_keeps_to_its_cores_only_where_the_node_is_ours(
    order: Orders,
    opened: Callable[..., NodeAgent],
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    processes: int,
    index: int,
    cores: int,
    expected: tuple[int, ...],
    floating: bool,
) -> None:
    """A node that gives Ray all four cores has them split as a local run splits them; of one that
    gives some, so many are used, any.
    """
    monkeypatch.setattr(node_agent.cpu, "usable_cores", lambda: [10, 11, 12, 13])
    device = replace(DEVICE, cores=tuple(range(cores)))
    one = opened(order(place=place_on(cpus, processes, index), device=device))
    assert (one._device.cores, one._device.floating) == (expected, floating)


@pytest.mark.parametrize("allow_mixed", [False, True])
def test_nodes_are_compared_with_the_machine_that_processed_the_job_before(
    order: Orders, tmp_path: Path, allow_mixed: bool
) -> None:
    """As in a job that was started here and is continued, or appended to, on a cluster."""
    order()
    job = OpenJob.open(tmp_path / "out")
    job = replace(job, first=replace(job.first, vector_units="avx2"))
    checks = provisioning.Provisioning(None, job, [], ("null",), allow_mixed=allow_mixed)
    same = node_agent.identity(("null",))
    checks.check("a (1)", replace(same, vector_units="avx2"))
    with (
        contextlib.nullcontext()
        if allow_mixed
        else pytest.raises(
            DeviceError,
            match=r"node b \(2\) has vector units sse, an earlier machine of this job has avx2: .*mixed",
        )
    ):
        checks.check("b (2)", replace(same, vector_units="sse"))


def test_a_node_whose_answers_may_differ_is_refused(
    order: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both values are named; what mixing may differ in is let through where it is allowed, another
    imagemill never.
    """
    ours = {"imagemill": "1.0", "pillow": "12.0"}
    order()
    job = OpenJob.open(tmp_path / "out")
    job = replace(job, first=replace(job.first, vector_units=""))
    monkeypatch.setattr(provisioning, "identity", lambda _: Identity(ours, "avx512f avx2"))

    def refuse(
        found: dict[str, str], vector_units: str = "avx512f avx2", *, allow_mixed: bool = False
    ) -> None:
        checks = provisioning.Provisioning(None, job, [], ("null",), allow_mixed=allow_mixed)
        checks.check("a (1)", Identity(ours, "avx512f avx2"))
        checks.check("b (2)", Identity(found, vector_units))

    refuse(ours | {"more": "1"})
    with pytest.raises(
        DeviceError,
        match=r"node b \(2\) has pillow 11\.0, this machine has 12\.0: their answers may differ\. "
        r"Install the same on both, or add --allow-mixed\.",
    ):
        refuse(ours | {"pillow": "11.0"})
    with pytest.raises(DeviceError, match=r"node b \(2\) has pillow none, this machine has 12\.0"):
        refuse({"imagemill": "1.0"})
    refuse(ours | {"pillow": "11.0"}, allow_mixed=True)
    with pytest.raises(
        DeviceError,
        match=(
            r"has imagemill 0\.9, this machine has 1\.0: their answers may differ\. Install the"
            r" same on both\."
        ),
    ):
        refuse(ours | {"imagemill": "0.9"}, allow_mixed=True)
    with pytest.raises(
        DeviceError,
        match=r"has vector units avx2, .*\. Leave one of them out, or add --allow-mixed\.",
    ):
        refuse(ours, "avx2")


def test_identity_names_what_decides_answers_for_every_backend() -> None:
    """imagemill, the way of decoding, the libraries behind it and the backend's own, and the
    processor's units.
    """
    found = node_agent.identity(("openvino", "null"))
    expected = {"imagemill", "decoder", "pillow", "simplejpeg", "numpy", "openvino"}
    assert set(found.versions) == expected
    assert all(found.versions.values())
    assert found.vector_units
