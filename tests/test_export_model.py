"""Model folders without an ONNX file: their networks are exported with PyTorch (`export` of a job
is in test_export.py).

Torch is imported by the child alone. Golden logits are those of the libraries themselves; see
golden/make_export_folders.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import helpers
from golden.make_export_folders import images, pixels
from hub_server import Hub, Repo
from imagemill.errors import ModelError, UsageError
from imagemill.models.export import cached
from imagemill.system import processes
from imagemill.system.openvino_library import new_core
from test_no_network import HOOK as NOTE_SOCKETS

pytestmark = pytest.mark.usefixtures("torch_is_preloaded")

GOLDEN = Path(__file__).parent / "golden" / "export"


@functools.cache
def imports(*modules: str) -> bool:
    """Whether modules can be imported by a process of their own."""
    code = "import " + ", ".join(modules)
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True).returncode == 0


needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs torch and transformers: pip install 'imagemill[export]'",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the ViT's folder."""
    return shutil.copytree(GOLDEN / "transformers", tmp_path / "my vit")


@pytest.fixture
def meddle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run code in every child before its work."""

    def meddle(code: str) -> None:
        helpers.fill(tmp_path / "meddle", {"sitecustomize.py": code.encode()})
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "meddle"))

    return meddle


def changed(folder: Path, **values: object) -> Path:
    """Change values in the configuration of a folder."""
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def answers(file: Path, batch: np.ndarray) -> np.ndarray:
    """Return the only output of an ONNX file."""
    core = new_core()
    model = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(model(batch)[0])


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def refused(folder: Path, models: Path, kind: type[Exception] = ModelError) -> str:
    """Return the one line with which a folder is refused."""
    with pytest.raises(kind) as caught:
        cached.onnx_for(folder, models, lambda _: None)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700
    return message


# ── what is exported ──────────────────────────────────────────────────────────────────────────────


def check_export(folder: Path, models: Path, network: str) -> None:
    """Export a folder twice, and compare the file with the golden logits."""
    lines: list[str] = []
    file = cached.onnx_for(folder, models, lines.append)
    assert [line.partition(" ")[0] for line in lines] == ["exporting", "exported"]
    assert file.parent.name.startswith(f"{network}-")
    assert files_in(models) == [str(file.relative_to(models))]

    golden = np.load(GOLDEN / f"{folder.name}.logits.npy")
    for batch in (1, 3, 4):
        found = answers(file, images()[:batch])
        np.testing.assert_allclose(found, golden[:batch], rtol=0, atol=1e-4)
    inode = file.stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached, "Child", None)  # the second time no process is started
        assert cached.onnx_for(folder, models, lines.append) == file
    assert file.stat().st_ino == inode and len(lines) == 2


@needs_transformers
@pytest.mark.process
def test_a_network_of_transformers_is_exported_once_and_answers_as_in_pytorch(
    tmp_path: Path, meddle: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCKET_LOG", str(tmp_path / "sockets"))
    meddle(NOTE_SOCKETS)
    check_export(GOLDEN / "transformers", tmp_path / "models", "ViTForImageClassification")
    events = [json.loads(line) for line in (tmp_path / "sockets").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start"]  # it opened no connection


@pytest.mark.process
def test_a_network_of_timm_is_exported_once_and_answers_as_in_pytorch(tmp_path: Path) -> None:
    if not importlib.util.find_spec("timm") or not imports("torch", "timm"):
        pytest.skip(
            "needs timm, and a torchvision that fits torch: pip install 'imagemill[export]'"
        )
    check_export(GOLDEN / "timm", tmp_path / "models", "convnext_atto")


@needs_transformers
@pytest.mark.process
def test_a_repository_of_the_hub_without_onnx_is_run(
    hub: Hub, tmp_path: Path, imagemill: Callable[..., helpers.Result]
) -> None:
    """Labels and probabilities of PNG files are those of transformers; the second run has neither
    the Hub nor PyTorch.
    """
    folder = GOLDEN / "transformers"
    hub.repos["me/vit"] = Repo({file.name: file.read_bytes() for file in folder.iterdir()})
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(pixels()):
        Image.fromarray(image).save(photos / f"{number}.png")
    variables = hub.environment(IMAGEMILL_MODELS=str(tmp_path / "models"))

    def run(output: Path, **changes: str) -> helpers.Result:
        return imagemill(
            "run", photos, "--output", output, "--model", "hf:me/vit", "--top-k", 10,
            env=helpers.environment(**variables, **changes),
        )  # fmt: skip

    first = run(tmp_path / "out")
    assert first.code == 0, first.err
    assert "exporting ViTForImageClassification to ONNX, once" in first.err
    logits = np.load(GOLDEN / "transformers.logits.npy")
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row in helpers.rows(tmp_path / "out"):
        found = {item["label"]: item["probability"] for item in row["top_k"]}
        for label, probability in enumerate(expected[int(row["path"][0])]):
            assert found[f"class {label}"] == pytest.approx(probability, abs=1e-4)
    hub.stop()
    helpers.fill(tmp_path / "no", {"torch.py": b"raise SystemExit('torch')"})
    paths = [str(tmp_path / "no"), processes.PACKAGE_PARENT]
    again = run(tmp_path / "again", PYTHONPATH=os.pathsep.join(paths))
    assert again.code == 0, again.err
    assert "exporting" not in again.err
    assert helpers.table(tmp_path / "again").equals(helpers.table(tmp_path / "out"))


@needs_transformers
@pytest.mark.process
@pytest.mark.large
def test_weights_in_several_files_and_a_network_without_a_head(
    folder: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights = {key.removeprefix("vit."): weights[key] for key in weights if key.startswith("vit.")}
    places = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(sorted(weights))}
    for name in set(places.values()):
        part = {key: weights[key] for key in weights if places[key] == name}
        save_file(part, folder / name, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    file = cached.onnx_for(changed(folder, architectures=["ViTModel"]), tmp_path / "models", print)
    tokens = answers(file, images())[:, 0]  # the weights have no pooler
    whole = load_file(GOLDEN / "transformers" / "model.safetensors")
    logits = tokens @ whole["classifier.weight"].T + whole["classifier.bias"]
    golden = np.load(GOLDEN / "transformers.logits.npy")
    np.testing.assert_allclose(logits, golden, rtol=0, atol=1e-4)


def test_whatever_decides_the_file_is_in_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.13.0", "transformers": "5.24.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    monkeypatch.setattr(cached, "_export", lambda request, config, home: homes.append(home) or cached.Exported("", 0))  # fmt: skip
    homes: list[Path] = []

    def name(size: tuple[int, int] | None = None) -> str:
        cached.onnx_for(folder, tmp_path, lambda _: None, size)
        return homes[-1].name

    names = [name(), name((32, 40)), name((40, 32))]
    versions["transformers"] = "5.24.1"
    names.append(name())
    changed(folder, layer_norm_eps=1e-6)
    names.append(name())
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    names.append(name())
    assert len(set(names)) == len(names)
    assert name() == names[-1]


# ── what is refused before a process is started ───────────────────────────────────────────────────


def test_without_pytorch_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    message = refused(GOLDEN / "transformers", tmp_path, UsageError)
    assert message.endswith(
        "has no model.onnx, and imagemill does not build ViTForImageClassification itself: exporting"
        " it takes PyTorch and transformers, and torch is not installed. Type: pip install"
        " 'imagemill[export]'"
    )
    assert "PyTorch and timm" in refused(GOLDEN / "timm", tmp_path, UsageError)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"architectures": None}, "architectures does not name one network"),
        ({"architectures": []}, "architectures does not name one network"),
        ({"architectures": [["ViTModel"]]}, "architectures does not name one network"),
        ({"architectures": ["os.system"]}, "architectures does not name one network"),
        ({"architectures": ["A\n\x1b[2J"]}, "architectures does not name one network"),
        ({"architectures": ["A" * 10**6]}, "architectures does not name one network"),
        ({"pretrained_cfg": {}, "architecture": "hf-hub:a/b"}, "architecture does not name one"),
        ({"pretrained_cfg": {}, "architecture": "vit"}, "the size of the input is None"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"image_size": 10**9}, "the size of the input is [3, 1000000000, 1000000000]"),
        ({"image_size": -32}, "the size of the input is"),
        ({"image_size": True}, "the size of the input is"),
        ({"image_size": [32] * 10**5}, "the size of the input is"),
        ({"image_size": "32"}, "the size of the input is"),
        ({"num_channels": 10**9}, "the size of the input is"),
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "1")
    message = refused(changed(folder, **values), tmp_path / "models")
    assert reason in message and str(folder / "config.json") in message
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"[" * 10**6}, "config.json is nested too deeply"),
        ({INDEX: b"[]"}, "model.safetensors.index.json is not a JSON object"),
        ({INDEX: b'{"weight_map": {"a": "../../etc/passwd"}}'}, "'../../etc/passwd' is not the name"),
        ({INDEX: b'{"weight_map": {"a": "pytorch_model.bin"}}'}, "is not the name of a safetensors"),
        ({INDEX: b'{"weight_map": {"a": ["b"]}}'}, "is not the name of a safetensors file"),
        ({INDEX: b'{"weight_map": {}}'}, "names no files"),
        ({INDEX: b"{}"}, "names no files"),
        ({INDEX: b'{"weight_map": {"a": "a.safetensors"}}'}, "weight_map: there is no a.safetensors"),
        ({"pytorch_model.bin": b""}, "pytorch_model.bin is not read here, since a pickle may run"),
        ({}, "neither model.onnx nor model.safetensors"),
    ],
)  # fmt: skip
def test_files_that_make_no_sense_are_one_line(
    folder: Path, tmp_path: Path, files: dict[str, bytes], reason: str
) -> None:
    (folder / "model.safetensors").unlink()
    helpers.fill(folder, files)
    assert reason in refused(folder, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_folder_without_a_configuration_is_one_line(tmp_path: Path) -> None:
    assert "config.json cannot be read: No such file" in refused(tmp_path, tmp_path / "models")


# ── what the child refuses ────────────────────────────────────────────────────────────────────────

TRAP = """
import pathlib
pathlib.Path({!r}).touch()
"""


@needs_transformers
@pytest.mark.process
def test_neither_code_nor_pickles_of_a_folder_are_executed(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    code = TRAP.format(str(sprung)).encode()
    pickled = b"cbuiltins\nexec\n(V" + code.replace(b"\n", rb"\u000a") + b"\ntR."
    names = ("modeling_x", "configuration_x", "torch", "transformers", "json")
    helpers.fill(folder, {f"{name}.py": code for name in names})
    helpers.fill(folder, {"pytorch_model.bin": pickled, "adapter_model.bin": pickled})
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder)})
    )
    auto_map = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForImageClassification": "modeling_x.XForImageClassification",
    }
    changed(folder, auto_map=auto_map, _attn_implementation="someone/kernels")
    with contextlib.chdir(folder):
        file = cached.onnx_for(folder, tmp_path / "models", lambda _: None)
    golden = np.load(GOLDEN / "transformers.logits.npy")
    np.testing.assert_allclose(answers(file, images()), golden, rtol=0, atol=1e-4)

    changed(folder, architectures=["XForImageClassification"], model_type="x")
    message = refused(folder, tmp_path / "models")
    assert "has no XForImageClassification, and code in a repository is never executed" in message
    assert not sprung.exists()
    exec(compile(code, "", "exec"))  # the trap would have been seen
    assert sprung.exists()


@needs_transformers
@pytest.mark.process
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "config.json describes a much larger network"),
        ({"num_hidden_layers": 3}, "its weights lack 16 of the network's tensors"),
        ({"hidden_size": 64}, "cannot be loaded"),
        ({"architectures": ["CLIPTextModel"]}, "it takes input_ids, not images"),
    ],
)  # fmt: skip
def test_a_network_that_does_not_fit_its_weights_is_one_line(
    folder: Path, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    message = refused(changed(folder, **values), tmp_path / "models")
    assert reason in message
    log = Path(message.rpartition(" Log: ")[2])
    assert files_in(tmp_path / "models") == [str(log.relative_to(tmp_path / "models"))]
    assert log.stat().st_size


@needs_transformers
@pytest.mark.process
def test_other_answers_than_those_of_pytorch_are_an_error(
    tmp_path: Path, meddle: Callable[[str], None]
) -> None:
    meddle("import imagemill.models.export.child as child\nchild.MAX_DIFFERENCE = 1e-12")
    message = refused(GOLDEN / "transformers", tmp_path / "models")
    assert "answers differ from PyTorch's by" in message and "1e-12 is allowed" in message
    assert not list((tmp_path / "models").rglob("model.onnx"))


@pytest.mark.process
def test_a_child_that_dies_is_one_line_and_its_log_is_kept(
    tmp_path: Path, meddle: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "1")
    meddle("import os, signal\nprint('the end', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    message = refused(GOLDEN / "transformers", tmp_path / "models")
    assert "its process was killed by SIGKILL. Log: " in message
    assert Path(message.rpartition(" Log: ")[2]).read_text() == "the end\n"


WAITING = """
import os, sys, time
if "imagemill.models.export.child" in sys.orig_argv:
    open({!r}, "w").write(str(os.getpid()))
    time.sleep(600)
"""
EXPORTING = """
import signal, sys
from importlib import metadata
from pathlib import Path
from imagemill.errors import Interrupted
from imagemill.models.export import cached
def end(*_):
    raise Interrupted("terminated", 143)
signal.signal(signal.SIGTERM, end)  # as the command line does
metadata.version = lambda name: "1"
cached.onnx_for(Path(sys.argv[1]), Path(sys.argv[2]), print)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, b"KeyboardInterrupt"), (signal.SIGTERM, b"Interrupted")]
)
def test_a_signal_ends_the_export_and_leaves_nothing(
    tmp_path: Path, meddle: Callable[[str], None], number: signal.Signals, end: bytes
) -> None:
    pid = tmp_path / "pid"
    meddle(WAITING.format(str(pid)))
    arguments = [str(GOLDEN / "transformers"), str(tmp_path / "models")]
    paths = [os.environ["PYTHONPATH"], processes.PACKAGE_PARENT]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", EXPORTING, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
    )
    helpers.until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    assert end in process.communicate(timeout=300)[1]
    helpers.until(lambda: not Path(f"/proc/{pid.read_text()}").exists())
    assert not files_in(tmp_path / "models")
