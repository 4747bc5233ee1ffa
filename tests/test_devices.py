"""Devices: what `--devices` means, and which cores a process may use."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import fill
from imagemill import devices
from imagemill.errors import DeviceError, UsageError


@given(count=st.integers(1, 100), processes=st.integers(1, 130))
def test_cores_are_split_evenly_and_completely(count: int, processes: int) -> None:
    """Each core belongs to one process and shares differ by one at most; more processes than cores take turns, one core each."""
    cores = [3 * number for number in range(count)]
    shares = devices.split_cores(cores, processes)
    assert len(shares) == processes
    assert {core for share in shares for core in share} == set(cores) if processes >= count else True
    if processes <= count:
        assert [core for share in shares for core in share] == cores
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_each_item_becomes_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names count on within a kind; the cores of the whole list are split over all of it."""
    monkeypatch.setattr(devices, "usable_cores", lambda: [0, 1, 2, 5])
    found = devices.resolve("cpu:2+null+cpu@openvino")
    assert [(d.name, d.backend, d.cores) for d in found] == [
        ("cpu#0", "openvino", (0,)),
        ("cpu#1", "openvino", (1,)),
        ("null#0", "null", (2,)),
        ("cpu#2", "openvino", (5,)),
    ]


def test_auto_is_one_process_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and `cpu` mean the same on a machine without anything else."""
    monkeypatch.setattr(devices, "usable_cores", lambda: [0, 1, 2])
    assert [d.cores for d in devices.resolve("auto")] == [(0, 1, 2)]
    assert devices.resolve("auto") == devices.resolve("cpu") == devices.resolve("cpu:1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is not a device. Write auto, cpu, or cpu:N, joined by +."),
        ("cpu:", "'cpu:' is not a device."),
        ("cpu:x", "'cpu:x' is not a device."),
        ("cpu+", "'' is not a device."),
        ("CPU", "'CPU' is not a device."),
        ("cpu:-1", "'cpu:-1' is not a device."),
        ("tpu", "'tpu' is not a kind of device. Known: auto, cpu"),
        ("cpu:0", "cpu:N takes one number from 1 to 512, not 0."),
        ("cpu:513", "cpu:N takes one number from 1 to 512, not 513."),
        ("cpu:1,2", "cpu:N takes one number from 1 to 512, not 1,2."),
        ("cpu@onnxruntime", "cpu has no backend 'onnxruntime'. Known: openvino"),
    ],
)
def test_a_misspelt_device_is_wrong_usage_that_names_it(spec: str, message: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UsageError, match=re.escape(f"--devices {spec}: {message}")):
        devices.resolve(spec)


@pytest.mark.parametrize("spec", ["cuda:0", "cuda:0,1", "ipu:8", "cpu+ipu:8", "ipu:4@popart"])
def test_a_device_that_is_planned_says_so(spec: str) -> None:
    """GPUs and IPUs end with a clear message, and with what to use instead."""
    with pytest.raises(DeviceError, match=r"not supported by this version of imagemill\. Use --devices cpu\."):
        devices.resolve(spec)


def quota(tmp_path: Path, membership: str, files: dict[str, str]) -> float | None:
    fill(tmp_path / "cgroup", {name: text.encode() for name, text in files.items()})
    (tmp_path / "membership").write_text(membership)
    return devices.cgroup_quota(tmp_path / "cgroup", tmp_path / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "200000 100000\n", "cpu.max": "max 100000"}, 2.0),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {}, None),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", {"a/cpu.max": "rubbish\n"}, None),
        ("4:memory:/x\n2:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 2.5),
        ("2:cpu:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("3:cpuset:/x\n", {"cpuset/x/cpu.cfs_quota_us": "1", "cpuset/x/cpu.cfs_period_us": "1"}, None),
    ],
)
def test_the_cgroups_limit_is_the_least_of_its_ancestors(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    """Version 2 and version 1; no limit, and no readable limit, are none."""
    assert quota(tmp_path, membership, files) == expected


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    """Other systems have no such file."""
    assert devices.cgroup_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(("limit", "expected"), [(None, [2, 3, 7]), (2.0, [2, 3]), (1.2, [2, 3]), (0.3, [2]), (99.0, [2, 3, 7])])
def test_usable_cores_are_the_affinity_cut_to_the_limit(monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: list[int]) -> None:
    """Cores this process may not use are never handed to a worker, and at least one is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 3}, raising=False)
    monkeypatch.setattr(devices, "cgroup_quota", lambda: limit)
    assert devices.usable_cores() == expected


def test_offers_say_what_to_type() -> None:
    """Every offer names a `--devices` argument that resolves."""
    for offer in devices.offers():
        assert devices.resolve(offer["devices"])
        assert offer["what"]


def test_processor_is_read_from_either_kind_of_cpuinfo(tmp_path: Path) -> None:
    """x86 says flags, arm64 says Features; where there is no such file nothing is made up."""
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor : 0\nmodel name : A CPU\nflags : fpu avx2 amx_bf16\n")
    arm.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert devices.processor_flags(x86) == {"fpu", "avx2", "amx_bf16"}
    assert devices.processor_name(x86) == "A CPU"
    assert "asimd" in devices.processor_flags(arm)
    assert devices.processor_flags(tmp_path / "none") == set()
