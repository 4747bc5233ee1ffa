"""What `--devices auto` means, depending on the GPUs, the number of images and the precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import helpers
from imagemill.pipeline.backends import automatic, devices, nvidia, offers
from imagemill.pipeline.backends.base import Found
from imagemill.pipeline.backends.nvidia import Traits
from imagemill.system import cpu

H100 = Traits((9, 0), (2_619_000 * 5_120, 132))
T4 = Traits((7, 5), (5_001_000 * 256, 40))
P40 = Traits((6, 1), (3_615_000 * 384, 30))
GB = 10**9


@dataclass
class Machine:
    """The GPUs that the driver shows: name, traits, free memory."""

    gpus: list[tuple[str, Traits, int | None]]
    missing: str | None = None
    """What the backend lacks."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that a test may change."""
    machine = Machine([("H100", H100, 80 * GB)])

    def find_gpus() -> Found:
        return Found(tuple(name for name, _, _ in machine.gpus))

    monkeypatch.setattr(nvidia, "find_gpus", find_gpus)
    monkeypatch.setattr(nvidia, "traits", lambda number: machine.gpus[number][1])
    monkeypatch.setattr(nvidia, "free_memory", lambda number: machine.gpus[number][2])
    monkeypatch.setattr(
        devices,
        "look_for",
        lambda _backend, _kind: Found((), machine.missing) if machine.missing else find_gpus(),
    )
    return machine


def choose(images: int | None = None, precision: str | None = None) -> tuple[str, list[str]]:
    lines: list[str] = []
    return automatic.choose(images, precision, lines.append), lines


@pytest.mark.parametrize(
    ("images", "precision", "expected", "line"),
    [
        (1_000, None, "cuda", None),
        (None, "auto", "cuda", None),
        (10**6, "fp32", "cuda", None),
        (5, "fp16", "cuda", None),
        (
            999,
            "auto",
            "auto",
            "H100 is not used: for 999 images its start takes too long. To use it: --devices cuda",
        ),
        (5, "bf16", "auto", "H100 is not used: for 5 images its start takes too long."),
        (10**6, "int8", "auto", "H100 is not used: it does not compute in int8."),
    ],
)
def test_a_gpu_is_used_if_the_job_is_worth_its_start(
    here: Machine, images: int | None, precision: str | None, expected: str, line: str | None
) -> None:
    """A precision that only one kind of device has decides, whatever the number of images."""
    found, lines = choose(images, precision)
    assert found == expected
    assert len(lines) == (line is not None)
    assert "".join(lines).startswith(line or "")


@pytest.mark.parametrize(
    ("gpus", "expected", "lines"),
    [
        ([("H100", H100, 80 * GB)] * 2, "cuda", []),
        ([("H100", H100, None)], "cuda", []),
        (
            [("T4", T4, 15 * GB), ("H100", H100, 80 * GB), ("H100", H100, 80 * GB)],
            "cuda:1,2",
            [
                "T4 is not used: its last bits differ from those of H100, which is faster. To use"
                " it in a job of its own: --devices cuda:0"
            ],
        ),
        (
            [("P40", P40, 24 * GB)] * 2,
            "auto",
            ["P40 (× 2) are not used: its compute capability is 6.1, and 7.0 is needed."],
        ),
        (
            [("H100", H100, GB // 2), ("H100", H100, 80 * GB)],
            "cuda:1",
            [
                "H100 is not used: 0.5 GB of its memory are free, and 2 are needed. Free memory, or"
                " try it: --devices cuda:0"
            ],
        ),
        (
            [("P40", P40, 24 * GB), ("H100", H100, GB // 2), ("T4", T4, 15 * GB)],
            "cuda:2",
            ["P40 is not used: its compute", "H100 is not used: 0.5 GB of its memory"],
        ),
    ],
)
def test_the_usable_gpus_of_the_best_model_are_used(
    here: Machine, gpus: list[tuple[str, Traits, int | None]], expected: str, lines: list[str]
) -> None:
    """The others get one line each kind, with the reason."""
    here.gpus = gpus
    found, shown = choose(10_000)
    assert found == expected
    assert len(shown) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))


def test_a_gpu_without_a_backend_is_named_with_what_to_type(here: Machine) -> None:
    """One line, and the job runs on the CPU."""
    here.missing = "PyTorch is not installed: pip install 'imagemill[torch]'."
    line = "H100 is not used: PyTorch is not installed: pip install 'imagemill[torch]'."
    assert choose(10_000) == ("auto", [line])
    here.gpus *= 8
    assert choose(10_000) == ("auto", [line.replace("is not used", "(× 8) are not used", 1)])


@pytest.mark.parametrize(
    ("is_card_here", "visible", "lines"),
    [
        (
            True,
            None,
            ["an NVIDIA GPU is not used: No NVIDIA GPU: the driver answers with error 3."],
        ),
        (False, None, []),
        (True, "", []),
    ],
)
def test_a_driver_that_fails_is_reported_if_there_is_a_card(
    monkeypatch: pytest.MonkeyPatch, is_card_here: bool, visible: str | None, lines: list[str]
) -> None:
    """Nothing is printed without a GPU, or if the user has hidden it."""
    missing = "No NVIDIA GPU: the driver answers with error 3."
    monkeypatch.setattr(nvidia, "find_gpus", lambda: Found((), missing))
    monkeypatch.setattr(nvidia, "is_card_here", lambda: is_card_here)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose(10_000) == ("auto", lines)


def test_a_card_is_found_without_a_driver(tmp_path: Path) -> None:
    """By its PCI vendor and class: an NVIDIA network card is no GPU."""
    assert not nvidia.is_card_here(tmp_path / "none")
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x020000")):
        helpers.fill(tmp_path / "pci" / name, {"vendor": vendor.encode(), "class": kind.encode()})
    (tmp_path / "pci" / "c").mkdir()
    assert not nvidia.is_card_here(tmp_path / "pci")
    helpers.fill(tmp_path / "pci" / "d", {"vendor": b"0x10de\n", "class": b"0x030200\n"})
    assert nvidia.is_card_here(tmp_path / "pci")


def test_devices_says_what_auto_means_here(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a usable GPU, and beside one that is not used."""
    monkeypatch.setattr(cpu, "usable_cores", lambda: list(range(4)))
    (note,) = [n for n in offers.offers()[0]["notes"] if n.startswith("--devices auto")]
    assert note == (
        "--devices auto means cuda for jobs of 1,000 images or more, else this: one process, a"
        " stream and a decoding thread on each core"
    )
    here.missing = "PyTorch is not installed: pip install 'imagemill[torch]'."
    assert offers.offers()[0]["notes"][-2:] == [
        "--devices auto means this: one process, a stream and a decoding thread on each core",
        f"H100 is not used: {here.missing}",
    ]
