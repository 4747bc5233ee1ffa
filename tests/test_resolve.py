"""What `--model` means, and what is suggested if it means nothing."""

from __future__ import annotations

import shlex
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from imagemill.errors import UsageError
from imagemill.models import resolve
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
    for name, suggested in (("birds v2.pth", "birds_v2"), ("-.safetensors", "mine")):
        file = tmp_path / name
        file.touch()
        with pytest.raises(UsageError) as caught:
            resolve.resolve(str(file), models_dir)
        assert str(caught.value) == (
            f"--model {file} is a file with weights. Make a model of it: imagemill get-model"
            f" {suggested} --from {shlex.quote(str(file))}, then use --model {suggested}."
        )
    other = tmp_path / "notes.txt"
    other.touch()
    with pytest.raises(UsageError, match="is a file, but not ONNX"):
        resolve.resolve(str(other), models_dir)


@pytest.mark.parametrize(
    ("origin", "typed"),
    [
        ({"source": "onnx", "file": "/nets/net.onnx"}, "/nets/net.onnx"),
        ({"source": "folder", "folder": "/nets/vit"}, "/nets/vit"),
        (
            {"source": "hub", "repository": "owner/vit", "commit": "0f" * 20},
            f"hf:owner/vit@{'0f' * 20}",
        ),
        ({"source": "file", "file": "best.pth"}, None),
    ],
)
def test_a_model_can_be_asked_for_again(origin: dict[str, str], typed: str | None) -> None:
    """What to type for a job whose model was deleted; the Hub's commit included."""
    assert resolve.typed(replace(TINY_CARD, origin=origin)) == typed


def test_only_published_models_that_are_not_here_are_downloads(
    tmp_path: Path, models_dir: Path
) -> None:
    """So a job that continues compares what the same name means now."""
    for model in ("tiny", "hf:owner/name", "net.onnx", str(tmp_path)):
        assert resolve.is_local(model, models_dir), model
    for model in ("resnext101_32x4d", "no_such_name"):
        assert not resolve.is_local(model, models_dir), model
