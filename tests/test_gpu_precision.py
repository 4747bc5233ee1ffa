"""`--precision auto` on NVIDIA GPUs: fp16, else bf16, if the card keeps fp32's answers in it and fp32
is slower than decoding. Rates and answers of the card are made up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from imagemill.errors import DeviceMemoryError
from imagemill.models import bundle as bundles
from imagemill.models import variants
from imagemill.records import Bundle, DeviceSpec, Entry, Precision
from imagemill.tuning import accuracy, batch_size, check, check_process, on_gpus, precisions
from imagemill.tuning.images import Image
from tiny import CLASSES, TINY_CARD, tiny_model

FP32, FP16, BF16 = Precision.FP32, Precision.FP16, Precision.BF16
GPU = DeviceSpec("cuda#0", "cuda", "torch", (0, 1), 0, "H100 (132 SMs)")
IMAGES = 8


class Card:
    """A card's rates in images/s, and the share of images with another answer than in fp32."""

    def __init__(self) -> None:
        self.rates = {FP32: 1_000.0, FP16: 4_000.0, BF16: 4_000.0}
        self.decoding = 20_000.0
        self.flips = {FP32: 0, FP16: 0, BF16: 0}
        self.computed: list[Precision] = []
        self.measured: list[Precision] = []
        self.error: Exception | None = None
        self.lines: list[str] = []

    def rate(self, precision: Precision) -> float:
        self.measured.append(precision)
        return self.rates[precision]

    def answers(
        self, precision: Precision, _file: Path, images: list[Image]
    ) -> tuple[np.ndarray, float]:
        if self.error is not None:
            raise self.error
        self.computed.append(precision)
        logits = np.random.default_rng(0).normal(size=(len(images), CLASSES)).astype(np.float32)
        for row in range(self.flips[precision]):
            logits[row] = -logits[row]
        return logits, 0.0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    held_out = [Image("a source", "an image", np.zeros((1, 2, 2, 3), np.uint8))] * IMAGES
    monkeypatch.setattr(check.Run, "_rate", lambda _run, *given: made.rate(*given))
    monkeypatch.setattr(check.Run, "_answers", lambda _run, *given: made.answers(*given))
    monkeypatch.setattr(on_gpus.GpuRun, "_held_out_images", lambda _run: (held_out, made.decoding))
    monkeypatch.setattr(check_process, "in_child", check.carry_out)
    monkeypatch.setattr(accuracy, "MIN_IMAGES", IMAGES)
    monkeypatch.setattr(accuracy, "MIN_AGREEMENT", dict.fromkeys(Precision, 0.5))
    monkeypatch.setattr(batch_size, "rule", lambda *_: 4)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Bundle:
    """A bundle of its own, because results are kept with it."""
    return bundles.write(tmp_path / "tiny", TINY_CARD, tiny_model())


Auto = Callable[..., Precision]


@pytest.fixture
def auto(card: Card, model: Bundle) -> Auto:
    """Returns the precision of a job with a million images."""

    def call(images: int = 10**6, setting: str = "auto", **changes: Any) -> Precision:
        card.computed, card.measured, card.lines = [], [], []
        gpus = changes.pop("chosen", (GPU,))
        entries = [Entry(0, b"%d.jpg" % number, 1) for number in range(3 * IMAGES)]
        found = precisions.prepare(
            setting,
            model,
            ("/images",),
            lambda: entries,
            images,
            chosen=gpus,
            notify=card.lines.append,
        )
        assert found.model_file == model.dir / bundles.MODEL
        return found.precision

    return call


def test_fp16_is_used_if_it_keeps_the_answers_and_saves_time(
    card: Card, model: Bundle, auto: Auto
) -> None:
    """The result is kept for this model of card and these libraries; later jobs only measure how
    fast images are decoded.
    """
    assert auto() is FP16
    assert card.computed == [FP32, FP16]
    assert card.lines[0].startswith(
        "checking whether tiny keeps its answers on H100 (132 SMs) in fp16 (takes about 15 s, could"
        " save 750 s); later jobs use the result"
    )
    assert card.lines[1].startswith("precision fp16: its agreement with fp32 is 1.0000")
    assert len(card.lines) == 2
    assert list(variants.read(model.dir)) == ["fp16 on H100 (132 SMs)"]
    assert auto() is FP16
    assert (card.computed, card.measured, len(card.lines)) == ([], [], 1)
    assert auto(chosen=(replace(GPU, model="T4 (40 SMs)"),)) is FP16
    assert card.computed == [FP32, FP16]


def test_another_version_of_a_library_is_checked_again(
    card: Card, auto: Auto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels differ between versions."""
    computed = []
    for version in ("2.11.0", "2.11.0", "2.12.0"):
        versions = {"torch": version}
        monkeypatch.setattr(check, "library_versions", lambda _, found=versions: found)
        assert auto() is FP16
        computed.append(len(card.computed))
    assert computed == [2, 0, 2]


def test_bf16_is_next_and_fp32_the_last(card: Card, auto: Auto) -> None:
    """Both results are kept."""
    card.flips[FP16] = IMAGES
    assert auto() is BF16
    assert card.computed == [FP32, FP16, BF16]
    assert auto() is BF16
    assert card.computed == []


def test_fp32_stays_if_neither_is_accepted(card: Card, auto: Auto) -> None:
    """One line gives the reasons."""
    card.flips = {FP32: 0, FP16: IMAGES, BF16: IMAGES}
    assert auto() is FP32
    assert card.lines[1].startswith(
        "precision fp32: fp16 is not used: its agreement with fp32 is 0.0000"
    )
    assert ". bf16 is not used: its agreement" in card.lines[1]
    assert auto() is FP32
    assert (card.computed, len(card.lines)) == ([], 1)


@pytest.mark.parametrize(
    ("decoding", "gpus", "expected"),
    [(900.0, 1, FP32), (1_040.0, 1, FP32), (1_200.0, 1, FP16), (1_200.0, 2, FP32)],
)
@pytest.mark.parametrize("is_known", [False, True])
def test_fp32_stays_if_decoding_is_slower_anyway(
    card: Card, auto: Auto, decoding: float, gpus: int, expected: Precision, is_known: bool
) -> None:
    """Also if fp16 was accepted before: accuracy is not traded for nothing."""
    if is_known:
        assert auto() is FP16
    card.decoding = decoding
    chosen = tuple(replace(GPU, name=f"cuda#{number}") for number in range(gpus))
    assert auto(chosen=chosen) is expected
    if expected is FP32:
        assert card.lines == [
            f"precision fp32: decoding makes {decoding:,.0f} images/s and fp32 {1_000 * gpus:,}, so"
            " a faster precision would save nothing"
        ]
        assert card.computed == []


def test_a_precision_that_is_not_faster_or_gains_little_is_not_checked(
    card: Card, auto: Auto
) -> None:
    """Rates are measured, not believed."""
    card.rates |= {FP16: 1_010.0, BF16: 1_300.0}
    assert auto(images=50_000) is FP32
    assert card.lines == [
        "precision fp32: fp16 is not faster. bf16 not checked, because that takes longer than it"
        " saves"
    ]


def test_short_jobs_and_errors_cost_nothing_but_the_precision(
    card: Card, auto: Auto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured for a short job, unless fp16 was accepted before."""
    assert auto(images=9_999) is FP32
    assert (card.measured, card.lines) == ([], ["precision fp32"])
    card.error = DeviceMemoryError("cuda#0 has 0.1 of 24.0 GB free, and batches of 4 need more.")
    assert auto() is FP32
    assert card.lines[-1] == f"precision fp32: the accuracy check failed: {card.error}"
    card.error = None
    assert auto() is FP16
    assert auto(images=9_999) is FP16


def test_what_is_measured_without_a_job_uses_accepted_results(
    card: Card, auto: Auto, model: Bundle
) -> None:
    """As `imagemill.load` and `bench` do; nothing is decoded or computed for it."""
    assert auto(images=0) is FP32
    assert precisions.without_images(None, model, [GPU]).precision is FP32
    auto()
    assert auto(images=0) is FP16
    assert precisions.without_images(None, model, [GPU]).precision is FP16
    assert card.computed == []


@pytest.mark.parametrize("setting", ["fp32", "fp16", "bf16"])
def test_a_precision_that_is_asked_for_is_obeyed(card: Card, auto: Auto, setting: str) -> None:
    """Without a check."""
    assert auto(setting=setting) == setting
    assert (card.computed, card.lines) == ([], [])


@pytest.mark.parametrize(
    "chosen",
    [
        (GPU, replace(GPU, name="cuda#1", model="T4 (40 SMs)")),
        (replace(GPU, backend="onnxruntime"),),
    ],
)
def test_two_models_or_another_backend_are_fp32(
    card: Card, auto: Auto, chosen: tuple[DeviceSpec, ...]
) -> None:
    """A result holds for one model of card, and ONNX Runtime has only fp32 there."""
    assert auto(chosen=chosen) is FP32
    assert card.computed == []


def test_a_check_on_too_few_images_is_repeated_on_more(
    card: Card, auto: Auto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on as many as before."""
    monkeypatch.setattr(accuracy, "MIN_IMAGES", 2 * IMAGES)
    for expected in ([FP32, FP16, BF16], []):
        assert auto() is FP32
        assert card.computed == expected
    more = [Image("a source", "an image", np.zeros((1, 2, 2, 3), np.uint8))] * 2 * IMAGES
    monkeypatch.setattr(on_gpus.GpuRun, "_held_out_images", lambda _run: (more, 20_000.0))
    assert auto() is FP16
    assert card.computed == [FP32, FP16]
