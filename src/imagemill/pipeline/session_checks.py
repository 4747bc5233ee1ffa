"""What a session has to show before its first image: finite answers, and if need be the same answer
at every place of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import BadLogitsError, InexactError
from imagemill.pipeline.top_k import valid_rows
from imagemill.records import Batch, Outputs, Precision, SessionSpec

_log = logging.getLogger(__name__)

_TEST_RANGES: Final = ((0, 256), (0, 64), (192, 256), (96, 160))
"""Pixel values of the random test images: full contrast, dark, bright, grey. A model that fails on
one kind may accept another.
"""


def check_model(
    stream: Callable[[Iterable[Batch]], Iterator[tuple[Batch, Outputs]]], spec: SessionSpec
) -> None:
    """Run a session on random images, normally on one batch of them.

    Args:
        stream: of a session that was opened for the spec.
        spec: its card and precision are named in the error.

    Raises:
        BadLogitsError: the outputs are NaN or infinity for every one of these images.
    """
    shape = (spec.batch_size, spec.card.recipe.height, spec.card.recipe.width, 3)
    rng = np.random.default_rng(0)
    for low, high in _TEST_RANGES:
        batch = Batch(rng.integers(low, high, shape, np.uint8), spec.batch_size, ())
        answers = list(stream([batch]))  # to its end, so that nothing stays in flight
        if any(valid_rows(outputs).any() for _, outputs in answers):
            return
    if spec.precision is Precision.FP32:
        remedy = (
            "Its weights are damaged, or its normalisation (mean, std, scale) is wrong: get the"
            " model again, or use another one."
        )
    else:
        remedy = "Use --precision fp32 and a new --output folder."
    raise BadLogitsError(
        f"{spec.card.name} returns NaN or infinity in {spec.precision} for every image: tried on "
        f"{len(_TEST_RANGES) * spec.batch_size} random images before the first of yours. {remedy}"
    )


def check_exactness(
    stream: Callable[[Iterable[Batch]], Iterator[tuple[Batch, Outputs]]],
    spec: SessionSpec,
    name: str,
    *,
    allow_inexact: bool = False,
) -> None:
    """Compare answers bit for bit: again, at other places, among other neighbours, and one image in
    all places.

    Args:
        stream: of a session that was opened for the spec.
        spec: its batch size and input are used.
        name: of the device, for the message.
        allow_inexact: only log a difference.

    Raises:
        InexactError: an answer differs, and that is not allowed.
    """
    size = spec.batch_size
    shape = (size, spec.card.recipe.height, spec.card.recipe.width, 3)
    rng = np.random.default_rng(1)
    first, other = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
    half = np.arange(size) % 2 == 1
    mixed = first.copy()
    mixed[half] = other[half]
    tried = [first, first, first[::-1], mixed, np.broadcast_to(first[:1], shape)]
    batches = (Batch(pixels.copy(order="C"), size, ()) for pixels in tried)
    found = [_bits(outputs) for _, outputs in stream(batches)]
    expected = found[0]
    differences = {
        "repetition": found[1] != expected,
        "position in the batch": found[2][::-1] != expected,
        "neighbours": (found[3] != expected)[~half],
        "position in a batch of equal images": found[4] != expected[:1],
    }
    changed = {what: rows.any(axis=1).sum() for what, rows in differences.items() if rows.any()}
    if not changed:
        return
    text = (
        f"{name}: answers depend on {' and '.join(changed)} (of {size} random images,"
        f" {max(changed.values())} differ in the last bits)"
    )
    if not allow_inexact:
        raise InexactError(
            f"{text}, so a resumed job would not repeat them. Add --allow-inexact to accept that,"
            " or use another --precision, --batch-size or --devices."
        )
    _log.warning("%s; --allow-inexact accepts that", text)


def _bits(outputs: Outputs) -> NDArray[np.uint8]:
    """Return the bytes of each image's outputs, uint8 (images, bytes)."""
    parts = [outputs.logits, *([] if outputs.embedding is None else [outputs.embedding])]
    rows = np.concatenate([np.ascontiguousarray(part) for part in parts], axis=1)
    return rows.view(np.uint8)
