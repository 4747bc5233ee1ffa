"""The Python API: `imagemill.run` and `imagemill.load`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import helpers
import imagemill
import pictures
from imagemill import api
from imagemill.models import bundle, registry
from imagemill.records import Recipe, Settings
from pth_files import write_legacy
from test_models_golden import GOLDEN, arrays_of, recipe
from tiny import TINY_CARD, tiny_model


@pytest.fixture(scope="module")
def classifier(lite0: Any) -> Iterator[imagemill.Classifier]:
    """EfficientNet-Lite0, with logits and embedding."""
    with imagemill.load("efficientnet_lite0", models_dir=lite0.dir.parent, precision="fp32", save=["logits", "embedding"]) as opened:
        yield opened


def columns(prediction: imagemill.Prediction) -> dict[str, Any]:
    """A prediction as a row of a job spells it."""
    found = {name: getattr(prediction, name) for name in ("status", "error", "class_id", "label", "probability", "width", "height")}
    found["top_k"] = [dataclasses.asdict(answer) for answer in prediction.top_k] or None
    for name in ("logits", "embedding"):
        value = getattr(prediction, name)
        found[name] = None if value is None else value.tolist()
    return found


def test_importing_is_cheap() -> None:
    """`import imagemill` brings none of the libraries; what is exported is there when it is touched, and nothing else is."""
    program = """
import sys, imagemill
heavy = {"numpy", "PIL", "openvino", "onnx", "pyarrow", "rich", "imagemill.api", "imagemill.errors", "imagemill.records"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "run" in dir(imagemill)
assert issubclass(imagemill.UsageError, imagemill.ImagemillError)
assert "numpy" not in sys.modules
for name in imagemill.__all__:
    assert getattr(imagemill, name) is not None
try:
    imagemill.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=helpers.environment())


def test_every_error_is_exported() -> None:
    """All exceptions of errors.py can be caught as `imagemill.NAME`."""
    from imagemill import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.ImagemillError)}
    assert names <= set(imagemill.__all__)


def test_run_takes_every_setting() -> None:
    """Each field of Settings is a keyword of the same name and default, and the other way round."""
    keywords = {name: value.default for name, value in inspect.signature(imagemill.run).parameters.items()}
    settings = {item.name: item.default for item in dataclasses.fields(Settings)}
    assert keywords.pop("progress") is False
    assert settings.pop("dry_run") is False
    assert set(keywords) == set(settings)
    for name in set(settings) - {"sources", "output", "retry_failed"}:
        assert keywords[name] == settings[name], name


def test_a_run_is_the_command_line_s(jpegs: Callable[..., Path], tmp_path: Path) -> None:
    """The same rows, the same summary; again it resumes; a different setting is refused as there."""
    folder = jpegs(5, **{"bad.jpg": b"text"})
    made = imagemill.run(folder, tmp_path / "out", model="tiny", devices="null", save="logits", exclude=["001.*"], retry_failed=True)
    assert (made.images, made.ok, made.failed) == (5, 4, 1)
    assert json.loads((tmp_path / "out" / "summary.json").read_bytes())["ok"] == 4
    assert imagemill.run([str(folder)], str(tmp_path / "out"), model="tiny", devices="null", exclude="001.*").resumed_shards > 0
    assert len(helpers.rows(tmp_path / "out")[0]["logits"]) == 10
    with pytest.raises(imagemill.JobMismatchError, match="--top-k 5, now --top-k 2"):
        imagemill.run(folder, tmp_path / "out", top_k=2, devices="null", exclude="001.*")
    with pytest.raises(imagemill.SourceError):
        imagemill.run(tmp_path / "nowhere", tmp_path / "other", model="tiny", devices="null")


def test_a_run_leaves_signals_alone_and_works_in_threads(jpegs: Callable[..., Path], tmp_path: Path) -> None:
    """Handlers are as before, whoever set them; two threads may run two jobs at once."""
    folder = jpegs(4)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    imagemill.run(folder, tmp_path / "main", model="tiny", devices="null")
    summaries = []
    threads = [
        threading.Thread(target=lambda n=number: summaries.append(imagemill.run(folder, tmp_path / str(n), model="tiny", devices="null")))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.ok for summary in summaries] == [4, 4]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_progress_is_shown_when_it_is_asked_for(jpegs: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr; without it a run says nothing at all."""
    imagemill.run(jpegs(2), tmp_path / "out", model="tiny", devices="null")
    assert capfd.readouterr() == ("", "")
    imagemill.run(jpegs(2), tmp_path / "out", model="tiny", devices="null", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "finished already" in err


def test_predictions_are_the_rows_of_a_run(classifier: imagemill.Classifier, lite0: Any, tmp_path: Path) -> None:
    """Good pictures and bad ones of many kinds: every column is the same, bit for bit, from paths and from bytes."""
    good = {
        "wide.jpg": pictures.jpeg(1300, 600),
        "tall.png": pictures.encode(pictures.photograph(70, 300), "PNG"),
        "grey.jpg": pictures.encode(pictures.photograph(99, 80).convert("L"), "JPEG"),
        "turned.jpg": pictures.jpeg(200, 90, orientation=6),
    }
    bad = {"cut.jpg": pictures.jpeg(300, 200)[:900], "text.jpg": b"text", "empty.jpg": b""}
    folder = helpers.fill(tmp_path / "in", good | bad)
    made = imagemill.run(
        folder,
        tmp_path / "out",
        model="efficientnet_lite0",
        models_dir=lite0.dir.parent,
        precision="fp32",
        devices="cpu",
        save=["logits", "embedding"],
    )
    assert (made.ok, made.failed) == (4, 3)
    rows = helpers.rows(tmp_path / "out")
    expected = [{name: value for name, value in row.items() if name not in ("index", "source", "path")} for row in rows]
    found = classifier.predict([folder / row["path"] for row in rows])
    assert [columns(item) for item in found] == expected
    found = classifier.predict([(folder / row["path"]).read_bytes() for row in rows])
    assert [columns(item) for item in found] == expected


def test_pixels_are_prepared_as_the_same_picture_in_a_file(classifier: imagemill.Classifier) -> None:
    """RGB arrays, grey arrays, views, batches of them and Pillow's pictures answer as a PNG of the same pixels does."""
    image = pictures.photograph(321, 234)
    grey = image.convert("L")
    (colour,) = classifier.predict(pictures.encode(image, "PNG"))
    (plain,) = classifier.predict(pictures.encode(grey, "PNG"))
    pixels = np.asarray(image)
    shifted = np.zeros((300, 400, 3), np.uint8)
    shifted[20:254, 30:351] = pixels
    found = classifier.predict([pixels, shifted[20:254, 30:351], image, np.asarray(grey), grey])
    assert [columns(item) for item in found] == [columns(item) for item in (colour, colour, colour, plain, plain)]
    assert [columns(item) for item in classifier.predict(np.stack([pixels, pixels]))] == [columns(colour)] * 2
    assert [columns(item) for item in classifier.predict(pixels)] == [columns(colour)]
    assert (colour.width, colour.height) == (321, 234)
    assert colour.status == "ok"
    assert isinstance(colour.status, imagemill.Status)
    assert len(colour.top_k) == 5
    assert colour.top_k[0] == imagemill.Answer(colour.class_id, colour.label, colour.probability)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((4, 4, 3)), r"item 1 is an array of float64 \(4, 4, 3\)\. Give uint8 \(H, W, 3\), RGB, or \(H, W\), grey\."),
        (np.zeros((4, 4, 4), np.uint8), r"item 1 is an array of uint8 \(4, 4, 4\)\."),
        (np.zeros((0, 4, 3), np.uint8), r"item 1 is an array of uint8 \(0, 4, 3\)\."),
        (np.zeros(4, np.uint8), r"item 1 is an array of uint8 \(4,\)\."),
        (7, r"item 1 is of type int\. Give a path, encoded bytes, or pixels\."),
    ],
)
def test_what_is_no_picture_is_a_clear_error(classifier: imagemill.Classifier, item: Any, message: str) -> None:
    """An argument that cannot be meant; nothing is computed."""
    with pytest.raises(imagemill.UsageError, match=message):
        classifier.predict([np.zeros((4, 4, 3), np.uint8), item])
    with pytest.raises(imagemill.UsageError, match=message.replace("item 1", "item 0")):
        classifier.predict(item)


def test_missing_files_and_no_items(classifier: imagemill.Classifier, tmp_path: Path) -> None:
    """A path where nothing is becomes a prediction that says so; nothing in gives nothing out."""
    found = classifier.predict(tmp_path / "gone.jpg")
    assert [(item.status, item.error, item.top_k, item.logits) for item in found] == [("missing", "there is no such file", (), None)]
    (odd,) = classifier.predict("a\0b.jpg")
    assert (odd.status, odd.error) == ("missing", "there can be no such file: its name holds a null character")
    assert classifier.predict([]) == []


def test_threads_may_share_a_classifier(classifier: imagemill.Classifier) -> None:
    """Each gets the answers to its own pictures, in order."""
    data = [[pictures.jpeg(60 + item, 50, seed=10 * thread + item) for item in range(6)] for thread in range(3)]
    expected = [[item.logits.tolist() for item in classifier.predict(items)] for items in data]
    found: dict[int, list[Any]] = {}

    def ask(number: int) -> None:
        for _ in range(3):
            found[number] = [item.logits.tolist() for item in classifier.predict(data[number])]  # type: ignore[union-attr]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == expected


def test_a_nan_costs_its_own_prediction(models_dir: Path) -> None:
    """The image's prediction is `invalid_output`, without class and saved arrays; the others of the call are answered."""
    white, other = np.full((32, 32, 3), 255, np.uint8), np.asarray(pictures.photograph(32, 32))
    with imagemill.load("spoilt", precision="fp32", save=("logits", "embedding")) as opened:
        *good, bad = opened.predict([other] * 9 + [white])
        assert good == opened.predict([other]) * 9
    assert good[0].status == "ok"
    assert (bad.status, bad.class_id, bad.label, bad.probability, bad.top_k) == ("invalid_output", None, None, None, ())
    assert bad.logits is bad.embedding is None
    assert bad.error is not None
    assert bad.error.startswith("the model returned NaN or infinity for this image in fp32")


def test_a_model_that_answers_nan_for_everything_is_not_loaded(tmp_path: Path) -> None:
    """`load` raises: no image would get an answer."""
    bundle.write(tmp_path / "broken", replace(TINY_CARD, name="broken"), tiny_model(spoil="everything"))
    with pytest.raises(imagemill.BadLogitsError, match="broken returns NaN or infinity in fp32 for every image"):
        imagemill.load(tmp_path / "broken", precision="fp32")


def test_a_failing_iteration_does_not_spoil_the_next_call(models_dir: Path) -> None:
    """What the caller's own generator raises passes through."""

    def items() -> Iterator[bytes]:
        yield pictures.jpeg()
        raise KeyError("mine")

    with imagemill.load("tiny", precision="fp32") as opened:
        with pytest.raises(KeyError):
            opened.predict(items())
        assert opened.predict(pictures.jpeg())[0].status == "ok"


def test_a_closed_classifier_says_so(models_dir: Path) -> None:
    """Closing twice does nothing; labels and name stay known."""
    opened = imagemill.load("tiny", precision="auto", top_k=2)
    assert len(opened.predict(pictures.jpeg())[0].top_k) == 2
    opened.close()
    opened.close()
    assert (opened.name, opened.precision, len(opened.labels)) == ("tiny", "fp32", 10)
    with pytest.raises(imagemill.UsageError, match="is closed"):
        opened.predict(pictures.jpeg())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu:2"}, r"device cpu:2 names 2 devices; a classifier runs on one"),
        ({"precision": "int8"}, r"tiny has no int8 variant for this machine\. Make it: `imagemill quantize tiny --images SOURCE`"),
        ({"precision": "fp8"}, r"--precision fp8: not known"),
        ({"save": "everything"}, r"--save everything: not known"),
        ({"top_k": 0}, r"--top-k 0: must be at least 1"),
        ({"top_k": "5"}, r"--top-k '5': must be a whole number"),
        ({"model": "nothing_like_it"}, r"No model is called nothing_like_it"),
    ],
)
def test_load_refuses_what_makes_no_sense(changes: dict[str, Any], message: str, models_dir: Path) -> None:
    """With one clear line, as the command line does."""
    with pytest.raises(imagemill.UsageError, match=message):
        imagemill.load(**({"model": "tiny"} | changes))


def test_own_labels(models_dir: Path, tmp_path: Path) -> None:
    """`labels` names a file, as `--labels` does; another count is refused with both named."""
    helpers.fill(tmp_path, {"ten.txt": b"\n".join(b"%d!" % number for number in range(10)), "two.txt": b"a\nb\n"})
    with imagemill.load("tiny", precision="fp32", labels=tmp_path / "ten.txt") as opened:
        (found,) = opened.predict(pictures.jpeg())
    assert found.label == f"{found.class_id}!"
    with pytest.raises(imagemill.ClassCountError, match=r"returns 10 classes, .*two\.txt has 2 lines"):
        imagemill.load("tiny", labels=tmp_path / "two.txt")


def test_saved_embeddings_are_the_published_implementations(tmp_path: Path) -> None:
    """`--save embedding`, all the way from a checkpoint to Parquet: what torchvision hands to its classifier, and its logits."""
    name = "torchvision_resnext50_32x4d"
    checkpoint = write_legacy(tmp_path / "weights.pth", arrays_of(name))
    made = registry.get("resnext50_32x4d.golden", tmp_path / "models", from_file=checkpoint)
    assert made.card.recipe == Recipe()
    folder = helpers.fill(
        tmp_path / "in", {f"{n}.png": pictures.encode(Image.fromarray(item), "PNG") for n, item in enumerate(recipe.pixels())}
    )
    imagemill.run(
        folder,
        tmp_path / "out",
        model=made.dir,
        precision="fp32",
        devices="cpu",
        preprocess="center-crop",
        save=["embedding", "logits"],
    )
    rows = helpers.rows(tmp_path / "out")
    for column in ("embedding", "logits"):
        found = np.array([row[column] for row in rows], np.float32)
        np.testing.assert_allclose(found, np.load(GOLDEN / f"{name}.{column}.npy"), rtol=0, atol=1e-3)


def test_the_layer_of_the_api_is_as_documented() -> None:
    """Everything public has a docstring."""
    for name in api.__all__:
        assert getattr(api, name).__doc__, name


def test_the_documentation_s_examples_run(lite0: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of docs/python.md, in order, in a folder with `photos/a.jpg` and `photos/b.jpg`."""
    helpers.fill(tmp_path / "photos", {"a.jpg": pictures.jpeg(seed=1), "b.jpg": pictures.jpeg(seed=2)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEMILL_MODELS", str(lite0.dir.parent))
    text = (helpers.PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {"__name__": "example"})


def test_the_documented_fields_are_those_of_a_prediction() -> None:
    """In the order of the code."""
    text = (helpers.PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    table = text.partition("| `Prediction` |")[2].partition("\n\n")[0]
    told = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.partition("|")[2].partition("|")[0])]
    assert told == [item.name for item in dataclasses.fields(imagemill.Prediction)]
