"""Classes in words: `imagemill classes` makes an ordinary model from CLIP or SigLIP and labels.

fixtures/make_zero_shot.py made the two tiny models and the answers of transformers.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import helpers
import imagemill
from fixtures.make_zero_shot import LABELS, SIZES, TEMPLATES, pixels
from hub_server import Hub, Repo
from imagemill import cli
from imagemill.errors import JobMismatchError, ModelError, UsageError
from imagemill.models import bundle
from imagemill.models.hub import HubFile
from imagemill.models.zero_shot import prompts as texts
from imagemill.models.zero_shot import scale as scales
from imagemill.models.zero_shot import text_tower, towers
from imagemill.models.zero_shot.family import read_family

pytest.importorskip("tokenizers", reason="needs tokenizers")

FIXTURES = Path(__file__).parent / "fixtures" / "zero_shot"
KINDS = ("clip", "siglip")


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture to where it may be changed."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "labels.txt", LABELS)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(pixels(width, height)).save(folder / f"{number}.png")
    return folder


def write_lines(file: Path, lines: Any) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def templated(templates: tuple[str, ...]) -> list[str]:
    return [part for template in templates for part in ("--template", template)]


def golden(name: str) -> Any:
    return np.load(FIXTURES / f"{name}.npz")


def probabilities(rows: list[dict[str, Any]]) -> np.ndarray:
    """Probabilities (images, labels), whatever order `top_k` has."""
    found = np.full((len(rows), len(LABELS)), np.nan)
    for place, row in enumerate(rows):
        for answer in row["top_k"]:
            assert answer["label"] == LABELS[answer["class_id"]]
            found[place, answer["class_id"]] = answer["probability"]
    return found


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize("name", KINDS)
def test_a_run_gives_the_probabilities_and_embeddings_of_transformers(
    name: str, labels: Path, images: Path, tmp_path: Path, imagemill: Callable[..., Any]
) -> None:
    made = imagemill("classes", FIXTURES / name, "--labels", labels, "--output", tmp_path / "mine")
    assert (made.code, made.out) == (0, f"{tmp_path / 'mine'}\n"), made.err
    assert "preprocessor_config.json" in made.err
    assert "templates: a photo of a {}." in made.err
    done = imagemill(
        *("run", images, "--model", tmp_path / "mine", "--output", tmp_path / "out"),
        *("--save", "embedding", "--json"),
    )
    assert done.code == 0, done.err
    assert done.json["model"] == "mine"
    rows = helpers.rows(tmp_path / "out")
    np.testing.assert_allclose(probabilities(rows), golden(name)["one"], atol=1e-4)
    np.testing.assert_allclose(
        np.array([row["embedding"] for row in rows]),
        golden(name)["embeddings"],
        atol=1e-5,
    )


@pytest.mark.parametrize("name", KINDS)
def test_several_templates_are_averaged_as_embeddings(
    name: str, labels: Path, images: Path, tmp_path: Path
) -> None:
    more = write_lines(tmp_path / "more.txt", ["", *TEMPLATES[1:], ""])
    options = ["--template", TEMPLATES[0], "--template", f"@{more}"]
    assert classes(FIXTURES / name, labels, tmp_path / "mine", *options) == 0
    with imagemill.load(tmp_path / "mine") as classifier:
        found = classifier.predict(sorted(images.iterdir()))
    rows = [{"top_k": [vars_of(answer) for answer in row.top_k]} for row in found]
    np.testing.assert_allclose(probabilities(rows), golden(name)["three"], atol=1e-4)


def vars_of(answer: Any) -> dict[str, Any]:
    return {"class_id": answer.class_id, "label": answer.label, "probability": answer.probability}


def classes(folder: object, labels: Path, output: Path, *options: str) -> int:
    """Run `imagemill classes` in this process."""
    arguments = ["classes", str(folder), "--labels", str(labels), "--output", str(output)]
    return cli.main([*arguments, *options])


@pytest.mark.process
def test_other_labels_or_templates_are_another_model(
    labels: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_lines(tmp_path / "other.txt", [*LABELS[:3], "bus"])
    turned = write_lines(tmp_path / "turned.txt", LABELS[::-1])
    made: dict[str, Any] = {}
    for name, file, options in (
        ("first", labels, ()),
        ("again", labels, ()),
        ("other", other, ()),
        ("turned", turned, ()),
        ("template", labels, ("--template", TEMPLATES[1])),
        ("scale", labels, ("--logit-scale", "30")),
    ):
        assert classes(FIXTURES / "clip", file, tmp_path / name, *options) == 0
        made[name] = bundle.load(tmp_path / name).card
    sums = {name: card.sha256 for name, card in made.items()}
    assert sums["first"] == sums["again"]
    assert len(set(sums.values())) == len(made) - 1
    capsys.readouterr()
    assert classes(FIXTURES / "clip", labels, tmp_path / "first") == 0
    assert capsys.readouterr().err == (
        f"imagemill: {tmp_path / 'first'} is here already\n"
        f"imagemill: Ready: imagemill run SOURCE --output DIR --model {tmp_path / 'first'}\n"
    )
    assert classes(FIXTURES / "clip", other, tmp_path / "first") == 2
    assert "holds another model (first, 4 classes)" in capsys.readouterr().err
    assert bundle.load(tmp_path / "first").card == made["first"]
    shorter = shutil.copytree(FIXTURES / "clip", tmp_path / "clip")
    tokenizer = json.loads((shorter / "tokenizer_config.json").read_text())
    (shorter / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 4}))
    assert classes(shorter, labels, tmp_path / "first") == 2, "texts are cut elsewhere"
    imagemill.run(images, tmp_path / "out", model=tmp_path / "first", report=False)
    with pytest.raises(JobMismatchError):
        imagemill.run(images, tmp_path / "out", model=tmp_path / "template", report=False)


@pytest.mark.process
@pytest.mark.large
def test_int8_is_made_and_checked_as_of_any_model(
    labels: Path, images: Path, tmp_path: Path, imagemill: Callable[..., Any]
) -> None:
    assert classes(FIXTURES / "clip", labels, tmp_path / "mine") == 0
    for seed in range(12):
        Image.fromarray(pixels(40 + seed, 40)).save(images / f"more{seed}.png")
    done = imagemill(
        *("quantize", tmp_path / "mine", "--images", images),
        *("--calibration", 8, "--held-out", 8, "--json"),
    )
    assert done.code == 0, done.err
    comparison = done.json["precisions"]["int8"]["comparison"]
    assert (comparison["images"], comparison["accepted"]) == (8, False)  # too few to accept
    ran = imagemill(
        *("run", images, "--model", tmp_path / "mine", "--output", tmp_path / "out"),
        *("--precision", "int8", "--limit", 4),
    )
    assert ran.code == 0, ran.err


# ── scale and bias ────────────────────────────────────────────────────────────────────────────────


def safetensors(file: Path, **values: tuple[str, bytes]) -> Path:
    """Write single numbers: name=(type, bytes)."""
    header, data = {}, b""
    for name, (dtype, number) in values.items():
        ends = [len(data), len(data) + len(number)]
        shape = [] if dtype != "F32" or len(number) == 4 else [len(number) // 4]
        header[name.replace("__", ".")] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        data += number
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


F32 = "F32", struct.pack("<f", 2.0)


@pytest.mark.parametrize(
    "number",
    [F32, ("F16", struct.pack("<e", 2.0)), ("BF16", b"\0\x40"), ("F64", struct.pack("<d", 2.0))],
)
def test_a_scale_is_read_from_safetensors_first(number: Any, model: Any) -> None:
    folder = model("siglip")
    safetensors(folder / "model.safetensors", model__logit_scale=number, model__logit_bias=number)
    found = scales.find(folder, has_bias=True)
    assert found.scale == pytest.approx(np.exp(2.0))
    assert found.bias == 2.0
    assert found.origin == "model.safetensors: logit_scale"
    assert scales.find(folder, has_bias=False).bias == 0


def test_a_scale_is_read_from_the_smallest_graph_of_both_towers(model: Any) -> None:
    folder = model("siglip")
    whole = onnx.load(folder / "onnx" / "model.onnx")
    (folder / "onnx" / "model_int8.onnx").write_bytes(b"")
    node = helper.make_node("Add", ["a", "b"], ["sum"])
    value = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1])
    other = helper.make_model(helper.make_graph([node], "other", [], [value]))
    (folder / "onnx" / "model_int8.onnx").write_bytes(other.SerializeToString())
    found = scales.find(folder, has_bias=True)
    assert (round(found.scale, 4), round(found.bias, 4)) == (8.0, -1.5)
    assert found.origin == "model.onnx: the graph's last steps"
    # As PyTorch folds constants, and with the bias first.
    del whole.graph.node[:], whole.graph.initializer[:]
    whole.graph.node.extend(
        [
            helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.float32([5]))),
            helper.make_node("Identity", ["bias"], ["b"]),
            helper.make_node("MatMul", ["x", "y"], ["cosines"]),
            helper.make_node("Add", ["b", "cosines"], ["shifted"]),
            helper.make_node("Mul", ["shifted", "s"], ["scaled"]),
            helper.make_node("Transpose", ["scaled"], ["logits_per_image"]),
        ]
    )
    whole.graph.initializer.append(numpy_helper.from_array(np.float16(-3), "bias"))
    (folder / "onnx" / "model.onnx").write_bytes(whole.SerializeToString())
    found = scales.find(folder, has_bias=True)
    assert (found.scale, found.bias) == (5.0, -15.0)


@pytest.mark.process
def test_without_a_file_clip_has_the_published_scale_and_siglip_needs_flags(
    model: Any, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in KINDS:
        (model(name) / "onnx" / "model.onnx").unlink()
    assert classes(tmp_path / "clip", labels, tmp_path / "mine") == 0
    assert "logit_scale: 100 (no file has it; this is that of all" in capsys.readouterr().err
    assert classes(tmp_path / "siglip", labels, tmp_path / "other") == 1
    assert "--logit-scale N --logit-bias N" in capsys.readouterr().err
    flags = ("--logit-scale", "8", "--logit-bias", "-1.5")
    assert classes(tmp_path / "siglip", labels, tmp_path / "other", *flags) == 0
    assert classes(FIXTURES / "siglip", labels, tmp_path / "same") == 0
    sums = {bundle.load(tmp_path / name).card.sha256 for name in ("other", "same")}
    assert len(sums) == 1


def test_flags_come_before_files(model: Any) -> None:
    folder = model("siglip")
    assert scales.find(folder, has_bias=True, scale=50.0, bias=-7.0) == scales.Scale(
        50.0, -7.0, "--logit-scale"
    )
    for values in ({"scale": 50.0}, {"bias": 1.0}, {"scale": 0.0, "bias": 1.0}):
        with pytest.raises(UsageError, match="--logit-scale"):
            scales.find(folder, has_bias=True, **values)
    with pytest.raises(UsageError, match="only SigLIP models have one"):
        scales.find(folder, has_bias=False, scale=50.0, bias=1.0)


# ── texts ─────────────────────────────────────────────────────────────────────────────────────────


def text_tower_graph(
    inputs: tuple[str, ...] = ("input_ids",),
    shape: tuple[int | str, ...] = ("texts", "length"),
    output: str = "text_embeds",
    features: int = 12,
    scale: float = 1.0,
) -> onnx.ModelProto:
    """Return a tower that adds up the vectors of a text's tokens, those outside the mask left out
    if it reads a mask.
    """
    table = np.random.default_rng(0).normal(0, scale, (600, features)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["vectors"])]
    if "attention_mask" in inputs:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["floats", "last"], ["mask"]),
            helper.make_node("Mul", ["vectors", "mask"], ["masked"]),
        ]
    nodes.append(
        helper.make_node("ReduceSum", [nodes[-1].output[0], "middle"], [output], keepdims=0)
    )
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [shape[0], features])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([1]), "middle"),
            numpy_helper.from_array(np.array([2]), "last"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def embeddings(folder: Path, tower: onnx.ModelProto, prompts: list[str]) -> np.ndarray:
    file = folder / "onnx" / "text_model.onnx"
    file.write_bytes(tower.SerializeToString())
    family = read_family(folder)
    tokens = text_tower.tokenize(folder, family, prompts)
    found = np.zeros((len(prompts), 12), np.float32)
    for places, rows in text_tower.TextTower(file, family).embed(tokens):
        found[places] = rows
    return found


PROMPTS = ["a cat", "a photo of a long-haired guinea pig in a forest", "dog"] * 15 + ["van"]


@pytest.mark.parametrize("name", KINDS)
def test_batches_lengths_and_masks_do_not_change_an_embedding(name: str, model: Any) -> None:
    folder = model(name)
    output = read_family(folder).kind.text_output

    def made(**options: Any) -> np.ndarray:
        return embeddings(folder, text_tower_graph(output=output, **options), PROMPTS)

    masked = made(inputs=("input_ids", "attention_mask", "token_type_ids"))
    np.testing.assert_allclose(np.linalg.norm(masked, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(masked[:45].reshape(15, 3, 12).std(0), 0, atol=1e-6)
    length = {"clip": 77, "siglip": 64}[name]
    fixed = made(inputs=("input_ids", "attention_mask"), shape=(4, length))
    np.testing.assert_allclose(fixed, masked, atol=1e-6)
    if name == "siglip":  # padding counts, as it did in training
        np.testing.assert_allclose(made(), masked, atol=1e-6)


def test_padding_is_what_the_tokenizer_config_says(model: Any) -> None:
    folder = model("siglip")
    file = folder / "tokenizer_config.json"
    messages = json.loads(file.read_text())
    ids = []
    for changes in (
        {},
        {"pad_token": {"content": "<unk>"}, "padding_side": "left"},
        {"pad_token": None},
    ):
        file.write_text(json.dumps(messages | changes))
        if changes == {"pad_token": None}:
            (folder / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
        family = read_family(folder)
        tokens = text_tower.tokenize(folder, family, ["a cat"])
        tower = text_tower.TextTower(folder / "onnx" / "text_model.onnx", family)
        ids.append(tower.feed(tokens.ids, family.length, tokens.padding)["input_ids"][0])
    count = len(tokens.ids[0])
    end, unknown = 0, 1
    assert ids[0].tolist() == tokens.ids[0] + [end] * (64 - count)
    assert ids[1].tolist() == [unknown] * (64 - count) + tokens.ids[0]
    assert ids[2].tolist() == tokens.ids[0] + [unknown] * (64 - count)


def test_siglip_reads_lower_case_even_if_its_tokenizer_does_not(model: Any) -> None:
    folder = model("siglip")
    file = folder / "tokenizer.json"
    messages = json.loads(file.read_text())
    del messages["normalizer"]["normalizers"][0]
    file.write_text(json.dumps(messages))
    family = read_family(folder)
    upper, lower = text_tower.tokenize(folder, family, ["A CAT", "a cat"]).ids
    assert upper == lower


def test_texts_that_are_too_long_are_cut_with_a_message(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "long.txt", ["cat", "dog " * 100, "van"])
    assert classes(FIXTURES / "clip", file, tmp_path / "mine") == 0
    assert (
        'note: 1 of 3 texts have more than 77 tokens, the rest is ignored: "a photo of a dog dog'
        in capsys.readouterr().err
    )
    file = write_lines(tmp_path / "same.txt", ["dog " * 100, "dog " * 101])
    assert classes(FIXTURES / "clip", file, tmp_path / "other") == 2
    assert "are the same text to this model" in capsys.readouterr().err


# ── what is wrong ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], [], "labels.txt is empty"),
        (["cat", "", "dog"], [], "line 2 of 3 is blank"),
        (["cat", "dog", "cat"], [], '"cat" is there twice (lines 1 and 3)'),
        (["cat", "cat "], [], "is there twice (lines 1 and 2)"),
        (["cat", "d\x1bog"], [], '"d\\x1bog" (line 2) has control characters'),
        (["cat", "d\u2028og"], [], '"d\\u2028og" (line 2) has control characters'),
        (["cat", "x" * 1001], [], "has 1,001 characters; at most 1,000"),
        (range(100_001), [], "has 100,001 labels; at most 100,000"),
        (["cat"], [], "The probability of a single class is always 1.0"),
        (["cat", "Cat"], [], '"cat" and "Cat" are the same text to this model'),
        (["cat", "dog"], ["--template", "a photo"], "has no places for a label"),
        (["cat", "dog"], ["--template", "{} or {}"], "has 2 places for a label"),
        (["cat", "dog"], ["--template", "{0}"], "has no places for a label"),
        (["cat", "dog"], ["--template", "a {}\n"], "(line 1) has control characters"),
        (["cat", "dog"], ["--template", "{}", "--template", "{}"], '"{}" is there twice'),
        (["cat", "dog"], ["--template", "@nowhere"], "--template @nowhere cannot be read"),
        (["cat", "dog"], ["--template", "@/dev/null"], "--template @/dev/null is empty"),
        (
            range(2000),
            [*templated(tuple(f"{n} {{}}" for n in range(501)))],
            "are more than 1,000,000",
        ),
        (["cat", "dog"], ["--logit-scale", "-1"], "a scale is above 0"),
        (["cat", "dog"], ["--logit-bias", "1"], "Give --logit-scale and --logit-bias together"),
    ],
)
def test_labels_and_templates_that_make_no_sense_are_one_clear_line(
    lines: Any,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_lines(tmp_path / "labels.txt", lines)
    assert classes(FIXTURES / "clip", file, tmp_path / "mine", *options) == 2
    assert_one_line(capsys, message)
    assert sorted(tmp_path.iterdir()) == [file]


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    """Check the last line of stderr: notes may come before it, nothing after it."""
    out, err = capsys.readouterr()
    *notes, last = err.splitlines()
    assert out == ""
    assert message in last
    assert last.startswith("imagemill: ")
    assert all(line.startswith("imagemill: ") for line in notes), err
    assert last.isprintable()


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write_sparse(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(2**26 + 1)


def save_text(folder: Path, **options: Any) -> None:
    graph = text_tower_graph(**options)
    (folder / "onnx" / "text_model.onnx").write_bytes(graph.SerializeToString())


def hide_features(folder: Path) -> None:
    """Let the image tower not declare how long its embeddings are."""
    file = folder / "onnx" / "vision_model.onnx"
    graph = onnx.load(file)
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "features"
    file.write_bytes(graph.SerializeToString())


def change_external(folder: Path) -> None:
    graph = text_tower_graph()
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    (folder / "onnx" / "text_model.onnx").write_bytes(graph.SerializeToString())


def change_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    messages = json.loads(file.read_text())
    messages["model"]["vocab"]["a</w>"] = 10**9
    file.write_text(json.dumps(messages))


def damage(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), "config.json cannot be read"),
        (deep, "config.json is "),
        (
            lambda folder: change_json(folder / "config.json", model_type="vit"),
            "model_type is vit; classes in words need one of",
        ),
        (lambda folder: change_json(folder / "config.json", model_type=["clip"]), "model_type"),
        (
            lambda folder: change_json(folder / "config.json", text_config={"vocab_size": -1}),
            "vocab_size",
        ),
        (
            lambda folder: change_json(folder / "config.json", text_config={"vocab_size": 100}),
            "They belong to different models",
        ),
        (without("preprocessor_config.json"), "preprocessor_config.json"),
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (damage("tokenizer.json", b"{"), "tokenizer.json cannot be used: EOF"),
        (damage("tokenizer.json", b"\xff\xfe"), "tokenizer.json cannot be used"),
        (damage("tokenizer.json", b"[" * 100_000), "tokenizer.json cannot be used"),
        (
            damage(
                "tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'
            ),
            "tokenizer.json cannot be used",
        ),
        (
            lambda folder: write_sparse(folder / "tokenizer.json"),
            "tokenizer.json is larger than 67,108,864 bytes",
        ),
        (change_vocabulary, "makes the token 1000000000"),
        (
            lambda folder: change_json(folder / "tokenizer_config.json", pad_token="nowhere"),
            "has no pad_token that is in it",
        ),
        (
            lambda folder: change_json(folder / "tokenizer_config.json", model_max_length="x"),
            "model_max_length",
        ),
        (without("onnx/text_model.onnx"), "has no onnx/text_model.onnx"),
        (without("onnx/vision_model.onnx"), "has no onnx/vision_model.onnx"),
        (damage("onnx/text_model.onnx", b"nothing"), "text_model.onnx is damaged or not ONNX"),
        (damage("onnx/vision_model.onnx", b""), "vision_model.onnx is empty"),
        (damage("onnx/model.onnx", b"nothing"), "model.onnx is damaged or not ONNX"),
        (
            lambda folder: (save_text(folder, features=20), hide_features(folder)),
            "vision_model.onnx makes 12 of an image",
        ),
        (
            lambda folder: save_text(folder, features=20),
            "text_model.onnx makes 20 numbers of a text",
        ),
        (
            lambda folder: save_text(folder, output="pooled"),
            "returns pooled; a text tower reads input_ids and returns text_embeds",
        ),
        (
            lambda folder: save_text(folder, inputs=("input_ids", "pixels")),
            "needs the input pixels",
        ),
        (
            lambda folder: save_text(folder, inputs=("input_ids", "position_ids")),
            "needs the input position_ids",
        ),
        (lambda folder: save_text(folder, shape=("texts",)), "must have the shape (texts, length)"),
        (lambda folder: save_text(folder, shape=(1, 3)), "reads 3 tokens, config.json says 77"),
        (
            lambda folder: save_text(folder, scale=float("nan")),
            "returns NaN, infinity or only zeros",
        ),
        (lambda folder: save_text(folder, scale=0.0), "returns NaN, infinity or only zeros"),
        (change_external, "outside its folder"),
        (
            lambda folder: shutil.copy(
                folder / "onnx" / "text_model.onnx", folder / "onnx" / "vision_model.onnx"
            ),
            "an image tower of such a model returns image_embeds",
        ),
        (damage("model.safetensors", b"\xff" * 100), "model.safetensors cannot be read"),
        (
            damage("model.safetensors", struct.pack("<Q", 2) + b"[]"),
            "model.safetensors cannot be read",
        ),
        (
            lambda folder: safetensors(
                folder / "model.safetensors", logit_scale=("F32", b"\0" * 8)
            ),
            "logit_scale is not one floating-point number",
        ),
        (
            lambda folder: safetensors(
                folder / "model.safetensors", logit_scale=("F32", struct.pack("<f", float("nan")))
            ),
            "logit_scale is nan",
        ),
        (
            lambda folder: safetensors(
                folder / "model.safetensors", logit_scale=("F32", struct.pack("<f", 1e30))
            ),
            "No trained model has such numbers",
        ),
    ],
)
def test_a_damaged_or_hostile_folder_is_one_clear_line(
    change: Callable[[Path], object],
    message: str,
    model: Any,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = model("clip")
    (tmp_path / "secret").write_bytes(bytes(600 * 12 * 4))
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    assert classes(folder, labels, tmp_path / "mine") == 1
    assert_one_line(capsys, message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_without_hf_asks_nobody(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classes("Xenova/clip-vit-base-patch32", labels, tmp_path / "mine") == 2
    assert_one_line(capsys, "type hf:Xenova/clip-vit-base-patch32")


def test_without_tokenizers_the_package_to_install_is_named(
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert classes("hf:owner/clip", labels, tmp_path / "mine") == 2  # nothing is downloaded
    assert_one_line(capsys, "pip install 'imagemill[words]'")


def test_an_output_that_is_something_else_is_left_alone(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classes(FIXTURES / "clip", labels, tmp_path) == 2
    assert_one_line(capsys, "is there already")
    assert sorted(tmp_path.iterdir()) == [labels]


# ── the Hub ───────────────────────────────────────────────────────────────────────────────────────


def test_of_a_repository_the_towers_and_the_smallest_file_with_the_scale_are_fetched() -> None:
    names = {
        "onnx/model.onnx": 600,
        "onnx/model_quantized.onnx": 150,
        "onnx/text_model.onnx": 250,
        "onnx/text_model.onnx_data": 1,
        "onnx/vision_model.onnx": 350,
        "onnx/vision_model_fp16.onnx": 1,
        "pytorch_model.bin": 600,
        "model.safetensors": 601,
        "config.json": 1,
        "tokenizer.json": 2,
        "modeling.py": 1,
    }
    files = {name: HubFile(size) for name, size in names.items()}
    texts_ = ["config.json", "tokenizer.json"]
    both = ["onnx/text_model.onnx_data", "onnx/text_model.onnx", "onnx/vision_model.onnx"]
    assert towers.hub_files("a/b", files, with_scale=True) == [
        *texts_,
        "onnx/model_quantized.onnx",
        *both,
    ]
    assert towers.hub_files("a/b", files, with_scale=False) == [*texts_, *both]
    del files["onnx/text_model.onnx"]
    with pytest.raises(ModelError, match=r"hf:a/b has no onnx/text_model\.onnx"):
        towers.hub_files("a/b", files, with_scale=True)


def test_a_repository_is_fetched_once_and_serves_other_labels_offline(
    hub: Hub,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("IMAGEMILL_MODELS", str(tmp_path / "models"))
    paths = [path for path in (FIXTURES / "siglip").rglob("*") if path.is_file()]
    files = {path.relative_to(FIXTURES / "siglip").as_posix(): path.read_bytes() for path in paths}
    repo = hub.repos["owner/siglip"] = Repo(files | {"modeling.py": b"raise SystemExit"})
    assert classes("hf:owner/siglip", labels, tmp_path / "mine") == 0
    assert not [request for request in hub.requests if "modeling" in request]
    card = bundle.load(tmp_path / "mine").card
    assert card.licence == "apache-2.0"
    name = f"hf:owner/siglip@{repo.commit}"
    assert {key: card.origin[key] for key in ("source", "model", "commit")} == {
        "source": "words",
        "model": name,
        "commit": repo.commit,
    }
    assert bundle.describe_origin(card).startswith(f"classes in words, from {name}")
    assert classes(FIXTURES / "siglip", labels, tmp_path / "same") == 0
    assert bundle.load(tmp_path / "same").card.sha256 == card.sha256
    hub.stop()
    other = write_lines(tmp_path / "other.txt", ["bus", "car"])
    assert classes("hf:owner/siglip", other, tmp_path / "other") == 0
    assert bundle.load(tmp_path / "other").card.labels == ("bus", "car")


def test_a_prompt_is_its_template_with_the_label_in_it() -> None:
    made = texts.Prompts(("{}", "cat"), ("a {}.",))
    assert made.of("a {}.") == ["a {}.", "a cat."]
