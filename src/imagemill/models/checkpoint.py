"""Read the arrays of a published checkpoint without PyTorch and without running anything that it says.

    read(path) ─► {parameter name: array}      in the order of the file

Three formats, told apart by their first bytes and never by the suffix: `.safetensors`; the zip form of `.pth` (a pickle plus one raw
member per storage); and its legacy form (five pickles, then the raw storages).

**A pickle is a program.** It is not given to Python's unpickler here. `_Machine` interprets the two dozen opcodes that describe plain
data, and where the program names something to call, the name is looked up in a closed table of five: nothing is imported, nothing is
called. Every other opcode and name is refused, and the message says which. What a file can make this module allocate is bounded by the
file's own size: tensors may not be larger than their storage, storages not larger than the bytes that hold them, and the program itself
has a budget of bytes and opcodes.
"""

from __future__ import annotations

import errno
import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import CheckpointError

Array = NDArray[Any]

PICKLE_BYTES: Final = 16 * 2**20
"""Budget of the pickle stream; that of a ResNeXt-101 takes 60 kB."""
PICKLE_OPCODES: Final = 1_000_000
"""Budget of the program; that of a ResNeXt-101 takes 25,000 opcodes."""
DIRECTORY_BYTES: Final = 16 * 2**20
"""Budget of a zip file's directory."""

_LEGACY_MAGIC: Final = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_LEGACY_PROTOCOL: Final = 1001

_STORAGES: Final[dict[str, str]] = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": "bf16",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "|i1",
    "torch ByteStorage": "|u1",
    "torch BoolStorage": "bool",
}
_CALLABLES: Final = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
    }
)
_WRAPPERS: Final = ("state_dict", "model_state_dict")


class _Refused(Exception):  # noqa: N818 - carries the reason to `read`, which makes it a CheckpointError
    """What is wrong with the file, in words."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the pickle mentions and the table admits. It stands for the thing and is never resolved."""

    full: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of numbers kept outside the pickle."""

    key: str
    dtype: str
    count: int
    """Elements of the whole storage."""
    start: int
    """First element of the view that the tensor was saved with; 0 except in very old files."""
    length: int
    """Elements of that view."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A view into a storage: offset, size and stride in elements, checked against the storage's bounds."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read(path: Path) -> dict[str, Array]:
    """Read a checkpoint's parameters by name, in the order of the file.

    16-bit floats become float32, other types stay. A state dict wrapped as `{"state_dict": …}` is unwrapped. Arrays may be read-only
    and may share memory where the file shares storages.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is none of the three formats, or holds more than tensors; says what is
            wrong and what to do. No other exception leaves this function for whatever bytes the file holds.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _read(path, file, head, size)
    except _Refused as reason:
        raise CheckpointError(f"{path}: {reason}. Nothing in it was run. Get the file again from its publisher.") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a seek to before the first byte, which only a damaged zip asks for
            raise CheckpointError(f"{path}: damaged ({error}). Nothing in it was run. Get the file again from its publisher.") from error
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. Check the path given with --from.") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: its tensors do not fit into memory. Use a machine with more, or a smaller model.") from error
    except Exception as error:  # the border of a parser: whatever the bytes were, the user gets one clear line
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(f"{path}: damaged ({what}). Nothing in it was run. Get the file again from its publisher.") from error


def _read(path: Path, file: IO[bytes], head: bytes, size: int) -> dict[str, Array]:
    if head[:4] == b"PK\x03\x04":
        return _read_zip(file, size)
    if head[:15] == _LEGACY_MAGIC:
        return _read_legacy(file, size)
    if len(head) > 8 and head[8:9] == b"{":
        return _read_safetensors(path, size)
    raise _Refused(_strange(head, size))


def _strange(head: bytes, size: int) -> str:
    if size == 0:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not a checkpoint"
    if head[:1] == b"\x80":
        return "this is a bare pickle, which may hold anything; only files made by torch.save or safetensors are read"
    return f"neither .safetensors nor .pth: it begins with {head[:8].hex(' ')}"


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_safetensors(path: Path, size: int) -> dict[str, Array]:
    from safetensors import SafetensorError, deserialize, safe_open

    arrays: dict[str, Array] = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = list(file.offset_keys())
            brain_floats = [name for name in names if file.get_slice(name).get_dtype() == "BF16"]
            for name in names:
                arrays[name] = np.empty(0, np.float32) if name in brain_floats else _widened(file.get_tensor(name))
    except SafetensorError as error:
        raise _Refused(f"damaged .safetensors of {size} bytes ({error})") from None
    except (AttributeError, TypeError) as error:  # how the library's NumPy side meets float8 and other types that NumPy lacks
        raise _Refused(f"a tensor's number type is not read here ({error})") from None
    if brain_floats:  # NumPy has no bfloat16, so the library hands such tensors out as bytes only
        wanted = set(brain_floats)
        for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            if name in wanted:
                arrays[name] = _from_bfloat16(np.frombuffer(tensor["data"], "<u2")).reshape(tensor["shape"])
    return arrays


# ── zip .pth ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_zip(file: IO[bytes], size: int) -> dict[str, Array]:
    _check_zip_directory(file, size)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise _Refused(f"damaged zip of {size} bytes ({error}); the download was probably cut") from None
    with archive:
        members = _checked_members(archive, size)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"a zip, but not one made by torch.save: it holds {len(pickles)} members named NAME/data.pkl instead of 1")
        prefix = pickles[0].removesuffix("data.pkl")
        if (order := members.get(f"{prefix}byteorder")) is not None and order.file_size <= 16 and archive.read(order) != b"little":
            raise _Refused(f"{prefix}byteorder says {archive.read(order)!r}; only little-endian files are read")
        program = members[pickles[0]]
        if program.file_size > PICKLE_BYTES:
            raise _Refused(f"{program.filename} has {program.file_size} bytes, more than the {PICKLE_BYTES} that a checkpoint can need")
        machine = _Machine(size)
        root = machine.run(io.BytesIO(archive.read(program)))
        tensors = _state_dict(root, size)

        raw: dict[str, Array] = {}
        total = 0
        for storage in machine.storages.values():
            name = f"{prefix}data/{storage.key}"
            member = members.get(name)
            expected = storage.count * _itemsize(storage.dtype)
            if member is None:
                raise _Refused(f"{name} is missing, which the pickle refers to")
            if member.file_size != expected:
                raise _Refused(f"{name} has {member.file_size} bytes, the pickle says {expected}")
            total += expected
            if total > size:
                raise _Refused(f"its storages claim more than the file's {size} bytes")
            try:
                raw[storage.key] = np.frombuffer(archive.read(member), _raw_dtype(storage.dtype))
            except zipfile.BadZipFile as error:
                raise _Refused(f"{name} is damaged ({error})") from None
    return {name: _array(tensor, raw) for name, tensor in tensors.items()}


def _check_zip_directory(file: IO[bytes], size: int) -> None:
    """Refuse a directory beyond its budget before `zipfile` turns it into objects of ten times its size."""
    start = max(0, size - 2**16 - 22 - 20 - 56)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise _Refused(f"damaged zip of {size} bytes: its directory, the last part of the file, is missing; the download was probably cut")
    claimed = struct.unpack_from("<I", tail, end + 12)[0]
    if (wide := tail.rfind(b"PK\x06\x06")) >= 0 and len(tail) >= wide + 56:
        claimed = max(claimed if claimed != 2**32 - 1 else 0, struct.unpack_from("<Q", tail, wide + 40)[0])
    if claimed > min(size, DIRECTORY_BYTES):
        raise _Refused(f"its zip directory claims {claimed} bytes, more than the {min(size, DIRECTORY_BYTES)} allowed")
    file.seek(0)


def _checked_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.orig_filename
        if name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in name.split("/"):
            raise _Refused(f"its member {name!r} has a path that leads out of the archive")
        if name in members:
            raise _Refused(f"its member {name!r} is there twice")
        if member.flag_bits & 0x1:
            raise _Refused(f"its member {name!r} is encrypted")
        if member.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"its member {name!r} is compressed, which torch.save never does")
        if member.file_size != member.compress_size or member.file_size > size:
            raise _Refused(f"its member {name!r} claims {member.file_size} bytes, {member.compress_size} stored, in a file of {size}")
        members[name] = member
    return members


# ── legacy .pth ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_legacy(file: IO[bytes], size: int) -> dict[str, Array]:
    stream = io.BytesIO(file.read(PICKLE_BYTES))
    machine = _Machine(size)
    machine.run(stream)  # the magic number, seen already
    protocol = machine.run(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(protocol, int):
        raise _Refused(f"its protocol number is not {_LEGACY_PROTOCOL}, the only one torch.save ever wrote")
    system = machine.run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("it was not written by a little-endian machine")
    root = machine.run(stream)
    keys = machine.run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Refused("the list of its storages is damaged")
    tensors = _state_dict(root, size)

    raw: dict[str, Array] = {}
    position = stream.tell()
    for key in keys:
        storage = machine.storages.get(key)
        if storage is None or key in raw:
            raise _Refused(f"its list of storages names {_shown(key)} {'twice' if key in raw else 'which no tensor uses'}")
        file.seek(position)
        length = file.read(8)
        count = struct.unpack("<q", length)[0] if len(length) == 8 else 0
        if len(length) == 8 and count != storage.count:
            raise _Refused(f"storage {_shown(key)} has {count} elements at byte {position}, the pickle says {storage.count}")
        need = count * _itemsize(storage.dtype)
        if len(length) < 8 or position + 8 + need > size:
            raise _Refused(f"it ends at byte {size}, inside storage {key} of {storage.count} elements; the download was probably cut")
        raw[key] = np.fromfile(file, _raw_dtype(storage.dtype), count)
        position += 8 + need
    if missing := [key for key in machine.storages if key not in raw]:
        raise _Refused(f"storage {_shown(missing[0])} is missing, which the pickle refers to")
    return {name: _array(tensor, raw) for name, tensor in tensors.items()}


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _itemsize(dtype: str) -> int:
    return _raw_dtype(dtype).itemsize


def _raw_dtype(dtype: str) -> np.dtype[Any]:
    return np.dtype({"bf16": "<u2", "bool": "|u1"}.get(dtype, dtype))


def _array(tensor: _Tensor, raw: Mapping[str, Array]) -> Array:
    storage = tensor.storage
    numbers = raw[storage.key][storage.start : storage.start + storage.length]
    if prod(tensor.size) == 0:
        view: Array = np.empty(tensor.size, numbers.dtype)
    else:  # `_tensor` has checked that the last element lies inside
        step = numbers.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.size, tuple(step * stride for stride in tensor.stride), writeable=False
        )
    contiguous: Array = np.ascontiguousarray(view).reshape(tensor.size)
    if storage.dtype == "bf16":
        return _from_bfloat16(contiguous)
    if storage.dtype == "bool":
        return contiguous.astype(np.bool_)
    return _widened(contiguous)


def _widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _from_bfloat16(bits: Array) -> NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    upper = np.left_shift(bits.astype(np.uint32), 16, dtype=np.uint32)
    return upper.view(np.float32)


def _state_dict(root: object, size: int) -> dict[str, _Tensor]:
    """Pick the mapping of names to tensors out of what the pickle described."""
    if isinstance(root, dict):
        for wrapper in _WRAPPERS:
            if isinstance(root.get(wrapper), dict):
                root = root[wrapper]
                break
    if not isinstance(root, dict):
        raise _Refused(f"it holds {_kind(root)}, not a mapping of parameter names to tensors")
    tensors: dict[str, _Tensor] = {}
    total = 0
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise _Refused(f"its entry {_shown(name)} is {_kind(value)}, not a tensor")
        total += prod(value.size) * _itemsize(value.storage.dtype)
        if total > 2 * size:  # twice: tied weights share their storage
            raise _Refused(f"its tensors claim more than {2 * size} bytes, in a file of {size}")
        tensors[name] = value
    return tensors


def _kind(value: object) -> str:
    """Name a value's type; the value itself is never printed, it may be endless."""
    if isinstance(value, _Tensor):
        return "a tensor"
    if isinstance(value, _Name):
        return f"the name {value.full.replace(' ', '.')}"
    return f"a value of type {type(value).__name__}"


def _shown(value: object) -> str:
    """Show a value taken from the file, if it is short and plain."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "…")
    if isinstance(value, int | float) and -(2**63) < value < 2**63:
        return repr(value)
    return _kind(value)


# ── the pickle machine ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


_CONSTANTS: Final[dict[str, object]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS: Final = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE".split()
)
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Interprets the data part of pickle. Contract: no import, no call, no attribute; every opcode costs O(1) plus its argument's bytes."""

    def __init__(self, file_size: int) -> None:
        self.storages: dict[str, _Storage] = {}
        """Storages that the pickles referred to, by key, in order of appearance."""
        self._file_size = file_size
        self._left = PICKLE_OPCODES

    def run(self, stream: IO[bytes]) -> Any:
        """Run one pickle from the stream and return what it describes; the stream is left behind its last byte."""
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}

        def pop() -> Any:
            if not stack:
                raise _Refused("its pickle takes a value from an empty stack")
            return stack.pop()

        def pop_to_mark() -> list[Any]:
            nonlocal stack
            if not marks:
                raise _Refused("its pickle has no mark where one is needed")
            items, stack = stack, marks.pop()
            return items

        def top(kind: type) -> Any:
            if not stack or type(stack[-1]) is not kind:
                raise _Refused(f"its pickle wants a {kind.__name__} where there is none")
            return stack[-1]

        def put(index: Any) -> None:
            if not stack:
                raise _Refused("its pickle remembers a value from an empty stack")
            memo[index] = stack[-1]

        try:
            for opcode, argument, at in pickletools.genops(stream):
                self._left -= 1
                if self._left < 0:
                    raise _Refused(f"its pickle has more than {PICKLE_OPCODES} opcodes")
                code = opcode.name
                if code in _LITERALS:
                    stack.append(argument)
                elif code in _CONSTANTS:
                    stack.append(_CONSTANTS[code])
                elif code in {"BINPUT", "LONG_BINPUT", "PUT"}:
                    put(argument)
                elif code == "MEMOIZE":
                    put(len(memo))
                elif code in {"BINGET", "LONG_BINGET", "GET"}:
                    if argument not in memo:
                        raise _Refused(f"its pickle recalls value {argument}, which it never remembered")
                    stack.append(memo[argument])
                elif code == "MARK":
                    marks.append(stack)
                    stack = []
                elif code in _TUPLES:
                    stack.append(tuple(reversed([pop() for _ in range(_TUPLES[code])])))
                elif code == "TUPLE":
                    items = pop_to_mark()
                    stack.append(tuple(items))
                elif code == "EMPTY_LIST":
                    stack.append([])
                elif code == "LIST":
                    items = pop_to_mark()
                    stack.append(items)
                elif code == "EMPTY_DICT":
                    stack.append({})
                elif code == "DICT":
                    items = pop_to_mark()
                    stack.append(_filled({}, items))
                elif code == "APPEND":
                    item = pop()
                    top(list).append(item)
                elif code == "APPENDS":
                    items = pop_to_mark()
                    top(list).extend(items)
                elif code == "SETITEM":
                    value, key = pop(), pop()
                    _filled(top(dict), [key, value])
                elif code == "SETITEMS":
                    items = pop_to_mark()
                    _filled(top(dict), items)
                elif code == "GLOBAL":
                    stack.append(_admitted(argument))
                elif code == "STACK_GLOBAL":
                    name, module = pop(), pop()
                    if not isinstance(name, str) or not isinstance(module, str):
                        raise _Refused("its pickle names something with what is not text")
                    stack.append(_admitted(f"{module} {name}"))
                elif code == "REDUCE":
                    arguments, function = pop(), pop()
                    stack.append(_built(function, arguments))
                elif code == "BUILD":
                    pop()  # the module versions that PyTorch hangs onto a state dict; not needed
                    top(dict)
                elif code == "BINPERSID":
                    stack.append(self._storage(pop()))
                elif code == "STOP":
                    result = pop()
                    if stack or marks:
                        raise _Refused("its pickle ends with values left over")
                    return result
                elif code not in {"PROTO", "FRAME"}:
                    raise _Refused(f"its pickle uses the opcode {code} at byte {at}, which a checkpoint does not need")
        except ValueError as error:
            raise _Refused(f"its pickle is damaged ({str(error)[:200]})") from None
        raise _Refused("its pickle has no end")

    def _storage(self, identity: object) -> _Storage:
        """Read the persistent id of a storage: `("storage", type, key, device, elements[, view])`."""
        match identity:
            case ("storage", _Name(full=kind), str(key), str(), int(count)):
                start, length = 0, count
            case ("storage", _Name(full=kind), str(key), str(), int(count), None):
                start, length = 0, count
            case ("storage", _Name(full=kind), str(key), str(), int(count), (str(), int(start), int(length))):
                pass
            case _:
                raise _Refused("its pickle refers to something outside that is not a storage")
        dtype = _STORAGES.get(kind)
        if dtype is None:
            raise _Refused(f"storage {_shown(key)} is of {kind.replace(' ', '.')}, which is not a storage type")
        if not re.fullmatch(r"[0-9]{1,40}", key):
            raise _Refused(f"its pickle refers to a storage named {_shown(key)}, which is not a number")
        if not 0 <= count * _itemsize(dtype) <= self._file_size:
            raise _Refused(f"storage {key} claims {_shown(count)} elements, in a file of {self._file_size} bytes")
        if start < 0 or length < 0 or start + length > count:
            raise _Refused(f"a view of storage {key} leaves it")
        known = self.storages.setdefault(key, _Storage(key, dtype, count, 0, count))
        if (known.dtype, known.count) != (dtype, count):
            raise _Refused(f"storage {key} is described twice, in different ways")
        return _Storage(key, dtype, count, start, length)


def _admitted(full: Any) -> _Name:
    if full in _CALLABLES or full in _STORAGES:
        return _Name(full)
    shown = full.replace(" ", ".")
    raise _Refused(f"refused: its pickle asks for {_shown(shown)}, which is none of the names that a checkpoint needs")


def _filled(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Add keys and values that alternate. Only plain keys: hashing nested tuples can take exponential time."""
    if len(items) % 2:
        raise _Refused("its pickle has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise _Refused(f"its pickle uses {_kind(key)} as a key")
        target[key] = value
    return target


def _built(function: object, arguments: object) -> object:
    """Do what the five admitted callables would do."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise _Refused(f"its pickle calls {_kind(function)}")
    match function.full, arguments:
        case "collections OrderedDict", ():
            return {}
        case "collections OrderedDict", (list(pairs),):  # how Python 2 wrote it
            items: list[Any] = []
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise _Refused("its pickle makes a mapping of what are not pairs")
                items += pair
            return _filled({}, items)
        case "torch._utils _rebuild_tensor", (_Storage() as storage, offset, size, stride):
            return _tensor(storage, offset, size, stride)
        case "torch._utils _rebuild_tensor_v2", (_Storage() as storage, offset, size, stride, *rest) if 2 <= len(rest) <= 3:
            return _tensor(storage, offset, size, stride)
        case "torch._utils _rebuild_parameter", (_Tensor() as tensor, _, _):
            return tensor
    raise _Refused(f"its pickle calls {function.full.replace(' ', '.')} with arguments that do not fit")


def _tensor(storage: _Storage, offset: object, size: object, stride: object) -> _Tensor:
    """Check a view against the bounds of its storage."""
    sizes, strides = _naturals(size), _naturals(stride)
    if type(offset) is not int or offset < 0 or sizes is None or strides is None or len(sizes) != len(strides) or len(sizes) > 16:
        raise _Refused(f"a tensor in storage {storage.key} has an impossible shape")
    elements = prod(sizes)
    last = offset + sum((extent - 1) * step for extent, step in zip(sizes, strides, strict=True))
    if elements and (last >= storage.length or elements > storage.length):
        reach = f"{_shown(elements)} elements, the last at {_shown(last)}"
        raise _Refused(f"a tensor of {reach}, does not fit into its storage {storage.key} of {storage.length} elements")
    if not elements and max(sizes) > 2**31:
        raise _Refused(f"a tensor in storage {storage.key} has an impossible shape")
    return _Tensor(storage, offset, sizes, strides)


def _naturals(values: object) -> tuple[int, ...] | None:
    if type(values) not in (tuple, list):
        return None
    assert isinstance(values, tuple | list)
    return tuple(values) if all(type(value) is int and value >= 0 for value in values) else None
