"""Read the arrays of a published checkpoint without PyTorch and without running anything that it
says.

    load(path) ─► {parameter name: array}, in the order of the file, and names of classes

Three formats, recognised by their first bytes and never by the suffix: `.safetensors`; the zip form
of `.pth` (a pickle plus one raw member per storage); and its legacy form (five pickles, then the
raw storages).

A pickle is a program: `pickled` reads it as data, and runs nothing. What a file can make this
module allocate is bounded by the file's own size; the pickle and a zip's directory have budgets of
bytes.
"""

from __future__ import annotations

import errno
import io
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import CheckpointError, counted
from imagemill.models.checkpoints import labels, state_dicts
from imagemill.models.checkpoints.labels import Labels
from imagemill.models.checkpoints.pickled import (
    Machine,
    Refused,
    Tensor,
    Unknown,
    kind,
    shown,
    walk,
)
from imagemill.system.messages import Notify

Array = NDArray[Any]

PICKLE_BYTES: Final = 16 * 2**20
"""Budget of the pickle stream; that of a ResNeXt-101 takes 60 kB."""
DIRECTORY_BYTES: Final = 16 * 2**20
"""Budget of a zip file's directory."""

_REMEDY: Final = (
    "Nothing in it was run. Copy or download the file again, or save the weights alone:"
    " torch.save(model.state_dict(), FILE)."
)
_LEGACY_MAGIC: Final = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_LEGACY_PROTOCOL: Final = 1001
_PLAIN: Final = (
    "numpy",
    "collections ",
    "datetime ",
    "pathlib ",
    "__builtin__ frozenset",
    "builtins frozenset",
    "_codecs encode",
)
"""Names whose calls make plain values, which some programs save among the parameters."""
_DEEPEST: Final = 4
"""Parts of the path to a state dict."""
_NUMBERS: Final = (
    *("F64", "F32", "F16", "BF16", "BOOL"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"),
)
"""Types of safetensors that are read. 8-bit floats would need the scales beside them."""


class Checkpoint(Struct, frozen=True):
    """What a weights file holds."""

    arrays: dict[str, Array]
    """By name of the parameter, in the order of the file."""
    labels: Labels | None = None
    """Names of the classes, if they are saved beside the parameters."""


def read(path: Path, notify: Notify = lambda _: None) -> dict[str, Array]:
    """Read a checkpoint's parameters by name, in the order of the file. See `load`."""
    return load(path, notify).arrays


def load(path: Path, notify: Notify = lambda _: None) -> Checkpoint:
    """Read a checkpoint's parameters, and the names of its classes.

    16-bit floats become float32, other types stay. Arrays may be read-only and may share memory
    where the file shares storages. The state dict may be nested in other mappings, beside anything
    else; see `state_dicts` for which is taken and how its names are shortened.

    Args:
        path: the file.
        notify: takes one line if the file has several state dicts: which is used.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is none of the three formats, or has
            no state dict; says what is wrong and what to do. No other exception leaves this
            function for whatever bytes the file holds.
    """
    import ml_dtypes  # noqa: F401 - adds bfloat16 to NumPy; here, because it takes 15 ms

    try:
        with path.open("rb") as file:
            head = file.read(16)
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _read(path, file, head, size, lambda line: notify(f"{path.name}: {line}"))
    except Refused as reason:
        raise CheckpointError(f"{path}: {reason}. {_REMEDY}") from None
    except OSError as error:
        if (
            error.errno == errno.EINVAL
        ):  # a seek to before the first byte, which only a damaged zip asks for
            raise CheckpointError(f"{path}: damaged ({error}). {_REMEDY}") from error
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}. Check the path given with --from."
        ) from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path}: its tensors do not fit into memory. Use a machine with more, or a smaller"
            " model."
        ) from error
    except (
        Exception
    ) as error:  # the border of a parser: whatever the bytes were, the user gets one clear line
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(f"{path}: damaged ({what}). {_REMEDY}") from error


def _read(path: Path, file: IO[bytes], head: bytes, size: int, notify: Notify) -> Checkpoint:
    if head[:4] == b"PK\x03\x04":
        return _read_zip(file, size, notify)
    if head[:15] == _LEGACY_MAGIC:
        return _read_legacy(file, size, notify)
    if len(head) > 8 and head[8:9] == b"{":
        return Checkpoint(state_dicts.choose({"": _read_safetensors(path, size)}, notify))
    raise Refused(_strange(head, size))


def _strange(head: bytes, size: int) -> str:
    if size == 0:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not a checkpoint"
    if head[:1] == b"\x80":
        return (
            "this is a bare pickle, which may hold anything; only files made by torch.save or"
            " safetensors are read"
        )
    return f"neither .safetensors nor .pth (first bytes: {head[:8].hex(' ')})"


# ── safetensors ───────────────────────────────────────────────────────────────────────────────────


def _read_safetensors(path: Path, size: int) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    arrays: dict[str, Array] = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in file.offset_keys():
                if (kind := file.get_slice(name).get_dtype()) not in _NUMBERS:  # such as F8_E4M3
                    raise Refused(f"a tensor's number type is not read here ({kind})")
                arrays[name] = _widened(file.get_tensor(name))
            return arrays
    except SafetensorError as error:
        raise Refused(f"damaged .safetensors of {size} bytes ({error})") from None


# ── zip .pth ──────────────────────────────────────────────────────────────────────────────────────


def _read_zip(file: IO[bytes], size: int, notify: Notify) -> Checkpoint:
    _check_zip_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        members = _checked_members(archive, size)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(
                "a zip, but not one made by torch.save: it holds"
                f" {counted(len(pickles), 'member')} named NAME/data.pkl instead of 1"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if (
            (order := members.get(f"{prefix}byteorder")) is not None
            and order.file_size <= 16
            and archive.read(order) != b"little"
        ):
            raise Refused(
                f"{prefix}byteorder says {archive.read(order)!r}; only little-endian files are read"
            )
        program = members[pickles[0]]
        if program.file_size > PICKLE_BYTES:
            raise Refused(
                f"{program.filename} has {program.file_size} bytes, more than the {PICKLE_BYTES}"
                " that a checkpoint can need"
            )
        machine = Machine(size)
        root = machine.run(io.BytesIO(archive.read(program)))
        tensors = _state_dict(root, size, notify)
        needed = {tensor.storage.key for tensor in tensors.values()}

        raw: dict[str, Array] = {}
        total = 0
        for storage in (machine.storages[key] for key in machine.storages if key in needed):
            name = f"{prefix}data/{storage.key}"
            member = members.get(name)
            expected = storage.count * np.dtype(storage.dtype).itemsize
            if member is None:
                raise Refused(f"{name} is missing, which the pickle refers to")
            if member.file_size != expected:
                raise Refused(f"{name} has {member.file_size} bytes, the pickle says {expected}")
            total += expected
            if total > size:
                raise Refused(f"its storages claim more than the file's {size} bytes")
            raw[storage.key] = np.frombuffer(archive.read(member), storage.dtype)
    arrays = {name: _array(tensor, raw) for name, tensor in tensors.items()}
    return Checkpoint(arrays, labels.find(root))


def _check_zip_directory(file: IO[bytes], size: int) -> None:
    """Refuse a directory beyond its budget before `zipfile` turns it into objects of ten times its
    size.
    """
    start = max(0, size - 2**16 - 22 - 20 - 56)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise Refused(
            f"damaged zip of {size} bytes: its directory, the last part of the file, is missing;"
            " the download was probably cut"
        )
    claimed = struct.unpack_from("<I", tail, end + 12)[0]
    if (wide := tail.rfind(b"PK\x06\x06")) >= 0 and len(tail) >= wide + 56:
        claimed = max(
            claimed if claimed != 2**32 - 1 else 0, struct.unpack_from("<Q", tail, wide + 40)[0]
        )
    if claimed > min(size, DIRECTORY_BYTES):
        raise Refused(
            f"its zip directory claims {claimed} bytes, more than the {min(size, DIRECTORY_BYTES)}"
            " allowed"
        )
    file.seek(0)


def _checked_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.orig_filename
        if (
            name.startswith("/")
            or "\\" in name
            or "\0" in name
            or ":" in name
            or ".." in name.split("/")
        ):
            raise Refused(f"its member {name!r} has a path that leads out of the archive")
        if name in members:
            raise Refused(f"its member {name!r} is there twice")
        if member.flag_bits & 0x1:
            raise Refused(f"its member {name!r} is encrypted")
        if member.compress_type != zipfile.ZIP_STORED:
            raise Refused(
                f"its member {name!r} is compressed, as in TorchScript; torch.save never does that"
            )
        if member.file_size != member.compress_size or member.file_size > size:
            raise Refused(
                f"its member {name!r} claims {member.file_size} bytes, {member.compress_size}"
                f" stored, in a file of {size}"
            )
        members[name] = member
    return members


# ── legacy .pth ───────────────────────────────────────────────────────────────────────────────────


def _read_legacy(file: IO[bytes], size: int, notify: Notify) -> Checkpoint:
    stream = io.BytesIO(file.read(PICKLE_BYTES))
    machine = Machine(size)
    machine.run(stream)  # the magic number, seen already
    protocol = machine.run(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(protocol, int):
        raise Refused(
            f"its protocol number is not {_LEGACY_PROTOCOL}, the only one torch.save ever wrote"
        )
    system = machine.run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it was not written by a little-endian machine")
    root = machine.run(stream)
    keys = machine.run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("the list of its storages is damaged")
    tensors = _state_dict(root, size, notify)
    needed = {tensor.storage.key for tensor in tensors.values()}

    raw: dict[str, Array] = {}
    position = stream.tell()
    passed = set()
    for key in keys:
        storage = machine.storages.get(key)
        if storage is None or key in passed:
            raise Refused(
                f"its list of storages names {shown(key)}"
                f" {'twice' if key in passed else 'which no tensor uses'}"
            )
        passed.add(key)
        file.seek(position)
        length = file.read(8)
        count = struct.unpack("<q", length)[0] if len(length) == 8 else 0
        if len(length) == 8 and count != storage.count:
            raise Refused(
                f"storage {shown(key)} has {count} elements at byte {position}, the pickle says"
                f" {storage.count}"
            )
        need = count * np.dtype(storage.dtype).itemsize
        if len(length) < 8 or position + 8 + need > size:
            raise Refused(
                f"it ends at byte {size}, inside storage {key} of {storage.count} elements; the"
                " download was probably cut"
            )
        if key in needed:
            raw[key] = np.fromfile(file, storage.dtype, count)
        position += 8 + need
    if missing := [key for key in machine.storages if key in needed - passed]:
        raise Refused(f"storage {shown(missing[0])} is missing, which the pickle refers to")
    arrays = {name: _array(tensor, raw) for name, tensor in tensors.items()}
    return Checkpoint(arrays, labels.find(root))


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────


def _array(tensor: Tensor, raw: Mapping[str, Array]) -> Array:
    storage = tensor.storage
    numbers = raw[storage.key][storage.start : storage.start + storage.length]
    if prod(tensor.size) == 0:
        view: Array = np.empty(tensor.size, numbers.dtype)
    else:  # `pickled` has checked that the last element lies inside
        step = numbers.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :],
            tensor.size,
            tuple(step * stride for stride in tensor.stride),
            writeable=False,
        )
    return _widened(np.ascontiguousarray(view).reshape(tensor.size))


def _widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _state_dict(root: object, size: int, notify: Notify) -> dict[str, Tensor]:
    """Pick the mapping of names to tensors out of what the pickle described."""
    tensors: dict[str, Tensor] = {}
    total = 0
    for name, value in state_dicts.choose(_found(root), notify).items():
        total += prod(value.size) * np.dtype(value.storage.dtype).itemsize
        if total > 2 * size:  # twice: tied weights share their storage
            raise Refused(f"its tensors claim more than {2 * size} bytes, in a file of {size}")
        tensors[name] = value
    return tensors


def _found(root: object) -> dict[str, dict[str, Tensor]]:
    """Return every mapping in the checkpoint that holds parameters by name, with the path to it.
    Raises: Refused if there is none.
    """
    if not isinstance(root, dict):
        raise Refused(f"it holds {kind(root)}, not a mapping of parameter names to tensors")
    found: dict[str, dict[str, Tensor]] = {}
    mappings = walk(root, _DEEPEST, without="optim")
    for path, mapping in mappings:
        if tensors := {
            name: value
            for name, value in mapping.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }:
            found[path] = tensors
    # Metrics and schedulers keep tensors too, but call none of them a weight.
    found = {
        path: tensors
        for path, tensors in found.items()
        if any(name.endswith("weight") for name in tensors)
    } or found
    for path, mapping in mappings:
        for value in mapping.values():
            if isinstance(value, Unknown) and not found:
                raise Refused(
                    f"{value.refusal}; there is no state dict in it, as"
                    " torch.save(model.state_dict(), FILE) would write"
                )
            if (
                isinstance(value, Unknown)
                and path in found
                and value.called
                and not value.full.startswith(_PLAIN)
            ):
                raise Refused(
                    value.refusal
                )  # among the parameters themselves: the file is not what it is said to be
    if not found:
        entry = next(((name, value) for name, value in root.items()), None)
        raise Refused(
            f"its entry {shown(entry[0])} is {kind(entry[1])}, not a tensor"
            if entry
            else "it holds an empty mapping"
        )
    return found
