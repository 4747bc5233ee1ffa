"""One device on a node of a cluster: checks the node, fetches what it lacks, and supervises the
worker there. It knows nothing of Ray.

The launcher, on another machine, asks: `prepare` once, then `turn` again and again. A turn carries
the launcher's words to the worker and what the worker says back, and ends as soon as there is
something to tell.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path

from imagemill.errors import DeviceError, ModelError, OutputError, SourceError
from imagemill.job import plan
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices
from imagemill.pipeline.decoding import DECODER
from imagemill.records import BadImage, DeviceSpec, Job, Lease, Shard
from imagemill.system import cpu
from imagemill.system.files import delivered, in_turn, make_folder, reason, write_whole
from imagemill.system.processes import Failed, Stop
from imagemill.version import __version__
from imagemill.workers import protocol
from imagemill.workers.pool import Died, Told
from imagemill.workers.supervisor import Supervisor

_LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("onnxruntime", "onnxruntime-gpu"),
}
"""Backend → the distributions whose versions decide its answers, as far as they are installed."""
_LOOKS, _LOOK_S = 5, 1.0
"""Shared folders may show a new file some seconds late."""
_SAMPLED = 3
_END_S = 2.0
UNITS = "vector units"
"""Key of `identity` whose value is compared between nodes, not with the launcher's machine, which
may have no worker.
"""


def identity(backends: Sequence[str]) -> dict[str, str]:
    """What of this machine decides the last bits of an answer: versions by name, and the
    processor's vector units.
    """
    found = {"imagemill": __version__, "decoder": DECODER}
    for name in (
        "pillow",
        "simplejpeg",
        "numpy",
        *(library for backend in backends for library in _LIBRARIES.get(backend, ())),
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {UNITS: " ".join(cpu.vector_units(cpu.flags())) or "none known"}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of the model."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A planned image as the launcher's machine reads it."""

    source: int
    """Position of its source."""
    path: bytes
    locator: bytes
    sha256: str
    """Of its encoded bytes."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a station needs to know to begin."""

    node: str
    """Its node, for people."""
    job: Job
    """As it was frozen."""
    device: DeviceSpec
    """Its `cores` are only so many; which they are is found on the node."""
    index: int
    """Which of the node's processes it is."""
    processes: int
    """Of this job on the node."""
    cpus: int
    """That the node gives the cluster."""
    launch: str
    """What `JobPaths.launch` must hold."""
    plan_nonce: str
    model: tuple[ModelFile, ...]
    """The file that is compiled, then those beside it that it reads."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Restart:
    """The worker is to be started again."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one turn."""

    heard: tuple[
        protocol.Ready | protocol.Want | protocol.Idle | protocol.Done | Failed | Died, ...
    ]
    told: Told


def sample(job: Job, shards: Sequence[Shard]) -> tuple[Sample, ...]:
    """A few images, spread over the shards, as this machine reads them; those that it cannot read
    are left out.
    """
    folder = JobPaths.of(job.output).plan
    opened = sources.open_all(job.sources, aside=folder, access=job.access)
    found = []
    for shard in {
        shard.number: shard for shard in (shards[0], shards[len(shards) // 2], shards[-1])
    }.values():
        row = plan.read(folder, shard)[0]
        try:
            data = opened[row.source].fetch(row.path, row.locator, job.limits.max_bytes)
        except BadImage:
            continue
        found.append(Sample(row.source, row.path, row.locator, hashlib.sha256(data).hexdigest()))
    return tuple(found[:_SAMPLED])


def model_files(job: Job) -> tuple[ModelFile, ...]:
    """The files that the job's model consists of, the one that is compiled first. Raises:
    ModelError.
    """
    file = Path(job.model_file)
    beside = [file.with_suffix(".bin")] if file.suffix == ".xml" else [file.with_name(bundle.DATA)]
    try:
        return tuple(
            ModelFile(path.name, bundle.sha256(path))
            for path in (file, *(path for path in beside if path.is_file()))
        )
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror}. Get the model again with imagemill"
            " get-model."
        ) from error


class Station:
    """Watches over one device's worker on this node.

    Args:
        order: what to do.
        contents: the model's files, in the order's order, where this machine turned out to lack
        them.

    Raises:
        ImagemillError: the node is not fit for the job; says which, why, and what to do.
    """

    def __init__(self, order: Order, contents: Sequence[memoryview] = ()) -> None:
        self._order = order
        self._paths = JobPaths.of(order.job.output, order.job.log_dir)
        self._store = open_store(self._paths)
        self._worker: Supervisor | None = None
        self._check_output()
        self._store.fetch_plan(order.plan_nonce)
        self._check_sources()
        make_folder(self._paths.logs)
        self._device = self._fitted(order.device)
        self._job = self._with_model(contents)
        self.lacks_model = self._job is None
        """The model is not on this machine: a station is to be made with its contents."""
        if self._job is not None:
            self._worker = Supervisor(self._job, self._device)

    def turn(
        self, messages: Sequence[Lease | protocol.Pause | Stop | Restart], seconds: float
    ) -> Report:
        """Pass messages on to the worker; return as soon as it said something, or after so long."""
        assert self._worker is not None
        assert self._job is not None
        for message in messages:
            if isinstance(message, Restart):
                self._worker = Supervisor(self._job, self._device)
            else:
                self._worker.send(message)
        wait([self._worker.connection], timeout=seconds)
        heard = tuple(self._worker.hear())
        self._worker.watch()
        return Report(heard, self._worker.told())

    def end(self) -> None:
        """All is done: let the worker end by itself."""
        if self._worker is not None:
            self._worker.send(Stop())
            self._worker.wait(_END_S)
        self.close()

    def close(self) -> None:
        """End the worker, and put its log beside the results."""
        if self._worker is not None:
            self._worker.close()
        self._store.publish_logs(self._paths.device_log(self._order.device.name).name)

    # What is checked before the first lease.

    def _check_output(self) -> None:
        for look in range(_LOOKS):
            try:
                if self._store.read(self._paths.launch).decode() == self._order.launch:
                    return
                why = "it holds another launch"
            except OSError as error:
                why = reason(error)
            if look + 1 < _LOOKS:
                time.sleep(_LOOK_S)
        raise OutputError(
            f"--output {self._paths.output} on node {self._order.node} is not what it is on the"
            f" launcher's: {why}. {self._store.share_hint}"
        )

    def _check_sources(self) -> None:
        job, node = self._order.job, self._order.node
        remedy = (
            "Put it on storage that all nodes share, under the same path, or into an object store"
            " (s3://…)."
        )
        try:
            sources.check(job.sources, job.access)
        except SourceError as error:
            raise SourceError(f"node {node}: {error} {remedy}") from error
        opened = sources.open_all(job.sources, aside=self._paths.plan, access=job.access)
        for image in self._order.samples:
            differs = (
                f"source {job.sources[image.source]} on node {node} is not what it is on the"
                " launcher's"
            )
            name = sources.shown(image.path) or "it"
            try:
                data = opened[image.source].fetch(image.path, image.locator, job.limits.max_bytes)
            except BadImage as bad:
                raise SourceError(f"{differs}: {name}: {bad.error}. {remedy}") from bad
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise SourceError(f"{differs}: {name} is another image. {remedy}")

    def _fitted(self, device: DeviceSpec) -> DeviceSpec:
        """The device with cores of this node."""
        usable = devices.usable_cores()
        if self._order.cpus >= len(usable):
            return replace(
                device, cores=devices.split_cores(usable, self._order.processes)[self._order.index]
            )
        return replace(device, cores=tuple(usable[: len(device.cores)]), floating=True)

    # The model.

    def _with_model(self, contents: Sequence[memoryview]) -> Job | None:
        """The job with the model where this machine has it; None: it has it nowhere."""
        job, files = self._order.job, self._order.model
        if _holds(Path(job.model_file).parent, files):
            return job
        key = hashlib.sha256(
            "\n".join(f"{file.name} {file.sha256}" for file in files).encode()
        ).hexdigest()
        folder = delivered(key)
        with in_turn(folder.with_name(f"{key}.lock")):
            if not _holds(folder, files):
                if not contents:
                    return None
                self._write(folder, contents)
        return replace(
            job, model_file=str(folder / files[0].name), cache_dir=str(folder / "compiled")
        )

    def _write(self, folder: Path, contents: Sequence[memoryview]) -> None:
        make_folder(folder)
        for file, content in zip(self._order.model, contents, strict=True):
            found = hashlib.sha256(content).hexdigest()
            if found != file.sha256:
                raise ModelError(
                    f"{file.name} came to node {self._order.node} with the sha256 {found}, the"
                    f" job's is {file.sha256}. Repeat the command."
                )
            write_whole(folder / file.name, content)


def _holds(folder: Path, files: Sequence[ModelFile]) -> bool:
    """Whether a folder has these very files."""
    try:
        return all(bundle.sha256(folder / file.name) == file.sha256 for file in files)
    except OSError:
        return False


def refuse_other(
    name: str,
    found: Mapping[str, str],
    expected: Mapping[str, str],
    than: str,
    *,
    allow_mixed: bool,
) -> None:
    """Compare what decides the answers of a node with those of another machine.

    Args:
        name: of the node, for people.
        found: its `identity`.
        expected: the other's; keys that it lacks are not compared.
        than: the other, for people.
        allow_mixed: whether all but the version of imagemill itself may differ.

    Raises:
        DeviceError: they differ; names both values.
    """
    for key, value in expected.items():
        other = found.get(key, "none")
        if other == value or (allow_mixed and key != "imagemill"):
            continue
        remedy = (
            "Leave one of them out, or add --allow-mixed."
            if key == UNITS
            else (
                f"Install the same on both{'' if key == 'imagemill' else ', or add --allow-mixed'}."
            )
        )
        raise DeviceError(
            f"node {name} has {key} {other}, {than} has {value}: their answers may differ. {remedy}"
        )
