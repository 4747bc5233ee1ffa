"""Make the golden pixels of test_folders_pixels.py: what transformers' and timm's own preprocessing
makes of images of odd sizes.

    pip install torch transformers pillow              (torchvision must not be there)
    python tests/golden/make_processors.py transformers

    pip install 'transformers<5' pillow numpy          (PyTorch is not needed)
    python tests/golden/make_processors.py transformers4

    pip install torch torchvision timm transformers
    python tests/golden/make_processors.py timm
    python tests/golden/make_processors.py torchvision

Made with transformers 5.24.0 and 4.57.6 (their Pillow processors), timm 1.0.31, torchvision 0.28.0,
Pillow 13.0.0, PyTorch 2.13.0. Both versions of transformers agree on all cases that both know.
`torchvision` is for processors of transformers that do not use Pillow. `processors/LIBRARY.npz`
holds, for each NAME of `processors/cases.json`:

- `NAME/0`, `NAME/1`, …: uint8, `odd_images.sampled` of the prepared `odd_image` of each size,
  before rescaling and normalisation;
- `NAME/black`, `NAME/white`: float32 (3,), what a black and a white image become in the end.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from odd_images import SIZES, odd_image, sampled  # noqa: E402

CASES: dict[str, dict[str, Any]] = json.loads((HERE / "processors/cases.json").read_text())


def transformers_arrays(case: dict[str, Any]) -> dict[str, Any]:
    """What the class of a `preprocessor_config.json` makes of the images."""
    import transformers

    keys = dict(case["preprocessor"])
    name = keys.pop("image_processor_type").removesuffix("Fast")
    if transformers.__version__ < "5":
        from transformers.models.deprecated.efficientformer import image_processing_efficientformer
        from transformers.models.deprecated.vit_hybrid import image_processing_vit_hybrid

        homes = (transformers, image_processing_efficientformer, image_processing_vit_hybrid)
        kind = next(getattr(home, name) for home in homes if hasattr(home, name))
    else:
        kind = getattr(transformers, name + "Pil")
    plain = kind(**keys | {"do_rescale": False, "do_normalize": False, "include_top": False})
    whole = kind(**keys)

    def prepared(processor: Any, image: np.ndarray) -> np.ndarray:
        out = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        return np.asarray(out).transpose(1, 2, 0)

    return _arrays(lambda image: prepared(plain, image), lambda image: prepared(whole, image))


def torchvision_arrays(case: dict[str, Any]) -> dict[str, Any]:
    """What a class that works with floats makes of the images: rounded to levels."""
    import transformers

    keys = dict(case["preprocessor"])
    kind = getattr(transformers, keys.pop("image_processor_type").removesuffix("Fast"))
    plain, whole = kind(**keys | {"do_normalize": False}), kind(**keys)

    def prepared(processor: Any, image: np.ndarray) -> np.ndarray:
        out = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
        return out.numpy().transpose(1, 2, 0)

    def levels(image: np.ndarray) -> np.ndarray:
        return np.round(prepared(plain, image) * 255).astype(np.uint8)

    return _arrays(levels, lambda image: prepared(whole, image))


def timm_arrays(case: dict[str, Any]) -> dict[str, Any]:
    """What timm's evaluation transforms make of the images."""
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=case["config"]["pretrained_cfg"])
    plain = create_transform(**config, normalize=False)
    whole = create_transform(**config)
    return _arrays(
        lambda image: plain(Image.fromarray(image)).numpy().transpose(1, 2, 0),
        lambda image: whole(Image.fromarray(image)).numpy().transpose(1, 2, 0),
    )


def _arrays(pixels: Any, whole: Any) -> dict[str, Any]:
    arrays = {}
    for number, (width, height) in enumerate(SIZES):
        found = pixels(odd_image(width, height))
        assert found.dtype == np.uint8, found.dtype
        arrays[str(number)] = sampled(found)
    for name, level in (("black", 0), ("white", 255)):
        image = whole(np.full((64, 64, 3), level, np.uint8))
        arrays[name] = image[image.shape[0] // 2, image.shape[1] // 2].astype(np.float32)
    return arrays


def import_timm() -> None:
    """Import timm though torchvision's compiled operators do not load beside this PyTorch. The
    transforms are Pillow's and need none of them, so their names alone are declared.
    """
    import torch

    declared = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
            declared.define(f"{missing[1]}(Tensor any) -> Tensor")
        else:
            KEPT.append(declared)
            return


KEPT: list[object] = []
"""What is declared is undone with the object that declared it."""


MAKERS = {
    "transformers": transformers_arrays,
    "transformers4": transformers_arrays,
    "torchvision": torchvision_arrays,
    "timm": timm_arrays,
}


def main() -> None:
    library = sys.argv[1]
    if library in ("timm", "torchvision"):
        import_timm()
    arrays = {}
    for name, case in CASES.items():
        if case.get("library", "transformers") == library:
            made = MAKERS[library](case)
            arrays |= {f"{name}/{key}": value for key, value in made.items()}
    file = HERE / f"processors/{library}.npz"
    np.savez_compressed(file, **arrays)
    print(file, file.stat().st_size, len(arrays))


if __name__ == "__main__":
    main()
