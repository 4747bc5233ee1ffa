"""Bundles are whole or absent, say what is wrong with them, and never read weights from outside
their folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from imagemill.errors import ModelError, UsageError
from imagemill.models import bundle
from imagemill.models.architectures import graph
from imagemill.models.custom import wrap
from imagemill.models.labels import imagenet_labels, read_labels
from imagemill.records import Bundle, Card, Interpolation, Recipe, Scores

CARD = Card(
    name="tiny",
    architecture="tiny",
    labels=("cat", "dög"),
    recipe=Recipe(8, 8, None, interpolation=Interpolation.BICUBIC, exif=False),
    mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0),
    sha256="",
    licence="CC0-1.0",
    origin={"source": "random", "seed": 1, "sha256": None, "verified": False},
    parameters=14,
    scores=Scores.LOGITS,
    normalised="normalised",
    top1=1.5,
)


def tiny_model() -> onnx.ModelProto:
    arrays = {
        "c.weight": np.ones((2, 3, 3, 3), np.float32),
        **{
            f"b.{part}": np.ones(2, np.float32)
            for part in ("weight", "bias", "running_mean", "running_var")
        },
        "f.weight": np.eye(2, dtype=np.float32),
        "f.bias": np.zeros(2, np.float32),
    }
    g = graph.Graph(arrays, epsilon=1e-5)
    g.classify(g.conv(g.normalise("pixels", CARD.mean, CARD.std), "c", "b"), "f")
    return g.model("tiny", CARD.recipe, 2, 2)


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    return bundle.write(tmp_path / "tiny", CARD, tiny_model())


def test_what_is_written_is_what_is_loaded(tiny: Bundle) -> None:
    """Every field of the card survives, enums included, and the hash is that of the model."""
    loaded = bundle.load(tiny.dir)
    assert loaded == tiny
    assert replace(loaded.card, sha256="") == CARD
    bundle.verify_hash(loaded)
    assert sorted(os.listdir(tiny.dir)) == ["card.json", "model.onnx"]


def test_a_changed_model_is_found_by_its_hash(tiny: Bundle) -> None:
    """verify_hash names both sums."""
    data = bytearray((tiny.dir / "model.onnx").read_bytes())
    at = data.index(np.eye(2, dtype=np.float32).tobytes())
    data[at] ^= 1
    (tiny.dir / "model.onnx").write_bytes(data)
    with pytest.raises(
        ModelError, match=f"has the sha256 [0-9a-f]{{64}}, its card says {tiny.card.sha256}"
    ):
        bundle.verify_hash(bundle.load(tiny.dir))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is not a model that imagemill made: it has no card.json"),
        ("{", "card.json cannot be read: Expecting"),
        ("[]", "expected `object`, got `array`"),
        ("[" * 100_000, "card.json cannot be read"),
        ({"labels": [1, 2]}, r"labels\[0\]: expected `str`, got `int`"),
        (
            {
                "recipe": {
                    "height": 0,
                    "width": 0,
                    "resize": None,
                    "interpolation": "bilinear",
                    "exif": True,
                }
            },
            "recipe says height 0, width 0, resize None",
        ),
        (
            {"recipe": {"height": 8, "resize": None, "interpolation": "magic", "exif": True}},
            "recipe.interpolation: invalid enum value 'magic'",
        ),
        (
            {"recipe": {"size": 9, "resize": 9, "interpolation": "bicubic", "exif": True}},
            "recipe: object contains unknown field `size`",
        ),
        ({"mean": [1, 2]}, "mean: expected `array` of length 3"),
        ({"name": None}, "name: expected `str`, got `null`"),
    ],
)
def test_a_damaged_card_is_one_clear_error(tiny: Bundle, change: object, message: str) -> None:
    """The error names the file, what is wrong, and what to do."""
    path = tiny.dir / "card.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message) as caught:
        bundle.load(tiny.dir)
    assert "imagemill get-model" in str(caught.value)
    assert str(tiny.dir) in str(caught.value)


def test_a_card_without_a_field_names_it(tiny: Bundle) -> None:
    (tiny.dir / "card.json").write_text('{"name": "tiny"}')
    with pytest.raises(ModelError, match="missing required field `architecture`"):
        bundle.load(tiny.dir)


def test_a_missing_or_cut_model_is_found(tiny: Bundle) -> None:
    """A missing file when the bundle is opened, a cut or empty one by its hash."""
    model = tiny.dir / "model.onnx"
    whole = model.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        model.write_bytes(whole[:length])
        with pytest.raises(
            ModelError, match=r"has the sha256 .* Remove .* and get the model again"
        ):
            bundle.verify_hash(bundle.load(tiny.dir))
    model.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        bundle.load(tiny.dir)


def test_an_interrupted_write_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card goes first and comes last, so a folder is a bundle only when it is whole; no
    temporary file stays.
    """
    made = bundle.write(tmp_path / "tiny", CARD, tiny_model())
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match="No space left on device"):
        bundle.write(tmp_path / "tiny", CARD, tiny_model())
    assert calls
    assert not bundle.is_bundle(made.dir)
    assert os.listdir(made.dir) == ["model.onnx"]


def test_weights_beyond_the_limit_lie_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With external data the answers are the same, frozen copies share it, and the hash covers
    it.
    """
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    whole = bundle.write(tmp_path / "whole", CARD, tiny_model())
    monkeypatch.setattr(bundle, "EXTERNAL_FROM", 100)
    split = bundle.write(tmp_path / "split", CARD, tiny_model())
    assert (split.dir / "model.onnx.data").is_file()
    assert bundle.load(split.dir) == split
    bundle.verify_hash(split)
    frozen = bundle.freeze(split, 3)
    answers = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
            None, {"pixels": pixels}
        )
        for path in (whole.dir / "model.onnx", split.dir / "model.onnx", frozen)
    ]
    for answer in answers[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(answers[0], answer, strict=True))
    data = bytearray((split.dir / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (split.dir / "model.onnx.data").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx\.data has the sha256"):
        bundle.verify_hash(split)
    (split.dir / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data cannot be read: No such file"):
        bundle.verify_hash(split)


def test_frozen_copies_have_a_fixed_batch_and_are_made_once(tiny: Bundle) -> None:
    """model_6.onnx takes 6 images only; asking again leaves the file alone."""
    path = bundle.freeze(tiny, 6)
    assert path == tiny.dir / "model_6.onnx"
    before = path.stat()
    assert bundle.freeze(tiny, 6).stat() == before
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [
        value.type.tensor_type.shape.dim[0].dim_value
        for value in (*model.graph.input, *model.graph.output)
    ] == [6, 6, 6]
    with pytest.raises(ModelError, match="A batch of 0 cannot be frozen"):
        bundle.freeze(tiny, 0)


def stranger(location: str, where: str) -> onnx.ModelProto:
    """A model with a tensor whose data is said to lie at `location`, hidden in one of the places
    where tensors can be.
    """
    outside = numpy_helper.from_array(np.ones(4, np.float32), "w")
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value=location)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    if where == "initializer":
        g = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [y], [outside])
    elif where == "constant":
        g = helper.make_graph(
            [helper.make_node("Constant", [], ["y"], value=outside)], "g", [], [y]
        )
    elif where == "subgraph":
        inner = helper.make_graph(
            [helper.make_node("Identity", ["w"], ["z"])],
            "i",
            [],
            [helper.make_tensor_value_info("z", 1, [4])],
            [outside],
        )
        g = helper.make_graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
            "g",
            [],
            [y],
        )
    else:
        g = helper.make_graph([], "g", [], [y])
        g.sparse_initializer.add().values.CopyFrom(outside)
    model = helper.make_model(g)
    if where == "function":
        constant = helper.make_node("Constant", [], ["y"], value=outside)
        model.functions.append(
            helper.make_function("d", "f", [], ["y"], [constant], [helper.make_opsetid("", 11)])
        )
        del model.graph.sparse_initializer[:]
    return model


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph", "sparse", "function"])
@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret",
        "a/../../secret",
        "..\\secret",
        "C:\\secret",
        "link",
        "linked/secret",
        "",
    ],
)
def test_external_data_outside_the_folder_is_refused(
    tiny: Bundle, location: str, where: str
) -> None:
    """Absolute paths, dots and links, wherever in the model they hide, before they are opened."""
    (tiny.dir.parent / "secret").write_bytes(bytes(16))
    (tiny.dir / "link").symlink_to(tiny.dir.parent / "secret")
    (tiny.dir / "linked").symlink_to(tiny.dir.parent)
    with pytest.raises(ModelError, match="refused: ") as caught:
        wrap.files_of(tiny.dir / "x.onnx", stranger(location, where))
    assert repr(location) in str(caught.value)


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph", "sparse", "function"])
def test_external_data_inside_the_folder_is_accepted(tiny: Bundle, where: str) -> None:
    """Sub-folders included."""
    (tiny.dir / "sub").mkdir()
    (tiny.dir / "sub" / "w.bin").write_bytes(bytes(16))
    model = stranger("sub/w.bin", where)
    file = tiny.dir / "x.onnx"
    assert wrap.files_of(file, model) == [file, tiny.dir / "sub/w.bin"]


def test_models_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """$IMAGEMILL_MODELS, else the user's cache folder."""
    monkeypatch.setenv("IMAGEMILL_MODELS", "/somewhere")
    assert bundle.default_models_dir() == Path("/somewhere")
    monkeypatch.delenv("IMAGEMILL_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setattr("sys.platform", "linux")
    assert bundle.default_models_dir() == Path("/cache/imagemill/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "darwin")
    assert bundle.default_models_dir() == Path.home() / "Library/Caches/imagemill/models"


def test_imagenet_has_a_thousand_labels() -> None:
    """One per class, in the order of the sorted WordNet ids."""
    labels = imagenet_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[1], labels[999]) == ("tench", "goldfish", "toilet tissue")
    assert all(label == label.strip() and label for label in labels)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("ä\nb\n", "utf-8"),
        ("ä\nb", "utf-8"),
        ("ä\nb\n\n \n\t\n\n", "utf-8"),
        ("ä\r\nb\r\n\r\n", "utf-8-sig"),
        ("ä\rb\r\r", "utf-8"),
        ("ä\r\nb\r\n\r\n", "utf-16"),
        ("\ufeffä\nb\n", "utf-16-be"),
    ],
)
def test_label_files_are_read_as_editors_write_them(
    text: str, encoding: str, tmp_path: Path
) -> None:
    """Blank lines at the end, byte order marks, the line ends of every system, and UTF-16 as
    PowerShell writes it.
    """
    file = tmp_path / "labels.txt"
    file.write_bytes(text.encode(encoding))
    assert read_labels(file) == ("ä", "b")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"a\n\nb\n",
            r"line 2 of 3 is blank, .* Write the missing label there, or delete the line",
        ),
        (b"\n a\nb\n\n", r"line 1 of 3 is blank"),
        (b"a\r\n \t\r\nb\r\n", r"line 2 of 3 is blank"),
        (
            "a\nb\n".encode("utf-16-le"),
            r"is not a text file: it contains null characters\. Give a text file in UTF-8",
        ),
        ("a\nb\n".encode("utf-32"), r"is not a text file: it contains null characters"),
        ("ä\n".encode("latin-1"), r"cannot be read: it is not UTF-8\. Give a text file in UTF-8"),
        (b"\xff\xfea", r"cannot be read: it is not UTF-8"),
    ],
)
def test_label_files_that_could_shift_classes_are_refused(
    data: bytes, message: str, tmp_path: Path
) -> None:
    """A blank line before the last label is named by its number; what is no text is one line."""
    (tmp_path / "labels.txt").write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_labels(tmp_path / "labels.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": ("one",)},
            r"has one label and the scores are logits: .* Change scores to \"sigmoid\"\.",
        ),
        (
            {"recipe": Recipe(224, 224, 223)},
            r"resize 223 is smaller than the model's input of 224x224, .* black borders",
        ),
        (
            {"recipe": Recipe(224, 224, (300, 200))},
            r"resize 300x200 is smaller than the model's input of 224x224",
        ),
        ({"recipe": Recipe(100, 300, 99)}, r"resize 99 is smaller than .* input of 300x100"),
        ({"labels": ()}, r"has 0 labels, and its outputs are logits, embedding: .* has labels"),
        (
            {"outputs": ("embedding",)},
            r"has \d+ labels, and its outputs are embedding: .* has none",
        ),
        ({"recipe": Recipe(fill="white")}, r"recipe\.fill is 'white'\. Write #rrggbb"),
        (
            {"recipe": Recipe(pad=True)},
            r"recipe\.pad needs a width and a height .*, and recipe\.resize is 256\.",
        ),
    ],
)
def test_a_bundle_whose_card_spoils_every_answer_is_not_opened(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Such as a card that was edited by hand."""
    bundle.write(tmp_path / "b", replace(CARD, **changes), tiny_model())
    with pytest.raises(ModelError, match=message):
        bundle.load(tmp_path / "b")
