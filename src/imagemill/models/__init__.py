"""Models: published checkpoints in, ONNX bundles out."""
