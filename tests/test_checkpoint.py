"""The readers give what PyTorch gives, run nothing, and answer whatever bytes they meet with one
clear error.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import pth_files
from imagemill.errors import CheckpointError
from imagemill.models.checkpoints import checkpoint, pickled

FIXTURES = Path(__file__).parent / "fixtures"
ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array(7, np.int64)}
WRITERS = {"zip": pth_files.write_zip, "legacy": pth_files.write_legacy}


def expected_content() -> dict[str, np.ndarray]:
    """What fixtures/make_fixtures.py put into its files."""
    base = np.arange(24, dtype=np.float32)
    return {
        "plain": base.reshape(2, 3, 4),
        "transposed": base.reshape(4, 6).T,
        "slice": base[5:17:3],
        "parameter": np.array([[1.5, -2.0]], np.float32),
        "half": np.array([0.5, 65504.0, -6.0e-8], np.float16).astype(np.float32),
        "brain": np.array([1.0, -3.140625, 3.0e38], np.float32).view(np.uint32) + np.uint32(0x8000),
        "double": np.array([0.1]),
        "long": np.array(-(2**40)),
        "int": np.array([7], np.int32),
        "byte": np.array([0, 255], np.uint8),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize(
    "file",
    [
        "plain.zip.pth",
        "plain.legacy.pth",
        "nested.zip.pth",
        "nested.legacy.pth",
        "protocol4.zip.pth",
    ],
)
def test_files_of_real_pytorch_read_to_the_same_numbers(file: str) -> None:
    """Strides, offsets, shared storages, Parameters, 16-bit floats, integers, wrapping: names,
    order, types, values as saved.
    """
    read = checkpoint.read(FIXTURES / file)
    expected = expected_content()
    brain = (expected.pop("brain") & np.uint32(0xFFFF0000)).view(np.float32)
    assert list(read) == list(expected_content())
    assert np.array_equal(read.pop("brain"), brain)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype, name
        assert read[name].shape == array.shape, name
        assert np.array_equal(read[name], array), name


@pytest.mark.parametrize("file", ["net.zip.pth", "net.legacy.pth"])
def test_state_dict_of_a_real_module_is_read(file: str) -> None:
    """A module's state dict carries versions as an attribute; they are skipped."""
    read = checkpoint.read(FIXTURES / file)
    assert np.array_equal(read["0.weight"], np.load(FIXTURES / "net.weight.npy"))
    assert read["1.num_batches_tracked"].shape == ()


def test_files_written_under_python_2_are_read(tmp_path: Path) -> None:
    """Byte strings, `_rebuild_tensor` without v2, OrderedDict of a list of pairs: as in files of
    2017.
    """
    read = checkpoint.read(pth_files.write_legacy(tmp_path / "old.pth", ARRAYS, python2=True))
    assert list(read) == list(ARRAYS)
    assert all(np.array_equal(read[name], ARRAYS[name]) for name in ARRAYS)


def test_format_is_decided_by_content_not_by_suffix(tmp_path: Path) -> None:
    """Each format is read under each suffix."""
    for suffix in (".pth", ".safetensors", ".bin"):
        for write in (*WRITERS.values(), lambda path, arrays: save_file(arrays, path) or path):
            path = write(tmp_path / f"weights{suffix}", ARRAYS)
            assert np.array_equal(checkpoint.read(path)["a.weight"], ARRAYS["a.weight"])


def test_safetensors_keep_file_order_and_widen_16_bit_floats(tmp_path: Path) -> None:
    """bfloat16, which NumPy lacks, is read too; order is that of the data."""
    header = {
        "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]},
        "a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
    }
    body = (
        np.array([0x3F80, 0xC000], "<u2").tobytes()
        + np.array([0.5, 2], "<f2").tobytes()
        + struct.pack("<q", -5)
    )
    path = safetensors_file(tmp_path, header, body)
    read = checkpoint.read(path)
    assert list(read) == ["b", "a", "c"]
    assert np.array_equal(read["b"], np.array([[1.0], [-2.0]], np.float32))
    assert read["a"].dtype == np.float32
    assert read["c"] == -5


def safetensors_file(folder: Path, header: object, body: bytes) -> Path:
    text = json.dumps(header).encode()
    path = folder / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


# ── what training programs write ──────────────────────────────────────────────────────────────────

WEIGHTS = {
    "conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bn1.running_mean": np.float32([1, 2]),
    "bn1.num_batches_tracked": np.array(7, np.int64),
}
AVERAGED = {name: np.asarray(array + array.dtype.type(1)) for name, array in WEIGHTS.items()}
BN_ONLY = {name: AVERAGED[name] for name in AVERAGED if "bn1" in name}


def prefixed(prefix: str, arrays: dict[str, np.ndarray] = WEIGHTS) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def adam() -> dict[str, Any]:
    """The state of an optimizer, as `torch.save` gets it: tensors too, and settings that are no
    plain data.
    """
    moments = {
        number: {"step": 3, "exp_avg": np.float32([1, 2]), "exp_avg_sq": np.float32([3, 4])}
        for number in range(2)
    }
    return {
        "state": moments,
        "param_groups": [{"lr": np.float64(0.1), "betas": (0.9, 0.999), "params": [0, 1]}],
    }


def clutter() -> dict[str, Any]:
    """What stands beside the weights in a training program's checkpoint."""
    return {
        "epoch": 12,
        "optimizer": adam(),
        "Optimizer_by_name": prefixed("", AVERAGED),
        "args": argparse.Namespace(
            lr=0.1,
            output=PurePosixPath("runs/1"),
            when=datetime.date(2026, 11, 27),
            classes={"a", "b"},
        ),
        "best_acc": np.float64(81.5),
        "loss": np.array(0.25, np.float32),
        "seen": frozenset({1}),
        "by_pair": {(1, 2): "tuple"},
        "history": collections.defaultdict(list, {"acc": [1.0, 2.0]}),
        "milestones": collections.Counter([30, 60]),
        "ordered": collections.OrderedDict(a=1),
        "rng": b"bytes",
    }


def write_training_state(form: str, folder: Path, state: dict[str, Any]) -> Path:
    arrays: dict[str, np.ndarray] = {}
    program = pth_files.training_state(state, arrays, legacy=form == "legacy")
    return WRITERS[form](folder / "w.pth", arrays, b"\x80\x02" + program + b".")


def same(read: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return list(read) == list(expected) and all(
        np.array_equal(read[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    "keys",
    [
        "model",
        "net",
        "network",
        "module",
        "state_dict",
        "model_state_dict",
        "weights",
        "classifier",
        "model state_dict",
        "a b c",
    ],
)
def test_a_state_dict_is_found_wherever_it_is_nested(keys: str, form: str, tmp_path: Path) -> None:
    """Beside an optimizer's state, a namespace of arguments, numbers of NumPy, sets, dates and
    paths, none of which is needed or made.
    """
    state: dict[str, Any] = WEIGHTS
    for key in reversed(keys.split()):
        state = clutter() | {key: state}
    messages: list[str] = []
    assert same(
        checkpoint.read(write_training_state(form, tmp_path, state), messages.append), WEIGHTS
    )
    read = checkpoint.read(
        write_training_state(form, tmp_path, clutter() | WEIGHTS), messages.append
    )
    assert read.pop("loss") == 0.25
    assert same(read, WEIGHTS), "not nested at all"
    assert messages == []


PREFIXES = [
    "module.",
    "model.",
    "_orig_mod.",
    "net.",
    "network.",
    "model._orig_mod.",
    "_orig_mod.module.",
    "module.model.net.",
    "model.module.",
]


@pytest.mark.parametrize("form", [*WRITERS, "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_wrappers_are_dropped(prefix: str, form: str, tmp_path: Path) -> None:
    """DataParallel's, torch.compile's and Lightning's, in any order, and for a part of the network;
    the loss's weights are left out.
    """
    arrays = prefixed(prefix) | {
        "criterion.weight": np.float32([1]),
        "loss_fn.pos_weight": np.float32([1]),
        "n_averaged": np.array(3),
    }
    arrays["layer1.module.0._orig_mod.weight"] = np.float32([5])
    expected = WEIGHTS | {"layer1.0.weight": np.float32([5])}
    path = tmp_path / "w.pth"
    (
        save_file(arrays, path)
        if form == "safetensors"
        else write_training_state(form, tmp_path, {"state_dict": arrays})
    )
    read = checkpoint.read(path)
    assert same({name: read[name] for name in expected}, expected)
    assert len(read) == len(expected)


@pytest.mark.parametrize(
    ("prefix", "left"),
    [
        ("resnet.", ""),
        ("model.base_model.", ""),
        ("_orig_mod.classifier.cnn.", ""),
        ("features.0.", "features.0."),
        ("timm_model.features.0.", "features.0."),
        ("1.", "1."),
    ],
)
def test_what_all_names_begin_with_is_dropped(prefix: str, left: str, tmp_path: Path) -> None:
    """Users' modules hold the network under any name. A place in a sequence stays: what stands
    before it may be there for a reason, and Cadene's names begin so.
    """
    arrays = prefixed(prefix) | {"criterion.weight": np.float32([1])}
    save_file(arrays, tmp_path / "w.safetensors")
    assert set(checkpoint.read(tmp_path / "w.safetensors")) == set(prefixed(left))


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"model": WEIGHTS, "model_ema": prefixed("module.", AVERAGED) | {"n_averaged": np.array(9)}}, "'model_ema'), not the plain ones"),
        ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, "'state_dict_ema'), not the plain ones ('state_dict'"),
        ({"ema_state_dict": AVERAGED, "net": WEIGHTS}, "'ema_state_dict'), not the plain ones ('net'"),
        ({"model": WEIGHTS, "ema": {"decay": 0.99, "module": AVERAGED}}, "'ema/module'), not the plain ones ('model'"),
        ({"state_dict": prefixed("model.") | prefixed("ema_model.module.", AVERAGED)}, "'state_dict/ema_model.*'), not the plain ones"),
        (prefixed("net.") | prefixed("model_ema.", AVERAGED), "'model_ema.*'), not the plain ones (the top level"),
    ],
)  # fmt: skip
def test_averaged_weights_are_used_and_named(
    state: dict[str, Any], line: str, tmp_path: Path
) -> None:
    """Publishers evaluate with the EMA of the weights, and timm loads it; the line says which are
    used and which are not.
    """
    messages: list[str] = []
    assert same(
        checkpoint.read(
            write_training_state("zip", tmp_path, {"optimizer": adam(), "epoch": 3} | state),
            messages.append,
        ),
        AVERAGED,
    )
    assert len(messages) == 1
    assert messages[0].startswith("w.pth: the EMA weights are used (")
    assert line in messages[0]


def test_averaged_weights_alone_are_used(tmp_path: Path) -> None:
    """There is nothing to choose."""
    messages: list[str] = []
    assert same(
        checkpoint.read(
            write_training_state("zip", tmp_path, {"model_ema": AVERAGED}), messages.append
        ),
        AVERAGED,
    )
    assert messages == []


def test_averaged_weights_that_lack_parameters_are_not_used(tmp_path: Path) -> None:
    """Some programs average trained parameters only, without running statistics, or spell their
    names in their own way.
    """
    messages: list[str] = []
    path = write_training_state(
        "zip",
        tmp_path,
        {
            "state_dict": (
                prefixed("model.")
                | prefixed("model_ema.", BN_ONLY)
                | {"model_ema.xweight": WEIGHTS["conv1.weight"]}
            )
        },
    )
    assert same(checkpoint.read(path, messages.append), WEIGHTS)
    assert messages == [
        "w.pth: the EMA weights ('state_dict/model_ema.*') are not used: they have no"
        " 'conv1.weight'"
    ]


def test_several_models_are_not_mixed(tmp_path: Path) -> None:
    """The usual key is preferred, and that is said; without one, and for two models under one key,
    the file is refused with both named.
    """
    messages: list[str] = []
    path = write_training_state("zip", tmp_path, {"teacher": AVERAGED, "model": WEIGHTS})
    assert same(checkpoint.read(path, messages.append), WEIGHTS)
    assert messages == ["w.pth: the weights under 'model' are used, not those under 'teacher'"]
    path = write_training_state("zip", tmp_path, {"student": WEIGHTS, "teacher": AVERAGED})
    with pytest.raises(
        CheckpointError,
        match=r"several state dicts \('student', 'teacher'\): save the one that you want",
    ):
        checkpoint.read(path)
    path = write_training_state(
        "zip", tmp_path, {"state_dict": prefixed("model.") | prefixed("net.", AVERAGED)}
    )
    with pytest.raises(
        CheckpointError,
        match=r"two of its tensors are called 'conv1\.weight', one of them 'net\.conv1\.weight'",
    ):
        checkpoint.read(path)


@pytest.mark.parametrize("form", WRITERS)
def test_what_would_run_beside_the_weights_is_not_run(form: str, tmp_path: Path) -> None:
    """It is data that nobody needs."""
    state = {"state_dict": WEIGHTS, "args": Runs(os.system, f"touch {tmp_path / 'ran'}")}
    assert same(checkpoint.read(write_training_state(form, tmp_path, state)), WEIGHTS)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_only_the_tensors_that_are_used_are_read(tmp_path: Path) -> None:
    """An optimizer's state is twice as large as the weights: it costs no memory, and damage in it
    does not matter.
    """
    path = write_training_state(
        "zip",
        tmp_path,
        {"state_dict": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": np.zeros(1_000_000)}}}},
    )
    tracemalloc.start()
    try:
        assert same(checkpoint.read(path), WEIGHTS)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert same(checkpoint.read(repack(path, {"archive/data/3": bytes(7_999_000)})), WEIGHTS)


def test_weights_that_an_optimizer_keeps_too_are_found() -> None:
    """A pickle may refer to one mapping from several places."""
    shared = {"weight": 1}
    root = {"optimizer": {"ema": shared}, "train": {"model": shared}}
    assert [path for path, _ in pickled.walk(root, 4, without="optim")] == [
        *("", "train", "train/model")
    ]


@pytest.mark.parametrize(
    "state", [argparse.Namespace(lr=1), {"model": argparse.Namespace(lr=1), "epoch": 3}]
)
def test_a_pickled_object_instead_of_a_state_dict_is_named(state: Any, tmp_path: Path) -> None:
    """As `torch.save(model)` writes it: its class cannot be made without running its code."""
    with pytest.raises(
        CheckpointError,
        match=r"its pickle asks for 'argparse\.Namespace', which is none of the names",
    ):
        checkpoint.read(write_training_state("zip", tmp_path, state))


def test_a_model_of_ultralytics_names_its_export(tmp_path: Path) -> None:
    """Its `best.pt` holds a pickled network; the ONNX file says all that imagemill needs."""
    pickled = b"\x80\x02cultralytics.nn.tasks\nClassificationModel\n)\x81."
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("best/data.pkl", pickled)
    with pytest.raises(CheckpointError, match=r"export it: yolo export model=FILE format=onnx"):
        checkpoint.read(path)


def test_tensors_with_attributes_are_read(tmp_path: Path) -> None:
    """PyTorch writes a Parameter that carries attributes in a way of its own."""
    inner = pth_files.tensor("0", ARRAYS["a.weight"], legacy=False)
    parameter = (
        pth_files.name("torch._utils", "_rebuild_parameter_with_state") + b"(" + inner + b"\x88N}tR"
    )
    call, rest = (
        pth_files.name("torch._utils", "_rebuild_tensor_v2"),
        inner[len(pth_files.name("torch._utils", "_rebuild_tensor_v2")) : -1],
    )
    subclass = (
        pth_files.name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + call
        + pth_files.name("my.own", "Tensor")
        + rest
        + b"}tR"
    )
    program = (
        b"\x80\x02}("
        + pth_files.text("a.weight")
        + parameter
        + pth_files.text("b.weight")
        + subclass
        + b"u."
    )
    read = checkpoint.read(
        pth_files.write_zip(tmp_path / "w.pth", {"a": ARRAYS["a.weight"]}, program)
    )
    assert same(read, {"a.weight": ARRAYS["a.weight"], "b.weight": ARRAYS["a.weight"]})


# ── hostile pickles ───────────────────────────────────────────────────────────────────────────────


class Runs:
    """Unpickling this runs a command."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call  # type: ignore[return-value]


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickle → what the refusal must say."""
    command = f"touch {marker}"
    return {
        "os.system": (pickle.dumps(Runs(os.system, command), 2), "posix.system"),
        "eval": (pickle.dumps(Runs(eval, f"open({str(marker)!r}, 'w')"), 2), "__builtin__.eval"),
        "protocol 4": (pickle.dumps(Runs(eval, f"open({str(marker)!r}, 'w')"), 4), "builtins.eval"),
        "among tensors": (
            b"\x80\x02}(" + pth_files.text("a") + pth_files.tensor("0", ARRAYS["a.weight"], legacy=True)
            + pth_files.text("b") + pickle.dumps(Runs(os.system, command), 2)[2:-1] + b"u.",
            "posix.system",
        ),
        "dotted name": (b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.", "_rebuild_tensor_v2.__globals__"),
        "torch.load": (b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00atR.", "torch.load"),
        "OrderedDict of another module": (b"\x80\x02ccollections\nabc.OrderedDict\n)R.", "collections.abc.OrderedDict"),
        "INST": (b"\x80\x02(S'" + command.encode() + b"'\nios\nsystem\n.", "opcode INST"),
        "OBJ": (b"\x80\x02(cposix\nsystem\n.", "posix.system"),
        "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        "EXT1": (b"\x80\x02\x82\x01.", "opcode EXT1"),
        "PERSID": (b"\x80\x02Pfoo\n.", "opcode PERSID"),
        "BUILD on a name": (b"\x80\x02ccollections\nOrderedDict\n}b.", "wants a dict"),
        "calls a storage type": (b"\x80\x02ctorch\nFloatStorage\n(K\x01tR.", "torch.FloatStorage"),
        "calls a number": (b"\x80\x02K\x01)R.", "calls a value of type int"),
        "a path as storage": (
            b"\x80\x02}" + pth_files.text("a") + pth_files.tensor("../../etc/passwd", ARRAYS["a.weight"], legacy=True) + b"s.",
            "'../../etc/passwd', which is not a number",
        ),
        "not a storage outside": (b"\x80\x02(X\x06\x00\x00\x00moduletQ.", "not a storage"),
    }  # fmt: skip


HOSTILE = sorted(hostile(Path("marker")))


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_that_would_run_something_is_refused_by_name(
    case: str, form: str, tmp_path: Path
) -> None:
    """Nothing runs, nothing is written, and the message names what was refused and says what to
    do.
    """
    marker = tmp_path / "ran"
    program, named = hostile(marker)[case]
    path = WRITERS[form](tmp_path / "w.pth", ARRAYS, program)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Copy or download the file again" in str(caught.value)
    assert os.listdir(tmp_path) == ["w.pth"]


def bombs() -> dict[str, tuple[bytes, str]]:
    """Pickles of few bytes that would take memory or time without end → the bound that stops each
    of them.
    """
    huge = 2**62
    weight = ARRAYS["a.weight"]

    def one(tensor: bytes) -> bytes:
        return b"\x80\x02}" + pth_files.text("a") + tensor + b"s."

    doubling = b")q\x00" + b"".join(
        b"h%c\x86q%c" % (level, level + 1) for level in range(100)
    )  # each is a pair of the one before
    many = b"".join(
        pth_files.text(f"a{i}") + pth_files.tensor("0", np.zeros(10_000, np.float32), legacy=True)
        for i in range(500)
    )
    return {
        "memo index": (b"\x80\x02Nr\xff\xff\xff\xff.", "holds a value of type NoneType"),
        "BINBYTES8": (
            b"\x80\x04\x8e" + struct.pack("<Q", huge) + b".",
            f"expected {huge} bytes in a bytes8",
        ),
        "BINUNICODE": (
            b"\x80\x02X\xff\xff\xff\x7fabc.",
            f"expected {2**31 - 1} bytes in a unicodestring4",
        ),
        "BYTEARRAY8": (
            b"\x80\x05\x96" + struct.pack("<Q", huge) + b".",
            f"expected {huge} bytes in a bytearray8",
        ),
        "FRAME": (
            b"\x80\x04\x95" + struct.pack("<Q", huge) + b"N.",
            "holds a value of type NoneType",
        ),
        "LONG4": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not enough data in stream to read long4"),
        "huge storage": (
            one(pth_files.tensor("0", weight, legacy=True, count=huge)),
            rf"storage 0 claims {huge} elements, in a file of \d+ bytes",
        ),
        "huge shape": (
            one(pth_files.tensor("0", weight, legacy=True, shape=(2**31, 2**31))),
            "does not fit into its storage 0 of 12",
        ),
        "stretched": (
            one(pth_files.tensor("0", weight, legacy=True, shape=(2**40,), stride=(0,))),
            f"of {2**40} elements, the last at 0,",
        ),
        "empty but endless": (
            one(pth_files.tensor("0", weight, legacy=True, shape=(0, 2**62))),
            "has an impossible shape",
        ),
        "key of doubling tuples": (b"\x80\x02}" + doubling + b"Ns.", "holds an empty mapping"),
        "doubling tuples": (b"\x80\x02" + doubling + b".", "holds a value of type tuple"),
        "many opcodes": (b"\x80\x02" + b"N" * 100_001 + b".", "more than 100000 opcodes"),
        "nested": (
            b"\x80\x02" + b"(" * 20_000 + b"l" * 20_000 + b".",
            "holds a value of type list",
        ),
        "long": (
            b"\x80\x02X" + struct.pack("<I", 18_000_000) + b"x" * 18_000_000 + b".",
            (
                "has 18000008 bytes, more than the 16777216|expected 18000000 bytes in a"
                " unicodestring4, but only"
            ),
        ),
        "same tensor many times": (
            b"\x80\x02}(" + many + b"u.",
            r"its tensors claim more than \d+ bytes, in a file of",
        ),
    }


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("case", sorted(bombs()))
def test_a_pickle_that_allocates_without_end_is_refused(
    case: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 300 MB: lengths are checked against the file, shapes against storages, the
    program against its budget.
    """
    arrays = {"a": np.zeros(10_000, np.float32)} if case.startswith("same") else ARRAYS
    program, reason = bombs()[case]
    path = WRITERS[form](tmp_path / "w.pth", arrays, program)
    monkeypatch.setattr(pickled, "PICKLE_OPCODES", 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=reason):
            checkpoint.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300_000_000


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"shape": (13,)}, "does not fit into its storage 0 of 12 elements"),
        ({"offset": 1}, "does not fit"),
        ({"shape": (2, 2), "stride": (11, 1)}, "does not fit"),
        ({"shape": (3, 4), "stride": (-4, 1)}, "impossible shape"),
        ({"offset": -1}, "impossible shape"),
        ({"shape": (3,), "stride": (1, 1)}, "impossible shape"),
        ({"count": 11}, "11"),
    ],
)
@pytest.mark.parametrize("form", WRITERS)
def test_a_view_that_leaves_its_storage_is_refused(
    form: str, lie: dict, message: str, tmp_path: Path
) -> None:
    """Offsets, shapes and strides are checked before memory is touched."""
    program = (
        b"\x80\x02}"
        + pth_files.text("a")
        + pth_files.tensor("0", ARRAYS["a.weight"], legacy=True, **lie)
        + b"s."
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(WRITERS[form](tmp_path / "w.pth", {"a": ARRAYS["a.weight"]}, program))


# ── damaged and custom files ─────────────────────────────────────────────────────────────────────


def repack(
    path: Path, change: dict[str, bytes | None], names: dict[str, str] | None = None, **options: int
) -> Path:
    """Write a zip again with members replaced, removed (None), added or renamed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {name: data for name, data in change.items() if data is not None}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            if name not in change or change[name] is not None:
                archive.writestr((names or {}).get(name, name), data)
    return path


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "archive/../../outside", "..\\outside", "C:/outside"]
)
def test_a_zip_with_a_path_leading_out_is_refused(name: str, tmp_path: Path) -> None:
    """Nothing is extracted anyway; the file is refused all the same, and nothing is written."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = repack(pth_files.write_zip(folder / "w.pth", ARRAYS), {name: b"x"})
    with pytest.raises(CheckpointError, match="leads out of the archive"):
        checkpoint.read(path)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["in", "w.pth"]


def test_odd_zips_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Compressed, incomplete, custom, big-endian, wrongly sized, twice the same name."""

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            checkpoint.read(tmp_path / "w.pth")

    def fresh() -> Path:
        return pth_files.write_zip(tmp_path / "w.pth", ARRAYS)

    repack(fresh(), {}, compression=zipfile.ZIP_DEFLATED)
    refused("is compressed")
    repack(fresh(), {"archive/data/0": None})
    refused("archive/data/0 is missing")
    repack(fresh(), {"archive/data/0": b"1234"})
    refused("archive/data/0 has 4 bytes, the pickle says 48")
    repack(fresh(), {"archive/data.pkl": None})
    refused("not one made by torch.save")
    repack(fresh(), {"archive/byteorder": b"big"})
    refused("big")
    with pytest.warns(UserWarning, match="Duplicate"):
        repack(fresh(), {}, {"archive/version": "archive/data/0"})
    refused("is there twice")
    data = bytearray(fresh().read_bytes())
    at = data.index(ARRAYS["a.weight"].tobytes())
    data[at + 5] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    refused("damaged .*'archive/data/0'")


def zip_directory(claimed: int, *, wide: int | None = None) -> bytes:
    """The end of a zip file whose directory claims to have so many bytes; `wide` says it in the
    form for large files too.
    """
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, claimed, 0, 0)
    if wide is None:
        return end
    return (
        b"PK\x06\x06"
        + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, wide, 0)
        + b"PK\x06\x07"
        + struct.pack("<IQI", 0, 0, 1)
        + end
    )


@pytest.mark.parametrize(
    ("end", "claimed"),
    [
        (zip_directory(2_000), None),
        (zip_directory(2_001), 2_001),
        (zip_directory(2**32 - 1), 2**32 - 1),
        (zip_directory(2**32 - 1, wide=2_000), None),
        (zip_directory(2**32 - 1, wide=2_001), 2_001),
        (zip_directory(0, wide=2**40), 2**40),
        (zip_directory(2_001, wide=0), 2_001),
    ],
)
def test_the_directory_of_a_zip_has_a_budget(
    end: bytes, claimed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it claims to take is looked at before the directory is, since each of its entries
    becomes an object ten times as large.
    """
    monkeypatch.setattr(checkpoint, "DIRECTORY_BYTES", 2_000)
    path = tmp_path / "w.pth"
    path.write_bytes(b"PK\x03\x04" + bytes(70_000) + end)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    refusals = re.findall(
        r"its zip directory claims (\d+) bytes, more than the 2000 allowed", str(caught.value)
    )
    assert refusals == ([] if claimed is None else [str(claimed)])


def test_the_directory_of_a_zip_is_no_longer_than_the_file(tmp_path: Path) -> None:
    """In a small file the budget is its own size; a whole checkpoint's directory fits."""
    path = pth_files.write_zip(tmp_path / "w.pth", ARRAYS)
    checkpoint.read(path)
    data = path.read_bytes()
    at, size = data.rindex(b"PK\x05\x06") + 12, len(data)
    path.write_bytes(data[:at] + struct.pack("<I", size + 1) + data[at + 4 :])
    with pytest.raises(
        CheckpointError,
        match=f"its zip directory claims {size + 1} bytes, more than the {size} allowed",
    ):
        checkpoint.read(path)
    with path.open("wb") as file:  # a large one; its zeros take no room
        file.write(b"PK\x03\x04")
        file.seek(17 * 2**20)
        file.write(zip_directory(2**24 + 1))
    with pytest.raises(
        CheckpointError,
        match=f"its zip directory claims {2**24 + 1} bytes, more than the {2**24} allowed",
    ):
        checkpoint.read(path)


def test_a_zip_may_end_in_a_long_comment(tmp_path: Path) -> None:
    """Its directory is found before the longest comment that there can be."""
    path = pth_files.write_zip(tmp_path / "w.pth", ARRAYS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 65_535
    assert np.array_equal(checkpoint.read(path)["a.weight"], ARRAYS["a.weight"])


@pytest.mark.parametrize("field", [20, 24], ids=["stored", "whole"])
def test_a_member_whose_two_sizes_differ_is_refused(field: int, tmp_path: Path) -> None:
    """It is stored as it is, so one of the sizes is a lie; both of them are named."""
    path = pth_files.write_zip(tmp_path / "w.pth", ARRAYS)
    data = bytearray(path.read_bytes())
    at = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 46
    data[at + field : at + field + 4] = struct.pack("<I", 44)
    path.write_bytes(data)
    whole, stored = (44, 48) if field == 24 else (48, 44)
    with pytest.raises(
        CheckpointError,
        match=rf"its member 'archive/data/0' claims {whole} bytes, {stored} stored, in a file of",
    ):
        checkpoint.read(path)


def test_a_legacy_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    """Its numbers would be read the wrong way round."""
    path = pth_files.write_legacy(tmp_path / "w.pth", ARRAYS)
    data = path.read_bytes()
    key = pth_files.text("little_endian") + b"\x88"
    assert data.count(key) == 1
    path.write_bytes(data.replace(key, key[:-1] + b"\x89"))
    with pytest.raises(CheckpointError, match="was not written by a little-endian machine"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("start", "length", "leaves"),
    [(0, 12, False), (1, 12, True), (-1, 12, True), (13, -1, True), (12, 0, False)],
)
def test_a_view_of_a_storage_lies_within_it(start: int, length: int, leaves: bool) -> None:
    """Very old files save tensors by views of their storages."""
    identity = (
        b"(" + pth_files.text("storage") + pth_files.name("torch", "FloatStorage") + pth_files.text("0") + pth_files.text("cpu")
        + pth_files.number(12) + b"(" + pth_files.text("1") + pth_files.number(start) + pth_files.number(length) + b"ttQ."
    )  # fmt: skip
    machine = pickled.Machine(1_000)
    if leaves:
        with pytest.raises(pickled.Refused, match="a view of storage 0 leaves it"):
            machine.run(io.BytesIO(b"\x80\x02" + identity))
    else:
        assert machine.run(io.BytesIO(b"\x80\x02" + identity)) == pickled.Storage(
            "0", "<f4", 12, start, length
        )


def test_storages_that_lie_within_each_other_are_bounded_by_the_file(tmp_path: Path) -> None:
    """Each of a zip's members fits into the file, but one holds the others: all of them together
    would take its square in memory.
    """
    inner = np.arange(2_000, dtype=np.float32)
    info = zipfile.ZipInfo("archive/data/0")
    info.CRC, info.file_size, info.compress_size = (
        zipfile.crc32(inner.tobytes()),
        inner.nbytes,
        inner.nbytes,
    )  # type: ignore[attr-defined]
    header = info.FileHeader()
    member = header + inner.tobytes()
    outer = np.frombuffer(member + bytes(-len(member) % 4), np.float32)
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl", pth_files.state_dict({"inner": inner, "outer": outer}, legacy=False)
        )
        archive.writestr("archive/data/1", outer.tobytes())
        info.header_offset = archive.getinfo("archive/data/1").header_offset + len(
            archive.getinfo("archive/data/1").FileHeader()
        )
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
    size = path.stat().st_size
    assert inner.nbytes < size
    assert outer.nbytes < size < inner.nbytes + outer.nbytes
    with pytest.raises(
        CheckpointError, match=f"its storages claim more than the file's {size} bytes"
    ):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "this is a web page"),
        (b"\x80\x02}q\x00.", "bare pickle"),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\0\0\0",
            r"neither .safetensors nor .pth \(first bytes: 89 50 4e 47",
        ),
        (b"PK\x03\x04", "damaged zip"),
        (pth_files.LEGACY_MAGIC, "damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    """The message says what the file looks like."""
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / "w.pth")


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    """Missing files and folders are no tracebacks."""
    with pytest.raises(CheckpointError, match=r"No such file or directory\. Check the path"):
        checkpoint.read(tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="Is a directory"):
        checkpoint.read(tmp_path)


def test_what_is_not_a_tensor_is_named(tmp_path: Path) -> None:
    """A mapping with something else in it, or no mapping at all, is refused with its key and
    type.
    """
    path = pth_files.write_zip(
        tmp_path / "w.pth", {}, b"\x80\x02}" + pth_files.text("lr") + b"K\x01s."
    )
    with pytest.raises(CheckpointError, match="entry 'lr' is a value of type int, not a tensor"):
        checkpoint.read(path)
    path = pth_files.write_zip(tmp_path / "w.pth", {}, b"\x80\x02]K\x01a.")
    with pytest.raises(CheckpointError, match="holds a value of type list"):
        checkpoint.read(path)


@pytest.mark.parametrize("form", [*WRITERS, "safetensors"])
def test_a_file_cut_anywhere_is_one_clear_error(form: str, tmp_path: Path) -> None:
    """Every length shorter than the whole is a CheckpointError, never an answer and never another
    exception.
    """
    path = tmp_path / "w.pth"
    save_file(ARRAYS, path) if form == "safetensors" else WRITERS[form](path, ARRAYS)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


SEEDS = [path.read_bytes() for path in sorted(FIXTURES.glob("*.pth"))]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    which=st.sampled_from(range(len(SEEDS))), seed=st.integers(0, 2**32), changes=st.integers(1, 12)
)
def test_damaged_bytes_never_raise_anything_else(
    which: int, seed: int, changes: int, tmp_path: Path
) -> None:
    """Bytes flipped at random give tensors or a CheckpointError."""
    data = bytearray(SEEDS[which])
    chooser = random.Random(seed)
    for _ in range(changes):
        data[chooser.randrange(len(data))] = chooser.choice(
            [0, 1, 127, 128, 255, chooser.randrange(256)]
        )
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    try:
        arrays = checkpoint.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert sum(array.nbytes for array in arrays.values()) <= 8 * len(data)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickles_gives_the_same_values(protocol: int) -> None:
    """Nested, empty and shared ones included."""
    shared = ["a", 1, -(2**40), 2.5, True, None]
    value = {"x": shared, "y": (shared, {}, [], ()), "z": {1: {"t": (1, 2, 3, 4)}}}
    found = pickled.Machine(1_000).run(io.BytesIO(pickle.dumps(value, protocol)))
    assert found == value
    assert found["x"] is found["y"][0]


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (True, (2,), (1,)),
        (0.0, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), ()),
        (0, (1,) * 17, (1,) * 17),
    ],
)
def test_a_tensor_of_an_impossible_shape_is_refused(
    offset: Any, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """Sixteen dimensions are the most."""
    storage = pickled.Storage("0", "<f4", 4, 0, 4)
    with pytest.raises(pickled.Refused, match="a tensor in storage 0 has an impossible shape"):
        pickled._tensor(storage, offset, size, stride)
    assert pickled._tensor(storage, 0, (1,) * 16, (1,) * 16).size == (1,) * 16
