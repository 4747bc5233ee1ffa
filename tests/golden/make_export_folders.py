"""Make the model folders of tests/test_export_model.py, which have safetensors and no ONNX file:

    PYTHONPATH=tests/golden/torchvision_names python tests/golden/make_export_folders.py

(without PYTHONPATH where torchvision fits PyTorch). They were made with PyTorch 2.13.0,
transformers 5.24.0 and timm 1.0.31, on a CPU.

- `export/transformers`: a ViT of 10 classes with random weights, saved by `save_pretrained`;
- `export/timm`: a ConvNeXt of 10 classes with random weights, saved by `save_for_hf`;
- `export/NAME.logits.npy`: float32 (4, 10), the network's own answers to `images()`.

Both prepare an image of 32 × 32 pixels alike: (pixel / 255 - 0.5) / 0.5.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "export"


def pixels() -> np.ndarray:
    """Return four random images: uint8 (4, 32, 32, 3)."""
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


def images() -> np.ndarray:
    """Return these images as networks get them: float32 (4, 3, 32, 32)."""
    planes = pixels().transpose(0, 3, 1, 2)
    return np.ascontiguousarray((planes / np.float32(255) - np.float32(0.5)) / np.float32(0.5))


def main() -> None:
    import timm
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label={number: f"class {number}" for number in range(10)},
    )
    vit = transformers.ViTForImageClassification(config)
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    convnext = timm.create_model("convnext_atto", num_classes=10, **arguments)
    prepared = {"input_size": [3, 32, 32], "crop_pct": 1, "mean": [0.5] * 3, "std": [0.5] * 3}
    for network in (vit, convnext):
        network.eval()
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 or "pos" in name or "token" in name:
                torch.nn.init.normal_(parameter, std=0.5)  # fresh ones are 0 or 1, and hide errors
            else:
                torch.nn.init.normal_(parameter, std=0.2)

    shutil.rmtree(HERE, ignore_errors=True)
    vit.save_pretrained(HERE / "transformers")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(HERE / "transformers")
    timm.models.save_for_hf(
        convnext,
        HERE / "timm",
        model_config={"pretrained_cfg": convnext.pretrained_cfg | prepared},
        model_args=arguments,
        safe_serialization=True,
    )
    with torch.no_grad():
        batch = torch.from_numpy(images())
        np.save(HERE / "transformers.logits.npy", vit(batch).logits.numpy())
        np.save(HERE / "timm.logits.npy", convnext(batch).numpy())


if __name__ == "__main__":
    main()
