"""int8 variants, what the accuracy check finds, and which precision a job gets: promise 6."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import helpers
import sample_images
from imagemill.errors import Interrupted, ModelError, UsageError, WorkerError
from imagemill.models import bundle as bundles
from imagemill.models import variants
from imagemill.models.architectures import resnet
from imagemill.models.variants import PrecisionRecord
from imagemill.pipeline.backends import open_session, openvino_rewrites
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import (
    Batch,
    Bundle,
    Card,
    DeviceSpec,
    Entry,
    Limits,
    Precision,
    Recipe,
    Scores,
    SessionSpec,
    Settings,
)
from imagemill.runner import run
from imagemill.system import cpu
from imagemill.system.openvino_library import new_core
from imagemill.tuning import (
    accuracy,
    check,
    check_process,
    command,
    images,
    precisions,
    quantize,
)
from tiny import WIDE_CARD, tiny_model

pytestmark = pytest.mark.process

SIZE = 32
IMAGES = 260
CALIBRATION, HELD_OUT = 40, 200
"""Fewer than in production, but enough for the interval of an agreement of 1 to reach 0.97."""
COLOURS = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1))
CPU = (DeviceSpec("cpu#0", "cpu", "openvino", (0,)),)


def classifier(loud: float = 0.0, offset: float = 0.0) -> onnx.ModelProto:
    """Tells six colours apart. `loud` is the weight of two further channels that say nothing:
    between the two convolutions int8's one step for all channels then drowns the others. `offset`
    is added to every channel there, more than int8 and bf16 have digits for.
    """
    prototypes = np.float32(COLOURS).reshape(6, 3, 1, 1)
    first = np.concatenate([prototypes, np.full((2, 3, 1, 1), loud, np.float32)])
    second = np.eye(6, 8, dtype=np.float32).reshape(6, 8, 1, 1)
    arrays = {
        "mean": np.float32([127.0]),
        "std": np.float32([128.0]),
        "w1": first,
        "b1": np.full(8, offset, np.float32),
        "w2": second,
        "b2": np.full(6, -offset, np.float32),
        "w3": 8 * np.eye(6, dtype=np.float32),
        "b3": np.zeros(6, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normalised"]),
        helper.make_node(
            "Conv", ["normalised", "w1", "b1"], ["first"], name="first", kernel_shape=[1, 1]
        ),
        helper.make_node("Relu", ["first"], ["relu"], name="relu"),
        helper.make_node(
            "Conv", ["relu", "w2", "b2"], ["second"], name="second", kernel_shape=[1, 1]
        ),
        helper.make_node("GlobalAveragePool", ["second"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node("Gemm", ["embedding", "w3", "b3"], ["logits"], name="logits", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 6]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 6]),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)


def make_bundle(folder: Path, **options: float) -> Bundle:
    card = Card(
        name="colours",
        architecture="colours",
        labels=tuple("red green blue cyan magenta yellow".split()),
        recipe=Recipe(SIZE, SIZE, None),
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
        sha256="",
        licence="Apache-2.0",
        origin={"source": "file"},
    )
    return bundles.write(folder, card, classifier(**options))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 small images of six colours in 6 folders."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        colour = number * 7 % 6
        (folder / str(colour)).mkdir(exist_ok=True)
        base = 127 + 60 * np.array(COLOURS[colour])
        pixels = (base + rng.normal(0, 30, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / str(colour) / f"{number:04d}.ppm")
    return folder


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantising and comparing need fewer images."""
    monkeypatch.setattr(accuracy, "MIN_IMAGES", HELD_OUT)
    monkeypatch.setattr(precisions, "HELD_OUT", HELD_OUT)
    monkeypatch.setattr(precisions, "CALIBRATION", CALIBRATION)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accuracy checks run in this process: quicker, and seen by monkeypatch."""
    monkeypatch.setattr(
        check_process, "in_child", lambda wanted, notify=print: check.carry_out(wanted, notify)
    )
    return


def entries_of(folder: Path) -> list[Entry]:
    return list(command.listing([str(folder)]))


def record(
    bundle: Bundle, *, accepted: bool = True, images: int = HELD_OUT, **changes: Any
) -> PrecisionRecord:
    """What the bundle would keep of bf16."""
    agree = images if accepted else images // 2
    reference = np.eye(6, dtype=np.float32)[np.zeros(images, int)] * 9
    candidate = reference.copy()
    candidate[agree:] = 9 - candidate[agree:]
    comparison = accuracy.compare(reference, candidate)
    versions, unit, _ = check._circumstances(Precision.BF16)
    return replace(
        PrecisionRecord(comparison, "id", bundle.card.sha256, versions, unit, bundle.card.recipe),
        **(
            {
                "group_channels": openvino_rewrites.wanted(Precision.BF16, cpu.flags()),
                "images_per_second": 30.0,
                "fp32_images_per_second": 10.0,
            }
            | changes
        ),
    )


# The model.


def test_every_grouped_convolution_runs_in_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: with constants unfolded, all grouped convolutions would stay in fp32. Four blocks
    of a ResNeXt show it as well as 33.
    """
    monkeypatch.setitem(resnet.BLOCKS, 14, (1, 1, 1, 1))
    network = resnet.ResNet(14, 32, 4)
    built = network.build(network.random(0), Recipe(), network.mean, network.std)
    onnx.save(built, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8) for _ in range(3)]
    saved = quantize.save(quantize.quantize(tmp_path / "model.onnx", pixels), tmp_path)
    request = new_core().compile_model(str(saved), "CPU", {"PERF_COUNT": True})
    request = request.create_infer_request()
    request.infer([np.concatenate(pixels[:2])])
    found = [item for item in request.profiling_info if item.node_type.endswith("Convolution")]
    assert sum(item.node_type == "GroupConvolution" for item in found) == 4
    assert [item.exec_type for item in found if not item.exec_type.upper().endswith("_I8")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{saved.stem}.bin",
        saved.name,
        "model.onnx",
    ]


def test_the_variant_keeps_names_and_answers_alike_in_any_batch(tmp_path: Path) -> None:
    """The same input and outputs as the model's, at any batch size, bit for bit."""
    bundle = make_bundle(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
    file = quantize.save(
        quantize.quantize(tmp_path / "model.onnx", [row[None] for row in pixels]),
        tmp_path,
    )

    def logits(batch_size: int) -> np.ndarray:
        spec = SessionSpec(str(file), bundle.card, Precision.INT8, batch_size)
        session = open_session(spec, CPU[0], Stopwatch())
        batches = [
            Batch(pixels[start : start + batch_size], batch_size, ())
            for start in range(0, 12, batch_size)
        ]
        return np.concatenate([outputs.logits for _, outputs in session.stream(batches)])

    assert logits(1).shape == (12, 6)
    np.testing.assert_array_equal(logits(1), logits(4))
    np.testing.assert_array_equal(logits(1), logits(6))


def test_quantising_without_images_says_what_to_do(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    with pytest.raises(ModelError, match="without images to calibrate on"):
        quantize.quantize(tmp_path / "model.onnx", [])


def test_nothing_phones_home(tmp_path: Path) -> None:
    """Importing OpenVINO and NNCF, and quantising, opens no socket and starts no process; checked
    by Python's audit events.
    """
    make_bundle(tmp_path)
    script = f"""
import sys
seen = []
watched = ("socket.", "urllib.", "subprocess.", "os.fork", "os.posix_spawn")
sys.addaudithook(lambda event, _: event.startswith(watched) and seen.append(event))
import numpy as np
from pathlib import Path
from imagemill.tuning import quantize
pixels = [np.zeros((1, {SIZE}, {SIZE}, 3), np.uint8)]
quantize.save(quantize.quantize(Path({str(tmp_path / "model.onnx")!r}), pixels), Path({str(tmp_path)!r}))
import nncf.telemetry, openvino
assert "openvino_telemetry" in sys.modules and sys.modules["openvino_telemetry"] is None
print(seen)
import socket
socket.socket().close()
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "[]",
        "['socket.__new__']",
    ]  # the second shows that the hook would have seen it


def test_weights_use_their_full_range_only_if_sums_cannot_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without int8 units, two products are added in 16 bits: there all weights use half of their
    range.
    """
    make_bundle(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, SIZE, SIZE, 3), np.uint8)

    def largest() -> list[int]:
        model = quantize.quantize(tmp_path / "model.onnx", list(pixels))
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        weights = [one.data for one in constants if one.get_element_type().get_type_name() == "i8"]
        return [int(np.abs(one.astype(int)).max()) for one in weights if one.ndim > 1]

    monkeypatch.setattr(quantize, "_has_unit", lambda: True)
    assert largest() == [127, 127, 127]
    monkeypatch.setattr(quantize, "_has_unit", lambda: False)
    assert largest() == [63, 63, 63]


def test_a_network_with_attention_is_quantised_as_a_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNCF then smooths activations over channels. A softmax at the end is no attention."""
    import nncf

    kinds: list[Any] = []

    def stop(*_: object, **options: Any) -> None:
        kinds.append(options["model_type"])
        raise RuntimeError("stopped")

    monkeypatch.setattr(nncf, "quantize", stop)
    for count in (0, 1, 2):
        model = classifier()
        names = ["logits", *(f"softmax{number}" for number in range(count))]
        for before, after in itertools.pairwise(names):
            model.graph.node.append(helper.make_node("Softmax", [before], [after]))
        model.graph.output[0].name = names[-1]
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(ModelError, match="stopped"):
            quantize.quantize(tmp_path / "model.onnx", [np.zeros((1, SIZE, SIZE, 3), np.uint8)])
    assert kinds == [None, None, nncf.ModelType.TRANSFORMER]


# accuracy.json


def test_a_result_is_written_beside_the_others_and_not_to_the_card(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    card = (tmp_path / "card.json").read_bytes()
    bf16, int8 = record(bundle), record(bundle, accepted=False, file="int8-a.xml")
    variants.write(tmp_path, bf16=bf16)
    variants.write(tmp_path, int8=int8)  # by a caller that has not seen the first
    assert variants.read(tmp_path) == {"bf16": bf16, "int8": int8}
    assert (tmp_path / "card.json").read_bytes() == card


def test_precisions_json_is_checked_when_it_is_read(tmp_path: Path) -> None:
    """A wrong type is one error with file, key and remedy."""
    bundle = make_bundle(tmp_path)
    assert variants.read(tmp_path) == {}
    variants.write(tmp_path, bf16=record(bundle))
    file = tmp_path / "accuracy.json"
    file.write_text(file.read_text().replace('"images": 200', '"images": "many"'))
    with pytest.raises(ModelError) as caught:
        precisions.choose(bundle, 10)
    assert str(caught.value) == (
        f"{file} cannot be read: bf16.comparison.images: expected `int`, got `str`. Remove it;"
        " `imagemill quantize` writes it again."
    )


def test_a_new_model_in_the_folder_drops_the_results(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    variants.write(tmp_path, bf16=record(bundle))
    bundles.write(tmp_path, bundle.card, onnx.load(tmp_path / "model.onnx"))
    assert variants.read(tmp_path) == {}


@pytest.mark.parametrize("name", ["../model.xml", "/etc/passwd", "int8-a.onnx", "", None])
def test_a_record_cannot_point_to_a_file_elsewhere(tmp_path: Path, name: str | None) -> None:
    known = record(make_bundle(tmp_path), file=name, sha256="x")
    assert variants.int8_file(tmp_path, known) is None


def test_a_changed_variant_is_not_used(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "int8-a.xml").write_bytes(b"graph")
    (tmp_path / "int8-a.bin").write_bytes(b"weights")
    sha256 = variants.digest(tmp_path / "int8-a.xml")
    known = record(bundle, file="int8-a.xml", sha256=sha256)
    assert variants.int8_file(tmp_path, known) == tmp_path / "int8-a.xml"
    (tmp_path / "int8-a.bin").write_bytes(b"Weights")
    assert variants.int8_file(tmp_path, known) is None
    (tmp_path / "int8-a.bin").unlink()
    assert variants.int8_file(tmp_path, known) is None


# Picking images.


@given(st.integers(0, 3000), st.integers(0, 400), st.integers(1, 1500))
def test_calibration_and_held_out_never_share_an_entry(
    available: int, calibration: int, held_out: int
) -> None:
    first = images.calibration_share(available, calibration, held_out)
    assert 0 <= first <= available
    if available >= calibration + held_out:
        assert first >= calibration
        assert available - first >= held_out
    elif available and calibration:
        assert 1 <= first <= calibration


@given(st.integers(0, 2000), st.integers(1, 300))
def test_a_sample_holds_each_entry_once_and_is_the_same_every_time(
    listed: int, wanted: int
) -> None:
    entries = [Entry(0, b"%d" % number, 1) for number in range(listed)]
    chosen, count = images.sample(iter(entries), wanted)
    assert count == listed
    assert len(set(chosen)) == len(chosen) == min(wanted, listed)
    assert set(chosen) <= set(entries)
    assert images.sample(iter(entries), wanted) == (chosen, count)


def test_a_sample_is_of_all_sources_and_not_of_their_beginning() -> None:
    """Calibration and held-out images both: of three sources of 4,000 images, and of each quarter
    of each source, about the twelfth part. The sample is fixed, so no chance is involved.
    """
    entries = (Entry(place // 4000, b"%d" % place, 1) for place in range(12_000))
    chosen, _ = images.sample(entries, 2600)
    first = images.calibration_share(len(chosen), 300, 1000)
    for part in (chosen[:first], chosen[first:]):
        quarters = Counter(int(entry.path) // 1000 for entry in part)
        assert min(quarters.values()) > len(part) / 12 / 2
        assert len(quarters) == 12


def test_the_same_content_is_used_once(tmp_path: Path, tiny: Bundle) -> None:
    """Copies of one image, under other names and in other formats, count once in calibration and
    comparison together.
    """
    pixels = sample_images.photograph(40, 40, 1)
    folder = helpers.fill(
        tmp_path / "p",
        {
            "a.png": sample_images.encode(pixels, "PNG"),
            "b.png": sample_images.encode(pixels, "PNG"),
            "c.bmp": sample_images.encode(pixels, "BMP"),
            "d.png": sample_images.encode(sample_images.photograph(40, 40, 2), "PNG"),
        },
    )
    decoder = images.Decoder([str(folder)], tiny.card.recipe, Limits(), 1)
    entries = entries_of(folder)
    names = [image.name for image in decoder.decode(entries[:2], 9)]
    names += [image.name for image in decoder.decode(entries[2:], 9)]
    assert sorted(names) == ["a.png", "d.png"]
    assert decoder.duplicates == 2


def test_another_image_set_has_another_identity(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    entries = [Entry(0, b"a", 1), Entry(0, b"b", 2)]
    other = replace(bundle, card=replace(bundle.card, recipe=Recipe(64, 64)))
    row = replace(entries[1], locator=b"row 1")  # as in two tables whose rows have no names
    ids = {
        images.identity(entries, 2, bundle, ["photos"]),
        images.identity(entries, 2, bundle, ["other photos"]),
        images.identity(entries[:1], 2, bundle, ["photos"]),
        images.identity(entries, 1, bundle, ["photos"]),
        images.identity([entries[0], replace(entries[1], size=3)], 2, bundle, ["photos"]),
        images.identity([entries[0], row], 2, bundle, ["photos"]),
        images.identity(entries, 2, other, ["photos"]),
    }
    assert len(ids) == 7


# imagemill quantize.


def test_few_images_are_reported_and_not_accepted(tmp_path: Path, colours: Path) -> None:
    """In the child process, as the command does it; the second call measures nothing again."""
    bundle = make_bundle(tmp_path)
    messages: list[str] = []
    first = command.quantize_bundle(
        bundle, [str(colours / "0")], chosen=CPU, calibration=20, notify=messages.append
    )
    assert messages[0] == (
        "44 images found; 20 are needed to calibrate int8 and 1,000 others, all different, to"
        " accept it"
    )
    int8 = first.precisions["int8"]
    assert int8.comparison.accepted is False
    assert int8.comparison.reason.startswith("too few images: ")
    assert int8.calibration.images == 20
    assert int8.comparison.images == first.images - 20
    assert json.loads((tmp_path / "accuracy.json").read_text())["int8"]["file"] == int8.file
    assert (tmp_path / int8.file).is_file()
    assert command.report_lines(first)[-1].endswith(
        f", not accepted ({int8.comparison.reason}). `--precision auto` uses {first.automatic} from"
        " now on"
    )
    before = (tmp_path / int8.file).stat().st_mtime_ns
    messages.clear()
    again = command.quantize_bundle(
        bundles.load(tmp_path),
        [str(colours / "0")],
        chosen=CPU,
        calibration=20,
        notify=messages.append,
    )
    assert again == first
    assert messages[1] == "int8 was checked on these images before"
    assert (tmp_path / int8.file).stat().st_mtime_ns == before


def test_enough_agreeing_images_are_accepted_and_auto_then_uses_them(
    tmp_path: Path, colours: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path)
    report = command.quantize_bundle(
        bundle, [str(colours)], chosen=CPU, calibration=CALIBRATION, held_out=HELD_OUT
    )
    int8 = report.precisions["int8"]
    assert int8.comparison.accepted is True
    assert int8.comparison.images == HELD_OUT
    assert command.report_lines(report)[-1] == (
        f"fp32 → int8: {rates(int8)}agreement {int8.comparison.agreement:.4f}, accepted."
        f" `--precision auto` uses {report.automatic} from now on"
    )
    monkeypatch.setattr(check, "MIN_SPEEDUP", 0.0)
    prepared = precisions.prepare("auto", bundles.load(tmp_path), [], lambda: [], 10, chosen=CPU)
    assert prepared.precision is Precision.INT8
    assert prepared.model_file == tmp_path / int8.file
    assert prepared.variant == int8.file.removesuffix(".xml")
    assert prepared.lines == (f"precision int8: {int8.comparison.reason}",)
    precisions.verify_variant(prepared.model_file, prepared.sha256)
    prepared.model_file.with_suffix(".bin").write_bytes(b"changed")
    with pytest.raises(ModelError, match="is not the file that the job was started with"):
        precisions.verify_variant(prepared.model_file, prepared.sha256)
    assert (
        precisions.prepare("auto", bundles.load(tmp_path), [], lambda: [], 10, chosen=CPU).precision
        is not Precision.INT8
    )


def rates(record: PrecisionRecord) -> str:
    if not record.speedup:
        return ""
    return f"{record.fp32_images_per_second:,.1f} → {record.images_per_second:,.1f} images/s, "


def test_a_network_that_quantises_badly_is_refused_with_its_figures(
    tmp_path: Path, colours: Path, here: None
) -> None:
    """One loud channel sets the step for all. The report names images with both answers."""
    bundle = make_bundle(tmp_path, loud=3e4)
    report = command.quantize_bundle(
        bundle, [str(colours)], chosen=CPU, calibration=CALIBRATION, held_out=HELD_OUT
    )
    found = report.precisions["int8"].comparison
    assert not found.accepted
    assert found.reason == (
        f"its agreement with fp32 is {found.agreement:.4f}, the lower end of the 95 % interval,"
        f" {found.wilson_low:.4f}, is below 0.97"
    )
    flip = found.flips[0]
    assert (colours / flip.image).is_file()
    assert flip.fp32 != flip.answer
    assert {flip.fp32, flip.answer} <= set(bundle.card.labels)
    lines = command.report_lines(report)
    assert (
        f"  {flip.image}: {flip.fp32} ({flip.fp32_probability:.2f}) in fp32, {flip.answer}"
        f" ({flip.probability:.2f}) in int8"
    ) in lines
    figures = f"flips where fp32 was sure: {found.flips_where_sure} of {found.sure}, mean"
    assert figures in str(lines)
    assert report.automatic is not Precision.INT8
    assert lines[-1].endswith(
        f", not accepted ({found.reason}). `--precision auto` uses {report.automatic} from now on"
    )


@pytest.mark.parametrize("layer", [0, 1, 2], ids=["first", "second", "logits"])
@pytest.mark.parametrize("fault", ["exchanged", "negated", "cleared", "clipped"])
def test_a_network_with_one_broken_layer_is_never_accepted(
    tmp_path: Path,
    colours: Path,
    here: None,
    monkeypatch: pytest.MonkeyPatch,
    layer: int,
    fault: str,
) -> None:
    """Two output channels of one quantised layer are exchanged, its weights have another sign or
    are 0, or the range of its input is so small that all values are clipped.
    """
    made = quantize.quantize

    def broken(model_file: Path, pixels: Any) -> Any:
        model = made(model_file, pixels)
        break_layer(model, layer, fault)
        return model

    monkeypatch.setattr(quantize, "quantize", broken)
    report = command.quantize_bundle(
        make_bundle(tmp_path),
        [str(colours)],
        chosen=CPU,
        calibration=CALIBRATION,
        held_out=HELD_OUT,
    )
    found = report.precisions["int8"].comparison
    assert not found.accepted
    assert found.agreement < 0.9
    assert found.flips_where_sure


def break_layer(model: Any, number: int, fault: str) -> None:
    """Change a layer's quantised weights, with their scales if it is by channel, or the range of
    its input.
    """
    layers = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in ("Convolution", "MatMul")
    ]
    layer = layers[number]
    if fault == "clipped":
        quantiser = layer.input_value(0).get_node()
        while quantiser.get_type_name() != "FakeQuantize":
            quantiser = quantiser.input_value(0).get_node()
        for bound in range(1, 5):
            change(quantiser.input_value(bound).get_node(), lambda values: values * 1e-3)
        return
    todo = [layer.input_value(1).get_node()]
    while todo:
        node = todo.pop()
        if node.get_type_name() == "Constant" and node.data.ndim > 1 and node.data.shape[0] > 1:
            if fault == "exchanged":
                change(node, lambda values: values[[1, 0, *range(2, len(values))]])
            elif node.get_element_type().get_type_name() == "i8":
                sign = -1 if fault == "negated" else 0
                change(node, lambda values, sign=sign: values * sign)
        todo += [value.get_node() for value in node.input_values()]


def change(constant: Any, how: Callable[[np.ndarray], np.ndarray]) -> None:
    values = how(constant.data.copy()).astype(constant.data.dtype)
    changed = openvino.opset13.constant(values, constant.get_element_type())
    constant.output(0).replace(changed.output(0))


def test_a_stricter_bound_is_kept_with_the_result(
    tmp_path: Path, colours: Path, here: None
) -> None:
    """Another bound measures again, and decides for later jobs."""
    bundle, options = make_bundle(tmp_path), {"calibration": CALIBRATION, "held_out": HELD_OUT}
    for bound, accepted in ((0.999, False), (0.9, True)):
        report = command.quantize_bundle(
            bundle, [str(colours)], chosen=CPU, min_agreement=bound, **options
        )
        assert report.precisions["int8"].comparison.accepted is accepted
        assert variants.read(tmp_path)["int8"].comparison.min_agreement == bound
    with pytest.raises(UsageError, match=r"--min-agreement 1\.5: must be from 0 to 1"):
        command.quantize_bundle(bundle, [str(colours)], chosen=CPU, min_agreement=1.5)


def test_sources_without_images_are_one_line(tmp_path: Path, here: None) -> None:
    """Before a process is started, and nothing is written beside the model."""
    bundle = make_bundle(tmp_path / "model")
    before = sorted(bundle.dir.iterdir())
    source = helpers.fill(tmp_path / "source", {"readme.txt": b"text"})
    with pytest.raises(UsageError, match=r"source holds no images\. Give a folder of images like"):
        command.quantize_bundle(bundle, [str(source)], chosen=CPU)
    assert sorted(bundle.dir.iterdir()) == before


def test_images_without_a_valid_output_do_not_end_an_accuracy_check(
    tmp_path: Path, models_dir: Path
) -> None:
    """Those that are NaN in both precisions are left out of the result, and the others are
    compared.
    """
    made = bundles.load(shutil.copytree(models_dir / "spoilt", tmp_path / "spoilt"))
    white = sample_images.encode(Image.new("RGB", (40, 40), "white"), "PNG")
    images = {
        f"{number}.png": (
            white
            if number % 4 == 0
            else sample_images.encode(sample_images.photograph(40, 40, number), "PNG")
        )
        for number in range(12)
    }
    entries = tuple(entries_of(helpers.fill(tmp_path / "p", images)))
    asked = check.AccuracyCheck(
        made,
        (str(tmp_path / "p"),),
        entries,
        (0,),
        Limits(),
        (Precision.BF16,),
        calibration=0,
        held_out=12,
    )
    comparison = check.carry_out(asked)["bf16"].comparison
    assert comparison.images == 9
    assert comparison.agreement > 0.5


def test_fewer_images_take_nothing_from_more(tmp_path: Path, colours: Path, here: None) -> None:
    """Where none are enough for a result, what rests on more of them stays, and what rests on as
    many is replaced.
    """
    bundle, some, few = make_bundle(tmp_path / "model"), tmp_path / "some", tmp_path / "few"
    for folder, count in ((some, 30), (few, 2)):
        folder.mkdir()
        for file in sorted((colours / "0").iterdir())[:count]:
            (folder / file.name).write_bytes(file.read_bytes())
    kept = command.quantize_bundle(bundle, [str(some)], chosen=CPU, calibration=20).precisions
    assert not kept["int8"].comparison.accepted
    command.quantize_bundle(bundles.load(bundle.dir), [str(few)], chosen=CPU, calibration=1)
    assert variants.read(bundle.dir)["int8"] == kept["int8"]


def test_few_images_take_nothing_from_a_result_on_enough(
    tmp_path: Path, colours: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant that was accepted on many images is kept if it is quantised again on fewer, unless
    it no longer counts. The figures are reported.
    """
    bundle = make_bundle(tmp_path)
    accepted = command.quantize_bundle(
        bundle, [str(colours)], chosen=CPU, calibration=CALIBRATION
    ).precisions["int8"]
    few = command.quantize_bundle(
        bundles.load(tmp_path), [str(colours / "0")], chosen=CPU, calibration=20
    )
    assert few.precisions["int8"].comparison.reason.startswith("too few images: ")
    lines = command.report_lines(few)
    assert "  not kept: what was accepted before, on more images, stays" in lines
    assert lines[-1].endswith(". `--precision auto` still uses int8")
    assert variants.read(tmp_path)["int8"] == accepted
    assert sorted(path.name for path in tmp_path.glob("int8-*")) == [
        f"{Path(accepted.file).stem}.bin",
        accepted.file,
    ]

    (tmp_path / accepted.file).with_suffix(".bin").write_bytes(b"changed")
    again = command.quantize_bundle(
        bundles.load(tmp_path), [str(colours / "0")], chosen=CPU, calibration=20
    )
    assert variants.read(tmp_path)["int8"] == again.precisions["int8"]
    assert (tmp_path / again.precisions["int8"].file).is_file()


# What a job gets.


@pytest.fixture
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model were slow and the processor had every unit."""
    monkeypatch.setattr(check, "cost_and_gain", lambda *_, **__: (1.0, 2.0))
    monkeypatch.setattr(check, "_PROBE_S", 0.05)
    monkeypatch.setattr(cpu, "unit", lambda *_: "any")
    monkeypatch.setattr(check, "MIN_SPEEDUP", 0.0)


def auto(bundle: Bundle, folder: Path, **options: Any) -> precisions.ChosenPrecision:
    return precisions.prepare(
        "auto", bundle, [str(folder)], lambda: entries_of(folder), IMAGES, chosen=CPU, **options
    )


def test_auto_refuses_int8_and_falls_back_to_bf16_aloud(
    tmp_path: Path,
    colours: Path,
    here: None,
    everything_pays: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle(tmp_path, loud=3e4)
    messages: list[str] = []
    prepared = auto(bundle, colours, notify=messages.append)
    assert (prepared.precision, prepared.variant, prepared.model_file) == (
        Precision.BF16,
        "model",
        tmp_path / "model.onnx",
    )
    int8, bf16 = (record.comparison.reason for record in variants.read(tmp_path).values())
    assert prepared.lines == (f"precision bf16: {bf16}. int8 is not used: {int8}",)
    assert messages[0].startswith(
        "checking whether colours keeps its answers in int8 (takes about "
    )
    assert messages[1:] == list(prepared.lines)


def test_auto_falls_back_to_fp32_aloud_and_pays_for_the_results_once(
    tmp_path: Path,
    colours: Path,
    here: None,
    everything_pays: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither int8 nor bf16 has the digits for this model. The results are in the card, so the
    next job measures nothing.
    """
    if "avx512_bf16" not in cpu.flags():
        pytest.skip("this processor computes bf16 as fp32")
    bundle = make_bundle(tmp_path, offset=1e5)
    prepared = auto(bundle, colours)
    assert prepared.precision is Precision.FP32
    int8, bf16 = (record.comparison.reason for record in variants.read(tmp_path).values())
    assert prepared.lines == (
        f"precision fp32. int8 is not used: {int8}. bf16 is not used: {bf16}",
    )
    monkeypatch.setattr(check_process, "in_child", lambda *_: pytest.fail("measured again"))
    assert auto(bundles.load(tmp_path), colours).lines == prepared.lines


def test_auto_measures_nothing_where_a_job_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says how to have faster precisions checked."""
    monkeypatch.setattr(check_process, "in_child", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(cpu, "unit", lambda *_: "any")
    prepared = precisions.prepare(
        "auto", make_bundle(tmp_path), [], lambda: pytest.fail("listed"), 100, chosen=CPU
    )
    assert (prepared.precision, prepared.variant) == (Precision.FP32, "model")
    assert len(prepared.lines) == 1
    assert prepared.lines[0].startswith("precision fp32: int8 and bf16 not checked, because that")
    assert precisions.choose(bundles.load(tmp_path), 100).lines == prepared.lines
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "flags", lambda: {"avx2"})
    assert precisions.choose(bundles.load(tmp_path), 100).lines == (
        "precision fp32. This processor has no units that make int8 or bf16 faster",
    )


def test_auto_survives_an_accuracy_check_that_fails(
    tmp_path: Path, colours: Path, everything_pays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise WorkerError("the process that measures precisions died")

    monkeypatch.setattr(check_process, "in_child", fails)
    prepared = auto(make_bundle(tmp_path), colours)
    assert prepared.precision is Precision.FP32
    assert prepared.lines == (
        "precision fp32: the accuracy check failed: the process that measures precisions died",
    )


def test_a_signal_during_the_accuracy_check_ends_the_job(
    tmp_path: Path, colours: Path, everything_pays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to go on in fp32."""

    def interrupted(*_: object) -> None:
        raise Interrupted("terminated", 143)

    monkeypatch.setattr(check_process, "in_child", interrupted)
    with pytest.raises(Interrupted):
        auto(make_bundle(tmp_path), colours)


def test_an_accuracy_check_is_worthwhile_for_large_jobs_of_slow_models() -> None:
    """resnext101_32x4d makes 12.5 fp32 images/s on two cores: 200 to 300 s of accuracy check
    against 60 ms an image.
    """
    for precision in (Precision.INT8, Precision.BF16):
        for job, rate, expected in (
            (1_400, 0, False),
            (10_000, 0, True),
            (10_000, 12.5, True),
            (10_000, 5e3, False),
        ):
            cost, gain = check.cost_and_gain(precision, job, 300, 1000, rate=rate)
            assert (gain > cost) is expected


def test_an_accuracy_check_that_is_not_worthwhile_ends_before_the_first_image(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model turned out to be fast. Nothing is decoded and nothing said by the check."""
    monkeypatch.setattr(check, "_PROBE_S", 0.05)
    monkeypatch.setattr(check, "_STARTING_S", 1e9)
    monkeypatch.setattr(images.Decoder, "decode", lambda *_: pytest.fail("decoded"))
    messages: list[str] = []
    asked = replace(
        small_check(make_bundle(tmp_path), colours), precisions=(Precision.INT8,), images=10_000
    )
    assert check.carry_out(asked, messages.append) == {}
    assert messages == []


def test_bf16_that_is_slower_than_fp32_is_not_checked(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor may have bf16 instructions that gain nothing: its rate is measured before
    anything is compared.
    """
    rates = {Precision.FP32: 10.0, Precision.BF16: 5.5}
    monkeypatch.setattr(check.Run, "_rate", lambda _self, precision: rates[precision])
    asked = replace(small_check(make_bundle(tmp_path), colours), images=10**9)
    assert check.carry_out(asked) == {}


def test_explicit_int8_is_obeyed_and_reported(tmp_path: Path, colours: Path, here: None) -> None:
    bundle = make_bundle(tmp_path)
    prepared = precisions.prepare(
        "int8", bundle, [str(colours)], lambda: entries_of(colours)[:100], 100, chosen=CPU
    )
    assert prepared.precision is Precision.INT8
    assert prepared.model_file.is_file()
    assert prepared.lines[0].startswith("precision int8: the same top-1 class as fp32 for ")
    assert prepared.lines[-1].startswith(
        "int8 is used because it was asked for; `auto` would not use it: too few images"
    )
    again = precisions.prepare(
        "int8", bundles.load(tmp_path), [], lambda: pytest.fail("listed"), 100, chosen=CPU
    )
    assert again.model_file == prepared.model_file
    assert again.lines == prepared.lines


def explicit_int8(
    folder: Path, colours: Path, images: int, notify: Callable[[str], None] = lambda _: None
) -> precisions.ChosenPrecision:
    some = entries_of(colours)
    some = some[:: max(1, len(some) // images)][:images]
    return precisions.prepare(
        "int8",
        bundles.load(folder),
        [str(colours)],
        lambda: some,
        images,
        chosen=CPU,
        notify=notify,
    )


def test_int8_made_from_few_images_is_made_again_by_a_larger_job(
    tmp_path: Path, colours: Path, here: None
) -> None:
    """And then used by small jobs, too. Jobs with the first file keep it."""
    make_bundle(tmp_path)
    small = explicit_int8(tmp_path, colours, 3)
    assert variants.read(tmp_path)["int8"].calibration.images == 2
    assert explicit_int8(tmp_path, colours, 4) == small  # no more than one image more
    large = explicit_int8(tmp_path, colours, 30)
    assert large.model_file != small.model_file
    assert variants.read(tmp_path)["int8"].calibration.images == 24
    assert "of 6 held-out images" in large.lines[0]
    assert explicit_int8(tmp_path, colours, 3) == large
    assert explicit_int8(tmp_path, colours, 37) == large  # 29 images are not twice as many
    for prepared in (small, large):
        precisions.verify_variant(prepared.model_file, prepared.sha256)


def test_jobs_before_and_after_int8_is_made_again(
    tmp_path: Path, colours: Path, here: None
) -> None:
    """A small job, a larger one, the small one resumed without its rows, and the small one again:
    each report names the int8 model that its job used.
    """
    make_bundle(tmp_path / "models" / "colours")
    small = tmp_path / "small"
    small.mkdir()
    for file in sorted((colours / "0").iterdir())[:3]:
        shutil.copy(file, small)

    def job(images: Path, name: str) -> tuple[str, str]:
        output, models = tmp_path / name, tmp_path / "models"
        options = ("--output", output, "--model", "colours", "--models-dir", models)
        done = helpers.imagemill_here(
            "run", images, *options, "--precision", "int8", "--devices", "cpu"
        )
        assert done.code == 0, done.err
        session = json.loads((output / "job.json").read_bytes())["job"]["session"]
        return session["model_file"], (output / "report.html").read_text()

    first, report = job(small, "first")
    assert "used because of --precision int8" in report
    rows = helpers.by_path(tmp_path / "first")
    larger, _ = job(colours, "larger")
    assert larger != first
    for part in (tmp_path / "first" / "predictions").glob("*.parquet"):
        part.unlink()
    resumed, report = job(small, "first")
    assert resumed == first
    assert helpers.by_path(tmp_path / "first") == rows
    assert '<h2 id="accuracy">' not in report or "replaced since" in report
    again, report = job(small, "again")
    assert again == larger
    assert "used because of --precision int8" in report


def test_int8_of_few_images_is_made_again_however_many_were_held_out(
    tmp_path: Path, colours: Path, here: None
) -> None:
    """`quantize` calibrated on few images and compared many, and the result was refused."""
    bundle = make_bundle(tmp_path, loud=3e4)
    first = command.quantize_bundle(bundle, [str(colours)], chosen=CPU, calibration=2)
    assert not first.precisions["int8"].comparison.accepted
    made = explicit_int8(tmp_path, colours, 37)
    assert variants.read(tmp_path)["int8"].calibration.images == 29
    assert made.model_file.name == variants.read(tmp_path)["int8"].file


def test_int8_that_cannot_be_made_better_stays(
    tmp_path: Path, colours: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few or none of the larger job's images can be read, or NNCF is missing."""
    make_bundle(tmp_path / "model")
    some = tmp_path / "images"
    some.mkdir()
    for file in sorted((colours / "0").iterdir())[:6]:
        shutil.copy(file, some)
    readable = sorted(some.iterdir())
    small = explicit_int8(tmp_path / "model", some, 6)
    kept = variants.read(tmp_path / "model")["int8"]
    for number in range(30):
        (some / f"broken{number}.ppm").write_bytes(b"P6 32 32 255 ")
    for file in readable[:3]:
        file.unlink()
    assert explicit_int8(tmp_path / "model", some, 33) == small
    for file in readable[3:]:
        file.unlink()
    messages: list[str] = []
    assert explicit_int8(tmp_path / "model", some, 30, messages.append) == small
    assert messages[0] == (
        "int8 was calibrated on 4 images; this job has more, so it is made again"
    )
    assert messages[2].startswith("int8 is not calibrated again: ")
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    assert explicit_int8(tmp_path / "model", colours, 36) == small
    assert variants.read(tmp_path / "model")["int8"] == kept
    precisions.verify_variant(small.model_file, small.sha256)


@pytest.mark.parametrize("is_same", [False, True], ids=["other names of layers", "same bytes"])
def test_an_int8_file_that_jobs_use_survives_quantising_on_its_images(
    tmp_path: Path,
    colours: Path,
    here: None,
    monkeypatch: pytest.MonkeyPatch,
    is_same: bool,
) -> None:
    """A result that is not kept removes its own file only. NNCF numbers layers, so that the same
    images may give another file.
    """
    if is_same:
        made, known = quantize.quantize, {}

        def repeated(file: Path, pixels: Any) -> Any:
            return known.get(len(pixels)) or known.setdefault(len(pixels), made(file, pixels))

        monkeypatch.setattr(quantize, "quantize", repeated)
    make_bundle(tmp_path)
    small = explicit_int8(tmp_path, colours, 3)
    explicit_int8(tmp_path, colours, 30)
    again = replace(
        small_check(bundles.load(tmp_path), colours),
        entries=tuple(entries_of(colours)[:: IMAGES // 3][:3]),
        precisions=(Precision.INT8,),
        calibration=CALIBRATION,
        held_out=50,
    )
    some, _ = images.sample(again.entries, 9)
    record = check.carry_out(replace(again, entries=tuple(some)))["int8"]
    assert not record.kept
    precisions.verify_variant(small.model_file, small.sha256)
    kept = {small.model_file.name, variants.read(tmp_path)["int8"].file}
    assert {file.name for file in tmp_path.glob("int8-*.xml")} == kept


def test_a_multi_label_model_of_any_shape_is_quantised(tmp_path: Path, here: None) -> None:
    """Calibrated and compared on images that are wider than high, by its set of classes; the result
    is used.
    """
    card = replace(WIDE_CARD, scores=Scores.SIGMOID)
    bundle = bundles.write(tmp_path / "tags", card, tiny_model(width=2 * SIZE))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        sample_images.photograph(60, 50, number).save(folder / f"{number}.png")
    report = command.quantize_bundle(bundle, [str(folder)], chosen=CPU, calibration=10, held_out=30)
    comparison = report.precisions["int8"].comparison
    assert comparison.images == 30
    assert comparison.compared == "set of classes from probability 0.5"
    assert "the same set of classes from probability 0.5" in str(command.report_lines(report))
    assert check.usable(bundle, Precision.INT8) is not None


def test_nothing_is_traded_where_agreement_is_not_defined(
    models_dir: Path, everything_pays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network without a head: `auto` stays in fp32 and says why, int8 and `quantize` are refused,
    and bf16 that was asked for is used.
    """
    monkeypatch.setattr(check_process, "in_child", lambda *_: pytest.fail("measured"))
    headless = bundles.load(models_dir / "headless")

    def prepare(setting: str) -> precisions.ChosenPrecision:
        nothing = lambda: pytest.fail("listed")  # noqa: E731
        return precisions.prepare(setting, headless, [], nothing, 10**6, chosen=CPU)

    why = (
        "headless has no classes, so it is not defined when a faster precision answers as fp32 does"
    )
    assert prepare("auto").precision is Precision.FP32
    assert prepare("auto").lines == (f"precision fp32: {why}",)
    assert prepare("bf16").precision is Precision.BF16
    assert prepare("bf16").lines == (f"precision bf16: {why}",)
    assert prepare("fp32").lines == ()
    for refused in (
        lambda: prepare("int8"),
        lambda: command.quantize_bundle(headless, ["."], chosen=CPU),
    ):
        with pytest.raises(UsageError) as caught:
            refused()
        assert str(caught.value) == f"int8 is not possible: {why}. Use fp32."


def test_explicit_fp32_and_small_bf16_measure_nothing(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    fp32 = precisions.prepare("fp32", bundle, [], lambda: pytest.fail("listed"), 10**6, chosen=CPU)
    assert fp32 == precisions.ChosenPrecision(Precision.FP32, "model", tmp_path / "model.onnx")
    bf16 = precisions.prepare("bf16", bundle, [], lambda: pytest.fail("listed"), 99, chosen=CPU)
    assert bf16.precision is Precision.BF16
    assert bf16.lines == (
        f"bf16: not compared with fp32 yet; `imagemill quantize {tmp_path} --images SOURCE` does"
        " that",
    )


def test_explicit_int8_of_an_empty_source_is_no_error(tmp_path: Path) -> None:
    assert (
        precisions.prepare("int8", make_bundle(tmp_path), [], lambda: [], 0, chosen=CPU).precision
        is Precision.INT8
    )


def test_int8_on_a_backend_without_it_is_refused(tmp_path: Path) -> None:
    null = (DeviceSpec("null#0", "null", "null", (0,)),)
    assert (
        precisions.prepare(None, make_bundle(tmp_path), [], lambda: [], 9, chosen=null).precision
        is Precision.FP32
    )
    with pytest.raises(
        UsageError,
        match=(
            r"--precision int8: null@null does not compute in it\. Use --precision fp32 or bf16\."
        ),
    ):
        precisions.prepare("int8", make_bundle(tmp_path), [], lambda: [], 9, chosen=null)


@pytest.mark.parametrize(
    "change",
    [
        {"versions": {"openvino": "2020.1"}},
        {"instruction_set": "other"},
        {"group_channels": 7},
        {"recipe": Recipe(64, 64)},
        {"model": "0" * 64},
        {"accepted": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_result_of_other_circumstances_does_not_count(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    bundle = make_bundle(tmp_path)
    variants.write(tmp_path, bf16=record(bundle))
    assert precisions.choose(bundle, 10).precision is Precision.BF16
    variants.write(tmp_path, bf16=record(bundle, **change))
    assert precisions.choose(bundle, 10).precision is Precision.FP32


def test_a_result_travels_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied: int8 is used on a processor with the same units, and not on another."""
    bundle = make_bundle(tmp_path / "a")
    (bundle.dir / "int8-a.xml").write_bytes(b"graph")
    (bundle.dir / "int8-a.bin").write_bytes(b"weights")
    sha256 = variants.digest(bundle.dir / "int8-a.xml")
    flags = {"avx2", "avx512f", "avx512_vnni"}
    known = record(bundle, file="int8-a.xml", sha256=sha256, group_channels=0)
    variants.write(bundle.dir, int8=replace(known, instruction_set="avx512_vnni"))
    copied = bundles.load(shutil.copytree(bundle.dir, tmp_path / "b"))
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    found = precisions.choose(copied, 10)
    assert (found.precision, found.model_file) == (Precision.INT8, copied.dir / "int8-a.xml")
    for others in (flags | {"amx_int8"}, {"avx2"}):
        monkeypatch.setattr(cpu, "flags", lambda found=others: found)
        assert precisions.choose(copied, 10).precision is Precision.FP32


INT8_UNITS = {"avx2", "avx512f", "avx512_vnni"}


def test_without_the_extra_models_in_int8_that_exist_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need OpenVINO alone. Making one is an error that names the line to type."""
    bundle = make_bundle(tmp_path)
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    install = r"int8 needs a package that is not installed. Type: pip install 'imagemill\[int8\]'"
    with pytest.raises(ModelError, match=install):
        command.quantize_bundle(bundle, ["images"], chosen=CPU)
    with pytest.raises(ModelError, match=install):
        precisions.prepare("int8", bundle, [], lambda: pytest.fail("listed"), 100, chosen=CPU)
    (tmp_path / "int8-a.xml").write_bytes(b"graph")
    (tmp_path / "int8-a.bin").write_bytes(b"weights")
    sha256 = variants.digest(tmp_path / "int8-a.xml")
    known = record(bundle, file="int8-a.xml", sha256=sha256, group_channels=0)
    variants.write(tmp_path, int8=replace(known, instruction_set="avx512_vnni"))
    monkeypatch.setattr(cpu, "flags", lambda: INT8_UNITS)
    assert precisions.choose(bundle, 10).precision is Precision.INT8


def test_without_the_extra_a_job_in_int8_leaves_nothing_behind(
    tmp_path: Path, jpegs: Callable[..., Path], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    settings = Settings(
        (str(jpegs()),), str(tmp_path / "out"), "tiny", str(models_dir), precision="int8"
    )
    with pytest.raises(ModelError, match="int8 needs a package that is not installed"):
        run.run(settings)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_auto_names_it_once_where_int8_would_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(cpu, "flags", lambda: INT8_UNITS)
    bundle = make_bundle(tmp_path)
    (line,) = precisions.choose(bundle, 10**6).lines
    assert line.count("pip install 'imagemill[int8]'") == 1
    assert Precision.INT8 not in precisions.choose(bundle, 10**6).candidates
    (line,) = precisions.choose(bundle, 13).lines
    assert "pip" not in line


def test_a_result_holds_for_any_background(tmp_path: Path) -> None:
    """A result without a background, or with another one, counts: the arithmetic is the same."""
    bundle = make_bundle(tmp_path)
    plain = bundle.card.recipe
    on_white = replace(bundle, card=replace(bundle.card, recipe=replace(plain, background="#fff")))
    for recipe in (plain, replace(plain, background="#000000")):
        variants.write(tmp_path, bf16=record(bundle, recipe=recipe))
        assert precisions.choose(on_white, 10).precision is Precision.BF16


def test_an_accepted_precision_that_is_no_faster_is_not_used(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    variants.write(tmp_path, bf16=record(bundle, images_per_second=8.0))
    choice = precisions.choose(bundle, 10)
    assert choice.precision is Precision.FP32
    assert (
        "bf16 is not used: it keeps fp32's answers but makes only 0.80 times its images/s"
        in choice.lines[0]
    )


def test_a_refused_result_of_enough_images_is_final_and_one_of_too_few_is_not(
    tmp_path: Path, everything_pays: None
) -> None:
    bundle = make_bundle(tmp_path)
    variants.write(tmp_path, bf16=record(bundle, accepted=False, images=HELD_OUT - 1))
    assert Precision.BF16 in precisions.choose(bundle, 10**6).candidates
    variants.write(tmp_path, bf16=record(bundle, accepted=False))
    assert Precision.BF16 not in precisions.choose(bundle, 10**6).candidates


# The child.


def small_check(bundle: Bundle, folder: Path) -> check.AccuracyCheck:
    return check.AccuracyCheck(
        bundle, (str(folder),), tuple(entries_of(folder)), (0,), Limits(), (Precision.BF16,), 0, 20
    )


def test_an_image_that_kills_its_decoder_does_not_kill_the_job(
    tmp_path: Path, jpegs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy check is started again with every image decoded in a disposable process, and judges by
    the others.
    """
    for name, value in helpers.faulty_decoders().items():
        monkeypatch.setenv(name, value)
    folder = jpegs(12, **{"zz.jpg": b"imagemill-test-crash"})
    messages: list[str] = []
    found = check_process.in_child(
        small_check(make_bundle(tmp_path / "bundle"), folder), messages.append
    )
    assert found["bf16"].comparison.images == 12
    assert messages[0].startswith("the accuracy check process was killed by SIG")


def test_a_users_error_crosses_from_the_child_as_itself(
    tmp_path: Path, jpegs: Callable[..., Path]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle.dir / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"model\.onnx"):
        check_process.in_child(small_check(bundle, jpegs(3)))


# --truth.


def test_the_accuracy_of_both_precisions_is_shown_if_true_labels_are_given(
    tmp_path: Path, colours: Path, here: None
) -> None:
    """By the folders' names, which are class ids; a table gives the same, and is measured again."""
    bundle = make_bundle(tmp_path / "model", loud=3e4)
    rows = "".join(f"{file.name},{file.parent.name}\n" for file in colours.rglob("*.ppm"))
    (tmp_path / "truth.csv").write_text(f"path,label\n{rows}")
    for truth in ("folders", f"@{tmp_path / 'truth.csv'}"):
        report = command.quantize_bundle(
            bundle, [str(colours)], chosen=CPU, calibration=60, held_out=100, truth=truth
        )
        found = report.precisions["int8"].comparison
        assert (found.true.truth, found.true.images) == (truth, found.images)
        assert found.true.fp32 == 1
        assert found.true.precision == pytest.approx(found.agreement)
        assert f"right answers 1.0000 in fp32 and {found.agreement:.4f} here" in str(
            command.report_lines(report)
        )
    before = sorted(path.name for path in bundle.dir.iterdir())
    (tmp_path / "truth.csv").write_text("path,label\nno.ppm,0\n")
    with pytest.raises(UsageError, match="no image"):
        command.quantize_bundle(
            bundle,
            [str(colours)],
            chosen=CPU,
            calibration=61,
            held_out=99,
            truth=f"@{tmp_path / 'truth.csv'}",
        )
    assert sorted(path.name for path in bundle.dir.iterdir()) == before, "nothing was quantised"
    with pytest.raises(UsageError, match="`quantize` reads folders"):
        command.quantize_bundle(bundle, [str(colours)], chosen=CPU, truth="cls")


def test_images_without_a_true_label_are_left_out_of_the_accuracy() -> None:
    scores = np.float32([[1, 0], [1, 0], [0, 1], [np.nan, 0]])
    true = accuracy.true_accuracy("folders", np.int32([0, 1, -1, 1]), scores, scores[:, ::-1])
    assert (true.images, true.fp32, true.precision) == (3, 1 / 3, 1 / 3)
