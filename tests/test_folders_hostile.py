"""Model folders from strangers: one clear line each, nothing is executed, and nothing is written.

Each fault is a change of a sound folder. The message must name what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from imagemill.errors import ModelError, UsageError
from imagemill.models import resolve
from imagemill.models.folders import folder as folders

FOLDERS = Path(__file__).parent / "fixtures/folders"
SOUND = "clip"
MILLION = 1_000_000
Change = Callable[[Path], object]


def config(**values: Any) -> Change:
    return lambda folder: write(folder / "config.json", values)


def preprocessor(**values: Any) -> Change:
    return lambda folder: write(folder / "preprocessor_config.json", values)


def timm(**values: Any) -> Change:
    """Replace `config.json` by timm's."""
    plain = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": values}
    return lambda folder: (folder / "config.json").write_text(json.dumps(plain))


def both(first: Change, second: Change) -> Change:
    return lambda folder: (first(folder), second(folder))


def write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def raw(key: str, value: str) -> Change:
    """Add a key to `preprocessor_config.json` whose value is not something that Python writes."""

    def change(folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        file.write_text(file.read_text().rstrip().removesuffix("}") + f',"{key}": {value}}}')

    return change


def sparse(name: str, size: int) -> Change:
    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change


def link(name: str) -> Change:
    """Replace a file by a link to one outside the folder."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside" / name
        outside.parent.mkdir(exist_ok=True)
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def external(location: str) -> Change:
    """Let a weight of the network lie in another file."""

    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return change


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def is_folder(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def with_code(folder: Path) -> None:
    """Name a processor of its own, in a module that would write a file."""
    trap = f"open({str(folder.parent / 'executed')!r}, 'w')\n"
    (folder / "processing_own.py").write_text(trap)
    (folder / "__init__.py").write_text(trap)
    auto = {"AutoImageProcessor": "processing_own.OwnImageProcessor"}
    write(folder / "preprocessor_config.json", {"image_processor_type": "OwnImageProcessor"})
    write(folder / "preprocessor_config.json", {"auto_map": auto})


def a_million_labels(folder: Path) -> None:
    found = ",".join([f'"{number}":"a"' for number in range(MILLION)])
    (folder / "config.json").write_text(f'{{"model_type": "clip", "id2label": {{{found}}}}}')


def labels(*found: tuple[str, Any]) -> Change:
    return config(id2label=dict(found))


HOSTILE: dict[str, tuple[Change, str]] = {
    # files
    "a config of 1 GB": (sparse("config.json", 2**30), "larger than"),
    "a config that is empty": (text("config.json", ""), "not valid JSON"),
    "a config that is no object": (text("config.json", "[1]"), "not a JSON object"),
    "a config in no encoding": (text("config.json", b'{"a": "\xff\xfe\x80"}'), "not valid JSON"),
    "a config that is a pipe": (pipe, "config.json"),
    "a config elsewhere": (link("config.json"), "link to outside its folder"),
    "a processor elsewhere": (link("preprocessor_config.json"), "link to outside its folder"),
    "a network elsewhere": (link("model.onnx"), "link to outside its folder"),
    "a network that is a folder": (is_folder, "has no weights"),
    "a network of 3 GB": (sparse("model.onnx", 3 * 2**30), "3,221,225,472 bytes"),
    "a network that is none": (text("model.onnx", b"\0\1\2 none"), "damaged or not ONNX"),
    "weights above the folder": (external("../outside/secret"), "outside its folder"),
    "weights anywhere": (external("/etc/passwd"), "outside its folder"),
    "weights that are missing": (external("model.onnx_data"), "is not a file beside it"),
    "weights with control characters": (external("a\x1b[2J\nb"), "is not a file beside it"),
    # JSON
    "nested a million times": (text("config.json", '{"a":' * MILLION), "nested too deeply"),
    "nested in lists": (raw("size", "[" * MILLION), "nested too deeply"),
    "a key that appears twice": (raw("size", '1, "size": 2'), "appears twice"),
    "a number of a million digits": (raw("crop_pct", "9" * MILLION), "not valid JSON"),
    "a number of 400 digits": (raw("rescale_factor", "9" * 400), "rescale_factor"),
    "a number beyond all": (raw("rescale_factor", "1e999"), "rescale_factor"),
    "not a number": (raw("rescale_factor", "NaN"), "rescale_factor"),
    "infinity": (raw("rescale_factor", "Infinity"), "rescale_factor"),
    # values
    "a mean of NaN": (preprocessor(image_mean=[float("nan")] * 3), "image_mean"),
    "a mean of infinity": (preprocessor(image_mean=float("-inf")), "image_mean"),
    "a deviation of 0": (preprocessor(image_std=[0.5, 0.0, 0.5]), "image_std[1]"),
    "a deviation below 0": (preprocessor(image_std=-1), "image_std"),
    "a negative size": (preprocessor(size={"height": -48, "width": 48}), "size.height"),
    "a size of 0": (preprocessor(crop_size={"height": 0, "width": 48}), "crop_size.height"),
    "a size beyond memory": (preprocessor(size={"shortest_edge": 10**9}), "size.shortest_edge"),
    "a size that is a text": (preprocessor(size="large"), "size"),
    "a size that is true": (preprocessor(size=True), "size"),
    "a size of three": (preprocessor(size=[1, 2, 3]), "size"),
    "a filter that is unknown": (preprocessor(resample=6), "resample"),
    "a flag that is a text": (preprocessor(do_resize="yes"), "do_resize"),
    "a mean beyond all bounds": (
        preprocessor(rescale_factor=1e-9, image_mean=[10.0] * 3),
        "mean is",
    ),
    "a factor of 0": (preprocessor(rescale_factor=0), "rescale_factor"),
    "a class that is a list": (preprocessor(image_processor_type=["ViT"]), "image_processor_type"),
    "a class with control characters": (
        preprocessor(image_processor_type="\x1b[2J\nViT\u202e"),
        "is not known",
    ),
    "a class with code of its own": (with_code, "'OwnImageProcessor' is not known"),
    "a class that is very long": (preprocessor(image_processor_type="V" * MILLION), "is not known"),
    "architectures of the wrong type": (config(architectures={"a": 1}), "architectures"),
    "a type with control characters": (
        both(config(model_type="a\nb\x00"), preprocessor(image_processor_type=None)),
        "model_type is",
    ),
    "a problem that is unknown": (config(problem_type="\x07bell"), "problem_type is"),
    # labels
    "a million labels": (a_million_labels, "1,000,000 labels"),
    "labels with a gap": (labels(("0", "a"), ("2", "b")), "none for class 1"),
    "labels without numbers": (labels(("jay", "0")), "none for class 0"),
    "labels in a list": (config(id2label=["a", "b"]), "id2label"),
    "labels that are objects": (labels(("0", {"name": "a"})), "id2label"),
    "a label with a line break": (labels(("0", "a\nb")), "label 0 is 'a"),
    "a label that clears the screen": (labels(("0", "\x1b[2J")), "no control characters"),
    "a label of a megabyte": (labels(("0", "a" * MILLION)), "A label has 1 to 1,000 characters"),
    # what does not fit
    "a size that is not the network's": (
        preprocessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        "takes images of 48x48, but size is 64",
    ),
    "other classes than the network's": (labels(("0", "a"), ("1", "b")), "2 labels"),
    # timm
    "timm's size beyond memory": (timm(input_size=[3, 10**12, 224]), "pretrained_cfg.input_size"),
    "timm's channels": (timm(input_size=[4, 48, 48]), "takes 4 channels"),
    "timm's share of nothing": (timm(crop_pct=1e-300), "crop_pct is 1e-300"),
    "timm's filter": (timm(interpolation="random"), "pretrained_cfg.interpolation"),
    "timm's mean": (timm(mean=["a", "b", "c"]), "pretrained_cfg.mean"),
    "timm's mean of two": (timm(mean=[0.5, 0.5]), "mean has 2 numbers"),
    "timm's settings in a list": (timm() and config(pretrained_cfg=[]), "pretrained_cfg"),
    "timm's names": (timm(label_names=["a", "b\x00"] * 5), "no control characters"),
}


def tree(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        yield str(path), path.lstat().st_mtime_ns


@pytest.mark.process
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_one_clear_line(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    folder = tmp_path / "in" / "model"
    shutil.copytree(FOLDERS / SOUND, folder)
    change(folder)
    models = tmp_path / "models"
    models.mkdir()
    before = list(tree(tmp_path / "in"))
    lines: list[str] = []
    with pytest.raises((ModelError, UsageError)) as raised:
        resolve.resolve(str(folder), models, notify=lines.append)
    messages = str(raised.value)
    assert message in messages
    assert messages.isprintable() and len(messages) < 1_200
    assert all(line.isprintable() for line in lines)
    assert list(tree(tmp_path / "in")) == before
    assert not list(models.iterdir()) and not (tmp_path / "in/executed").exists()


def test_a_folders_name_may_hold_control_characters(tmp_path: Path) -> None:
    """It works, and what is printed about it is harmless."""
    folder = tmp_path / "a\x1b[2J\nb"
    shutil.copytree(FOLDERS / SOUND, folder)
    lines: list[str] = []
    made = resolve.resolve(str(folder), tmp_path / "models", notify=lines.append)
    assert made.card.name == r"a\x1b[2J\nb" and made.dir.parent == tmp_path / "models"
    assert lines and all(line.isprintable() for line in lines)


def test_a_fault_in_such_a_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2J\nb"
    shutil.copytree(FOLDERS / SOUND, folder)
    for name in ("model.onnx", "preprocessor_config.json", "config.json"):
        (folder / name).write_bytes(b"\0")
        with pytest.raises(ModelError) as raised:
            resolve.resolve(str(folder), tmp_path / "models")
        assert str(raised.value).isprintable() and name in str(raised.value)


def test_a_name_cannot_lead_out_of_the_models_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FOLDERS / SOUND, folder)
    origin = {"source": "hub", "repository": "../../../evil", "commit": "c" * 40}
    made = folders.bundle_for(folder, tmp_path / "models", lambda _: None, origin=origin)
    assert made.dir.parent == tmp_path / "models"


def test_links_inside_the_folder_and_to_the_hubs_blobs_are_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of such links."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots/1234"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for file in (FOLDERS / SOUND).iterdir():
        shutil.copy(file, blobs / f"{file.name}-blob")
        (folder / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    assert resolve.resolve(str(folder), tmp_path / "models").card.labels[0] == "amber"


def test_the_sound_folder_is_sound(tmp_path: Path) -> None:
    made = resolve.resolve(str(FOLDERS / SOUND), tmp_path / "models")
    assert len(made.card.labels) == 10
