"""Jobs on an NVIDIA GPU, with a stand-in for the driver and for `torch.cuda` in every process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import helpers
import sample_images
from tiny import SIZE

pytest.importorskip("torch", reason="needs torch")
from test_torch_session import overflowing

pytestmark = pytest.mark.process

WHITE = (255, 255, 255)
STANDIN = """
import sys
from pathlib import Path
from imagemill.pipeline.backends import nvidia
from imagemill.pipeline.backends.base import Found
from imagemill.pipeline.backends.torch import session
from imagemill.runner import attempts

nvidia.find_gpus = session.find_gpus = lambda: Found(("Stand-in (132 SMs)",))
nvidia.traits = lambda number: nvidia.Traits((9, 0), (1, 132))
nvidia.free_memory = lambda number: 8 * 10**9
session._missing = lambda kind: None
attempts.WAIT_S = attempts._PAUSE_S = 0.0
from imagemill.pipeline.backends import automatic
automatic.WORTHWHILE = 5

if "imagemill.workers.worker" in sys.orig_argv:
    import torch
    import cuda_standin
    from imagemill.pipeline.backends.torch import cuda, program

    class Runner(cuda.CudaRunner):
        def __init__(self, program, shape, *rest, **settings):
            if shape[0] > int(Path(__file__).with_name("fits").read_text()):
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(program, shape, *rest, **settings)

    # An image that overflows fp16 has a program of its own, so twice this is needed.
    program.Program.memory = lambda program, width: 1_450_000_000
    cuda.CudaRunner = Runner
    cuda.prepare = lambda: None
    cuda.open_card = lambda number: (cuda_standin.Cuda(), "cpu")
"""
"""A card with 8 GB, on which batches of as many images have room as the file `fits` says."""


@pytest.mark.large
def test_a_job_that_auto_puts_on_a_gpu_fits_its_batches_to_the_memory(
    imagemill: Callable[..., helpers.Result],
    tmp_path: Path,
) -> None:
    """A new job takes smaller batches and says so; its rows are those of the CPU, also of images
    that overflow fp16, which it counts. A frozen one ends with both figures.
    """
    overflowing(tmp_path / "models")
    helpers.fill(tmp_path / "site", {"sitecustomize.py": STANDIN.encode(), "fits": b"64"})
    paths = (tmp_path / "site", Path(__file__).parent, os.environ.get("PYTHONPATH", ""))
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    env = helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models"), **environment)
    env["PYTHONPATH"] = os.pathsep.join((environment["PYTHONPATH"], str(helpers.SOURCE_ROOT)))
    colours = [(40, 90, 140), (140, 90, 40), (90, 140, 40), (60, 60, 60), (150, 120, 90), WHITE]
    images = {
        f"{number}.png": sample_images.encode(Image.new("RGB", (SIZE, SIZE), colour), "PNG")
        for number, colour in enumerate(colours)
    }
    folder = helpers.fill(tmp_path / "images", images)
    words = ("run", folder, "--model", "over", "--shard-size", 4)
    ours = imagemill(*words, "--output", tmp_path / "ours", "--precision", "fp16", env=env)
    assert ours.code == 0, ours.err
    lines = [line for line in ours.err.splitlines() if "GB" in line]
    assert len(lines) == 1
    assert lines[0].endswith(
        "cuda#0 has 1.2 of 24.0 GB free, and batches of 128 need about 2.9 GB. Starting with"
        " batches of 64."
    )
    frozen = json.loads((tmp_path / "ours" / "job.json").read_text())
    assert frozen["devices"] == "cuda"
    assert frozen["job"]["session"]["batch_size"] == 64
    assert frozen["fixed"]["batch size"] == "64"
    recomputed = json.loads((tmp_path / "ours" / "summary.json").read_text())["recomputed"]
    assert recomputed == 1
    assert "1 image overflowed fp16 and was computed again in fp32" in ours.out
    few = imagemill(*words, "--output", tmp_path / "few", "--limit", 4, env=env)
    assert "Stand-in (132 SMs) is not used: for 4 images its start takes too long." in few.err
    found, expected = helpers.by_path(tmp_path / "ours"), helpers.by_path(tmp_path / "few")
    assert (len(found), len(expected)) == (6, 4)
    assert all(found[path]["label"] == row["label"] for path, row in expected.items())

    (tmp_path / "ours" / "predictions" / "part-000001.parquet").unlink()
    (tmp_path / "site" / "fits").write_text("32")
    frozen_again = imagemill(*words, "--output", tmp_path / "ours", "--devices", "auto", env=env)
    assert frozen_again.code == 1
    assert frozen_again.err.splitlines()[-1] == (
        "imagemill: cuda#0 has 1.2 of 24.0 GB free, and batches of 64 need about 2.9 GB. This job"
        " was frozen with that batch size. Free memory, or give another --output."
    )
