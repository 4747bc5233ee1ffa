"""Folders of transformers, optimum and timm as models: their answers, and what is read from them.

The folders in fixtures/folders and the answers of the libraries themselves are made by
fixtures/make_folders.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import helpers
from imagemill.errors import ClassCountError, ModelError, UsageError
from imagemill.models import bundle, resolve
from imagemill.models.folders import folder as folders
from imagemill.models.folders import processors
from imagemill.models.labels import imagenet_labels
from imagemill.models.preprocessing import with_recipe
from imagemill.records import Scores
from odd_images import ANSWERED, odd_image

FOLDERS = Path(__file__).parent / "fixtures/folders"
NAMES = sorted(path.name for path in FOLDERS.iterdir() if path.is_dir())
WITHIN = 1e-4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that the libraries were asked about, as PNG files in their order."""
    home = tmp_path_factory.mktemp("odd")
    for number, (width, height) in enumerate(ANSWERED):
        Image.fromarray(odd_image(width, height)).save(home / f"{number}.png")
    return home


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """Copies a fixture, with other values in its JSON files; None removes a key."""

    def copy(name: str, preprocessor: dict[str, Any] | None = None, **config: Any) -> Path:
        home = tmp_path / name
        shutil.copytree(FOLDERS / name, home)
        for file, changes in (("preprocessor_config", preprocessor), ("config", config)):
            if changes:
                path = home / f"{file}.json"
                values = json.loads(path.read_text()) | changes
                kept = {key: value for key, value in values.items() if value is not None}
                path.write_text(json.dumps(kept))
        return home

    return copy


def build(folder: Path, tmp_path: Path, **options: Any) -> tuple[bundle.Bundle, list[str]]:
    """Return the bundle of a folder and the lines that were printed."""
    lines: list[str] = []
    return folders.bundle_for(folder, tmp_path / "models", lines.append, **options), lines


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_librarys_answers(name: str, images: Path, tmp_path: Path) -> None:
    """`run --model FOLDER` without any flag: labels and probabilities are those of transformers or
    timm, for PNG files of odd sizes.
    """
    expected = json.loads((FOLDERS / f"{name}.json").read_text())
    top_k = str(len(expected[0]))
    out = tmp_path / "out"
    finished = helpers.imagemill_here(
        "run", images, "--output", out, "--model", FOLDERS / name, "--top-k", top_k,
        "--devices", "cpu:1", env=helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models")),
    )  # fmt: skip
    assert finished.code == 0, finished.err
    rows = sorted(helpers.rows(out), key=lambda row: row["path"])
    assert len(rows) == len(expected) == len(ANSWERED)
    for row, answer in zip(rows, expected, strict=True):
        found = {item["label"]: item["probability"] for item in row["top_k"]}
        assert [item["label"] for item in row["top_k"]] == [label for label, _ in answer]
        for label, probability in answer:
            assert found[label] == pytest.approx(probability, abs=WITHIN)


def test_logits_of_golden_answers_differ_between_images() -> None:
    """So a wrong preprocessing cannot go unnoticed."""
    for name in NAMES:
        answers = json.loads((FOLDERS / f"{name}.json").read_text())
        first = np.array([probability for _, probability in answers[0]])
        others = [np.array([probability for _, probability in answer]) for answer in answers[1:]]
        assert all(np.abs(first - other).max() > 20 * WITHIN for other in others)


@pytest.mark.process
def test_get_model_names_a_folder_and_takes_flags(images: Path, tmp_path: Path) -> None:
    """`get-model NAME --from FOLDER` with a flag and labels, then `run --model NAME`."""
    environment = helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models"))
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    made = helpers.imagemill_here(
        "get-model", "mine", "--from", FOLDERS / "timm_border", "--labels", labels,
        "--fill", "#000000", env=environment,
    )  # fmt: skip
    assert made.code == 0 and made.out.strip() == str(tmp_path / "models/mine"), made.err
    assert "interpolation: bicubic (config.json: pretrained_cfg.interpolation)" in made.err
    out = tmp_path / "out"
    finished = helpers.imagemill_here(
        "run", images, "--output", out, "--model", "mine", "--devices", "cpu:1", env=environment
    )
    assert finished.code == 0, finished.err
    assert {row["label"] for row in helpers.rows(out)} <= set("abcdefghij")
    assert bundle.load(tmp_path / "models/mine").card.recipe.fill == "#000000"


# ── what is read ──────────────────────────────────────────────────────────────────────────────────


def test_every_value_is_printed_with_its_origin(tmp_path: Path) -> None:
    made, lines = build(FOLDERS / "convnext_224", tmp_path)
    text = "\n".join(line.removeprefix(f"{FOLDERS / 'convnext_224'}: ") for line in lines)
    config = "preprocessor_config.json: "
    for line in (
        f"size: 224 ({config}size)",
        f"resize: 248 ({config}do_resize, size, crop_pct)",
        f"interpolation: bicubic ({config}resample)",
        "centre: transformers (ConvNextImageProcessor)",
        "labels: 10: amber, azure, coral, ivory, jade, … (config.json: id2label)",
    ):
        assert line in text
    assert f"mean: 0.485 0.456 0.406 ({config}" in text
    assert made.card.architecture == "ConvNextForImageClassification"
    assert made.card.name == "convnext_224"


def test_a_bundle_is_found_again_and_built_again_after_a_change(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied("vit")
    first, lines = build(folder, tmp_path)
    again, silence = build(folder, tmp_path)
    assert lines and not silence and again.dir == first.dir
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["0"] = "brown"
    (folder / "config.json").write_text(json.dumps(config))
    changed, _ = build(folder, tmp_path)
    assert changed.dir != first.dir and changed.card.labels[0] == "brown"


def test_several_labels_per_image_are_sigmoid(tmp_path: Path) -> None:
    made, _ = build(FOLDERS / "several", tmp_path)
    assert made.card.scores is Scores.SIGMOID


def test_a_name_is_the_bundles(tmp_path: Path) -> None:
    """As `get-model NAME --from FOLDER` makes it."""
    made, _ = build(FOLDERS / "vit", tmp_path, name="mine")
    assert made.dir == tmp_path / "models/mine"
    assert resolve.resolve("mine", tmp_path / "models").card.labels == made.card.labels
    for taken in ("mine.2", "mine.3"):
        (tmp_path / "models" / taken).mkdir()
    with pytest.raises(
        ModelError,
        match=(
            r"holds a model made from other files or values\. Remove that folder, or use another"
            r" name, such as mine\.4\.$"
        ),
    ):
        build(FOLDERS / "vit", tmp_path, name="mine", given={"interpolation": "bicubic"})


def test_given_values_replace_those_of_the_folder(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    given = {"interpolation": "bicubic", "labels": str(labels), "scores": None}
    made, lines = build(FOLDERS / "vit", tmp_path, given=given)
    assert made.card.recipe.interpolation == "bicubic"
    assert made.card.labels == tuple("abcdefghij")
    assert any("interpolation: bicubic (--interpolation)" in line for line in lines)


def test_the_origin_is_in_the_card(tmp_path: Path) -> None:
    origin = {"source": "hub", "repository": "someone/birds", "commit": "c" * 40, "licence": "mit"}
    made, _ = build(FOLDERS / "vit", tmp_path, origin=origin)
    assert made.card.name == "someone/birds" and made.card.licence == "mit"
    assert made.card.origin["commit"] == "c" * 40 and made.dir.name.startswith("someone_birds-")


def test_a_model_of_timm_without_names_of_1000_classes_has_imagenets(tmp_path: Path) -> None:
    read = folders.timm_config.read_timm(
        folders.Document(
            tmp_path / "config.json",
            {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {}},
        )
    )
    assert read.card.labels == imagenet_labels()
    assert "1,000 classes" in read.origins["labels"]


def test_timms_grey_images_have_three_equal_means(tmp_path: Path) -> None:
    pretrained = {"input_size": [1, 28, 28], "mean": [0.13], "std": [0.31], "crop_mode": "border"}
    values = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": pretrained}
    card = folders.timm_config.read_timm(folders.Document(tmp_path / "config.json", values)).card
    assert card.mean == (0.13,) * 3 and card.std == (0.31,) * 3 and card.fill == "#212121"


OLD: dict[str, tuple[dict[str, Any], str, int | str, int | str, str]] = {
    "vit": ({"size": 224, "image_mean": [0.5] * 3}, "vit", 224, "224x224", "bilinear"),
    "swin": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 3},
        "swin",
        224,
        "224x224",
        "bicubic",
    ),
    "beit": (
        {
            "feature_extractor_type": "BeitFeatureExtractor",
            "size": 224,
            "crop_size": 224,
            "do_center_crop": False,
            "resample": 2,
        },
        "beit",
        224,
        "224x224",
        "bilinear",
    ),
    "deit": (
        {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
        "deit",
        224,
        "256x256",
        "bicubic",
    ),
    "convnext": (
        {
            "feature_extractor_type": "ConvNextFeatureExtractor",
            "size": 384,
            "crop_pct": None,
            "resample": 3,
        },
        "convnext",
        384,
        "384x384",
        "bicubic",
    ),
    "resnet": ({"size": 224, "crop_pct": 0.875, "resample": 3}, "resnet", 224, 256, "bicubic"),
    "clip": (
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 224,
            "crop_size": 224,
            "resample": 3,
        },
        "clip",
        224,
        224,
        "bicubic",
    ),
    "mobilevit": (
        {
            "feature_extractor_type": "MobileViTFeatureExtractor",
            "size": 288,
            "crop_size": 256,
            "resample": 2,
            "do_flip_channel_order": True,
        },
        "mobilevit",
        256,
        288,
        "bilinear",
    ),
    "levit": (
        {"feature_extractor_type": "LevitFeatureExtractor", "size": 224, "resample": 3},
        "levit",
        224,
        256,
        "bicubic",
    ),
}
"""Files as versions of transformers before 4.26 wrote them: sizes are plain numbers."""


@pytest.mark.parametrize("name", OLD)
def test_old_files_are_read_as_they_were_meant(name: str, tmp_path: Path) -> None:
    preprocessor, model_type, size, resize, interpolation = OLD[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    document = folders.Document(tmp_path / "config.json", {"model_type": model_type})
    card = folders.transformers_config.read_transformers(tmp_path, document, {}).card
    assert (card.size, card.resize, card.interpolation) == (size, resize, interpolation)
    assert card.color == ("BGR" if name == "mobilevit" else "RGB")


# ── which file ────────────────────────────────────────────────────────────────────────────────────


def test_the_fp32_file_is_used_and_the_others_are_named(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied("vit")
    for name in ("model_fp16.onnx", "model_quantized.onnx"):
        (folder / "onnx" / name).write_bytes(b"not looked at")
    (folder / "model.safetensors").write_bytes(b"not looked at")
    made, lines = build(folder, tmp_path)
    assert made.card.origin["file"] == "onnx/model.onnx"
    unused = "onnx/model_fp16.onnx, onnx/model_quantized.onnx, model.safetensors are not used"
    assert f"{folder}: network: onnx/model.onnx ({unused})" in lines
    for name in ("onnx/model_fp16.onnx", "onnx/model_quantized.onnx"):
        (folder / name).unlink()
    _, lines = build(folder, tmp_path / "again", name="mine")
    assert "mine: network: onnx/model.onnx (model.safetensors is not used)" in lines
    assert all(line.startswith("mine: ") for line in lines), "the name that the user chose"
    (folder / "model.safetensors").unlink()
    _, lines = build(folder, tmp_path / "alone")
    assert f"{folder}: network: onnx/model.onnx" in lines


def test_a_single_file_of_another_name_is_used(copied: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied("clip")
    (folder / "model.onnx").rename(folder / "net.onnx")
    assert build(folder, tmp_path)[0].card.origin["file"] == "net.onnx"


def test_several_files_without_a_usual_name_are_listed(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied("clip")
    shutil.copy(folder / "model.onnx", folder / "a.onnx")
    (folder / "model.onnx").rename(folder / "b.onnx")
    with pytest.raises(ModelError, match=r"none of which is called model.onnx: a.onnx, b.onnx"):
        build(folder, tmp_path)


def test_a_folder_without_weights(copied: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied("clip")
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match="has no weights that can be read"):
        build(folder, tmp_path)


def test_a_folder_that_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has neither card.json.* nor config.json.* to ONNX\."):
        resolve.resolve(str(tmp_path), tmp_path / "models")
    (tmp_path / "config.json").write_text('{"name": "something else"}')
    with pytest.raises(ModelError, match="neither model_type nor architectures"):
        resolve.resolve(str(tmp_path), tmp_path / "models")


# ── the class of the processor ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("preprocessor", "config"),
    [
        ({"image_processor_type": "ViTImageProcessorFast"}, {}),
        ({"image_processor_type": "ViTImageProcessorPil"}, {}),
        ({"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"}, {}),
        ({"image_processor_type": None}, {"image_processor_type": "ViTImageProcessor"}),
        ({"image_processor_type": None}, {}),
        ({"image_processor_type": None}, {"model_type": "swin"}),
    ],
)
def test_the_processor_is_found_by_old_and_new_names(
    preprocessor: dict[str, Any], config: dict[str, Any], copied: Callable[..., Path]
) -> None:
    folder = copied("vit", preprocessor, **config)
    model = folders.look_into(folder, {}, {})
    assert model.read.origins["centre"] == "ViTImageProcessor"


@pytest.mark.parametrize(
    ("name", "is_headless"),
    [
        ("ViTModel", True),
        ("CLIPVisionModelWithProjection", True),
        ("Dinov2Model", True),
        ("ViTForImageClassification", False),
        ("LevitForImageClassificationWithTeacher", False),
    ],
)
def test_a_network_without_a_classifier_is_known_by_its_class(
    name: str, is_headless: bool, copied: Callable[..., Path]
) -> None:
    card = folders.look_into(copied("vit", architectures=[name]), {}, {}).read.card
    assert (card.logits == "none") == is_headless
    assert (card.labels is None) == is_headless


@pytest.mark.parametrize(
    ("preprocessor", "config", "message"),
    [
        (
            {"image_processor_type": "VideoMAEImageProcessor"},
            {},
            "the image processor 'VideoMAEImageProcessor' is not known",
        ),
        ({"image_processor_type": "Siglip2ImageProcessor"}, {}, "'Siglip2ImageProcessor' is not"),
        ({"image_processor_type": None}, {"model_type": "sam"}, "model_type is 'sam', whose image"),
        ({"image_processor_type": None}, {"model_type": None}, "image_processor_type is missing"),
        ({"do_center_crop": True, "crop_size": 48}, {}, "disagree whether ViTImageProcessor crops"),
        ({"size": {"shortest_edge": 64}}, {}, "images are resized to different shapes"),
        ({"size": {"longest_edge": 64}}, {}, "size limits the longest edge"),
        ({"size": {"height": 64}}, {}, "size must have height and width, or shortest_edge"),
        ({"do_resize": False}, {}, "images are resized to different shapes"),
        ({"do_pad": True}, {}, "do_pad is true"),
        ({"use_square_size": True}, {}, "use_square_size is true"),
        ({"size": 64, "default_to_square": False}, {}, "default_to_square is false, and only some"),
        ({"resample": "bicubic"}, {}, "resample: expected `int"),
        ({"image_mean": [0.5, 0.5]}, {}, "image_mean has 2 numbers; it must have 3, or 1"),
        ({}, {"problem_type": "regression"}, "problem_type is 'regression'"),
    ],
)
def test_what_is_unknown_or_unclear_is_an_error(
    preprocessor: dict[str, Any], config: dict[str, Any], message: str, copied: Callable[..., Path]
) -> None:
    folder = copied("vit", preprocessor, **config)
    with pytest.raises(ModelError) as raised:
        folders.look_into(folder, {}, {})
    assert message in str(raised.value) and "_config.json" not in message
    assert ".json: " in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("ConvNext", "resample"),
        ("EfficientNet", "resample"),
        ("MobileViT", "resample"),
        ("Pvt", "resample"),
        ("Beit", "size"),
    ],
)
def test_a_default_that_changed_between_versions_is_not_guessed(
    kind: str, key: str, copied: Callable[..., Path]
) -> None:
    missing = {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": {"shortest_edge": 64} if kind in ("ConvNext", "MobileViT") else 64,
        "do_center_crop": kind == "MobileViT",
        key: None,
    }
    with pytest.raises(
        ModelError, match=f"{key} is missing, and versions of transformers disagree"
    ):
        folders.look_into(copied("vit", missing), {}, {})


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((kind, key) for kind in ("CLIP", "ViT") for key in ("do_resize", "do_rescale")),
        *((kind, "resample") for kind in ("CLIP", "ViT", "ConvNext")),
        *((kind, "do_normalize") for kind in ("CLIP", "ViT", "ConvNext")),
        *((kind, "do_center_crop") for kind in ("CLIP", "DeiT", "MobileNetV1")),
        ("MobileViT", "do_flip_channel_order"),
        ("EfficientNet", "include_top"),
    ],
)
def test_null_is_not_guessed_if_it_changes_the_pixels(kind: str, key: str, tmp_path: Path) -> None:
    """Some versions of transformers take null as false, others as the default of the class."""
    values = {
        "size": {"height": 64, "width": 64} if kind != "ConvNext" else {"shortest_edge": 64},
        "resample": 3,
        "crop_size": {"height": 32, "width": 32},
        key: None,
    }
    document = folders.Document(tmp_path / "preprocessor_config.json", values)
    with pytest.raises(ModelError, match=f"{key} is null, and versions of transformers disagree"):
        processors.read_processor(document, kind)


def test_null_means_the_same_as_missing_if_versions_agree(tmp_path: Path) -> None:
    """Processors write every key that they know, and null for those that they do not use."""
    values = dict.fromkeys(
        ("crop_pct", "crop_size", "do_center_crop", "do_pad", "image_mean", "image_std", "size")
    )
    documents = [folders.Document(tmp_path / "p.json", item) for item in (values, {})]
    cards = [processors.read_processor(document, "ViT").card for document in documents]
    assert cards[0] == cards[1] and cards[0].size == 224


def test_a_resize_below_the_crop_names_the_file(copied: Callable[..., Path]) -> None:
    """Nobody typed a --resize."""
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 32, "width": 32}}
    read = folders.look_into(copied("clip", sizes), {}, {}).read
    with pytest.raises(UsageError) as raised:
        with_recipe(read)
    assert str(raised.value).startswith("preprocessor_config.json: ")
    assert "resize 20 is smaller than the model's input of 32x32" in str(raised.value)


def test_without_a_processor_the_values_must_be_given(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied("vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config.json is missing.*--resize, --mean"):
        build(folder, tmp_path)
    given = {"resize": "64x64", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    made, _ = build(folder, tmp_path, given=given)
    assert made.card.recipe.resize == (64, 64) and made.card.labels[0] == "amber"


def test_the_processor_of_transformers_5_is_found_in_processor_config(
    copied: Callable[..., Path],
) -> None:
    folder = copied("clip")
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    read = folders.look_into(folder, {}, {}).read
    assert read.origins["interpolation"] == "processor_config.json: image_processor.resample"


def test_two_files_that_prepare_images_differently_are_an_error(
    copied: Callable[..., Path],
) -> None:
    """transformers 4 reads one of them, and transformers 5 the other."""
    folder = copied("clip")
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    folders.look_into(folder, {}, {})
    other = {"image_processor": values | {"resample": 2}}
    (folder / "processor_config.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match=r"processor_config.json beside it prepare images diff"):
        folders.look_into(folder, {}, {})


# ── labels ────────────────────────────────────────────────────────────────────────────────────────


def test_labels_that_do_not_fit_the_network(copied: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied("vit", id2label={"0": "a", "1": "b"})
    with pytest.raises(ClassCountError, match="2 labels"):
        build(folder, tmp_path)


def test_labels_that_do_not_fit_num_classes(copied: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="label_names has 10 labels; num_classes is 11"):
        build(copied("timm_border", num_classes=11), tmp_path)


def test_labels_of_timm_may_have_their_classes_numbers(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    """`save_for_hf` takes a list or a mapping."""
    names = {str(number): f"label {number}" for number in reversed(range(10))}
    made, _ = build(copied("timm_border", label_names=names), tmp_path)
    assert made.card.labels == tuple(f"label {number}" for number in range(10))
    gap = {str(number): f"label {number}" for number in range(1, 11)}
    document = folders.Document(
        tmp_path / "config.json", {"label_names": gap, "pretrained_cfg": {}}
    )
    with pytest.raises(ModelError, match="label_names has 10 labels, but none for class 0"):
        folders.timm_config.read_timm(document)


def test_without_labels_they_are_numbers(copied: Callable[..., Path], tmp_path: Path) -> None:
    made, _ = build(copied("vit", id2label=None), tmp_path)
    assert made.card.labels == tuple(map(str, range(10)))
