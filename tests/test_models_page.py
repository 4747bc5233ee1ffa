"""The table at the top of docs/models.md: its commands are run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy

import helpers
import pth_files
from hub_server import Hub, Repo
from imagemill.cli import make_parser
from imagemill.models.architectures import ARCHITECTURES
from test_hub_run import FOLDERS, files_of, with_config

pytestmark = pytest.mark.process

CLI = Callable[..., helpers.Result]
PAGE = (helpers.PROJECT / "docs" / "models.md").read_text("utf-8")
TABLE = re.findall(
    r"^\| ([^|`][^|]*) \| (`[^|]*`) \|$",
    re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", PAGE.partition("\n## ")[0]),
    re.M,
)
"""What is had, and what is typed, by row."""
VIT = FOLDERS / "vit"
CLIP = Path(__file__).parent / "fixtures" / "zero_shot" / "clip"


def resnet18() -> dict[str, np.ndarray]:
    """Random weights for ten classes."""
    arrays = ARCHITECTURES["resnet18"].random(1)
    return arrays | {name: arrays[name][:10] for name in ("fc.weight", "fc.bias")}


def fine_tuned(here: Path, hub: Hub) -> None:
    pth_files.write_zip(here / "best.pth", resnet18())
    (here / "birds.txt").write_text("\n".join(f"bird {number}" for number in range(10)))


def transformers_folder(here: Path, hub: Hub) -> None:
    shutil.copytree(VIT, here / "FOLDER")


def timm_folder(here: Path, hub: Hub) -> None:
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "label_names": [f"bird {number}" for number in range(10)],
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    (here / "FOLDER").mkdir()
    (here / "FOLDER" / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(resnet18(), here / "FOLDER" / "model.safetensors")


def hub_repository(here: Path, hub: Hub) -> None:
    hub.repos["owner/name"] = Repo(files_of(VIT))


def ultralytics(here: Path, hub: Hub) -> None:
    model = onnx.load(str(VIT / "onnx" / "model.onnx"))
    names = {number: f"class {number}" for number in range(10)}
    onnx.helper.set_model_props(
        model, {"names": str(names), "imgsz": "[64, 64]", "task": "classify"}
    )
    onnx.save(model, str(here / "best.onnx"))


def pytorch(here: Path, hub: Hub) -> None:
    shutil.copy(VIT / "onnx" / "model.onnx", here / "net.onnx")
    (here / "labels.txt").write_text("\n".join(f"class {number}" for number in range(10)))


def words(here: Path, hub: Hub) -> None:
    hub.repos["Xenova/clip-vit-base-patch32"] = Repo(files_of(CLIP))
    (here / "labels.txt").write_text("a cat\na dog\n")


def tower(here: Path, hub: Hub) -> None:
    model = onnx.load(str(VIT / "onnx" / "model.onnx"))
    (features,) = (node.input[0] for node in model.graph.node if "logits" in node.output)
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("pooler_output", onnx.TensorProto.FLOAT, ["n", 24])
    )
    model.graph.node.append(onnx.helper.make_node("Identity", [features], ["pooler_output"]))
    files = with_config(files_of(VIT), architectures=["ViTModel"], id2label=None)
    hub.repos["owner/name"] = Repo(files | {"onnx/model.onnx": model.SerializeToString()})


def several(here: Path, hub: Hub) -> None:
    shutil.copytree(FOLDERS / "several", here / "FOLDER")


SETTINGS: dict[str, Callable[[Path, Hub], None]] = {
    "a fine-tuned checkpoint": fine_tuned,
    "a folder from transformers": transformers_folder,
    "a timm folder": timm_folder,
    "a name on the Hugging Face Hub": hub_repository,
    "an ONNX file from ultralytics": ultralytics,
    "an ONNX file from optimum": transformers_folder,
    "an ONNX file from PyTorch": pytorch,
    "no model, but words": words,
    "a network without classes": tower,
    "a model with several labels": several,
}
"""Start of a row → what makes it come true. Exporting needs PyTorch: see test_export_model.py."""


def commands(cell: str) -> list[list[str]]:
    """The lines of a cell that call imagemill, as arguments."""
    lines = [shlex.split(line.strip("`")) for line in cell.split("<br>")]
    return [line[1:] for line in lines if line[0] == "imagemill"]


def test_every_command_of_the_table_parses() -> None:
    """And all that is not a command of imagemill installs it."""
    assert len(TABLE) >= 11
    for _, cell in TABLE:
        for line in cell.split("<br>"):
            assert line.startswith(("`imagemill ", "`pip install '.["))
        for arguments in commands(cell):
            assert make_parser().parse_args(arguments).call


def test_every_row_of_the_table_is_run() -> None:
    """But the one that needs PyTorch."""
    rows = [had for had, _ in TABLE if not had.startswith(tuple(SETTINGS))]
    assert [had.partition(":")[0] for had in rows] == ["a folder or a Hub repository without ONNX"]


@pytest.mark.parametrize("start", SETTINGS)
def test_the_table_is_true(
    start: str,
    hub: Hub,
    imagemill: CLI,
    jpegs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A newcomer who types a row gets a row per image."""
    (cell,) = (cell for had, cell in TABLE if had.startswith(start))
    jpegs(4, "photos")
    SETTINGS[start](tmp_path, hub)
    env = helpers.environment(IMAGEMILL_MODELS=str(tmp_path / "models"))
    for arguments in commands(cell):
        result = imagemill(*arguments, cwd=tmp_path, env=env)
        assert result.code == 0, result.err
    rows = helpers.rows(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 4
    labels = {row["label"] for row in rows}
    expected = {
        "a fine-tuned checkpoint": {f"bird {number}" for number in range(10)},
        "a timm folder": {f"bird {number}" for number in range(10)},
        "an ONNX file from ultralytics": {f"class {number}" for number in range(10)},
        "an ONNX file from PyTorch": {f"class {number}" for number in range(10)},
        "no model, but words": {"a cat", "a dog"},
        "a network without classes": {None},
    }
    assert labels <= expected.get(start, labels)
    assert None not in labels or start in (
        "a network without classes",
        "a model with several labels",
    )
    assert ("embedding" in rows[0]) == (start == "a network without classes")
