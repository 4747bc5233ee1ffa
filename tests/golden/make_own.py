"""Compute `own.json`: the logits that published implementations return for small classifiers with
the weights and images of recipe.py, and the names of their parameters.

    pip install torch timm torchvision transformers efficientnet_lite_pytorch
    python tests/golden/make_own.py

All have 10 classes, as somebody's own network has. torchvision's compiled operators are not needed;
benchmarks/peers/timm_inference.py shows how it is imported where they do not load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import recipe
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks" / "peers"))
import timm_inference  # noqa: E402

timm_inference.import_timm()
import efficientnet_lite_pytorch  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

CLASSES = 10


def of_torchvision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES)


def of_timm(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=CLASSES)


def of_transformers(name: str) -> nn.Module:
    """ResNet-18 or -50 as transformers builds it."""
    depth = int(name.removeprefix("resnet"))
    small = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = transformers.ResNetConfig(num_labels=CLASSES, **(small if depth == 18 else {}))
    network = transformers.ResNetForImageClassification(config)
    forward = network.forward
    network.forward = lambda x: forward(x).logits
    return network


def of_lite(name: str) -> nn.Module:
    """As `efficientnet_lite_pytorch` builds it."""
    return efficientnet_lite_pytorch.EfficientNet.from_name(
        name.replace("_", "-"), num_classes=CLASSES
    )


CASES: dict[str, tuple[Callable[[str], nn.Module], str]] = {
    f"{made.__name__.removeprefix('of_')}/{name}": (made, name)
    for made, names in (
        (of_torchvision, ("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d")),
        (of_timm, ("resnet18", "resnet34", "resnet50", "resnext50_32x4d")),
        (of_timm, ("efficientnet_lite0", "tf_efficientnet_lite0", "tf_efficientnet_lite2")),
        (of_transformers, ("resnet18", "resnet50")),
        (of_lite, ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")),
    )
    for name in names
}


SIZES = {"efficientnet_lite1": (240, 240), "efficientnet_lite2": (260, 260), "resnet34": (160, 288)}
"""Height and width of the images, where they are not 224×224."""


def inputs(name: str, size: tuple[int, int]) -> torch.Tensor:
    """The images of recipe.py, normalised as the network's own family does."""
    pixels = recipe.pixels_of(*size)
    if "lite" not in name or name == "timm/efficientnet_lite0":
        return torch.from_numpy(recipe.normalised(pixels))
    scaled = (pixels.astype(np.float32) - 127) / 128
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def main() -> None:
    """Compute and write them all."""
    torch.manual_seed(0)
    golden = {}
    for name, (make, called) in CASES.items():
        network = make(called).eval()
        size = SIZES.get(called.removeprefix("tf_"), (224, 224))
        images = inputs(name, size)
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        state = {
            key: torch.from_numpy(np.asarray(recipe.tensor(key, tuple(shape))))
            for key, shape in shapes.items()
        }
        network.load_state_dict(state)
        with torch.no_grad():
            logits = network(images).numpy()
            network.load_state_dict(
                {key: v.half().float() if v.is_floating_point() else v for key, v in state.items()}
            )
            halved = network(images).numpy()
        golden[name] = {
            "size": size,
            "keys": shapes,
            "logits": np.round(logits.astype(np.float64), 6).tolist(),
            "fp16": np.round(halved.astype(np.float64), 6).tolist(),
        }
        spread = logits.std(axis=0).mean()
        print(f"{name}: between classes {logits.std():.3f}, between images {spread:.3f}")
        print(f"    fp16 moves logits by up to {np.abs(logits - halved).max():.5f}")
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items())
    (HERE / "own.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
