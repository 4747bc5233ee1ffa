"""Model folders without ONNX: weights of networks that imagemill builds, and of those that are
exported.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pth_files
from imagemill.errors import CheckpointError, ModelError
from imagemill.models import bundle
from imagemill.models.custom import check as custom_check
from imagemill.models.export import cached
from imagemill.models.folders import folder as folders

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

OWN = json.loads((GOLDEN / "own.json").read_text())
FOLDERS = Path(__file__).parent / "fixtures/folders"


def build(folder: Path, tmp_path: Path) -> tuple[bundle.Bundle, list[str]]:
    """Return the bundle of a folder and the lines that were printed."""
    lines: list[str] = []
    return folders.bundle_for(folder, tmp_path / "models", lines.append), lines


PREPROCESSOR = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "resample": 3}
RESNET = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}


def with_weights(
    home: Path, case: str, *, pickled: bool = False, prefix: str = "", **config: Any
) -> Path:
    """Make a folder of random weights, for which golden/own.json has the logits."""
    home.mkdir()
    if case.startswith("timm/"):
        config = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}} | config
    else:
        config = RESNET | {"id2label": {str(number): f"c{number}" for number in range(10)}} | config
        normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        values = json.dumps(PREPROCESSOR | normalisation)
        (home / "preprocessor_config.json").write_text(values)
    (home / "config.json").write_text(json.dumps(config))
    keys = OWN[case]["keys"]
    arrays = {prefix + key: recipe.tensor(key, tuple(shape)) for key, shape in keys.items()}
    if pickled:
        pth_files.write_zip(home / "pytorch_model.bin", arrays)
    else:
        save_file(arrays, home / "model.safetensors")
    return home


def test_another_config_is_another_model(tmp_path: Path) -> None:
    """Weights alone do not say which activation is between the layers, for example."""
    folder = with_weights(tmp_path / "net", "transformers/resnet18")
    first, _ = build(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    other, _ = build(folder, tmp_path)
    assert other.dir != first.dir
    (folder / "config.json").write_text(json.dumps(config))
    again, lines = build(folder, tmp_path)
    assert (again.dir, lines) == (first.dir, [])


def test_shards_decide_a_model_whatever_they_are_called(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "net", "transformers/resnet18", hidden_act="gelu")
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(arrays, "part1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    keys = set()
    for change in (0, 1):
        arrays["classifier.1.bias"] = arrays["classifier.1.bias"] + np.float32(change)
        save_file(arrays, folder / "part1.safetensors")
        keys.add(folders._key(folders.look_into(folder, {}, {})))
    assert len(keys) == 2


def test_a_quantised_graph_is_not_taken_for_the_network(tmp_path: Path) -> None:
    """Of graphs that are not called model.onnx, only one without weights beside it is used."""
    folder = with_weights(tmp_path / "net", "transformers/resnet18")
    (folder / "onnx").mkdir()
    for name in ("model_quantized.onnx", "model_fp16.onnx"):
        (folder / "onnx" / name).write_bytes(b"not read")
    found = folders.look_into(folder, {}, {})
    assert found.source.name == "model.safetensors"
    assert found.unused == ("onnx/model_fp16.onnx", "onnx/model_quantized.onnx")


@pytest.mark.process
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("transformers/resnet18", {}),
        ("transformers/resnet18", {"pickled": True}),
        ("timm/resnet18", {}),
        ("timm/resnet18", {"prefix": "timm_model."}),
    ],
)
def test_weights_of_a_network_that_imagemill_builds_are_enough(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """safetensors or a pickle, without ONNX: the logits are those of the library."""
    made, lines = build(with_weights(tmp_path / "net", case, **options), tmp_path)
    logits = custom_check.answers(made.dir / bundle.MODEL, [recipe.pixels()])[0]["logits"]
    np.testing.assert_allclose(logits, np.array(OWN[case]["logits"]), rtol=0, atol=1e-4)
    assert made.card.architecture == "resnet18" and len(made.card.labels) == 10
    assert any("resnet18, 10 classes, recognised from the weights" in line for line in lines)
    assert any("interpolation: bicubic" in line for line in lines)
    assert made.card.origin["source"] == "folder"


@pytest.mark.process
@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("transformers/resnet18", {"downsample_in_bottleneck": True}),
        ("transformers/resnet18", {"hidden_act": "gelu"}),
        ("timm/resnet18", {"architecture": "resnetblur18"}),
        ("timm/resnet18", {"model_args": {"output_stride": 8}}),
    ],
)
def test_a_variant_with_the_same_shapes_is_exported(
    case: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights do not show these differences, so the network must be made by its own library."""
    check_export(with_weights(tmp_path / "net", case, **config), tmp_path, monkeypatch)


@pytest.mark.process
def test_a_resnet_of_another_depth_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `microsoft/resnet-26`: imagemill does not build it, but its own library does."""
    folder = with_weights(tmp_path / "net", "transformers/resnet18", depths=[2, 2, 2, 1])
    arrays = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in arrays.items() if ".stages.3.layers.1." not in name}
    assert len(kept) < len(arrays)
    save_file(kept, folder / "model.safetensors")
    check_export(folder, tmp_path, monkeypatch)


def check_export(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the network of a folder is exported."""
    asked: list[Any] = []

    def onnx_for(folder: Path, models: Path, notify: object, size: tuple[int, int]) -> Path:
        asked.append((folder, size))
        raise ModelError("exporting is not tested here")

    monkeypatch.setattr(cached, "onnx_for", onnx_for)
    with pytest.raises(ModelError, match="not tested here"):
        build(folder, tmp_path)
    assert asked == [(folder, (224, 224))]


def test_an_exported_network_is_wrapped_with_the_folders_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(FOLDERS / "vit", folder, ignore=shutil.ignore_patterns("onnx"))
    save_file({"vit.weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    monkeypatch.setattr(cached, "onnx_for", lambda *_: FOLDERS / "vit/onnx/model.onnx")
    made, _ = build(folder, tmp_path)
    assert made.card.labels[0] == "amber" and made.card.recipe.height == 64
    assert made.card.origin["file"] == "model.safetensors"


def test_a_damaged_file_of_weights_is_named(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "net", "timm/resnet18")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged"):
        build(folder, tmp_path)


def test_a_pickle_is_read_and_not_executed(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "net", "timm/resnet18")
    (folder / "model.safetensors").unlink()
    trap = f"cos\nsystem\n(Vtouch {tmp_path / 'executed'}\ntR."
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", trap)
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        build(folder, tmp_path)
    assert not (tmp_path / "executed").exists()
