"""Test-only writers of `.pth` files, zip and legacy, from arrays and without PyTorch.

They spell the pickles opcode by opcode, as `torch.save` does, so that tests can also spell them
wrongly. torch 2.13 reads what they write with `torch.load(weights_only=True)` (checked by hand:
`tests/fixtures/make_fixtures.py --check`).
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
LEGACY_PROTOCOL = b"\x80\x02M\xe9\x03."
STORAGES = {
    "<f8": "Double",
    "<f4": "Float",
    "<f2": "Half",
    "<i8": "Long",
    "<i4": "Int",
    "<i2": "Short",
    "|i1": "Char",
    "|u1": "Byte",
    "<u2": "BFloat16",  # the upper halves of float32
}


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def old_text(value: str) -> bytes:
    """The way Python 2 wrote a short str."""
    encoded = value.encode()
    return b"U" + bytes([len(encoded)]) + encoded


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tensor(
    key: str,
    array: np.ndarray,
    *,
    legacy: bool,
    python2: bool = False,
    shape: tuple[int, ...] | None = None,
    stride: tuple[int, ...] | None = None,
    offset: int = 0,
    count: int | None = None,
) -> bytes:
    """One tensor over a whole storage; the keyword arguments tell lies about it."""
    notify = old_text if python2 else text
    storage = STORAGES[array.dtype.str]
    shape = array.shape if shape is None else shape
    if stride is None:
        stride = tuple(int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape)))
    count = array.size if count is None else count
    identity = (
        b"("
        + notify("storage")
        + name("torch", f"{storage}Storage")
        + notify(key)
        + notify("cpu")
        + number(count)
    )
    identity += (b"N" if legacy else b"") + b"tQ"
    head = name("torch._utils", "_rebuild_tensor" if python2 else "_rebuild_tensor_v2")
    tail = b"" if python2 else b"\x89" + name("collections", "OrderedDict") + b")R"
    return head + b"(" + identity + number(offset) + numbers(shape) + numbers(stride) + tail + b"tR"


def state_dict(arrays: Mapping[str, np.ndarray], *, legacy: bool, python2: bool = False) -> bytes:
    """The pickle of an OrderedDict of tensors; storage keys are 0, 1, …"""
    pairs = [
        (key, tensor(str(index), array, legacy=legacy, python2=python2))
        for index, (key, array) in enumerate(arrays.items())
    ]
    ordered = name("collections", "OrderedDict")
    if python2:  # OrderedDict([[key, value], …])
        body = (
            ordered
            + b"(]("
            + b"".join(b"](" + old_text(key) + value + b"e" for key, value in pairs)
            + b"etR"
        )
    else:
        body = ordered + b")R(" + b"".join(text(key) + value for key, value in pairs) + b"u"
    return b"\x80\x02" + body + b"."


def training_state(value: object, arrays: dict[str, np.ndarray], *, legacy: bool) -> bytes:
    """The pickle, without its frame, of mappings that hold arrays, which are added to `arrays`, and
    anything that Python can pickle.
    """
    if isinstance(value, np.ndarray):
        arrays[str(len(arrays))] = value
        return tensor(str(len(arrays) - 1), value, legacy=legacy)
    if isinstance(value, dict):
        items = (
            pickled(key) + training_state(item, arrays, legacy=legacy)
            for key, item in value.items()
        )
        return b"}(" + b"".join(items) + b"u"
    return pickled(value)


def pickled(value: object) -> bytes:
    """A value's pickle without its frame."""
    return pickle.dumps(value, 2)[2:-1]


def write_zip(path: Path, arrays: Mapping[str, np.ndarray], program: bytes | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(
            "archive/data.pkl", state_dict(arrays, legacy=False) if program is None else program
        )
        archive.writestr("archive/byteorder", "little")
        for index, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{index}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    program: bytes | None = None,
    *,
    python2: bool = False,
) -> Path:
    notify = old_text if python2 else text
    sizes = b"".join(
        notify(kind) + number(size) for kind, size in (("short", 2), ("int", 4), ("long", 4))
    )
    system = (
        b"\x80\x02}("
        + notify("protocol_version")
        + number(1001)
        + notify("little_endian")
        + b"\x88"
        + notify("type_sizes")
        + b"}("
        + sizes
        + b"uu."
    )
    with path.open("wb") as file:
        file.write(LEGACY_MAGIC + LEGACY_PROTOCOL + system)
        file.write(state_dict(arrays, legacy=True, python2=python2) if program is None else program)
        file.write(
            b"\x80\x02](" + b"".join(notify(str(index)) for index in range(len(arrays))) + b"e."
        )
        for array in arrays.values():
            file.write(struct.pack("<q", array.size))
            file.write(np.ascontiguousarray(array).tobytes())
    return path


def write_nested(path: Path, root: object) -> Path:
    """A training program's mappings, with arrays in them, as a zip."""
    arrays: dict[str, np.ndarray] = {}
    program = training_state(root, arrays, legacy=False)
    return write_zip(path, arrays, b"\x80\x02" + program + b".")


def write_bfloat16_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Upper halves of float32 as uint16, which safetensors' NumPy side cannot write."""
    header, position = {}, 0
    for key, array in arrays.items():
        offsets = [position, position + array.nbytes]
        header[key] = {"dtype": "BF16", "shape": array.shape, "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
