"""S3, S8 and S9: whether the card computes the right thing, and what its decoder would change."""

from __future__ import annotations

import importlib.util
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from compute import logits_of
from stage import ROOT, Stage, stream_of

from imagemill.pipeline.decoding.decode import decode
from imagemill.records import DeviceSpec, Limits, Precision
from imagemill.system import cpu
from imagemill.system.statistics import wilson


def conformance(stage: Stage) -> None:
    """S3: the tests that need a card, or for the rehearsal one that needs nothing."""
    chosen = ["-m", "gpu"] if stage.card.is_gpu else ["-k", "padding and null"]
    files = ["test_session_conformance.py", "test_cuda.py"][: 2 if stage.card.is_gpu else 1]
    # Other libraries' warnings on that machine are not what is tested here.
    plain = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    paths = [ROOT / "tests" / name for name in files]
    done = stage.command("-m", "pytest", "-q", *plain, *chosen, *paths, code=None)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", done.out.splitlines()[-1])}
    stage.put(tests=counts)
    if done.code:
        raise RuntimeError(f"tests failed: {counts}")


# S8.


def accuracy(stage: Stage) -> None:
    """S8: fp32 on the CPU by ONNX Runtime against every precision on the card."""
    if importlib.util.find_spec("onnxruntime") is None:
        stage.note("not compared: ONNX Runtime is not installed")
        return
    counts = (8, 8) if stage.is_tiny else (1000, 320)
    columns: dict[str, Any] = {}
    for role, model, count in zip(
        ("trained", "large"), (stage.trained, stage.large), counts, strict=True
    ):
        names, pixels = _pixels(stage, model, count)
        expected = _on_cpu(stage, model, pixels)
        answers = {"cpu": expected}
        for precision in (*stage.card.precisions, "tf32"):
            found = _on_card(stage, model, precision, pixels)
            answers[str(precision)] = found
            stage.put(**{f"{role}_{precision}": _compare(found, expected)})
        half = stage.figures[f"{role}_{stage.card.half}"]
        stage.put(**{f"{role}_half_top1": half["top1"]})
        if role == "trained":
            fp32 = stage.figures["trained_fp32"]
            stage.put(fp32_top1=fp32["top1"], fp32_difference=fp32["difference"])
        columns |= _columns(role, names, answers)
    _write(stage.out / "agreement.parquet", columns)


def _pixels(stage: Stage, model: str, count: int) -> tuple[list[str], np.ndarray]:
    """Return the names and the pixels, uint8 (n, height, width, 3), of the first images."""
    recipe, limits = stage.spec(model, Precision.FP32).card.recipe, Limits()
    files = sorted((stage.work / "images").iterdir())[:count]
    with ThreadPoolExecutor(len(cpu.usable_cores())) as pool:
        found = list(pool.map(lambda file: decode(file.read_bytes(), recipe, limits).pixels, files))
    return [file.name for file in files], np.stack([one for one in found if one is not None])


def _on_cpu(stage: Stage, model: str, pixels: np.ndarray) -> np.ndarray:
    from imagemill.pipeline.backends import open_session
    from imagemill.pipeline.stopwatch import Stopwatch

    spec = stage.spec(model, Precision.FP32, 4)
    device = DeviceSpec("cpu#0", "cpu", "onnxruntime", tuple(cpu.usable_cores()))
    session = open_session(spec, device, Stopwatch())
    found = logits_of(session.stream, pixels, 4)
    session.close()
    return found


def _on_card(stage: Stage, model: str, precision: str, pixels: np.ndarray) -> np.ndarray:
    if precision == "tf32":
        runner = stage.runner(stage.spec(model, Precision.FP32), tf32=True)
        found = logits_of(stream_of(runner), pixels, stage.batch)
        runner.close()
        return found
    session = stage.session(stage.spec(model, Precision(precision)))
    found = logits_of(session.stream, pixels, stage.batch)
    session.close()
    return found


def _compare(found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    low, high = wilson(same, len(found))
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    return {
        "images": len(found),
        "top1": same / len(found),
        "low": round(low, 4),
        "high": round(high, 4),
        "difference": float(apart),
    }


def _columns(role: str, names: list[str], answers: dict[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{role}_image": names}
    for name, logits in answers.items():
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        found[f"{role}_{name}_classes"] = order.tolist()
        found[f"{role}_{name}_logits"] = np.take_along_axis(logits, order[:, :2], 1).tolist()
    return found


def _write(file: Path, columns: dict[str, Any]) -> None:
    """Write columns of different length as one table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    longest = max(map(len, columns.values()))
    padded = {name: [*some, *[None] * (longest - len(some))] for name, some in columns.items()}
    pq.write_table(pa.table(padded), file)


# S9.


def jpeg(stage: Stage) -> None:
    """S9: torchvision's decoder on the card: images per second, and pixels that differ from
    simplejpeg's.
    """
    if importlib.util.find_spec("torchvision") is None:
        stage.note("not measured: torchvision is not installed")
        return
    if not stage.card.is_gpu:
        stage.note("not measured: this decoder needs an NVIDIA GPU")
        return
    import simplejpeg
    import torch
    from torchvision.io import decode_jpeg

    files = sorted((stage.work / "images").iterdir())[:256]
    data = [file.read_bytes() for file in files]
    encoded = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in data]
    found = decode_jpeg(encoded[:64], device="cuda")
    apart: list[np.ndarray] = []
    for bytes_, planes in zip(data, found, strict=False):
        ours = simplejpeg.decode_jpeg(bytes_, "RGB").astype(np.int16)
        theirs = planes.permute(1, 2, 0).cpu().numpy()
        if ours.shape == theirs.shape:  # a grey image has one plane there
            apart.append(np.abs(ours - theirs).ravel())
    every = np.concatenate(apart)
    stage.put(
        differing=round(float((every > 0).mean()), 4),
        mean=round(float(every.mean()), 4),
        largest=int(every.max()),
    )
    for size, threads in itertools.product((64, 256), (1, 2, 4)):
        batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]

        def decode_all(batches: Any = batches, threads: int = threads) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda some: decode_jpeg(some, device="cuda"), batches))

        each = stage.seconds(decode_all, 1.0)
        stage.put(images_s={f"batches of {size}, {threads} threads": round(len(data) / each)})
