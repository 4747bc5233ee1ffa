"""What the PyTorch backend computes on an NVIDIA GPU: `pytest -m gpu`, on a machine that has one.

PyTorch is imported by the tests, so that collecting them needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batches import make_spec
from imagemill.models import bundle, get
from imagemill.pipeline.backends import devices, open_session
from imagemill.pipeline.session_checks import check_exactness
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, Precision
from test_models_golden import GOLDEN, MODELS, arrays_of, built_from, recipe

pytestmark = [pytest.mark.gpu, pytest.mark.process]
_SIZE = 16


@pytest.fixture(scope="session")
def resnext50(models_dir: Path) -> Bundle:
    """A network with grouped convolutions, with random weights."""
    return get.get("resnext50_32x4d", models_dir, random_seed=0)


def make(model: Bundle, precision: Precision, size: int = _SIZE) -> Any:
    (device,) = devices.resolve("cuda:0")
    spec = make_spec(model, precision=precision, batch_size=size)
    return open_session(spec, device, Stopwatch()), spec


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_are_met_on_a_card(name: str) -> None:
    """Of all checkpoint families, in fp32: TF32 would miss them."""
    import torch

    from imagemill.pipeline.backends.torch import cuda
    from imagemill.pipeline.backends.torch.program import Loaded, from_model

    cuda.prepare()
    pixels = torch.from_numpy(recipe.pixels())
    program = from_model(built_from(arrays_of(name)), "pixels", pixels, ("logits",))
    with torch.inference_mode():
        (logits,) = Loaded(program, "cuda:0", torch.float32)(pixels.to("cuda:0"))
    expected = np.load(GOLDEN / f"{name}.logits.npy")
    np.testing.assert_allclose(logits.cpu().numpy(), expected, rtol=0, atol=MODELS[name])


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_no_bit_depends_on_place_or_neighbours(resnext50: Bundle, precision: Precision) -> None:
    """In every precision, on a network with all that a ResNeXt has."""
    session, spec = make(resnext50, precision)
    check_exactness(session.stream, spec, "cuda:0")
    session.close()


def test_images_that_overflow_fp16_are_computed_again(models_dir: Path, tiny: Bundle) -> None:
    """On the card, by themselves, and counted."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(tiny.dir / bundle.MODEL)
    for item in model.graph.initializer:
        if item.name in ("w2", "b2"):  # the largest number of fp16 is 65504
            scaled = numpy_helper.to_array(item) * np.float32(1e6)
            item.CopyFrom(numpy_helper.from_array(scaled, item.name))
    bundle.write(models_dir / "overflows", tiny.card, model)
    loud = bundle.load(models_dir / "overflows")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    found = {}
    for precision in (Precision.FP32, Precision.FP16):
        session, _ = make(loud, precision, 4)
        ((_, outputs),) = session.stream([Batch(pixels, 4, ())])
        found[precision] = outputs.logits
        assert session.recomputed == (4 if precision is Precision.FP16 else 0)
        session.close()
    expected = found[Precision.FP32]
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found[Precision.FP16], expected, rtol=0, atol=atol)
