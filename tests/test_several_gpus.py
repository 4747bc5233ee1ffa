"""Several GPUs: which is which, which cores lie near them, and what their processes see. A stub of
the driver stands in for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batches import make_job, make_spec
from imagemill.bench import pool as bench_pool
from imagemill.pipeline.backends import devices, nvidia
from imagemill.pipeline.backends.base import Found
from imagemill.pipeline.backends.nvidia import Identity
from imagemill.records import Bundle, DeviceSpec
from imagemill.system import cpu
from imagemill.workers import supervisor
from test_devices import ask, compiled, stub_driver

UUID = "%s-01010101-0101-0101-0101-010101010101"
PART = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetUuid(char *uuid, int number) { memset(uuid, 9, 16); return 0; }
int cuDeviceGetUuid_v2(char *uuid, int number) { memset(uuid, 1, 16); return 0; }
int cuDeviceGetPCIBusId(char *text, int size, int number) {
    strncpy(text, "0000:3B:00.0", size);
    return 0;
}
"""
"""A driver that shows a part of a GPU."""
NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { return strcmp(uuid, "%s") != 0; }
"""
"""NVML that knows one UUID."""
PROGRAM = (
    "import json; from imagemill.pipeline.backends.nvidia import identify;"
    " found = identify(1); print(json.dumps(found and [found.uuid, found.pci]))"
)


@pytest.mark.process
def test_a_gpu_is_known_by_the_uuid_that_nvml_knows_too(tmp_path: Path) -> None:
    """Of a part of a GPU, the driver's older call returns the whole one's. A UUID that NVML does
    not know is none, for a process pinned to it would see no GPU.
    """
    whole = stub_driver(tmp_path / "whole", 2)
    assert json.loads(ask(PROGRAM, whole)) is None
    compiled(tmp_path / "whole", "libnvidia-ml.so.1", NVML % (UUID % "GPU"))
    assert json.loads(ask(PROGRAM, whole)) == [UUID % "GPU", ""]
    part = stub_driver(tmp_path / "part", 2)
    compiled(tmp_path / "part", "libcuda.so.1", PART)
    compiled(tmp_path / "part", "libnvidia-ml.so.1", NVML % (UUID % "MIG"))
    assert json.loads(ask(PROGRAM, part)) == [UUID % "MIG", "0000:3b:00.0"]


def near(folder: Path, text: str | None) -> set[int]:
    if text is not None:
        (folder / "0000:3b:00.0").mkdir()
        (folder / "0000:3b:00.0" / "local_cpulist").write_text(text)
    return nvidia.near_cores(Identity("GPU-1", "0000:3b:00.0"), folder)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0-3,8-9\n", {0, 1, 2, 3, 8, 9}),
        ("5\n", {5}),
        ("\n", set()),
        ("rubbish\n", set()),
        (None, set()),
    ],
)
def test_cores_near_a_gpu_are_those_of_its_node(
    tmp_path: Path, text: str | None, cores: set[int]
) -> None:
    """As the kernel lists them; none if it does not."""
    assert near(tmp_path, text) == cores
    assert nvidia.near_cores(None, tmp_path) == set()


LOW, HIGH = range(8), range(8, 16)
"""The cores of two nodes."""


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([[], []], [[*LOW], [*HIGH]]),
        ([HIGH, LOW], [[*HIGH], [*LOW]]),
        ([LOW, LOW], [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        ([HIGH], [[*LOW, *HIGH]]),
        (
            [HIGH, HIGH, LOW, LOW],
            [[8, 9, 10, 11], [12, 13, 14, 15], [0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ([[], HIGH], [[*LOW], [*HIGH]]),
        ([[15], [15], [15]], [[0, 1, 2, 3, 4, 15], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]),
        ([[99]], [[*LOW, *HIGH]]),
    ],
)
def test_near_cores_are_shared_first_and_every_core_is_used(
    places: Sequence[Sequence[int]], expected: list[list[int]]
) -> None:
    """Each process gets as many as without nodes, for decoding needs all of them."""
    found = cpu.share_cores([*LOW, *HIGH], places)
    assert [list(share) for share in found] == expected
    assert sorted(core for share in found for core in share) == [*LOW, *HIGH]


def test_more_gpus_than_cores_take_turns() -> None:
    """Wherever they are."""
    assert cpu.share_cores([4, 5], [[5]] * 3) == [(4,), (5,), (4,)]


def test_resolved_gpus_have_their_uuid_and_the_cores_near_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the number that CUDA shows here, which need not be another process's."""
    monkeypatch.setattr(cpu, "usable_cores", lambda: [*LOW, *HIGH])
    monkeypatch.setattr(devices, "look_for", lambda _backend, _kind: Found(("A card", "A card")))
    monkeypatch.setattr(nvidia, "identify", lambda number: Identity(f"GPU-{number}", str(number)))
    nodes = {"0": set(HIGH), "1": set(LOW)}
    monkeypatch.setattr(nvidia, "near_cores", lambda found: nodes[found.pci] if found else set())
    first, second = devices.resolve("cuda")
    assert (first.uuid, first.id, first.cores) == ("GPU-0", 0, tuple(HIGH))
    assert (second.uuid, second.id, second.cores) == ("GPU-1", 1, tuple(LOW))
    assert devices.resolve("cpu")[0].uuid == ""


class Started:
    """What a process was started with."""

    pid = 1

    def __init__(self, _module: str, *_arguments: object, **given: Any) -> None:
        self.variables, self.connection = given.get("variables"), None
        self.log: Any = given.get("log")
        self.sent: list[Any] = []

    def send(self, message: object) -> None:
        self.sent.append(message)

    def receive(self, _timeout_s: float | None) -> object:
        return bench_pool.Ready()

    def wait(self, _seconds: float) -> None: ...

    def close(self) -> None:
        if self.log:
            self.log.close()


CARD = DeviceSpec("cuda#3", "cuda", "torch", (0,), 3, "A card", uuid="MIG-1")
ALONE = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "MIG-1"}


@pytest.mark.parametrize("what", ["worker", "bench"])
def test_a_gpus_process_sees_no_other_gpu(
    monkeypatch: pytest.MonkeyPatch, tiny: Bundle, tmp_path: Path, what: str
) -> None:
    """Set before it starts, so that no library has counted before; there its GPU has number 0."""
    monkeypatch.setattr(supervisor, "Child", Started)
    monkeypatch.setattr(bench_pool, "Child", Started)
    (tmp_path / "logs").mkdir()

    def started(device: DeviceSpec) -> Started:
        if what == "worker":
            watching = supervisor.Supervisor(make_job(tiny, output=str(tmp_path)), device)
            assert watching.device == device
            watching.close()
            return watching._child  # type: ignore[return-value]
        return bench_pool.MeasuringPool(make_spec(tiny), [device])._members[0].child  # type: ignore[return-value]

    found = started(CARD)
    assert found.variables == ALONE
    assert (found.sent[0].device.id, found.sent[0].device.name) == (0, "cuda#3")
    found = started(DeviceSpec("cuda#3", "cuda", "torch", (0,), 3))
    assert found.variables == {}
    assert found.sent[0].device.id == 3
