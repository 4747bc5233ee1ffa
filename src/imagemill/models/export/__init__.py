"""Export the network of a model folder that has no ONNX file, with PyTorch, in a child process."""

from imagemill.models.export.cached import onnx_for, weights_of

__all__ = ["onnx_for", "weights_of"]
