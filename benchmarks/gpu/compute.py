"""S5 to S7 and S12: how fast a session computes, against what, and whether its answers keep."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from limits import memory_limit
from stage import ROOT, Stage, Streaming, allow_tf32, in_batches, noise, shape_of, stream_of

from imagemill.errors import InexactError
from imagemill.pipeline.session_checks import check_exactness
from imagemill.records import Precision, SessionSpec

_ENOUGH = 0.98
"""Share of the best rate from which a smaller batch is as good."""


# S5.


def sessions(stage: Stage) -> None:
    """S5: every precision and batch size; then single settings of the runner beside each other."""
    half = stage.card.half
    sizes = (2, 4) if stage.is_tiny else (64, 128, 512, 32)
    tried = [(half, stage.batch), *((half, size) for size in sizes)]
    tried[1:1] = [(one, stage.batch) for one in stage.card.precisions if one is not half]
    rates: dict[int, tuple[float, float]] = {}
    for precision, size in dict.fromkeys(tried):
        if stage.left() < 15 and not stage.is_tiny:
            stage.note(f"no time left for {precision} in batches of {size}")
            continue
        spec = stage.spec(stage.large, precision, size)
        row = _session(stage, spec)
        stage.put(sessions={f"{precision}, {size}": row})
        if precision is half:
            rates[size] = row["images_s"], row["gb"]
        if (precision, size) == tried[0]:
            _shares(stage, spec, row["images_s"])
            stage.attempt("runners", partial(_runners, stage, spec))
    best = max(rate for rate, _ in rates.values())
    size = min(size for size, (rate, _) in rates.items() if rate >= _ENOUGH * best)
    stage.put(compact_batch=size, compact_gb=rates[size][1])


def _session(stage: Stage, spec: SessionSpec) -> dict[str, Any]:
    free = _free(stage)
    begun = time.monotonic()
    session = stage.session(spec)
    opened = time.monotonic() - begun
    gb = max(0.0, free - _free(stage))
    rate = stage.stream_rate(session.stream, spec)
    answers = [outputs.logits.tobytes() for _, outputs in session.stream(noise(spec, 2))]
    session.close()
    digest = hashlib.sha256(b"".join(answers)).hexdigest()
    return {
        "images_s": rate,
        "opened_s": round(opened, 2),
        "gb": round(gb, 2),
        "answers": digest,
    }


def _free(stage: Stage) -> float:
    """Return the free memory of the card in GB."""
    if not stage.card.is_gpu:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(0)[0]) / 1e9


def _shares(stage: Stage, spec: SessionSpec, rate: float) -> None:
    limit = memory_limit(stage, spec)
    stage.put(limit=limit)
    if "images_s" in limit:
        matmul = stage.figure("S1", "tflop_s")["bf16"]
        stage.put(
            to_limit=rate / limit["images_s"], to_matmul=rate * limit["gflop"] / 1000 / matmul
        )


def _runners(stage: Stage, spec: SessionSpec) -> None:
    """Compare the plain runner with one without a graph, with one that lets cuDNN fuse, and with
    its graph alone.
    """
    runners = {
        "graph": stage.runner(spec),
        "no graph": stage.runner(spec, graph=False),
        "fused": stage.runner(spec, fused=True),
    }

    def replayed() -> float:
        with torch.inference_mode():
            return round(spec.batch_size / stage.seconds(runners["graph"]._graph.replay), 1)

    def streamed(runner: Any) -> float:
        return stage.stream_rate(stream_of(runner), spec)

    calls = {name: partial(streamed, runner) for name, runner in runners.items()}
    rates = stage.alternate(calls | {"replay": replayed})
    stage.put(
        runners=rates,
        to_replay=rates["graph"] / rates["replay"],
        fused_to_plain=rates["fused"] / rates["graph"],
    )
    for runner in runners.values():
        runner.close()


# S6 and S12.


def peers(stage: Stage) -> None:
    """S6: timm's network in PyTorch as timm's own benchmark runs it, and compiled, in alternation
    with ours.
    """
    spec = stage.spec(stage.large, stage.card.half)
    session = stage.session(spec)
    ours = partial(stage.stream_rate, session.stream, spec)
    stage.put(ours=ours())
    if (network := _timm(stage)) is None:
        return
    _peer_flags()
    dtype = torch.float16 if stage.card.is_gpu else torch.bfloat16
    eager = {
        "timm AMP channels-last": _eager(stage, network, amp=dtype),
        "timm AMP NCHW": _eager(stage, network, amp=dtype, channels_last=False),
        "timm half channels-last": _eager(stage, network, dtype),
    }
    calls = {name: partial(_rate, stage, spec, call) for name, call in eager.items()}
    rates = stage.alternate({"imagemill": ours} | calls)
    stage.put(rates=rates, to_timm_amp=rates["imagemill"] / rates["timm AMP channels-last"])
    del eager, calls
    stage.attempt("compile", lambda: _compiled(stage, spec, ours, "to_compile"))


def autotuned(stage: Stage) -> None:
    """S12: against `torch.compile(mode="max-autotune")`, which takes minutes to compile."""
    spec = stage.spec(stage.large, stage.card.half)
    session = stage.session(spec)
    ours = partial(stage.stream_rate, session.stream, spec)
    _peer_flags()
    _compiled(stage, spec, ours, "to_autotune", mode="max-autotune")


def _compiled(
    stage: Stage, spec: SessionSpec, ours: Callable[[], float], figure: str, **options: Any
) -> None:
    if not stage.is_tiny and not (shutil.which("cc") or shutil.which("gcc")):
        stage.note("not compiled: torch.compile needs a C compiler, and there is none")
        return
    if (network := _timm(stage)) is None:
        return
    if stage.is_tiny:
        options = {"backend": "eager"}  # no compiler is needed, and no minutes
    dtype = torch.float16 if stage.card.is_gpu else torch.bfloat16
    begun = time.monotonic()
    call = _eager(stage, network, dtype, compiled=options)
    call()
    stage.synchronize()
    stage.put(compile_s=round(time.monotonic() - begun, 1))
    rates = stage.alternate({"imagemill": ours, "compiled": partial(_rate, stage, spec, call)})
    stage.put(compiled=rates, **{figure: rates["imagemill"] / rates["compiled"]})


def _timm(stage: Stage) -> Any:
    """Return a maker of timm's network, or None if timm is not installed."""
    if find_spec("timm") is None:
        stage.note("not compared: timm is not installed")
        return None
    sys.path.append(str(ROOT / "benchmarks" / "peers"))
    from timm_inference import import_timm

    import_timm()
    import timm

    return partial(timm.create_model, "test_resnet" if stage.is_tiny else stage.large)


def _peer_flags() -> None:
    """Set what timm's scripts set. Our graph is captured already, so it changes nothing there."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    allow_tf32()


def _eager(
    stage: Stage,
    network: Callable[[], Any],
    dtype: torch.dtype = torch.float32,
    *,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    compiled: dict[str, Any] | None = None,
) -> Callable[[], Any]:
    """Return a call that computes one of four batches of noise on the device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = network().eval().to(stage.card.place, dtype, memory_format=layout)
    if compiled is not None:
        made = torch.compile(made, **compiled)
    _, height, width, _ = shape_of(stage.spec(stage.large, stage.card.half))
    shape = (stage.batch, 3, *((64, 64) if stage.is_tiny else (height, width)))
    inputs = itertools.cycle(
        torch.randn(shape, device=stage.card.place).to(dtype, memory_format=layout)
        for _ in range(4)
    )
    mixed: Any = (
        contextlib.nullcontext() if amp is None else torch.autocast(stage.card.kind, dtype=amp)
    )

    def compute() -> Any:
        with torch.inference_mode(), mixed:
            return made(next(inputs))

    return compute


def _rate(stage: Stage, spec: SessionSpec, call: Callable[[], Any]) -> float:
    return round(spec.batch_size / stage.seconds(call), 1)


# S7.


def exactness(stage: Stage) -> None:
    """S7: whether position, neighbours, repetition, other slots and another process change a bit;
    and what another batch size changes.
    """
    inexact = 0
    for precision in stage.card.precisions:
        spec = stage.spec(stage.large, precision)
        session = stage.session(spec)
        inexact += not _is_exact(stage, f"{precision}", session.stream, spec)
        answers = [outputs.logits.tobytes() for _, outputs in session.stream(noise(spec, 2))]
        inexact += not _is_repeated(stage, f"{precision}", session.stream, spec)
        session.close()
        earlier = (stage.figure("S5", "sessions") or {}).get(f"{precision}, {spec.batch_size}")
        if earlier:
            same = earlier["answers"] == hashlib.sha256(b"".join(answers)).hexdigest()
            stage.put(same_in_another_process={str(precision): same})
            inexact += not same
    stage.put(inexact=inexact)
    spec = stage.spec(stage.large, stage.card.half)
    runner = stage.runner(spec, fused=True)
    _is_exact(stage, "fused", stream_of(runner), spec)
    _is_repeated(stage, "fused", stream_of(runner), spec)
    runner.close()
    stage.attempt("batch sizes", partial(_batch_sizes, stage, stage.card.half))


def _is_exact(stage: Stage, name: str, stream: Streaming, spec: SessionSpec) -> bool:
    try:
        check_exactness(stream, spec, name)
    except InexactError as error:
        stage.put(exact={name: str(error)})
        return False
    stage.put(exact={name: True})
    return True


def _is_repeated(stage: Stage, name: str, stream: Streaming, spec: SessionSpec) -> bool:
    batch, *_ = noise(spec, 1)
    count = 4 if stage.is_tiny else 50
    found = {outputs.logits.tobytes() for _, outputs in stream(itertools.repeat(batch, count))}
    stage.put(answers_of_repetition={name: len(found)})
    return len(found) == 1


def _batch_sizes(stage: Stage, precision: Precision) -> None:
    """Which share of the logits another batch size changes, and of how many images the class."""
    pixels = np.concatenate([b.pixels for b in noise(stage.spec(stage.large, precision), 2)])
    found = []
    for size in (stage.batch, stage.batch // 2, stage.batch // 4):
        spec = stage.spec(stage.large, precision, size)
        session = stage.session(spec)
        found.append(logits_of(session.stream, pixels, size))
        session.close()
        other = {
            "differing": round(float((found[-1] != found[0]).mean()), 5),
            "classes": int((found[-1].argmax(1) != found[0].argmax(1)).sum()),
            "images": len(pixels),
        }
        stage.put(another_batch_size={str(size): other})


def logits_of(stream: Streaming, pixels: np.ndarray, size: int) -> np.ndarray:
    """Return the logits of all images."""
    answers: Iterator[Any] = (outputs.logits for _, outputs in stream(in_batches(pixels, size)))
    return np.concatenate(list(answers))
