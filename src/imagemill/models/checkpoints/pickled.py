"""The language that a PyTorch checkpoint's pickle is written in, read as data.

A pickle is a program. It is not given to Python's unpickler here. `Machine` interprets the two
dozen opcodes that describe plain data, and where the program names something to call, the name is
looked up in a closed table: nothing is imported, nothing is called. What is made with a name
outside the table, such as a command's arguments, becomes a `Unknown` value, which only knows this
name. Every other opcode is refused, and the message says which. What a program can make this module
allocate is bounded by the size
of its file: tensors may not be larger than their storage, storages not larger than the file, and it
has a budget of opcodes.
"""

from __future__ import annotations

import pickletools
import re
from math import prod
from typing import IO, Any, Final

import numpy as np
from msgspec import Struct

PICKLE_OPCODES: Final = 1_000_000
"""Budget of the program; that of a ResNeXt-101 takes 25,000 opcodes."""

_STORAGES: Final[dict[str, str]] = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "|i1",
    "torch ByteStorage": "|u1",
    "torch BoolStorage": "?",
}
_CALLABLES: Final = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
        "torch._tensor _rebuild_from_type_v2",
    }
)


class Refused(Exception):  # noqa: N818 - carries the reason to `checkpoint.read`, which makes it a CheckpointError
    """What is wrong with the file, in words."""


class _Name(Struct, frozen=True):
    """A name that the pickle mentions and the table admits. It stands for the thing and is never
    resolved.
    """

    full: str


class Unknown(Struct, frozen=True, eq=False):
    """A value that is not made, because the table does not admit the name of its class or
    function.
    """

    full: str
    called: bool = False
    """Whether a function or class was called, and not an object of a class described."""

    @property
    def refusal(self) -> str:
        """Why a file that needs this value is refused."""
        dotted = shown(self.full.replace(" ", "."))
        is_yolo = self.full.startswith("ultralytics.")
        hint = " (export it: yolo export model=FILE format=onnx)" if is_yolo else ""
        return (
            f"refused: its pickle asks for {dotted}, which is none of the names that a checkpoint"
            f" needs{hint}"
        )


class Storage(Struct, frozen=True):
    """A run of numbers kept outside the pickle."""

    key: str
    dtype: str
    count: int
    """Elements of the whole storage."""
    start: int
    """First element of the view that the tensor was saved with; 0 except in very old files."""
    length: int
    """Elements of that view."""


class Tensor(Struct, frozen=True, eq=False):
    """A view into a storage: offset, size and stride in elements, checked against the storage's
    bounds.
    """

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_CONSTANTS: Final[dict[str, object]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS: Final = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE"
    " BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """Interprets the data part of pickle. Contract: no import, no call, no attribute; every opcode
    costs O(1) plus its argument's bytes.
    """

    def __init__(self, file_size: int) -> None:
        self.storages: dict[str, Storage] = {}
        """Storages that the pickles referred to, by key, in order of appearance."""
        self._file_size = file_size
        self._left = PICKLE_OPCODES

    def run(self, stream: IO[bytes]) -> Any:
        """Run one pickle from the stream and return what it describes; the stream is left behind
        its last byte. A damaged one raises any exception.
        """
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[Any, Any] = {}

        def pop_to_mark() -> list[Any]:
            nonlocal stack
            items, stack = stack, marks.pop()
            return items

        def top(wanted: type) -> Any:
            if stack and isinstance(stack[-1], Unknown):
                return wanted()  # what it would hold is dropped
            if not stack or type(stack[-1]) is not wanted:
                raise Refused(f"its pickle wants a {wanted.__name__} where there is none")
            return stack[-1]

        for opcode, argument, at in pickletools.genops(stream):
            self._left -= 1
            if self._left < 0:
                raise Refused(f"its pickle has more than {PICKLE_OPCODES} opcodes")
            code = opcode.name
            if code in _LITERALS:
                stack.append(argument)
            elif code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code in {"BINPUT", "LONG_BINPUT", "PUT"}:
                memo[argument] = stack[-1]
            elif code == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code in {"BINGET", "LONG_BINGET", "GET"}:
                stack.append(memo[argument])
            elif code == "MARK":
                marks.append(stack)
                stack = []
            elif code in _TUPLES:
                stack.append(tuple(reversed([stack.pop() for _ in range(_TUPLES[code])])))
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
                item = stack.pop()
                top(list).append(item)
            elif code == "APPENDS":
                items = pop_to_mark()
                top(list).extend(items)
            elif code == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _filled(top(dict), [key, value])
            elif code == "SETITEMS":
                items = pop_to_mark()
                _filled(top(dict), items)
            elif code == "EMPTY_SET":
                stack.append(Unknown("builtins set"))
            elif code == "ADDITEMS":
                items = pop_to_mark()
                top(list)
            elif code == "FROZENSET":
                items = pop_to_mark()
                stack.append(Unknown("builtins frozenset"))
            elif code == "GLOBAL":
                stack.append(_named(argument))
            elif code == "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise Refused("its pickle names something with what is not text")
                stack.append(_named(f"{module} {name}"))
            elif code == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_built(function, arguments))
            elif code in {"NEWOBJ", "NEWOBJ_EX"}:
                for _ in range(1 if code == "NEWOBJ" else 2):
                    stack.pop()  # arguments
                made = stack.pop()
                if not isinstance(made, Unknown):
                    raise Refused(f"its pickle uses the opcode {code} at byte {at} on {kind(made)}")
                stack.append(Unknown(made.full))
            elif code == "BUILD":
                stack.pop()  # the module versions that PyTorch attaches to a state dict; not needed
                top(dict)
            elif code == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif code == "STOP":
                result = stack.pop()
                if isinstance(result, Unknown):
                    raise Refused(result.refusal)
                return result
            elif code not in {"PROTO", "FRAME"}:
                raise Refused(
                    f"its pickle uses the opcode {code} at byte {at}, which a checkpoint does"
                    " not need"
                )
        raise Refused("its pickle has no end")

    def _storage(self, identity: object) -> Storage | Unknown:
        """Read the persistent id of a storage: `("storage", type, key, device, elements[,
        view])`.
        """
        match identity:
            case ("storage", Unknown() as unknown, *_):
                return unknown
            case ("storage", _Name(full=storage_type), str(key), str(), int(count)):
                start, length = 0, count
            case ("storage", _Name(full=storage_type), str(key), str(), int(count), None):
                start, length = 0, count
            case (
                "storage",
                _Name(full=storage_type),
                str(key),
                str(),
                int(count),
                (str(), int(start), int(length)),
            ):
                pass
            case _:
                raise Refused("its pickle refers to something outside that is not a storage")
        dtype = _STORAGES.get(storage_type)
        if dtype is None:
            raise Refused(
                f"storage {shown(key)} is of {storage_type.replace(' ', '.')}, which is not a"
                " storage type"
            )
        if not re.fullmatch(r"[0-9]{1,40}", key):
            raise Refused(
                f"its pickle refers to a storage named {shown(key)}, which is not a number"
            )
        if not 0 <= count * np.dtype(dtype).itemsize <= self._file_size:
            raise Refused(
                f"storage {key} claims {shown(count)} elements, in a file of {self._file_size}"
                " bytes"
            )
        if start < 0 or length < 0 or start + length > count:
            raise Refused(f"a view of storage {key} leaves it")
        known = self.storages.setdefault(key, Storage(key, dtype, count, 0, count))
        if (known.dtype, known.count) != (dtype, count):
            raise Refused(f"storage {key} is described twice, in different ways")
        return Storage(key, dtype, count, start, length)


def _named(full: Any) -> _Name | Unknown:
    return _Name(full) if full in _CALLABLES or full in _STORAGES else Unknown(str(full))


def _filled(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Add keys and values that alternate. Only plain keys are kept: hashing nested tuples can take
    exponential time.
    """
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str | bytes | int | float | None):
            target[key] = value
    return target


def _built(function: object, arguments: object) -> object:
    """Do what the admitted callables would do."""
    if isinstance(function, Unknown):
        return Unknown(function.full, called=True)
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise Refused(f"its pickle calls {kind(function)}")
    match function.full, arguments:
        case "collections OrderedDict", ():
            return {}
        case "collections OrderedDict", (list(pairs),):  # how Python 2 wrote it
            items: list[Any] = []
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise Refused("its pickle makes a mapping of what are not pairs")
                items += pair
            return _filled({}, items)
        case "torch._utils _rebuild_tensor", (Storage() as storage, offset, size, stride):
            return _tensor(storage, offset, size, stride)
        case "torch._utils _rebuild_tensor_v2", (
            Storage() as storage,
            offset,
            size,
            stride,
            *rest,
        ) if 2 <= len(rest) <= 3:
            return _tensor(storage, offset, size, stride)
        case "torch._utils _rebuild_parameter" | "torch._utils _rebuild_parameter_with_state", (
            Tensor() as tensor,
            _,
            _,
            *_,
        ):
            return tensor
        case "torch._tensor _rebuild_from_type_v2", (
            _Name() as inner,
            _,
            tuple() as rest,
            _,
        ):  # a tensor with attributes
            return _built(inner, rest)
        case _, (Unknown() as unknown, *_):
            return unknown
    raise Refused(
        f"its pickle calls {function.full.replace(' ', '.')} with arguments that do not fit"
    )


def _tensor(storage: Storage, offset: object, size: object, stride: object) -> Tensor:
    """Check a view against the bounds of its storage."""
    sizes, strides = _naturals(size), _naturals(stride)
    if (
        type(offset) is not int
        or offset < 0
        or sizes is None
        or strides is None
        or len(sizes) != len(strides)
        or len(sizes) > 16
    ):
        raise Refused(f"a tensor in storage {storage.key} has an impossible shape")
    elements = prod(sizes)
    last = offset + sum((extent - 1) * step for extent, step in zip(sizes, strides, strict=True))
    if elements and (last >= storage.length or elements > storage.length):
        reach = f"{shown(elements)} elements, the last at {shown(last)}"
        raise Refused(
            f"a tensor of {reach}, does not fit into its storage {storage.key} of {storage.length}"
            " elements"
        )
    if not elements and max(sizes) > 2**31:
        raise Refused(f"a tensor in storage {storage.key} has an impossible shape")
    return Tensor(storage, offset, sizes, strides)


def _naturals(values: Any) -> tuple[int, ...] | None:
    if type(values) not in (tuple, list):
        return None
    return tuple(values) if all(type(value) is int and value >= 0 for value in values) else None


def walk(
    root: dict[Any, Any], deepest: int, without: str = "/"
) -> list[tuple[str, dict[Any, Any]]]:
    """Return the mapping that a pickle described and those inside it, each once, with the path to
    it, which has at most `deepest` parts. What is in an entry whose name contains `without`, in any
    case, is left out.
    """
    mappings, seen = [("", root)], {id(root)}
    for path, mapping in mappings:  # grows meanwhile
        for name, value in mapping.items():
            is_new = isinstance(name, str) and isinstance(value, dict) and id(value) not in seen
            if is_new and path.count("/") + bool(path) < deepest and without not in name.lower():
                seen.add(id(value))
                mappings.append((f"{path}/{name}" if path else name, value))
    return mappings


def kind(value: object) -> str:
    """Name a value's type; the value itself is never printed, it may be endless."""
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, _Name):
        return f"the name {value.full.replace(' ', '.')}"
    if isinstance(value, Unknown):
        return f"an object of {shown(value.full.replace(' ', '.'))}"
    return f"a value of type {type(value).__name__}"


def shown(value: object) -> str:
    """Show a value taken from the file, if it is short and plain."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "…")
    if isinstance(value, int | float) and -(2**63) < value < 2**63:
        return repr(value)
    return kind(value)
