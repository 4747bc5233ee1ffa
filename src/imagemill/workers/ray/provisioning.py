"""What the nodes of a cluster get from the launcher's machine, and what must be the same on all."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from imagemill.errors import DeviceError, ModelError
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.records import BadImage, DeviceSpec, Job, Shard
from imagemill.workers.ray.messages import Assignment, Identity, ModelFile, Sample
from imagemill.workers.ray.node_agent import identity
from imagemill.workers.ray.nodes import Place

_VECTOR_UNITS = "vector units"


class Provisioning:
    """Checks nodes, and makes their assignments. Machines may differ in versions and vector units
    with `allow_mixed`.

    Raises:
        ModelError: the model cannot be read.
    """

    def __init__(
        self,
        ray: Any,
        opened: OpenJob,
        remaining: Sequence[Shard],
        backends: tuple[str, ...],
        *,
        allow_mixed: bool,
    ) -> None:
        self.backends = backends
        self.launch = secrets.token_hex(8)
        """Content of `JobPaths.launch`, by which a node recognises the output."""
        self._ray = ray
        job = self._job = opened.frozen.job
        self._plan_nonces = tuple(opened.plan_nonces)
        self._sources = opened.sources_of(remaining)
        self._allow_mixed = allow_mixed
        self._versions = identity(backends).versions
        known = [found.vector_units for found in opened.generations if found.vector_units]
        self._reference = ("an earlier machine of this job", known[-1]) if known else None
        """A name and its vector units: of what processed the job before, else of the first node.
        The launcher's machine may have no worker.
        """
        self._samples = sample_images(job, remaining) if remaining else ()
        self._model = model_files(job)

    def check(self, node: str, answer: Identity | Mapping[str, str]) -> None:
        """Compare a node with this machine and the first node.

        Raises:
            DeviceError: the node lacks imagemill, or its answers may differ.
        """
        if not isinstance(answer, Identity):
            version = self._versions["imagemill"]
            raise DeviceError(
                f"node {node} cannot import imagemill ({answer['missing']}). Type there: "
                f"{answer['python']} -m pip install 'imagemill[ray]=={version}'"
            )
        first, units = self._reference or (f"node {node}", answer.vector_units)
        found = {_VECTOR_UNITS: answer.vector_units, **answer.versions}
        for key, value in {**self._versions, _VECTOR_UNITS: units}.items():
            actual = found.get(key, "none")
            if actual == value or (self._allow_mixed and key != "imagemill"):
                continue
            other = first if key == _VECTOR_UNITS else "this machine"
            remedy = "Leave one of them out" if key == _VECTOR_UNITS else "Install the same on both"
            mixed = "" if key == "imagemill" else ", or add --allow-mixed"
            raise DeviceError(
                f"node {node} has {key} {actual}, {other} has {value}: their answers may differ."
                f" {remedy}{mixed}."
            )
        self._reference = first, units

    def assignment(self, device: DeviceSpec, place: Place) -> Assignment:
        """Return the assignment for one device."""
        return Assignment(
            job=self._job,
            device=device,
            place=place,
            launch=self.launch,
            plan_nonces=self._plan_nonces,
            sources=self._sources,
            model=self._model,
            samples=self._samples,
        )

    @cached_property
    def model_contents(self) -> list[Any]:
        """References to the model's files in Ray's object store.

        They are put there when the first node lacks them, and each node fetches them once.
        """
        folder = Path(self._job.session.model_file).parent
        return [self._ray.put(np.fromfile(folder / file.name, np.uint8)) for file in self._model]


def sample_images(job: Job, shards: Sequence[Shard]) -> tuple[Sample, ...]:
    """Return a few images, spread over the shards, as this machine reads them. Images that it
    cannot read are left out.
    """
    folder = JobPaths.of(job.output).plan
    opened = sources.open_all(job.sources, index_dir=folder, access=job.access)
    found = []
    for shard in dict.fromkeys((shards[0], shards[len(shards) // 2], shards[-1])):
        row = plan.read(folder, shard)[0]
        try:
            data = opened[row.source].fetch(row.path, row.locator, job.limits.max_bytes)
        except BadImage:
            continue
        found.append(Sample(row.source, row.path, row.locator, hashlib.sha256(data).hexdigest()))
    return tuple(found)


def model_files(job: Job) -> tuple[ModelFile, ...]:
    """Return the files of the job's model, the one to compile first. Raises: ModelError."""
    file = Path(job.session.model_file)
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
