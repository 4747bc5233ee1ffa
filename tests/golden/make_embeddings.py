"""Compute the golden embeddings: what published implementations hand to their classifier, for the
weights and images of recipe.py.

    pip install torch timm torchvision pretrainedmodels
    python tests/golden/make_embeddings.py

Checks on the way that the same forward pass gives the logits noted here before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pretrainedmodels
import recipe
import timm
import torch
import torchvision
from torch import nn

HERE = Path(__file__).parent


def timm_embedding(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """timm's own way: `forward_features`, then the head without its classifier."""
    return network.forward_head(network.forward_features(x), pre_logits=True)


def torchvision_embedding(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """torchvision's own way: its feature extractor, to the node `flatten`."""
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(network, ["flatten"])(x)["flatten"]


def cadene_embedding(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The lines of its `logits` method up to `last_linear`."""
    pooled = network.avg_pool(network.features(x))
    return pooled.view(pooled.size(0), -1)


NETWORKS = {
    "timm_resnext101_32x4d": (
        lambda: timm.create_model("resnext101_32x4d", pretrained=False),
        timm_embedding,
    ),
    "torchvision_resnext50_32x4d": (
        lambda: torchvision.models.resnext50_32x4d(weights=None),
        torchvision_embedding,
    ),
    "cadene_resnext101_32x4d": (
        lambda: pretrainedmodels.resnext101_32x4d(num_classes=1000, pretrained=None),
        cadene_embedding,
    ),
}


def main() -> None:
    """Compute and write them all."""
    x = torch.from_numpy(recipe.normalised(recipe.pixels()))
    for name, (make, embed) in NETWORKS.items():
        network = make().eval()
        state = {
            key: torch.from_numpy(recipe.tensor(key, tuple(value.shape)))
            for key, value in network.state_dict().items()
        }
        network.load_state_dict(state)
        with torch.no_grad():
            logits, embedding = network(x).numpy(), embed(network, x).numpy()
        np.testing.assert_allclose(logits, np.load(HERE / f"{name}.logits.npy"), rtol=0, atol=1e-3)
        np.save(HERE / f"{name}.embedding.npy", embedding)
        print(
            name,
            embedding.shape,
            embedding.dtype,
            float(embedding.std()),
            float(embedding.std(axis=0).mean()),
        )


if __name__ == "__main__":
    main()
