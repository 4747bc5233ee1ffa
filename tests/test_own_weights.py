"""Weights of your own: the architecture is recognised from names and shapes, and the network
answers as the implementation does that the weights were trained with.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from safetensors.numpy import save_file

import pth_files
from imagemill.errors import CheckpointError
from imagemill.models import architectures
from imagemill.models.architectures import ARCHITECTURES, Architecture, resnet
from imagemill.models.checkpoints import checkpoint
from imagemill.records import Recipe
from test_models_golden import run_openvino

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

pytestmark = pytest.mark.process

CASES = json.loads((GOLDEN / "own.json").read_text())
LARGE = {"torchvision/wide_resnet50_2", "torchvision/resnet50", "timm/resnet34"}
"""Cases whose blocks are those of another one."""
Arrays = dict[str, np.ndarray]


@functools.lru_cache(maxsize=2)
def arrays_of(case: str) -> Arrays:
    """The checkpoint that golden logits were computed with."""
    return {key: recipe.tensor(key, tuple(shape)) for key, shape in CASES[case]["keys"].items()}


def logits_of(case: str, arrays: Arrays) -> np.ndarray:
    """What the network that the arrays are recognised as returns for the golden images."""
    model = architectures.recognise(arrays, case.partition("/")[2])
    height, width = CASES[case]["size"]
    fitted = architectures.fitted(model, arrays)
    built = model.build(fitted, Recipe(height, width), model.mean, model.std)
    return run_openvino(built.SerializeToString(), recipe.pixels_of(height, width))[0]


# ── golden logits ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.large) if case in LARGE else case for case in CASES],
)
def test_logits_are_those_of_the_implementation(case: str) -> None:
    """torchvision's, timm's, transformers' and EfficientNet-Lite's own, within 1e-4."""
    expected = np.array(CASES[case]["logits"])
    logits = logits_of(case, arrays_of(case))
    assert logits.shape == (4, 10)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.2, "the tolerance must be far below what tells classes apart"


def to_cadene(arrays: Arrays) -> Arrays:
    """The same arrays under the names that Cadene gives them: his networks list their parameters in
    torchvision's order.
    """
    cadene, torchvision = (
        [
            name
            for name in json.loads((GOLDEN / f"{family}_resnext101_32x4d.keys.json").read_text())
            if not name.endswith("num_batches_tracked")
        ]
        for family in ("cadene", "timm")
    )
    names = dict(zip(torchvision, cadene, strict=True))
    return {names[key]: array for key, array in arrays.items() if key in names}


def in_state_dict(arrays: Arrays) -> dict[str, object]:
    return {
        "state_dict": {f"module.{name}": array for name, array in arrays.items()},
        "epoch": 7,
        "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "lr": 0.1},
    }


FORMS: Mapping[str, Callable[[Path, Arrays], Path]] = {
    "plain.pth": pth_files.write_zip,
    "legacy.pth": pth_files.write_legacy,
    "nested.pth": lambda path, arrays: pth_files.write_nested(path, in_state_dict(arrays)),
    "model.safetensors": lambda path, arrays: save_file(dict(arrays), path) or path,
}


FAMILIES = ("torchvision", "timm", "cadene")


def ten_classes(family: str, *, half: bool) -> tuple[str, Arrays]:
    """The case whose logits are wanted, and the checkpoint under the family's names."""
    case = f"{'timm' if family == 'timm' else 'torchvision'}/resnext50_32x4d"
    arrays = arrays_of(case)
    if family == "cadene":
        arrays = to_cadene(arrays)
    if half:
        arrays = {
            name: array.astype(np.float16) if array.dtype == np.float32 else array
            for name, array in arrays.items()
        }
    return case, arrays


@pytest.mark.parametrize(
    ("family", "half"), [("torchvision", True), ("timm", True), ("cadene", False)]
)
def test_a_resnext_with_ten_classes_answers_as_pytorch(
    family: str, half: bool, tmp_path: Path
) -> None:
    """PyTorch's, timm's and Cadene's names as `{"state_dict": {"module.…"}}`, in fp32 or fp16:
    within 1e-4 of what PyTorch returns for the same weights.
    """
    case, arrays = ten_classes(family, half=half)
    file = pth_files.write_nested(tmp_path / "best.pth", in_state_dict(arrays))
    read = checkpoint.read(file)
    file.unlink()
    assert architectures.recognise(read) == resnet.ResNet(50, 32, 4, classes=10)
    expected = np.array(CASES[case]["fp16" if half else "logits"])
    np.testing.assert_allclose(logits_of(case, read), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_checkpoint_holds_the_same(
    family: str, half: bool, form: str, tmp_path: Path
) -> None:
    """Plain and nested, of both versions of torch.save and of safetensors: bit for bit."""
    _, arrays = ten_classes(family, half=half)
    file = FORMS[form](tmp_path / form, arrays)
    read = checkpoint.read(file)
    file.unlink()
    assert architectures.recognise(read) == resnet.ResNet(50, 32, 4, classes=10)
    for name, array in arrays.items():
        assert np.array_equal(read[name], array), name
        assert read[name].dtype == (np.int64 if array.dtype == np.int64 else np.float32)


def test_bfloat16_is_read_from_both_formats(tmp_path: Path) -> None:
    """The upper half of each float32, from safetensors and from a `torch.BFloat16Storage`."""
    arrays = arrays_of("torchvision/resnet18")
    halves = {
        name: array.view(np.uint32) >> 16 for name, array in arrays.items() if array.dtype == "f4"
    }
    expected = {name: (half << 16).view(np.float32) for name, half in halves.items()}
    stored = {name: half.astype("<u2") for name, half in halves.items()}
    for file in (
        pth_files.write_zip(tmp_path / "w.pth", stored),
        pth_files.write_bfloat16_safetensors(tmp_path / "w.safetensors", stored),
    ):
        read = checkpoint.read(file)
        assert architectures.recognise(read).name == "resnet18"
        for name, array in expected.items():
            np.testing.assert_array_equal(read[name], array)


# ── recognising ───────────────────────────────────────────────────────────────────────────────────


def zeros(model: Architecture) -> Arrays:
    return {name: np.zeros(shape, np.float32) for name, shape in model.shapes().items()}


SMALL = [model for model in ARCHITECTURES.values() if model.parameters < 130_000_000]


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.name)
@pytest.mark.parametrize("classes", [1, 10, 21_843])
def test_each_architecture_is_recognised_with_any_number_of_classes(
    model: Architecture, classes: int
) -> None:
    """Also those that nobody published weights for."""
    model = replace(model, classes=classes)
    assert architectures.recognise(zeros(model)) == model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (resnet.ResNet(50, 64, 4), "resnext50_64x4d"),
        (resnet.ResNet(152, 32, 8), "resnext152_32x8d"),
        (resnet.ResNet(50, base_width=256), "wide_resnet50_4"),
    ],
)
def test_cardinality_and_width_follow_from_shapes(model: resnet.ResNet, name: str) -> None:
    """Whether or not the member of the family has a name that others know."""
    assert architectures.recognise(zeros(model)) == model
    assert model.name == name


def test_a_head_may_stand_in_a_sequence_or_be_missing() -> None:
    """`nn.Sequential(nn.Dropout(), nn.Linear(…))`; and a network whose only output is its
    embedding.
    """
    model = resnet.ResNet(18, classes=3)
    arrays = {name.replace("fc.", "fc.1."): array for name, array in zeros(model).items()}
    assert architectures.recognise(arrays) == model
    assert "fc.weight" in architectures.fitted(model, arrays)
    arrays = {name: array for name, array in zeros(model).items() if not name.startswith("fc.")}
    headless = architectures.recognise(arrays)
    assert headless == resnet.ResNet(18, classes=0)
    fitted = architectures.fitted(headless, arrays)
    built = headless.build(fitted, Recipe(), headless.mean, headless.std)
    assert [output.name for output in built.graph.output] == ["embedding"]
    onnx.checker.check_model(built, full_check=True)
    two = {**zeros(model), "fc.0.weight": np.zeros((8, 512)), "fc.3.weight": np.zeros((3, 8))}
    del two["fc.weight"]
    with pytest.raises(CheckpointError, match=r"extra: fc\.0\.weight \(8, 512\)"):
        architectures.fitted(architectures.recognise(two), two)


@pytest.mark.parametrize("head", ["classifier", "head.fc", "my_head", "classifier.1", "head.0"])
@pytest.mark.parametrize("case", ["resnet18", "efficientnet_lite0"])
def test_the_only_matrix_is_the_head(case: str, head: str) -> None:
    """Whatever the training program calls it."""
    model = replace(ARCHITECTURES[case], classes=3)
    arrays = {name.replace(model.head, head): array for name, array in zeros(model).items()}
    assert f"{head}.weight" in arrays
    assert architectures.recognise(arrays) == model
    assert f"{model.head}.weight" in architectures.fitted(model, arrays)
    more = {**arrays, "projection.weight": np.zeros((8, 3), np.float32)}
    with pytest.raises(CheckpointError, match=r"extra: "):
        architectures.fitted(architectures.recognise(more), more)


def test_weights_that_fit_two_architectures_list_both() -> None:
    """timm's Lite networks: the same names and shapes, padded differently. The name decides."""
    arrays = arrays_of("timm/efficientnet_lite0")
    with pytest.raises(
        CheckpointError,
        match=r"fit tf_efficientnet_lite0 and efficientnet_lite0.*tf_efficientnet_lite0\.mine",
    ):
        architectures.recognise(arrays)
    found = [
        architectures.recognise(arrays, name)
        for name in ("tf_efficientnet_lite0", "efficientnet_lite0")
    ]
    assert [model.name for model in found] == ["tf_efficientnet_lite0", "efficientnet_lite0"]
    tf, plain = (
        run_openvino(
            model.build(
                architectures.fitted(model, arrays), Recipe(), model.mean, model.std
            ).SerializeToString(),
            recipe.pixels(1),
        )[0]
        for model in (replace(found[1], is_tensorflow=True), found[1])
    )
    assert np.abs(tf - plain).max() > 1e-3, "the padding must matter, or the golden test is void"


@pytest.mark.parametrize(
    ("arrays", "wanted", "message"),
    [
        (
            {"stem.0.weight": np.zeros((96, 3, 4, 4), np.float32)},
            None,
            r"\(1 parameters: stem\.0\.weight, …\) are those of no architecture.*resnet50.*ONNX",
        ),
        ({"a\x1b[2J": np.zeros(3, np.float32)}, None, r"1 parameters: a\\x1b\[2J"),
        (zeros(resnet.ResNet(18)), "resnet50", "those of resnet18, not of resnet50"),
        (zeros(resnet.ResNet(18)), "tf_efficientnet_lite0", "those of resnet18, not of tf_"),
        (
            {"conv1.weight": np.zeros((64, 3, 3, 3), np.float32)},
            "resnet18",
            r"misshapen: conv1\.weight is \(64, 3, 3, 3\), resnet18 has \(64, 3, 7, 7\)",
        ),
        (
            {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)},
            None,
            "those of no architecture",
        ),
        (
            zeros(resnet.ResNet(50)) | {"layer1.0.conv2.weight": np.zeros((64, 0, 3, 3))},
            None,
            "those of no architecture",
        ),
        (
            zeros(resnet.ResNet(50)) | {"layer1.0.conv2.weight": np.zeros((64, 63, 3, 3))},
            None,
            "those of no architecture",
        ),
    ],
)
def test_weights_that_are_not_known_are_one_error(
    arrays: Arrays, wanted: str | None, message: str
) -> None:
    """It names the first parameters, or what does not fit."""
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
        architectures.recognise(arrays, wanted)
