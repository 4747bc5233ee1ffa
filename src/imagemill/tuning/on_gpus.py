"""The precision that `auto` means on NVIDIA GPUs: fp16, else bf16, if the card keeps fp32's answers
in it and the job gains time from it; else fp32.

Accuracy is never traded for nothing: if fp32 outruns decoding, it stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from imagemill.errors import ImagemillError, Interrupted
from imagemill.models import variants
from imagemill.models.variants import PrecisionRecord
from imagemill.records import Bundle, DeviceSpec, Entry, Precision, SessionSpec
from imagemill.system.messages import Notify
from imagemill.tuning import batch_size, check, check_process
from imagemill.tuning.check import AccuracyCheck
from imagemill.tuning.images import Image

ORDER: Final = (Precision.FP16, Precision.BF16)
_FEWEST: Final = 10_000
"""Images from which an accuracy check may be worthwhile: it takes about 15 s, and a T4 computes
10,000 images of resnext101_32x4d in an estimated 40 s in fp32.
"""
_CHECK_S: Final = 15.0
"""Estimated time of the accuracy check on a GPU: two sessions that start, and 1,000 images."""


def checked(chosen: Sequence[DeviceSpec]) -> tuple[DeviceSpec, ...]:
    """Return the devices if an accuracy check on the first one holds for all of them: if they are
    GPUs of one model, with PyTorch. Else nothing.
    """
    kinds = {(device.kind, device.backend, device.model) for device in chosen}
    is_one = len(kinds) == 1 and chosen[0].engine == "torch:cuda"
    return tuple(chosen) if is_one else ()


def find_accepted(bundle: Bundle, gpu: DeviceSpec) -> tuple[Precision, str]:
    """Return the first precision that was accepted on this model of GPU, else fp32, and a line for
    the user. Nothing is measured.
    """
    records = variants.read(bundle.dir)
    for precision in ORDER:
        record = check.usable(bundle, precision, gpu, records)
        if record and record.comparison.accepted and check.is_fast(record):
            return precision, f"precision {precision}: {record.comparison.reason}"
    return Precision.FP32, "precision fp32"


def choose(
    base: AccuracyCheck, entries: Callable[[], Iterable[Entry]], notify: Notify
) -> tuple[Precision] | tuple[Precision, str]:
    """Return the precision of a job that asks for `auto`, and a line for the user unless the check
    has printed it. An error of the check costs the job nothing but the faster precision.

    Args:
        base: with the job's GPUs and number of images; 0 measures nothing.
        entries: lists the job's images.
        notify: receives lines for the user.
    """
    known = find_accepted(base.bundle, base.gpus[0])
    if not base.images or (base.images < _FEWEST and known[0] is Precision.FP32):
        return known
    spec = SessionSpec("", base.bundle.card, ORDER[0], 0)
    try:
        size = batch_size.resolved(spec, base.gpus).batch_size
        asked = replace(base, precisions=ORDER, batch_size=size).with_sample(entries())
        found = check_process.in_child(asked, notify)
    except Interrupted:
        raise
    except ImagemillError as error:
        return Precision.FP32, f"precision fp32: the accuracy check failed: {error}"
    for name, record in found.items():
        return Precision(name), f"precision {name}: {record.comparison.reason}"
    return (Precision.FP32,)


class GpuRun(check.Run):
    """The accuracy check of a GPU, in the child process."""

    def carry_out(self) -> dict[str, PrecisionRecord]:
        """Return the first precision that is accepted and makes the job faster, or print why there
        is none.
        """
        asked, refused = self._asked, list[str]()
        held_out, decoding = self._held_out_images()
        known = {p: self._decided(p, len(held_out)) for p in asked.precisions}
        fp32 = next((r.fp32_images_per_second for r in known.values() if r), 0.0)
        fp32 = fp32 or self._rate(Precision.FP32)
        reference: NDArray[np.float32] | None = None
        for precision in asked.precisions:
            if self._gain(decoding, fp32, float("inf")) == 0:
                refused.append(
                    f"decoding makes {decoding:,.0f} images/s and fp32"
                    f" {fp32 * len(asked.gpus):,.0f}, so a faster precision would save nothing"
                )
                break
            record = known[precision]
            rate = record.images_per_second if record else self._rate(precision)
            gain = self._gain(decoding, fp32, rate)
            if gain == 0:
                refused.append(f"{precision} is not faster")
                continue
            if record is None and gain < _CHECK_S:
                refused.append(f"{precision} not checked, because that takes longer than it saves")
                continue
            if record is None:
                if reference is None:
                    self._notify(
                        f"checking whether {asked.bundle.card.name} keeps its answers on"
                        f" {asked.gpus[0].model} in {precision} (takes about {_CHECK_S:.0f} s,"
                        f" could save {gain:,.0f} s); later jobs use the result"
                    )
                    reference, _ = self._answers(Precision.FP32, self._onnx, held_out)
                record = self._check(precision, (), held_out, reference, fp32)
                record = replace(record, images_per_second=round(rate, 2))
                name = check.record_name(precision, asked.gpus[0])
                self._now = variants.write(asked.bundle.dir, **{name: record})
            if record.comparison.accepted:
                return {precision.value: record}
            refused.append(f"{precision} is not used: {record.comparison.reason}")
        self._notify("precision fp32: " + ". ".join(refused))
        return {}

    def _decided(self, precision: Precision, images: int) -> PrecisionRecord | None:
        """Return the bundle's record, unless more images are available now and may change it."""
        record = self._usable(precision)
        is_final = record and (record.comparison.accepted or record.comparison.images >= images)
        return record if is_final else None

    def _held_out_images(self) -> tuple[list[Image], float]:
        """Return the images to compare on, and how many per second all cores decode."""
        begun = time.perf_counter()
        images = list(self._decoder.decode(self._rest, self._asked.held_out))
        return images, len(images) / (time.perf_counter() - begun)

    def _gain(self, decoding: float, fp32: float, rate: float) -> float:
        """Return the seconds that the job saves with a precision; 0 if it is hardly faster.

        Args:
            decoding: images/s of all cores.
            fp32: images/s of one GPU.
            rate: images/s of one GPU in the precision.
        """
        images, gpus = self._asked.images or 0, len(self._asked.gpus)
        before, after = min(decoding, gpus * fp32), min(decoding, gpus * rate)
        if not before or after < check.MIN_SPEEDUP * before:
            return 0.0
        return images / before - images / after
