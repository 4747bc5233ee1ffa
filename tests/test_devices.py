"""Devices: what `--devices` means, and which cores a process may use."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import fill
from imagemill.errors import DeviceError, UsageError
from imagemill.pipeline.backends import devices, offers
from imagemill.pipeline.backends.base import Found
from imagemill.system import cpu


@given(count=st.integers(1, 100), processes=st.integers(1, 130))
def test_cores_are_split_evenly_and_completely(count: int, processes: int) -> None:
    """Each core belongs to one process and shares differ by one at most; more processes than cores
    take turns, one core each.
    """
    cores = [3 * number for number in range(count)]
    shares = cpu.split_cores(cores, processes)
    assert len(shares) == processes
    assert (
        {core for share in shares for core in share} == set(cores) if processes >= count else True
    )
    if processes <= count:
        assert [core for share in shares for core in share] == cores
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_each_item_becomes_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names count on within a kind; the cores of the whole list are split over all of it."""
    monkeypatch.setattr(cpu, "usable_cores", lambda: [0, 1, 2, 5])
    found = devices.resolve("cpu:2+null+cpu@openvino")
    assert [(d.name, d.backend, d.cores) for d in found] == [
        ("cpu#0", "openvino", (0,)),
        ("cpu#1", "openvino", (1,)),
        ("null#0", "null", (2,)),
        ("cpu#2", "openvino", (5,)),
    ]


@pytest.mark.parametrize("cores", [1, 3, 16])
def test_auto_is_one_process_on_all_cores_where_these_are_few(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` and `cpu` mean the same there."""
    monkeypatch.setattr(cpu, "usable_cores", lambda: list(range(cores)))
    assert [d.cores for d in devices.resolve("auto")] == [tuple(range(cores))]
    assert devices.resolve("auto") == devices.resolve("cpu") == devices.resolve("cpu:1")
    assert (
        "--devices auto means this: one process, a stream and a decoding thread on each core"
        in offers.offers()[0]["notes"]
    )


@pytest.mark.parametrize(("cores", "processes"), [(17, 2), (32, 2), (33, 3), (64, 4), (192, 12)])
def test_auto_is_several_processes_where_cores_are_many(
    cores: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 16 cores each: one process alone could not feed more of them. `cpu` stays one."""
    monkeypatch.setattr(cpu, "usable_cores", lambda: list(range(cores)))
    found = devices.resolve("auto")
    assert found == devices.resolve(f"cpu:{processes}")
    assert sorted(core for device in found for core in device.cores) == list(range(cores))
    assert max(len(device.cores) for device in found) <= 16
    assert len(devices.resolve("cpu")) == 1
    assert offers.offers()[0]["notes"][-1].startswith(
        f"--devices auto means cpu:{processes}: a process for every 16 cores, "
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is not a device. Write auto, cpu, cpu:N, cuda:I,J or ipu:N, joined by +."),
        ("cpu:", "'cpu:' is not a device."),
        ("cpu:x", "'cpu:x' is not a device."),
        ("cpu+", "'' is not a device."),
        ("CPU", "'CPU' is not a device."),
        ("cpu:-1", "'cpu:-1' is not a device."),
        ("tpu", "'tpu' is not a kind of device. Known: auto, cpu"),
        ("cpu:0", "cpu:N takes one number from 1 to 512, not 0."),
        ("cpu:513", "cpu:N takes one number from 1 to 512, not 513."),
        ("cpu:1,2", "cpu:N takes one number from 1 to 512, not 1,2."),
        ("cpu@tensorrt", "cpu has no backend 'tensorrt'. Known: openvino, torch, onnxruntime"),
        ("cuda:0@openvino", "cuda has no backend 'openvino'. Known: torch, onnxruntime."),
        ("cuda:0,", "cuda:I,J takes ids from 0 to 511, joined by commas, not 0,."),
        ("gpu:512", "gpu:I,J takes ids from 0 to 511, joined by commas, not 512."),
        ("ipu:1,2", "ipu:N takes one number from 1 to 512, not 1,2."),
    ],
)
def test_a_misspelt_device_is_wrong_usage_that_names_it(spec: str, message: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UsageError, match=re.escape(f"--devices {spec}: {message}")):
        devices.resolve(spec)


def compiled(folder: Path, name: str, source: str) -> None:
    """Make a shared library of C code."""
    (folder / "code.c").write_text(source)
    compiler = shlex.split(sysconfig.get_config_var("CC"))[0]
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / name, folder / "code.c"], check=True
    )


def stub_driver(folder: Path, gpus: int, code: int = 0) -> dict[str, str]:
    """An environment whose NVIDIA driver shows so many GPUs: a shared library with the calls that
    are made, compiled here. The UUID of GPU N is N in every byte.
    """
    folder.mkdir()
    source = f"""
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) {{ return {code}; }}
int cuDeviceGetCount(int *count) {{ *count = {gpus}; return 0; }}
int cuDeviceGetName(char *name, int size, int number) {{
    return snprintf(name, size, "Stub GPU %d", number) < 0;
}}
int cuDeviceGetAttribute(int *value, int attribute, int number) {{
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 37 ? 5120 : -1;
    return attribute == 36;
}}
int cuDeviceGetUuid(char *uuid, int number) {{ memset(uuid, number, 16); return 0; }}
"""
    compiled(folder, "libcuda.so.1", source)
    return helpers.environment(LD_LIBRARY_PATH=str(folder))


def ask(program: str, env: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


NVIDIA = (
    "from imagemill.pipeline.backends.nvidia import find_gpus; found = find_gpus();"
    " print(found.devices, found.missing)"
)


NVML = """
#include <stdio.h>
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    if (strcmp(uuid, "%s-01010101-0101-0101-0101-010101010101")) return 6;
    *device = (void *)7;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *sizes) {
    if (device != (void *)7) return 2;
    sizes[0] = 24000000000ULL; sizes[1] = 5000000000ULL; sizes[2] = 19000000000ULL;
    return 0;
}
"""
"""NVML of one GPU whose UUID is all ones, with 5 of 24 GB free."""


@pytest.mark.process
@pytest.mark.parametrize("prefix", ["GPU", "MIG"])
def test_the_free_memory_of_a_gpu_is_the_drivers_answer(tmp_path: Path, prefix: str) -> None:
    """Looked up by UUID, for a whole GPU or a part; None if the driver does not tell."""
    program = "from imagemill.pipeline.backends.nvidia import free_memory as f; print(f(1), f(0))"
    env = stub_driver(tmp_path / "stub", 2)
    assert ask(program, env) == "None None"
    compiled(tmp_path / "stub", "libnvidia-ml.so.1", NVML % prefix)
    assert ask(program, env) == "5000000000 None"
    assert ask(program, helpers.environment()) == "None None"


@pytest.mark.process
def test_nvidia_gpus_are_those_that_the_driver_shows(tmp_path: Path) -> None:
    """Asked of the driver itself, so that no toolkit is needed and CUDA_VISIBLE_DEVICES counts."""
    assert (
        ask(NVIDIA, stub_driver(tmp_path / "two", 2))
        == "('Stub GPU 0 (132 SMs)', 'Stub GPU 1 (132 SMs)') None"
    )
    assert "No NVIDIA GPU: the driver shows none." in ask(NVIDIA, stub_driver(tmp_path / "none", 0))
    assert "No NVIDIA GPU: the driver answers with error 100." in ask(
        NVIDIA, stub_driver(tmp_path / "ill", 1, code=100)
    )


@pytest.mark.process
def test_the_traits_of_a_gpu_are_the_drivers_answer(tmp_path: Path) -> None:
    """An attribute that the driver does not know counts as nothing."""
    program = "from imagemill.pipeline.backends.nvidia import traits; print(traits(0))"
    found = ask(program, stub_driver(tmp_path / "stub", 1))
    assert found == "Traits(capability=(9, 0), rank=(0, 132))"


@pytest.mark.process
def test_a_driver_without_its_provider_is_not_enough(tmp_path: Path) -> None:
    """`devices` names the library that lacks, and the line to type; `run` ends with the same. The
    driver is found by processes that start with LD_LIBRARY_PATH alone.
    """
    imagemill = helpers.imagemill_cli
    env = stub_driver(tmp_path / "driver", 1) | {"IMAGEMILL_MODELS": str(tmp_path / "none")}
    shown = {
        offer["devices"]: offer for offer in imagemill("devices", "--json", env=env).json["devices"]
    }
    missing = shown["cuda"]["missing"]
    assert missing.startswith(("PyTorch is not installed", "The installed PyTorch has no CUDA"))
    assert missing.endswith("pip install 'imagemill[torch]'.")
    for spec in ("cuda:0", "cuda:0@onnxruntime"):
        if spec.endswith("onnxruntime"):
            missing = (
                f"The installed ONNX Runtime {metadata.version('onnxruntime')} has no"
                " CUDAExecutionProvider. Exactly one of its wheels may be installed: pip uninstall"
                " -y onnxruntime, then pip install 'imagemill[cuda]'."
            )
        ended = imagemill("run", tmp_path, "--output", tmp_path / "out", "--devices", spec, env=env)
        assert (ended.code, ended.err) == (
            1,
            f"imagemill: --devices {spec}: {missing} Until then: --devices cpu.\n",
        )


@pytest.mark.parametrize(
    ("spec", "what", "remedy"),
    [
        (
            "cuda:0@onnxruntime",
            "No NVIDIA driver: libcuda.so.1 cannot be loaded",
            "pip install 'imagemill[cuda]'",
        ),
        ("cuda", "No NVIDIA driver", "`nvidia-smi` must list the GPU"),
        ("ipu:1", "popart", "enable.sh"),
        ("gpu:0", "OpenVINO finds no GPU (it finds: CPU)", "Install Intel's compute driver"),
        ("gpu", "OpenVINO finds no GPU", "For an NVIDIA GPU: --devices cuda."),
        ("npu", "OpenVINO finds no NPU (it finds: CPU)", "Install Intel's NPU driver"),
        ("rocm:0", "has no MIGraphXExecutionProvider", "onnxruntime-migraphx"),
        ("cpu+ipu:8", "popart", "enable.sh"),
    ],
)
def test_a_device_that_is_not_here_ends_the_run_before_anything_is_listed(
    tmp_path: Path, imagemill: Callable[..., helpers.Result], spec: str, what: str, remedy: str
) -> None:
    """Exit 1 and one line: what is missing, and what to type. Nothing is written, and no source is
    looked at.
    """
    ended = imagemill(
        "run", tmp_path / "no-such-folder", "--output", tmp_path / "out", "--devices", spec
    )
    assert ended.code == 1
    assert ended.err.startswith(f"imagemill: --devices {spec}: ")
    assert ended.err.count("\n") == 1
    assert what in ended.err
    assert remedy in ended.err
    assert ended.err.endswith("Until then: --devices cpu.\n")
    assert not list(tmp_path.iterdir())


def found(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Every accelerator that is looked for is here, under these names."""
    monkeypatch.setattr(devices, "look_for", lambda _backend, _kind: Found(names))


def test_accelerators_are_named_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` is all of them, `cuda:I,J` these; `ipu:N` is so many; names carry the id, and the
    engine tells backends apart.
    """
    found(monkeypatch, "one", "two", "three")
    assert [(d.name, d.backend, d.id) for d in devices.resolve("cuda")] == [
        (f"cuda#{i}", "torch", i) for i in range(3)
    ]
    mixed = devices.resolve("cuda:2,0+gpu:1+ipu:2+cuda:1@onnxruntime+cpu@onnxruntime")
    assert [(d.name, d.engine, d.id) for d in mixed] == [
        ("cuda#2", "torch:cuda", 2),
        ("cuda#0", "torch:cuda", 0),
        ("gpu#1", "openvino:gpu", 1),
        ("ipu#0", "popart:ipu", 0),
        ("ipu#1", "popart:ipu", 1),
        ("cuda#1", "onnxruntime:cuda", 1),
        ("cpu#0", "onnxruntime", 0),
    ]


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("cuda:3", DeviceError, "there is no cuda 3 here; there are: 0 (one), 1 (two), 2 (three)."),
        ("cuda:1,1", UsageError, "cuda 1 is named twice."),
        ("cuda+cuda:0@onnxruntime", UsageError, "cuda 0 is named twice."),
    ],
)
def test_an_id_that_is_not_here_or_taken_is_refused(
    monkeypatch: pytest.MonkeyPatch, spec: str, kind: type[Exception], message: str
) -> None:
    """Two processes on one device would only take its memory from each other."""
    found(monkeypatch, "one", "two", "three")
    with pytest.raises(kind, match=re.escape(f"--devices {spec}: {message}")):
        devices.resolve(spec)


def test_a_library_that_fails_at_looking_is_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broken installation is one line, never a traceback, and does not hide the other devices."""

    def broken(_backend: str, _kind: str) -> Found:
        raise OSError("libfoo.so: version GLIBC_9.9 not found")

    monkeypatch.setattr(devices, "look_for", broken)
    with pytest.raises(
        DeviceError,
        match=r"Looking for NVIDIA GPUs by torch failed: OSError: libfoo\.so: version",
    ):
        devices.resolve("cuda:0")
    assert {offer["devices"] for offer in offers.offers()} >= {"cpu", "cuda", "gpu", "npu", "ipu"}


@pytest.mark.parametrize(
    ("spec", "setting", "message"),
    [
        (
            "cpu+cpu@onnxruntime",
            "int8",
            "--precision int8: cpu@onnxruntime does not compute in it. Use --precision fp32.",
        ),
        (
            "cpu@onnxruntime",
            "bf16",
            "--precision bf16: cpu@onnxruntime does not compute in it. Use --precision fp32.",
        ),
        (
            "cpu",
            "fp16",
            (
                "--precision fp16: cpu@openvino does not compute in it. Use --precision fp32 or"
                " bf16 or int8."
            ),
        ),
        (
            "npu",
            None,
            (
                "--precision auto starts from fp32: npu@openvino does not compute in it. Use"
                " --precision fp16."
            ),
        ),
        (
            "npu+cpu",
            "auto",
            (
                "--precision auto starts from fp32: npu@openvino does not compute in it. The"
                " devices share no precision"
            ),
        ),
    ],
)
def test_a_precision_is_one_that_all_devices_compute_in(
    monkeypatch: pytest.MonkeyPatch, spec: str, setting: str | None, message: str
) -> None:
    """Accuracy is never traded silently: what cannot be computed is refused by name, before
    anything is listed.
    """
    found(monkeypatch, "one")
    with pytest.raises(UsageError, match=re.escape(message)):
        devices.check_precision(setting, devices.resolve(spec))


@pytest.mark.parametrize(
    ("spec", "all_compute"),
    [
        ("cpu", "fp32 bf16 int8"),
        ("cpu+cpu@onnxruntime", "fp32"),
        ("gpu+cuda", "fp32 fp16"),
    ],
)
def test_the_precisions_of_several_devices_are_those_they_share(
    monkeypatch: pytest.MonkeyPatch, spec: str, all_compute: str
) -> None:
    """In the order of `Precision`."""
    found(monkeypatch, "one")
    assert list(devices.precisions(devices.resolve(spec))) == all_compute.split()


def quota(tmp_path: Path, membership: str, files: dict[str, str]) -> float | None:
    fill(tmp_path / "cgroup", {name: text.encode() for name, text in files.items()})
    (tmp_path / "membership").write_text(membership)
    return cpu.cgroup_quota(tmp_path / "cgroup", tmp_path / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        (
            "0::/a/b\n",
            {
                "a/b/cpu.max": "800000 100000\n",
                "a/cpu.max": "200000 100000\n",
                "cpu.max": "max 100000",
            },
            2.0,
        ),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {}, None),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", {"a/cpu.max": "rubbish\n"}, None),
        (
            "4:memory:/x\n2:cpu,cpuacct:/x\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            "2:cpu:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        (
            "3:cpuset:/x\n",
            {"cpuset/x/cpu.cfs_quota_us": "1", "cpuset/x/cpu.cfs_period_us": "1"},
            None,
        ),
    ],
)
def test_the_cgroups_limit_is_the_least_of_its_ancestors(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    """Version 2 and version 1; no limit, and no readable limit, are none."""
    assert quota(tmp_path, membership, files) == expected


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    """Other systems have no such file."""
    assert cpu.cgroup_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, [2, 3, 7]), (2.0, [2, 3]), (1.2, [2, 3]), (0.3, [2]), (99.0, [2, 3, 7])],
)
def test_usable_cores_are_the_affinity_cut_to_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: list[int]
) -> None:
    """Cores this process may not use are never handed to a worker, and at least one is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 3}, raising=False)
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: limit)
    assert cpu.usable_cores() == expected


def test_offers_say_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every offer that is usable names a `--devices` argument that resolves; every other one says
    what is missing.
    """
    assert [offer["devices"] for offer in offers.offers() if not offer["missing"]] == ["cpu"]
    found(monkeypatch, "one", "two")
    shown = {offer["devices"]: offer for offer in offers.offers()}
    assert {"cpu", "cuda:0,1", "gpu:0,1", "npu:0,1", "ipu:1"} <= set(shown)
    assert all(devices.resolve(typed) for typed in shown)
    assert all(offer["what"] and offer["missing"] is None for offer in shown.values())


@pytest.mark.parametrize(
    ("flags", "backend", "automatic"),
    [
        (
            {"amx_int8", "amx_bf16", "avx512_vnni"},
            "openvino: fp32, int8 by amx_int8, bf16 by amx_bf16",
            "int8, else bf16, if the model",
        ),
        ({"avx512_vnni"}, "openvino: fp32, int8 by avx512_vnni", "int8, if the model"),
        (
            {"avx512_vnni", "avx512_bf16"},
            "openvino: fp32, int8 by avx512_vnni, bf16 by avx512_bf16",
            "int8, else bf16, if the model",
        ),
        ({"avx2"}, "openvino: fp32", "fp32: this processor has no units"),
    ],
)
def test_the_cpu_says_what_it_would_use_and_why(
    flags: set[str], backend: str, automatic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    notes = offers.offers()[0]["notes"]
    assert f"backend {backend}" in notes
    assert any(note.startswith(f"--precision auto means {automatic}") for note in notes)


def test_processor_is_read_from_either_kind_of_cpuinfo(tmp_path: Path) -> None:
    """x86 says flags, arm64 says Features; where there is no such file nothing is made up."""
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor : 0\nmodel name : A CPU\nflags : fpu avx2 amx_bf16\n")
    arm.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert cpu.flags(x86) == {"fpu", "avx2", "amx_bf16"}
    assert cpu.name(x86) == "A CPU"
    assert "asimd" in cpu.flags(arm)
    assert cpu.name(arm) == platform.machine()
    assert cpu.flags(tmp_path / "none") == set()
