"""Model folders: what a folder of transformers, optimum or timm says becomes a bundle."""
