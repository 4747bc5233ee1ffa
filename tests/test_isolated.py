"""The isolated decoder: only its child dies of an image, and its answers are those of `decode`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import helpers
import sample_images
from imagemill.errors import WorkerError
from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.decoding.isolated import IsolatedDecoder
from imagemill.records import Interpolation, IsolationReason, Limits, Recipe, Status
from imagemill.system import processes

pytestmark = pytest.mark.process

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS = Limits(max_pixels=20_000_000, max_bytes=2**24, max_seconds=30.0)
SQUASHED = Recipe(24, 32, (48, 40), interpolation=Interpolation.LANCZOS)
CRASH, HANG, OOM = b"imagemill-test-crash", b"imagemill-test-hang", b"imagemill-test-oom"


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedDecoder]:
    for name, value in helpers.faulty_decoders().items():
        monkeypatch.setenv(name, value)
    with IsolatedDecoder() as decoder:
        yield decoder


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TGA"])
def test_the_beginning_of_a_truncated_image_is_decoded_on_demand(
    decoder: IsolatedDecoder, form: str
) -> None:
    """What is there is the image; the next image that is not asked for so is truncated again."""
    whole = sample_images.encode(sample_images.photograph(224, 224), form)
    half = sample_images.half(whole)
    found, expected = (
        decoder.decode(data, Recipe(224, 224, None), LIMITS, partial=True) for data in (half, whole)
    )
    assert (found.status, found.error) == (expected.status, expected.error) == (Status.OK, None)
    assert found.pixels is not None
    assert expected.pixels is not None
    rows = slice(124, None) if form in ("BMP", "TGA") else slice(None, 80)  # from below
    assert np.array_equal(found.pixels[rows], expected.pixels[rows])
    assert not np.array_equal(found.pixels, expected.pixels)
    assert decoder.decode(half, Recipe(), LIMITS).status is Status.TRUNCATED


def child_pid(decoder: IsolatedDecoder) -> int:
    assert decoder._child is not None
    return decoder._child._process.pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(100, 100, resize=None, interpolation=Interpolation.BICUBIC, exif=False),
        SQUASHED,
    ],
)
@pytest.mark.parametrize("name", ["jpeg", "png", "cut"])
def test_same_answer_as_in_process(decoder: IsolatedDecoder, recipe: Recipe, name: str) -> None:
    """Whatever the child answers is what `decode` answers here, bit for bit."""
    whole = sample_images.jpeg(1200, 1100, orientation=6)
    data = {
        "jpeg": whole,
        "png": sample_images.encode(sample_images.photograph(70, 50), "PNG"),
        "cut": sample_images.half(whole),
    }[name]
    here, there = decode(data, recipe, LIMITS), decoder.decode(data, recipe, LIMITS)
    assert (there.status, there.error, there.width, there.height) == (
        here.status,
        here.error,
        here.width,
        here.height,
    )
    assert (
        np.array_equal(there.pixels, here.pixels)
        if here.pixels is not None
        else there.pixels is None
    )


def test_the_child_is_kept_between_images(decoder: IsolatedDecoder) -> None:
    """A quarantined image that can be decoded costs no new process."""
    decoder.decode(sample_images.jpeg(), Recipe(), LIMITS)
    first = child_pid(decoder)
    decoder.decode(b"text", Recipe(), LIMITS)
    assert child_pid(decoder) == first


def test_a_crashing_image_becomes_a_row(decoder: IsolatedDecoder) -> None:
    """One that kills its decoder twice is `crashed_decoder`, named with its signal; the next is
    decoded.
    """
    decoded = decoder.decode(sample_images.jpeg() + CRASH, Recipe(), LIMITS)
    assert decoded.pixels is None
    assert decoded.status is Status.CRASHED_DECODER
    assert (
        decoded.error
        == "the decoder was killed by SIGSEGV, twice in a process of its own (quarantined for: crash)"
    )
    assert decoder.decode(sample_images.jpeg(), Recipe(), LIMITS).status is Status.OK


def test_a_hanging_image_becomes_a_row(decoder: IsolatedDecoder) -> None:
    """One that is not done within `max_seconds`, twice, is `timeout`, and its child is gone."""
    decoder.decode(sample_images.jpeg(), Recipe(), LIMITS, IsolationReason.TIMEOUT)
    pid = child_pid(decoder)
    decoded = decoder.decode(
        sample_images.jpeg() + HANG,
        Recipe(),
        Limits(20_000_000, 2**24, 0.5),
        IsolationReason.TIMEOUT,
    )
    assert decoded.status is Status.TIMEOUT
    assert (
        decoded.error
        == "decoding took more than 0.5 s, twice in a process of its own (quarantined for: timeout)"
    )
    assert not alive(pid)
    assert (
        decoder.decode(sample_images.jpeg(), Recipe(), LIMITS, IsolationReason.TIMEOUT).status
        is Status.OK
    )


def test_a_decoder_that_takes_no_image_is_killed_too(decoder: IsolatedDecoder) -> None:
    """The limit holds for sending a large image as well: a child that is stopped reads nothing."""
    decoder.decode(sample_images.jpeg(), Recipe(), LIMITS)
    os.kill(child_pid(decoder), signal.SIGSTOP)
    large = sample_images.jpeg() + bytes(5_000_000)
    assert decoder.decode(large, Recipe(), Limits(20_000_000, 2**24, 0.5)).status is Status.OK


def test_a_greedy_image_becomes_a_row(decoder: IsolatedDecoder) -> None:
    """One that wants more memory than a child may have is `too_large`; the child's address space is
    bounded.
    """
    decoded = decoder.decode(sample_images.jpeg() + OOM, Recipe(), LIMITS)
    assert decoded.status is Status.TOO_LARGE
    assert decoded.error == "not enough memory to decode it"


def test_a_child_killed_from_outside_is_replaced(decoder: IsolatedDecoder) -> None:
    """The kernel may kill the child for its memory, or a person may: the image in progress is tried
    again and is ok.
    """
    decoder.decode(sample_images.jpeg(), Recipe(), LIMITS)
    os.kill(child_pid(decoder), signal.SIGKILL)
    assert decoder.decode(sample_images.jpeg(), Recipe(), LIMITS).status is Status.OK


def test_close_ends_the_child(decoder: IsolatedDecoder) -> None:
    """After `close` nothing of it runs; closing twice does no harm."""
    decoder.decode(sample_images.jpeg(), Recipe(), LIMITS)
    pid = child_pid(decoder)
    decoder.close()
    decoder.close()
    assert not alive(pid)


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_dies_with_its_parent(busy: bool) -> None:
    """SIGKILL to the parent leaves no child behind, whether it waits or is stuck in an image."""
    if busy and sys.platform != "linux":
        pytest.skip("only Linux ends a stuck child at once; elsewhere its alarm does, later")
    program = f"""
import sys, threading, time
sys.path[:0] = {sys.path!r}
import sample_images
from imagemill.pipeline.decoding.isolated import IsolatedDecoder
from imagemill.records import Limits, Recipe
decoder = IsolatedDecoder()
decoder.decode(sample_images.jpeg(), Recipe(), Limits())
print(decoder._child._process.pid, flush=True)
if {busy}:
    decoder.decode(b"{HANG.decode()}", Recipe(), Limits())
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, **helpers.faulty_decoders()},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert alive(pid)
        parent.kill()
    helpers.until(lambda: not alive(pid))


def test_a_child_that_cannot_start_is_an_error(
    decoder: IsolatedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image is blamed where no child can be started at all."""
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(
        WorkerError,
        match="failed to start 3 times in a row; the last time it ended with exit code 1",
    ):
        decoder.decode(sample_images.jpeg(), Recipe(), LIMITS)


def test_the_child_loads_no_heavy_library() -> None:
    """Its start is short: NumPy, Pillow, simplejpeg and ours, no more."""
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; import imagemill.pipeline.decoding.isolated;"
        " print(*sorted(sys.modules))"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True
        ).stdout.split()
    )
    assert {"numpy", "PIL", "simplejpeg"} <= loaded
    assert not loaded & {
        "openvino",
        "onnx",
        "onnxruntime",
        "pyarrow",
        "ray",
        "cv2",
        "rich",
    }
