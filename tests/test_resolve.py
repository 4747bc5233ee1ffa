"""What `--model` means, and what is suggested if it means nothing."""

from __future__ import annotations

import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from imagemill.errors import UsageError
from imagemill.models import bundle as bundles
from imagemill.models import get, mistaken, resolve
from imagemill.models.custom import wrap
from imagemill.system import serialization
from onnx_files import complete, saved, small
from tiny import TINY_CARD


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a name that means nothing contacts nobody")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            "timm/resnext101_32x4d.gluon_in1k",
            "--model timm/resnext101_32x4d.gluon_in1k is not a folder. If you mean the repository"
            " of the Hugging Face Hub, type: --model hf:timm/resnext101_32x4d.gluon_in1k",
        ),
        (
            "owner/name@v1.0",
            "--model owner/name@v1.0 is not a folder. If you mean the repository of the Hugging"
            " Face Hub, type: --model hf:owner/name@v1.0",
        ),
        (
            "https://huggingface.co/google/vit-base-patch16-224/tree/main",
            "--model https://huggingface.co/google/vit-base-patch16-224/tree/main is a web page."
            " Type: --model hf:google/vit-base-patch16-224",
        ),
        ("./photos", "--model ./photos: there is no such folder or file."),
        ("a/b/c", "--model a/b/c: there is no such folder or file."),
        ("weights/best.safetensors", "--model weights/best.safetensors: there is no such file."),
        (
            "resnext101_32x4",
            "No model is called resnext101_32x4. Did you mean resnext101_32x4d",
        ),
        ("Tiny_", "No model is called Tiny_. Did you mean tiny"),
        (
            "qqqqqqqq",
            "No model is called qqqqqqqq. `imagemill models` lists the names; a folder, a file"
            " that ends in .onnx, or hf:owner/name works, too.",
        ),
        ("a\x1b[2Jb", "No model is called a\\x1b[2Jb."),
    ],
)
def test_what_means_nothing_is_one_line_with_what_to_type(
    model: str, line: str, models_dir: Path
) -> None:
    """Names of the Hub, of published models, and of those in the models folder."""
    with pytest.raises(UsageError) as caught:
        resolve.resolve(model, models_dir)
    assert str(caught.value).startswith(line)
    assert str(caught.value).isprintable()


def test_a_file_with_weights_is_to_be_made_a_model_of(tmp_path: Path, models_dir: Path) -> None:
    """With a name of letters and digits."""
    for name, suggested in (
        ("birds v2.pth", "birds_v2"),
        ("-.safetensors", "mine"),
        ("checkpoint_best.pth.tar", "checkpoint_best"),
        ("last.v3.CKPT", "last.v3"),
        ("resnext101_32x4d.pth", "my-resnext101_32x4d"),
    ):
        file = tmp_path / name
        file.touch()
        with pytest.raises(UsageError) as caught:
            resolve.resolve(str(file), models_dir)
        assert str(caught.value) == (
            f"--model {file} is a file with weights. Make a model of it: imagemill get-model"
            f" {suggested} --from {shlex.quote(str(file))} --labels FILE, then use --model"
            f" {suggested}. FILE has one label per line, in the order of the classes."
        )
    other = tmp_path / "notes.txt"
    other.touch()
    with pytest.raises(UsageError, match="is a text file, not a model"):
        resolve.resolve(str(other), models_dir)


def made_of_parts(folder: Path, graph: str) -> Path:
    """Make a folder of optimum with a configuration, and its graph."""
    file = folder / graph
    file.parent.mkdir(parents=True)
    saved(small(), file.parent, file.name)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    return file


@pytest.mark.parametrize("graph", ["onnx/model.onnx", "onnx/model_int8.onnx", "model.onnx"])
def test_a_part_of_a_model_folder_is_refused(
    graph: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because what `config.json` and its neighbour say would be ignored. Nothing is written."""
    folder = tmp_path / "my-vit"
    file = made_of_parts(folder, graph)
    where = "" if graph == "model.onnx" else " in onnx/"
    parts = [file] if graph == "model.onnx" else [file, file.parent, folder / "." / "onnx"]
    for part in parts:
        with pytest.raises(UsageError) as caught:
            resolve.resolve(str(part), models_dir)
        line = f"{folder} has config.json and this network{where}. Use --model {folder}."
        assert str(caught.value) == line
        assert mistaken.for_wrap(str(part), {"mean": (0, 0, 0)}) == line
    monkeypatch.chdir(tmp_path)
    for place, text in ((tmp_path, f"my-vit/{graph}"), (file.parent, file.name)):
        monkeypatch.chdir(place)
        with pytest.raises(UsageError, match=r"Use --model (my-vit|\.+)\.$"):
            resolve.resolve(text, models_dir)
    with pytest.raises(UsageError, match=f"Use --from {folder}[.]$"):
        get.get("vit", models_dir, from_file=file)
    everything = {"mean": (0, 0, 0), "std": (1, 1, 1), "resize": 8}
    assert mistaken.for_wrap(str(file), everything) is None, "somebody who knows"
    wrap.wrap(file, everything)
    assert mistaken.for_wrap(str(file), {}) is None, "its card can be changed"
    assert resolve.resolve(str(file), models_dir / "new").card.recipe.resize == 8


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("MY-VIT", "No model is called MY-VIT. Did you mean the folder my-vit?"),
        ("my-vitt", "No model is called my-vitt. Did you mean the folder my-vit?"),
        ("./MY-VIT", "--model ./MY-VIT: there is no such folder or file. Did you mean the folder ./my-vit?"),
        ("BEST.onnx", "--model BEST.onnx: there is no such file. Did you mean the file best.onnx?"),
        ("best", "No model is called best. Did you mean the file best.onnx?"),
        ("nets/checkpoint.pth", "--model nets/checkpoint.pth: there is no such file. Did you mean the file nets/checkpoint.pth.tar?"),
        ("nets/Checkpoint", "--model nets/Checkpoint is not a folder. Did you mean the file nets/checkpoint.pth.tar? If you mean the"),
        ("tinny", "No model is called tinny. Did you mean tiny"),
        ("photo", "No model is called photo. `imagemill models` lists"),
        ("nowhere/best.onnx", "--model nowhere/best.onnx: there is no such file."),
    ],
)  # fmt: skip
def test_near_names_of_files_and_folders_are_suggested(
    model: str, line: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In upper or lower case, with and without a suffix. A folder of images is no model."""
    made_of_parts(tmp_path / "my-vit", "onnx/model.onnx")
    for name in ("photos/a.jpg", "nets/checkpoint.pth.tar", "best.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve.resolve(model, models_dir)
    assert str(caught.value).startswith(line)
    assert "photos" not in str(caught.value)
    if model.endswith((".onnx", ".pth")):
        assert mistaken.for_wrap(model, {}) == line.removeprefix("--model ")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("my-vit", "my-vit is a folder: use --model my-vit."),
        ("my-vit/onnx", "my-vit has config.json and this network in onnx/. Use --model my-vit."),
        ("photos", "photos is a folder. Give an ONNX file."),
        ("a b.pth.tar", "a b.pth.tar is a file with weights. Make a model of it: imagemill get-model a_b --from 'a b.pth.tar' --labels FILE, then"),
        ("hf:owner/name", "hf:owner/name is a name of the Hugging Face Hub: use --model hf:owner/name."),
        ("gone.onnx", "gone.onnx: there is no such file."),
    ],
)  # fmt: skip
def test_what_wrap_cannot_wrap_is_one_line_with_what_to_type(
    typed: str, line: str, tmp_path: Path, imagemill: Any
) -> None:
    """Exit code 2, and nothing is read as ONNX that is not."""
    made_of_parts(tmp_path / "my-vit", "onnx/model.onnx")
    (tmp_path / "photos").mkdir()
    (tmp_path / "a b.pth.tar").touch()
    done = imagemill("wrap", typed, cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith(f"imagemill: {line}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("classes.txt", "--model classes.txt is a text file, not a model. A file of labels is given to `imagemill get-model` or `imagemill wrap`: --labels classes.txt."),
        ("my-vit/config.json", "--model my-vit/config.json describes a model. Give its folder: --model my-vit."),
        ("NET.ONNX", "--model NET.ONNX: its name must end in .onnx, in small letters. Rename it."),
        ("net.engine", "--model net.engine is a file, but not a model: a model is an ONNX file (.onnx), a folder, or hf:owner/name. Unpack an archive. Export a model of another framework to ONNX."),
        ("https://example.com/net.onnx", "--model https://example.com/net.onnx is a URL. Download it, and give the file or folder."),
        ("s3://bucket/net", "--model s3://bucket/net is a URL. Download it, and give the file or folder."),
    ],
)  # fmt: skip
def test_errors_of_other_files_name_what_to_type(
    typed: str, line: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what they are not."""
    made_of_parts(tmp_path / "my-vit", "onnx/model.onnx")
    for name in ("classes.txt", "NET.ONNX", "net.engine"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve.resolve(typed, models_dir)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("name", "source", "end"),
    [
        ("team/colleague", "net.pth", "for example team_colleague."),
        ("Ünder wegs", "net.pth", "for example nder_wegs."),
        ("a/b", "hf:owner/name", "for example a_b."),
        (".hidden", None, "for example hidden. `imagemill models` lists the published models."),
        ("timm/resnet50", None, "imagemill get-model my-resnet50 --from hf:timm/resnet50"),
        ("hf:timm/vit@v1", None, "imagemill get-model vit --from hf:timm/vit@v1"),
    ],
)
def test_a_name_that_no_model_can_have_gets_another_suggested(
    name: str, source: str | None, end: str, models_dir: Path
) -> None:
    """Also if it is that of a repository of the Hub."""
    with pytest.raises(
        UsageError, match=r"Choose a name of letters, digits, _, \. and -"
    ) as caught:
        if source and source.startswith("hf:"):
            resolve.get_from(name, source, models_dir, given={})
        else:
            get.get(name, models_dir, from_file=Path(source) if source else None)
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize("config", ["{", '{"learning_rate": 0.1}', "[]", "[" * 10_000])
def test_another_config_beside_an_onnx_file_is_nothing(
    config: str, tmp_path: Path, models_dir: Path
) -> None:
    """That of a training program, for example."""
    file = made_of_parts(tmp_path / "net", "net.onnx")
    (file.parent / "config.json").write_text(config)
    with pytest.raises(UsageError, match="has no card beside it"):
        resolve.resolve(str(file), models_dir)


def test_what_to_type_for_a_bundle_finds_it(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name, a file, or a folder, as a shell takes it."""
    (tmp_path / "my nets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEMILL_MODELS", str(tmp_path / "models"))
    shutil.copytree(models_dir / "tiny", tmp_path / "models" / "tiny")
    shutil.copytree(models_dir / "tiny", tmp_path / "my nets" / "tiny")
    file = saved(small(), tmp_path / "my nets")
    given = complete(file)
    wrap.wrap(file, given)
    wrap.wrap(file, given, tmp_path / "wrapped")
    typed = {
        "tiny": "tiny",
        "my nets/tiny": f"'{tmp_path}/my nets/tiny'",
        str(file): "'my nets/small.onnx'",
        "wrapped": str(tmp_path / "wrapped"),
    }
    for model, expected in typed.items():
        found = resolve.resolve(model, tmp_path / "models")
        assert bundles.typed(found) == expected
        (again,) = shlex.split(expected)
        assert resolve.resolve(again, tmp_path / "models").dir.samefile(found.dir)
    unnamed = resolve.resolve(str(file), tmp_path / "models")
    file.unlink()
    assert bundles.typed(unnamed) == unnamed.dir.name, "the file is gone, the bundle is not"
    card = replace(
        unnamed.card,
        origin=unnamed.card.origin | {"source": "hub", "repository": "a/b", "commit": "0f"},
    )
    assert bundles.typed(replace(unnamed, card=card)) == "hf:a/b@0f"


def test_a_name_means_the_models_folder_first(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a folder that imagemill made, then a published model. docs/models.md has the order."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models_dir / "tiny", tmp_path / "tiny")
    assert resolve.resolve("tiny", models_dir).dir == models_dir / "tiny"
    assert resolve.resolve("./tiny", models_dir).dir.resolve() == tmp_path / "tiny"
    made_of_parts(tmp_path / "resnet18", "onnx/model.onnx")
    assert not resolve.is_local("resnet18", models_dir)
    assert resolve.is_local("./resnet18", models_dir)
    shutil.copytree(models_dir / "tiny", tmp_path / "resnet50")
    assert resolve.resolve("resnet50", models_dir).dir.resolve() == tmp_path / "resnet50"


def test_only_published_models_that_are_not_here_are_downloads(
    tmp_path: Path, models_dir: Path
) -> None:
    """So a job that continues compares what the same name means now."""
    for model in ("tiny", "hf:owner/name", "net.onnx", str(tmp_path)):
        assert resolve.is_local(model, models_dir), model
    for model in ("resnext101_32x4d", "no_such_name"):
        assert not resolve.is_local(model, models_dir), model
    shutil.copytree(models_dir / "tiny", tmp_path / "resnet18.tv_in1k")
    card = replace(TINY_CARD, origin={"source": "package", "published": "resnet18.tv_in1k"})
    (tmp_path / "resnet18.tv_in1k" / bundles.CARD).write_bytes(serialization.encode(card))
    for model in ("resnet18.tv_in1k", "resnet18"):
        assert resolve.is_local(model, tmp_path), model
