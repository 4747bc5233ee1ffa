"""The agent of one device on a node of a cluster. It knows nothing of Ray.

It checks the node, fetches what the node lacks, and supervises the worker there. The launcher, on
another machine, calls `turn` again and again. A turn passes the launcher's messages to the worker
and returns the worker's, as soon as there are any.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from msgspec.structs import replace

from imagemill.errors import ModelError, OutputError, SourceError, WorkerError
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.sources.base import shown
from imagemill.records import BadImage, DeviceSpec, Job, Lease
from imagemill.system import cpu, userdirs
from imagemill.system.files import in_turn, make_folder, reason, write_whole
from imagemill.system.processes import Stop
from imagemill.version import __version__
from imagemill.workers.protocol import Pause
from imagemill.workers.ray.messages import Assignment, Identity, ModelFile, Report, Restart
from imagemill.workers.supervisor import Supervisor

_LOOKS, _LOOK_S = 5, 1.0
"""Shared folders may show a new file some seconds late."""
_END_S = 2.0


def identity(backends: Sequence[str]) -> Identity:
    """Return what decides the last bits of this machine's answers."""
    own = {"imagemill": __version__, "decoder": DECODER}
    units = " ".join(cpu.vector_units(cpu.flags())) or "none known"
    return Identity(own | devices.versions_of(backends), units)


class NodeAgent:
    """Checks its node for a job, and supervises one device's worker there.

    Args:
        assignment: the job and the device.
        contents: the model's files, in the assignment's order, if this machine lacks them.

    Raises:
        ImagemillError: the node cannot take part in the job; says why, and what to do.
    """

    def __init__(self, assignment: Assignment, contents: Sequence[memoryview] = ()) -> None:
        self._assignment = assignment
        self._node = assignment.place.node.name
        self._paths = JobPaths.of(assignment.job.output, assignment.job.log_dir)
        self._store = open_store(self._paths)
        self._worker: Supervisor | None = None
        self._check_output()
        self._store.fetch_plan(assignment.plan_nonces)
        self._check_sources()
        make_folder(self._paths.logs)
        self._device = self._fitted(assignment.device)
        self._job = self._with_model(contents)
        self.lacks_model = self._job is None
        """Whether the model is not on this machine, so that an agent must be made with it."""
        if self._job is not None:
            self._worker = Supervisor(self._job, self._device)

    def turn(self, messages: Sequence[Lease | Pause | Stop | Restart], seconds: float) -> Report:
        """Pass messages to the worker, and return when it has sent some or after `seconds`."""
        assert self._worker is not None
        assert self._job is not None
        for message in messages:
            if isinstance(message, Restart):
                self._worker = Supervisor(self._job, self._device)
            else:
                self._worker.send(message)
        wait([self._worker.connection], timeout=seconds)
        received = tuple(self._worker.receive())
        self._worker.watch()
        return Report(received, self._worker.status())

    def end(self) -> None:
        """Let the worker end by itself, once everything is committed."""
        if self._worker is not None:
            self._worker.send(Stop())
            self._worker.wait(_END_S)
        self.close()

    def close(self) -> None:
        """Kill the worker if it still runs, and publish its log with the results."""
        if self._worker is not None:
            self._worker.close()
        self._store.publish_logs(self._paths.device_log(self._assignment.device.name).name)

    # Checks before the first lease.

    def _check_output(self) -> None:
        for look in range(_LOOKS):
            try:
                if self._store.read(self._paths.launch).decode() == self._assignment.launch:
                    return
                why = "it holds another launch"
            except OSError as error:
                why = reason(error)
            if look + 1 < _LOOKS:
                time.sleep(_LOOK_S)
        raise OutputError(
            f"--output {self._paths.output} on node {self._node} is not what it is on the"
            f" launcher's: {why}. {self._store.share_hint}"
        )

    def _check_sources(self) -> None:
        job, node = self._assignment.job, self._node
        remedy = (
            "Put it on storage that all nodes share, under the same path, or into an object store"
            " (s3://…)."
        )
        try:
            sources.check(self._assignment.sources, job.access)
        except SourceError as error:
            raise WorkerError(f"node {node}: {error} {remedy}") from error
        opened = sources.open_all(job.sources, index_dir=self._paths.plan, access=job.access)
        for image in self._assignment.samples:
            differs = (
                f"source {job.sources[image.source]} on node {node} is not what it is on the"
                " launcher's"
            )
            name = shown(image.path) or "it"
            try:
                data = opened[image.source].fetch(image.path, image.locator, job.limits.max_bytes)
            except BadImage as bad:
                raise WorkerError(f"{differs}: {name}: {bad.error}. {remedy}") from bad
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise WorkerError(f"{differs}: {name} is another image. {remedy}")

    def _fitted(self, device: DeviceSpec) -> DeviceSpec:
        """Return the device with cores of this node."""
        usable, place = cpu.usable_cores(), self._assignment.place
        if int(place.node.resources.get("CPU", 0)) >= len(usable):
            return replace(device, cores=cpu.split_cores(usable, place.of)[place.order])
        return replace(device, cores=tuple(usable[: len(device.cores)]), floating=True)

    # The model.

    def _with_model(self, contents: Sequence[memoryview]) -> Job | None:
        """Return the job with this machine's path of the model; None if it has no copy."""
        job, files = self._assignment.job, self._assignment.model
        if _holds(Path(job.session.model_file).parent, files):
            return job
        key = hashlib.sha256(
            "\n".join(f"{file.name} {file.sha256}" for file in files).encode()
        ).hexdigest()
        folder = userdirs.cache() / "delivered" / key
        with in_turn(folder.with_name(f"{key}.lock")):
            if not _holds(folder, files):
                if not contents:
                    return None
                self._write(folder, contents)
        session = replace(
            job.session, model_file=str(folder / files[0].name), cache_dir=str(folder / "compiled")
        )
        return replace(job, session=session)

    def _write(self, folder: Path, contents: Sequence[memoryview]) -> None:
        make_folder(folder)
        for file, content in zip(self._assignment.model, contents, strict=True):
            found = hashlib.sha256(content).hexdigest()
            if found != file.sha256:
                raise ModelError(
                    f"{file.name} came to node {self._node} with the sha256 {found}, the"
                    f" job's is {file.sha256}. Repeat the command."
                )
            write_whole(folder / file.name, content)


def _holds(folder: Path, files: Sequence[ModelFile]) -> bool:
    """Return whether a folder holds exactly these files."""
    try:
        return all(bundle.sha256(folder / file.name) == file.sha256 for file in files)
    except OSError:
        return False
