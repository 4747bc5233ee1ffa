"""ONNX files that describe themselves: labels and preprocessing from metadata, scores found in the
graph, and inputs and outputs of other shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, version_converter
from PIL import Image

import helpers
import sample_images
from imagemill.errors import ClassCountError, ModelError, UsageError
from imagemill.models import bundle
from imagemill.models import card as cards
from imagemill.models.custom import check as custom_check
from imagemill.models.custom import metadata, wrap
from imagemill.records import Bundle, Centre, Scores
from onnx_files import complete, head, saved, silent, small, turned

ULTRALYTICS = {
    "description": "Ultralytics YOLO11n-cls model",
    "author": "Ultralytics",
    "license": "AGPL-3.0 License (https://ultralytics.com/license)",
    "task": "classify",
    "batch": "1",
    "imgsz": "[8, 8]",
    "names": "{0: 'tench', 1: \"potter's wheel\", 2: 'hen'}",
}
PIXELS = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)


def reported(model: onnx.ModelProto, **metadata_props: str) -> onnx.ModelProto:
    """Return the model with these metadata."""
    helper.set_model_props(model, metadata_props)
    return model


def built(file: Path, **given: Any) -> Bundle:
    """Wrap a file and return its bundle."""
    wrap.wrap(file, complete(file, **given))
    return wrap.bundle_for(file, file.parent / "models", silent)


def answers(made: Bundle, pixels: np.ndarray = PIXELS) -> dict[str, np.ndarray]:
    """Return the answers of a bundle to a batch of pixels."""
    (found,) = custom_check.answers(made.dir / bundle.MODEL, [pixels])
    return found


# ── metadata ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
def test_an_export_of_ultralytics_needs_no_card(jpegs: Any, imagemill: Any, tmp_path: Path) -> None:
    """`run --model file.onnx` right away; each value is printed with its origin."""
    model = reported(
        head(turned("Softmax"), shape=(1, 3, 8, 8), outputs={"y": [1, 3]}), **ULTRALYTICS
    )
    file = saved(model, tmp_path, "best.onnx")
    arguments = ("--model", file, "--models-dir", tmp_path / "models", "--precision", "fp32")
    done = imagemill("run", jpegs(3), "--output", tmp_path / "out", *arguments)
    assert done.code == 0, done.err
    for line in (
        "best.onnx: size: 8 (metadata: imgsz)",
        "best.onnx: resize: 8 (metadata: task classify)",
        "best.onnx: mean: 0 0 0 (metadata: task classify)",
        "best.onnx: scores: softmax (the graph ends in a Softmax)",
        "best.onnx: labels: 3: tench, potter's wheel, hen (metadata: names)",
        "best.onnx: licence: AGPL-3.0 License (https://ultralytics.com/license) (metadata: license)",
        "best.onnx: layout: NCHW (shape of the input)",
    ):
        assert f"imagemill: {line}\n" in done.err
    labels = {row["label"] for row in helpers.rows(tmp_path / "out")}
    assert labels <= {"tench", "potter's wheel", "hen"}
    (made,) = (tmp_path / "models").iterdir()
    recipe = bundle.load(made).card.recipe
    assert (recipe.width, recipe.height, recipe.resize, recipe.pad) == (8, 8, 8, False)
    assert not cards.card_file(file).exists()


def test_an_input_of_ultralytics_that_is_not_square_is_squashed(tmp_path: Path) -> None:
    """As its `classify_transforms` do: `imgsz` is height and width."""
    entries = ULTRALYTICS | {"imgsz": "[8, 12]", "names": "['a', 'b', 'c']"}
    model = reported(head(turned("Softmax"), shape=("n", 3, 8, 12)), **entries)
    made = wrap.bundle_for(saved(model, tmp_path), tmp_path / "models", silent)
    recipe = made.card.recipe
    assert (recipe.width, recipe.height, recipe.resize) == (12, 8, (12, 8))
    assert made.card.labels == ("a", "b", "c")


def test_a_detector_of_ultralytics_is_refused(tmp_path: Path) -> None:
    """By the task that it names."""
    file = saved(reported(small(), **ULTRALYTICS | {"task": "detect"}), tmp_path)
    with pytest.raises(
        UsageError,
        match=r"for the task 'detect' \(metadata: task\), .* Export a classifier \(yolo…-cls\)\.$",
    ):
        wrap.wrap(file, {})


@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        ({"character": "0\n90\n180"}, ("0", "90", "180")),
        ({"character": "a\r\nb\r\nc\n"}, ("a", "b", "c")),
        ({"names": "['a', 'b', 'c']"}, ("a", "b", "c")),
        ({"names": "{2: 'c', 0: 'a', 1: 'b'}"}, ("a", "b", "c")),
        ({"id2label": json.dumps({"0": "ä", "1": "b", "2": "c"})}, ("ä", "b", "c")),
        ({"classes": "3", "labels": '["a", "b", "c"]'}, ("a", "b", "c")),
        ({"classes": "3"}, ("0", "1", "2")),
        ({"names": ""}, ("0", "1", "2")),
    ],
)
def test_labels_are_read_from_metadata(
    entries: dict[str, str], labels: tuple[str, ...], tmp_path: Path
) -> None:
    """As PaddlePaddle, ultralytics and others write them. A number of classes is no label."""
    file = saved(reported(small(), **entries), tmp_path)
    assert built(file).card.labels == labels
    assert cards.read_card(cards.card_file(file)).card.labels is None, (
        "the next export may have others"
    )


def test_labels_of_flags_and_cards_replace_those_of_metadata(tmp_path: Path) -> None:
    """The flag before the card, the card before the metadata."""
    file = saved(reported(small(), names="['a', 'b', 'c']"), tmp_path)
    plain = {"mean": [0, 0, 0], "std": [1, 1, 1], "resize": 8}
    cards.card_file(file).write_text(json.dumps(plain | {"color": "BGR"}))
    models = tmp_path / "models"
    assert wrap.bundle_for(file, models, silent).card.labels == ("a", "b", "c")
    cards.card_file(file).write_text(json.dumps(plain | {"labels": ["d", "e", "f"]}))
    assert wrap.bundle_for(file, models, silent).card.labels == ("d", "e", "f")
    helpers.fill(tmp_path, {"labels.txt": b"g\nh\ni\n"})
    _, checked = wrap.wrap(file, {"labels": str(tmp_path / "labels.txt")})
    assert checked.bundle.card.labels == ("g", "h", "i")
    assert f"labels: 3: g, h, i (--labels {tmp_path / 'labels.txt'})" in checked.lines


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"names": "{0: 'a', 2: 'b'}"}, r"metadata key names is not a list of labels, nor labels numb"),
        ({"names": "{0: 'a', 1: {}}"}, r"metadata key names is not a list of labels"),
        ({"names": "{0: __import__('os').mkdir('hacked')}"}, r"metadata key names is not a list of la"),
        ({"names": "[" * 100_000}, r"metadata key names is not a list of labels"),
        ({"names": "[" + "-" * 100_000 + "1]"}, r"metadata key names is not a list of labels"),
        ({"names": "{}"}, r"metadata key names is not a list of labels"),
        ({"names": "[1, 2, 3]"}, r"metadata key names is not a list of labels"),
        ({"names": "[1e999, NaN]"}, r"metadata key names is not a list of labels"),
        ({"names": "['a', 'b', 'c\\x1b[2J']"}, r"label 2 is 'c\\x1b\[2J'\. A label has 1 to 1,000 cha"),
        ({"names": "['a', ' ', 'c']"}, r"label 1 is ' '"),
        ({"names": "['a', '\\ud800', 'c']"}, r"label 1 is '\\ud800'"),
        ({"names": f"['a', 'b', '{'c' * 1001}']"}, r"label 2 is 'c{80}…'"),
        ({"names": "['a', 'b']"}, r"metadata: names has 2 labels, but small\.onnx has 3 classes\. .* with --labels FILE\.$"),
        ({"names": str([""] * 250_001)}, r"has 250,001 labels, at most 250,000 are read"),
        ({"names": "cat|dog|owl"}, r"metadata key names is 'cat\|dog\|owl', which is not a list of labels\. Give the labels once: imagemill wrap small\.onnx --labels FILE\. FILE has one label per line, in the order"),
        ({"classes": "cat,dog,owl"}, r"metadata key classes is 'cat,dog,owl', which is not a list"),
        ({"character": "a\x1b[2J"}, r"metadata key character is 'a\\x1b\[2J', which is not a list"),
        ({"names": " " * 9_000_000}, r"has 9,000,000 characters, at most 8,388,608 are read"),
        ({"character": "a\x07\nb\nc"}, r"metadata key character: label 0 is 'a\\x07'"),
        ({"imgsz": "huge"}, r"metadata key imgsz is 'huge', which is not one or two numbers"),
        ({"imgsz": "[1, 2, 3]"}, r"metadata key imgsz is '\[1, 2, 3\]'"),
        ({"imgsz": "9" * 39}, r"metadata key imgsz is wrong: size is 9+; it must be a number of pix"),
        ({"imgsz": "[0, 0]"}, r"metadata key imgsz is wrong: size is 0; it must be"),
        ({"imgsz": "224"}, r"takes images of 8x8, but size is 224 \(metadata: imgsz\)"),
    ],
)  # fmt: skip
def test_hostile_metadata_are_one_clear_line(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Nothing is executed, nothing is written."""
    file = saved(reported(small(), **entries), tmp_path)
    with pytest.raises((ModelError, UsageError), match=message) as caught:
        wrap.wrap(file, {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    assert not Path("hacked").exists()


def test_control_characters_in_names_of_tensors_are_escaped(tmp_path: Path) -> None:
    """In every message, also in one that lists outputs."""
    model = small(outputs={"embedding": ["n", 3, 4], "\x1b[2Jy": ["n", 3, "\n"]})
    with pytest.raises(UsageError, match=r"\\x1b\[2Jy \(n, 3, \\n\)") as caught:
        wrap.wrap(saved(model, tmp_path), {})
    assert str(caught.value).isprintable()


def damaged(how: str) -> onnx.ModelProto:
    """A model that no exporter writes."""
    model = small(shape=(1, 3, 8, 8))
    if how == "cycle":
        nodes = [helper.make_node("Identity", [old], [new]) for old, new in ("yz", "zy")]
        return head(*nodes, outputs={"y": ["n", 3]})
    if how == "no inputs":
        return head(helper.make_node("Reshape", [], ["y"]))
    if how == "type":
        model.graph.input[0].type.tensor_type.elem_type = 99
    if how == "numbers":
        model.graph.initializer[0].ClearField("raw_data")
    if how == "external":
        model.graph.initializer[0].ClearField("raw_data")
        model.graph.initializer[0].data_location = TensorProto.EXTERNAL
        for key, value in (("location", "data"), ("offset", "999"), ("length", "-5")):
            entry = model.graph.initializer[0].external_data.add()
            entry.key, entry.value = key, value
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cycle", r"small\.onnx cannot be run on a batch of 2"),
        ("no inputs", r"small\.onnx is damaged: its operator \w+ '' has 0 inputs"),
        ("type", r"small\.onnx takes 99; float32, float16 and uint8 can be fed"),
        ("numbers", r"small\.onnx is damaged: the constant mean has not the numbers"),
        ("external", r"small\.onnx is damaged, or does not belong to the weights beside it"),
    ],
)
def test_damaged_graphs_are_one_clear_line(how: str, message: str, tmp_path: Path) -> None:
    """Cycles end, and lies about sizes are found."""
    (tmp_path / "data").write_bytes(b"short")
    with pytest.raises(ModelError, match=message) as caught:
        wrap.wrap(saved(damaged(how), tmp_path), {})
    assert str(caught.value).isprintable()


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    """Python's protobuf returns them as bytes."""
    file = tmp_path / "small.onnx"
    file.write_bytes(small().SerializeToString().replace(b"embedding", b"embed\xff\xffng"))
    with pytest.raises(ModelError, match=r"small\.onnx is damaged: a name in it is not UTF-8"):
        wrap.wrap(file, {})


def test_the_image_keys_of_onnx_are_the_normalisation(tmp_path: Path) -> None:
    """`Image.BitmapPixelFormat` and `Image.NominalPixelRange`; then only --resize is missing."""
    entries = {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": "Normalized_1_1"}
    file = saved(reported(small(), **entries), tmp_path)
    with pytest.raises(
        UsageError,
        match=(
            r"the file does not say resize\. Known: color: BGR"
            r" \(metadata: Image\.BitmapPixelFormat\); scale: 1 .*"
            r"imagemill wrap .*small\.onnx --resize N --labels FILE\. FILE has one label per line,"
        ),
    ):
        wrap.bundle_for(file, tmp_path / "models", silent)
    wrap.wrap(file, {"resize": "none"})
    made = wrap.bundle_for(file, tmp_path / "models", silent)
    assert (made.card.mean, made.card.std) == ((127.5,) * 3, (127.5,) * 3)
    expected = (PIXELS.mean(axis=(1, 2)) - 127.5) / 127.5
    np.testing.assert_allclose(answers(made)["embedding"], expected[:, ::-1], rtol=0, atol=1e-4)


def test_a_file_without_a_card_that_takes_bytes_needs_only_a_resize(tmp_path: Path) -> None:
    """Its normalisation is inside; whether images are cropped is nowhere."""
    file = saved(small(kind=TensorProto.UINT8), tmp_path)
    with pytest.raises(UsageError, match=r"the file does not say resize\."):
        wrap.bundle_for(file, tmp_path / "models", silent)


def test_labels_that_cannot_be_read_are_not_needed_if_others_are_given(tmp_path: Path) -> None:
    """By a flag, by the card, or by another key; a number counts classes."""
    helpers.fill(tmp_path, {"labels.txt": b"cat\ndog\nowl\n"})
    file = saved(reported(small(), names="cat|dog|owl"), tmp_path)
    assert built(file, labels=str(tmp_path / "labels.txt")).card.labels == ("cat", "dog", "owl")
    assert built(file).card.labels == ("cat", "dog", "owl"), "the card has them"
    file = saved(reported(small(), names="a|b|c", classes="['a', 'b', 'c']"), tmp_path, "b.onnx")
    assert built(file).card.labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("names", "end"),
    [
        ("['cat', 'dog', 'owl']", ", or omit --labels: it names them itself (cat, dog, owl)."),
        ("cat|dog|owl", " classes."),
        ("['cat']", " classes."),
    ],
)
def test_too_few_labels_name_those_of_the_file(names: str, end: str, tmp_path: Path) -> None:
    """If the file has the right number."""
    helpers.fill(tmp_path, {"two.txt": b"cat\ndog\n"})
    file = saved(reported(small(), names=names), tmp_path)
    with pytest.raises(ClassCountError) as caught:
        wrap.wrap(file, {"labels": str(tmp_path / "two.txt")})
    assert str(caught.value).startswith(f"{tmp_path}/two.txt has 2 labels, but small.onnx has 3 ")
    assert str(caught.value).endswith(end)


def test_labels_that_nobody_gave_are_printed_too(tmp_path: Path) -> None:
    """By `wrap` and by `run`: a table full of numbers is no surprise."""
    line = "labels: 3: 0, 1, 2 (the classes' numbers; no labels were given)"
    file = saved(reported(small(), classes="3"), tmp_path)
    _, checked = wrap.wrap(file, complete(file))
    assert line in checked.lines
    messages: list[str] = []
    wrap.bundle_for(file, tmp_path / "models", messages.append)
    assert f"small.onnx: {line}" in messages
    assert cards.read_card(cards.card_file(file)).card.labels is None


USUAL = {
    "mean": "--mean 0.485 0.456 0.406",
    "std": "--std 0.229 0.224 0.225",
    "resize": "--resize 256",
}


def note(missing: str) -> str:
    """How the note about missing settings begins; it proposes no others."""
    usual = " ".join(flags for name, flags in USUAL.items() if name in missing)
    return (
        f"note: {missing} not given, so `run` refuses the model. Most networks trained on ImageNet"
        f" take {usual}. Add the values"
    )


def test_missing_settings_are_noted_each_time_and_refused_by_run(tmp_path: Path) -> None:
    """Because a guess costs accuracy silently. A default never becomes a choice in the card."""
    file, models = saved(small(), tmp_path), tmp_path / "models"
    helpers.fill(tmp_path, {"labels.txt": b"a\nb\nc\n"})
    for given in ({}, {"labels": str(tmp_path / "labels.txt")}, {"interpolation": "bicubic"}):
        _, checked = wrap.wrap(file, given)
        assert checked.lines[-1].startswith(note("mean, std and resize were"))
        proposed = f"imagemill wrap {file} --mean R G B --std R G B --resize N"
        assert proposed in checked.lines[-1]
        assert {"mean: 0 0 0 (default)", "resize: 9 (default: size / 0.875)"} < set(checked.lines)
    chosen = json.loads(cards.card_file(file).read_text())
    assert {name for name, value in chosen.items() if value is not None} == {
        *("labels", "interpolation")
    }
    with pytest.raises(
        UsageError,
        match=(
            r"neither the file nor its card \(small\.card\.json\) says mean, std and resize\. .*"
            r"imagemill wrap .*small\.onnx --mean R G B --std R G B --resize N$"
        ),
    ):
        wrap.bundle_for(file, models, silent)
    _, checked = wrap.wrap(file, {"mean": (0, 0, 0), "std": (1, 1, 1)})
    assert checked.lines[-1].startswith(note("resize was"))
    with pytest.raises(UsageError, match=r"says resize\. "):
        wrap.bundle_for(file, models, silent)
    _, checked = wrap.wrap(file, {"resize": 9})
    assert not any("not given, so" in line for line in checked.lines)
    assert wrap.bundle_for(file, models, silent).card.recipe.resize == 9


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"scale": 255, "resize": 8}, None),
        ({"scale": 255, "mean": (123, 117, 104), "resize": 8}, None),
        ({"mean": (0, 0, 0), "resize": 8}, "std was"),
        ({"std": (1, 1, 1), "crop": "none"}, "mean was"),
        ({"scale": 1, "crop": "none"}, "mean and std were"),
    ],
)
def test_what_run_wants_to_know(given: dict[str, Any], missing: str | None, tmp_path: Path) -> None:
    """Pixels of scale 255 may be fed as they are; without a crop there is one way to resize."""
    file = saved(small(), tmp_path)
    _, checked = wrap.wrap(file, given)
    if missing is None:
        assert wrap.bundle_for(file, tmp_path / "models", silent).card.scores is Scores.LOGITS
        return
    assert checked.lines[-1].startswith(note(missing))
    with pytest.raises(UsageError, match="neither the file nor its card"):
        wrap.bundle_for(file, tmp_path / "models", silent)


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


def two_outputs(first: str, second: str, *kinds: str) -> onnx.ModelProto:
    """A model with two outputs (n, 3) made of the same tensor by operators of these kinds."""
    nodes = [
        helper.make_node(kind, ["normalised"], [name])
        for kind, name in zip(kinds, (first, second), strict=True)
    ]
    return small(nodes=nodes, outputs={first: ["n", 3], second: ["n", 3]})


@pytest.mark.parametrize(
    ("model", "tensor", "scores", "origin"),
    [
        (two_outputs("logits", "probabilities", "Identity", "Softmax"), "logits", "logits", "by its name"),
        (two_outputs("a/logits:0", "features", "Identity", "Relu"), "a/logits:0", "logits", "by its name"),
        (two_outputs("y", "z", "Relu", "Softmax"), "z", "softmax", "the only output that ends in Softmax"),
        (two_outputs("probs", "z", "HardSigmoid", "Relu"), "probs", "logits", "by its name"),
        (two_outputs("image_embeds", "z", "Identity", "Identity"), "z", "logits", "the only output of that shape that is no embedding"),
    ],
)  # fmt: skip
def test_the_scores_are_found_among_several_outputs(
    model: onnx.ModelProto, tensor: str, scores: str, origin: str, tmp_path: Path
) -> None:
    """By name, by ending, or because the other one is an embedding; the reason is printed."""
    _, checked = wrap.wrap(saved(model, tmp_path), {})
    assert f"logits: {tensor} ({origin})" in checked.lines
    assert f"{tensor}: {scores}, 3 classes" in checked.lines


@pytest.mark.parametrize("tail", ["ArgMax", "TopK"])
def test_scores_before_an_argmax_are_found(tail: str, tmp_path: Path) -> None:
    """A graph that returns class numbers only."""
    nodes = [turned("Softmax", axis=1), helper.make_node(tail, ["y"], ["label"], axis=1)]
    kinds = [("label", TensorProto.INT64, ["n", 1])]
    if tail == "TopK":
        nodes[1] = helper.make_node("TopK", ["y", "k"], ["best", "label"], axis=1)
        kinds = [("best", TensorProto.FLOAT, ["n", 2]), ("label", TensorProto.INT64, ["n", 2])]
    model = small(nodes=nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "k"))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(*kind) for kind in kinds)
    file = saved(model, tmp_path)
    _, checked = wrap.wrap(file, {})
    assert any(line.startswith(f"logits: y (what the {tail} of output ") for line in checked.lines)
    found = answers(built(file))["logits"]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    made = onnx.load(str(built(file).dir / bundle.MODEL))
    assert tail not in {node.op_type for node in made.graph.node}


def test_a_segmentation_that_ends_in_argmax_is_no_classifier(tmp_path: Path) -> None:
    """Its ArgMax leaves a number per pixel."""
    model = small(nodes=[helper.make_node("ArgMax", ["std"], ["label"], axis=1, keepdims=0)])
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("label", TensorProto.INT64, ["n", 8, 8])
    )
    with pytest.raises(UsageError, match=r"none of its outputs has the shape of scores"):
        wrap.wrap(saved(model, tmp_path), {})


def zip_map(labels: list[str]) -> onnx.ModelProto:
    """As Azure Custom Vision exports a classifier: a softmax, and a map from label to score."""
    nodes = [
        turned("Softmax", axis=1),
        helper.make_node(
            "ZipMap", ["y"], ["loss"], domain="ai.onnx.ml", classlabels_strings=labels
        ),
        helper.make_node("ArgMax", ["y"], ["number"], axis=1, keepdims=0),
    ]
    opset = [helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx.ml", 1)]
    model = small(nodes=nodes, opset=opset)
    del model.graph.output[:]
    text = helper.make_tensor_value_info("number", TensorProto.INT64, ["n"])
    key = onnx.TypeProto()
    key.sequence_type.elem_type.map_type.key_type = TensorProto.STRING
    key.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.output.extend([text, helper.make_value_info("loss", key)])
    return model


def test_a_zipmap_is_dropped_and_names_the_labels(tmp_path: Path) -> None:
    """ONNX-ML's operators after the scores are not needed."""
    file = saved(zip_map(["cat", "dog", "owl"]), tmp_path)
    made = built(file)
    assert made.card.labels == ("cat", "dog", "owl")
    assert made.card.scores is Scores.SOFTMAX
    assert {node.domain for node in onnx.load(str(made.dir / bundle.MODEL)).graph.node} == {""}
    with pytest.raises(ModelError, match=r"its ZipMap: label 1 is 'd\\x1b'"):
        wrap.wrap(saved(zip_map(["cat", "d\x1b", "owl"]), tmp_path, "b.onnx"), {})


def test_a_tensor_inside_the_graph_can_be_named(tmp_path: Path) -> None:
    """`--logits` takes tensors that are no outputs."""
    file = saved(head(turned("HardSigmoid")), tmp_path)
    found = answers(built(file, logits="normalised"))["logits"]
    weight = np.random.default_rng(0).normal(size=(3, 3))
    np.testing.assert_allclose(found, PIXELS.mean(axis=(1, 2)) / 255 @ weight, rtol=1e-4)


def one_score(*nodes: Any, dims: list[Any] | None = None) -> onnx.ModelProto:
    nodes = nodes or (turned("Identity"),)
    return head(*nodes, classes=1, outputs={"y": dims or ["n", 1]})


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("Identity", ["n", 1]),
        ("Sigmoid", ["n", 1, 1, 1]),
        ("HardSigmoid", ["n", 1]),
        ("Identity", ["n", 1, 1, 1]),
    ],
)
def test_one_score_with_two_labels_becomes_two_classes(
    kind: str, dims: list[Any], tmp_path: Path
) -> None:
    """The score is the second class, whether the graph ends in a sigmoid or not."""
    helpers.fill(tmp_path, {"labels.txt": b"no\nyes\n"})
    nodes = [turned(kind)]
    if len(dims) == 4:
        nodes = [
            helper.make_node(kind, ["normalised"], ["flat"]),
            helper.make_node("Unsqueeze", ["flat", "last"], ["y"]),
        ]
    model = one_score(*nodes, dims=dims)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "last"))
    file = saved(model, tmp_path)
    given: dict[str, Any] = {"scores": "softmax"} if kind == "HardSigmoid" else {}
    given = complete(file, **given, labels=str(tmp_path / "labels.txt"))
    _, checked = wrap.wrap(file, given)
    card = checked.bundle.card
    assert card.labels == ("no", "yes")
    made = wrap.bundle_for(file, tmp_path / "models", silent)
    found = answers(made)["logits"]
    alone = answers(built(saved(model, tmp_path, "alone.onnx"), scores="sigmoid"))["logits"]
    if kind == "Identity":
        assert card.scores is Scores.LOGITS
        np.testing.assert_allclose(found, np.hstack([0 * alone, alone]), rtol=0, atol=1e-6)
    else:
        assert card.scores is Scores.SOFTMAX
        np.testing.assert_allclose(found, np.hstack([1 - alone, alone]), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match=r"one score for two labels, so --scores logits cannot be"):
        wrap.wrap(
            saved(one_score(), tmp_path, "b.onnx"),
            {"scores": "logits", "labels": str(tmp_path / "labels.txt")},
        )


def test_one_score_with_three_labels_is_refused(tmp_path: Path) -> None:
    """One label, or two, but not more."""
    helpers.fill(tmp_path, {"labels.txt": b"a\nb\nc\n"})
    file = saved(one_score(turned("Sigmoid")), tmp_path)
    with pytest.raises(
        ClassCountError, match=r"labels\.txt has 3 labels, but small\.onnx has 1 class\."
    ):
        wrap.wrap(file, {"labels": str(tmp_path / "labels.txt")})


# ── networks without a head ───────────────────────────────────────────────────────────────────────


def headless(shape: tuple[Any, ...] = ("n", 3, 8, 8), **outputs: list[Any]) -> onnx.ModelProto:
    """A model whose outputs are reshaped from (n, 8) numbers."""
    nodes = []
    model = small(classes=8, outputs=outputs, shape=shape)
    for name, dims in outputs.items():
        shape = [0 if place == 0 else dim for place, dim in enumerate(dims)]
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape")
        )
        nodes.append(helper.make_node("Reshape", ["normalised", f"{name}_shape"], [name]))
    del model.graph.node[3:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.process
@pytest.mark.parametrize(
    ("outputs", "length", "origin"),
    [
        ({"last_hidden_state": ["n", 2, 4]}, 4, "by its name, its first token"),
        ({"last_hidden_state": ["n", 2, 4], "pooler_output": ["n", 8]}, 8, "by its name"),
        ({"last_hidden_state": ["n", 2, 2, 2], "pooler_output": ["n", 8, 1, 1]}, 8, "by its name"),
        ({"image_embeds": ["n", 8], "last_hidden_state": ["n", 2, 4]}, 8, "by its name"),
    ],
)
def test_a_network_without_a_head_has_an_embedding_only(
    outputs: dict[str, list[Any]], length: int, origin: str, tmp_path: Path
) -> None:
    """As transformers exports DINOv2 and the vision tower of CLIP."""
    file = saved(headless(**outputs), tmp_path)
    _, checked = wrap.wrap(file, complete(file))
    assert checked.bundle.card.labels == ()
    assert checked.bundle.card.outputs == ("embedding",)
    assert any(line.startswith("logits: none (the outputs are ") for line in checked.lines)
    assert any(line.endswith(f"({origin})") for line in checked.lines if "embedding: " in line)
    found = answers(wrap.bundle_for(file, tmp_path / "models", silent))
    assert list(found) == ["embedding"]
    assert found["embedding"].shape == (2, length)
    whole = answers(built(saved(small(classes=8), tmp_path, "whole.onnx")))["logits"]
    np.testing.assert_allclose(found["embedding"], whole[:, :length], rtol=1e-6)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(
    ("side", "tokens", "is_mean"),
    [
        ((8, 8), 4, True),
        ((8, 4), 2, True),
        ((8, 4), 8, True),
        ((8, 8), 2, False),
        ((8, 8), 8, False),
    ],
)
def test_tokens_that_fill_a_grid_are_averaged(
    side: tuple[int, int], tokens: int, is_mean: bool, opset: int, tmp_path: Path
) -> None:
    """As Swin does it, whose tokens have no class token among them; their number may be open."""
    outputs = {"last_hidden_state": ["n", tokens, 8 // tokens]}
    made = headless(shape=("n", 3, *side), **outputs)
    model = version_converter.convert_version(made, opset)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "tokens"
    file = saved(model, tmp_path)
    _, checked = wrap.wrap(file, complete(file))
    how = "the mean of its tokens" if is_mean else "its first token"
    assert f"embedding: last_hidden_state (by its name, {how})" in checked.lines
    pixels = np.random.default_rng(1).integers(0, 256, (2, *side, 3), np.uint8)
    found = answers(wrap.bundle_for(file, tmp_path / "models", silent), pixels)["embedding"]
    whole = small(classes=8, shape=("n", 3, *side))
    numbers = answers(built(saved(whole, tmp_path, "whole.onnx")), pixels)["logits"]
    of_tokens = numbers.reshape(2, tokens, -1)
    expected = of_tokens.mean(axis=1) if is_mean else of_tokens[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.process
def test_a_job_of_a_network_without_a_head_saves_embeddings(
    jpegs: Any, imagemill: Any, tmp_path: Path
) -> None:
    """`run --model file.onnx`, from the outputs' names alone."""
    file = saved(headless(last_hidden_state=["n", 2, 4]), tmp_path)
    wrap.wrap(file, complete(file, resize=8))
    arguments = ("--model", file, "--models-dir", tmp_path / "models", "--precision", "fp32")
    done = imagemill("run", jpegs(2), "--output", tmp_path / "out", *arguments)
    assert done.code == 0, done.err
    for row in helpers.rows(tmp_path / "out"):
        assert row["label"] is None
        assert len(row["embedding"]) == 4


def test_other_networks_without_a_head_are_named(tmp_path: Path) -> None:
    """`--logits none`; if it cannot be seen which output is the embedding, --embedding."""
    file = saved(headless(y=["n", 8]), tmp_path)
    card = built(file, logits="none").card
    assert (card.labels, card.outputs) == ((), ("embedding",))
    file = saved(headless(y=["n", 8], z=["n", 2, 4]), tmp_path, "b.onnx")
    assert built(file, logits="none").card.outputs == ("embedding",)
    file = saved(headless(y=["n", 8], z=["n", 8]), tmp_path, "c.onnx")
    with pytest.raises(
        UsageError,
        match=r"none of its outputs is plainly the embedding, .*: y \(n, 8\), z \(n, 8\)",
    ):
        wrap.wrap(file, {"logits": "none"})
    assert answers(built(file, logits="none", embedding="z"))["embedding"].shape == (2, 8)
    helpers.fill(tmp_path, {"labels.txt": b"a\nb\nc\n"})
    with pytest.raises(UsageError, match=r"has no scores \(--logits\), so it takes no labels"):
        wrap.wrap(
            file, {"logits": "none", "embedding": "z", "labels": str(tmp_path / "labels.txt")}
        )
    file = saved(headless(last_hidden_state=["n", 2, 2, 2]), tmp_path, "d.onnx")
    with pytest.raises(UsageError, match=r"Name it with --embedding TENSOR"):
        wrap.wrap(file, {})


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [("n", 3, 6, 10), ("n", 6, 10, 3), ("n", 3, "h", "w")])
def test_inputs_that_are_not_square(shape: tuple[Any, ...], tmp_path: Path) -> None:
    """Width and height are kept apart, in the file's shape and in `--size`."""
    file = saved(small(shape=shape), tmp_path)
    given = {"size": "10x6"} if "h" in shape else {}
    made = built(file, crop="none", **given)
    recipe = made.card.recipe
    assert (recipe.width, recipe.height, recipe.resize) == (10, 6, (10, 6))
    pixels = np.random.default_rng(1).integers(0, 256, (2, 6, 10, 3), np.uint8)
    expected = pixels.mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(answers(made, pixels)["embedding"], expected, rtol=1e-5)
    wrap.wrap(file, {"crop": "center", "resize": 7, "centre": "transformers", **given})
    recipe = wrap.bundle_for(file, tmp_path / "models", silent).card.recipe
    assert (recipe.resize, recipe.centre) == (7, Centre.TRANSFORMERS)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (("batch", "num_channels", "height", "width"), "NCHW"),
        (("batch", 8, 8, "Channels"), "NHWC"),
    ],
)
def test_an_open_dimension_that_is_called_channels(
    shape: tuple[Any, ...], layout: str, tmp_path: Path
) -> None:
    """As optimum exports models: every dimension is open, and has a name."""
    model = small(shape=("n", 3, 8, 8) if layout == "NCHW" else ("n", 8, 8, 3))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    _, checked = wrap.wrap(saved(model, tmp_path), {"size": 8})
    assert f"layout: {layout} (shape of the input)" in checked.lines


@pytest.mark.parametrize(
    ("given", "resize", "fill"),
    [
        ({"resize": "pad"}, (10, 6), "#000000"),
        ({"resize": "pad", "fill": "#ffffff", "crop": "none"}, (10, 6), "#ffffff"),
        ({"resize": "pad 12x8", "fill": "#7F7F7F"}, (12, 8), "#7F7F7F"),
        ({"resize": "pad 5x5"}, (5, 5), "#000000"),
    ],
)
def test_letterboxes_become_the_recipe(
    given: dict[str, Any], resize: tuple[int, int], fill: str, tmp_path: Path
) -> None:
    """The image keeps its ratio; the rest is filled."""
    recipe = built(saved(small(shape=("n", 3, 6, 10)), tmp_path), **given).card.recipe
    assert (recipe.resize, recipe.pad, recipe.fill) == (resize, True, fill)


@pytest.mark.parametrize("opset", [8, 11, 13])
@pytest.mark.parametrize("shape", [("n", 1, 256, 256), ("n", 256, 256, 1)])
def test_grey_inputs_get_the_grey_of_pillow(
    shape: tuple[Any, ...], opset: int, tmp_path: Path
) -> None:
    """Exactly, for every colour whose channels are multiples of 4 and more; computed in the
    graph.
    """
    model = small(
        shape=shape,
        nodes=[helper.make_node("Flatten", ["std"], ["y"], axis=1)],
        outputs={"y": ["n", 256 * 256]},
        opset=[helper.make_opsetid("", opset)],
    )
    file = saved(model, tmp_path)
    made = built(file, scale=255, resize="none", logits="y")
    values = np.arange(0, 256, 4, dtype=np.uint8)
    colours = np.stack(np.meshgrid(values, values, values, indexing="ij"), axis=-1)
    colours = np.concatenate(
        [
            colours.reshape(-1, 256, 256, 3),
            np.random.default_rng(2).integers(0, 256, (4, 256, 256, 3), np.uint8),
            np.full((4, 256, 256, 3), 255, np.uint8),
        ]
    )
    found = answers(made, colours)["logits"].reshape(-1, 256, 256)
    grey = [np.asarray(Image.fromarray(item).convert("L")) for item in colours]
    assert np.array_equal(found, grey)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16])
def test_grey_inputs_of_other_types(kind: int, tmp_path: Path) -> None:
    """uint8 goes in as it is; mean and std are one number, given three times."""
    file = saved(small(shape=("n", 1, 8, 8), kind=kind), tmp_path)
    floats = kind == TensorProto.FLOAT16
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} if floats else {}
    made = built(file, **given)
    found = answers(made)
    grey = np.stack([np.asarray(Image.fromarray(item).convert("L")) for item in PIXELS])
    expected = grey.reshape(2, -1).mean(axis=1)
    if floats:
        expected = (expected / 255 - 0.5) / 0.25
    assert made.card.normalised is None, "an IPU cannot make grey"
    weight = np.random.default_rng(0).normal(size=(1, 3))
    np.testing.assert_allclose(found["logits"], expected[:, None] * weight, rtol=1e-2, atol=2e-3)


@pytest.mark.process
def test_a_grey_letterbox_runs_end_to_end(imagemill: Any, tmp_path: Path) -> None:
    """From a PNG of another shape to the model's answer, against Pillow doing the same steps."""
    model = small(
        shape=("n", 1, 20, 30),
        nodes=[helper.make_node("Flatten", ["std"], ["y"], axis=1)],
        outputs={"y": ["n", 600]},
    )
    file = saved(model, tmp_path)
    image = sample_images.photograph(61, 83, 3)
    helpers.fill(tmp_path / "in", {"a.png": sample_images.encode(image, "PNG")})
    flags = ("--resize", "pad", "--fill", "#ffffff", "--scale", "255", "--std", "1", "1", "1")
    assert imagemill("wrap", file, *flags).code == 0
    arguments = ("--model", file, "--models-dir", tmp_path / "models", "--precision", "fp32")
    done = imagemill(
        "run", tmp_path / "in", "--output", tmp_path / "out", *arguments, "--save", "logits"
    )
    assert done.code == 0, done.err
    canvas = Image.new("RGB", (30, 20), "#ffffff")
    width = round(61 * 20 / 83)
    canvas.paste(image.resize((width, 20), Image.Resampling.BILINEAR), ((30 - width) // 2, 0))
    (row,) = helpers.rows(tmp_path / "out")
    found = np.array(row["logits"]).reshape(20, 30)
    assert np.abs(found - np.asarray(canvas.convert("L"), np.float32)).max() <= 1


def test_read_labels_takes_what_exporters_write() -> None:
    """Escapes of both notations; None for what is no list."""
    assert metadata.read_labels("f", "k", "{0: 'a\\'b', 1: \"c\"}") == ("a'b", "c")
    assert metadata.read_labels("f", "k", '["\\u00e4"]') == ("ä",)
    assert metadata.read_labels("f", "k", "['a', 'b',]") == ("a", "b")
    assert metadata.read_labels("f", "k", "a, b") is None


def test_operators_may_be_of_the_domain_by_its_full_name(tmp_path: Path) -> None:
    """`ai.onnx` is the empty domain. A Gemm needs no bias from opset 11 on."""
    model = small(opset=[helper.make_opsetid("ai.onnx", 13)])
    model.graph.node[2].op_type = "Gemm"
    file = saved(model, tmp_path)
    wrap.wrap(file, complete(file))
