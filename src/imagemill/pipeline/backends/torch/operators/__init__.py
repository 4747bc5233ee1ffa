"""ONNX operators in PyTorch: the ones that image classifiers use, for opset 7 to 28.

A function per operator looks at a node's attributes and constant inputs once, and returns the call
that computes it. Shapes are static, so whatever depends on shapes alone is computed before the
first image.
"""

from imagemill.pipeline.backends.torch.operators import elementwise, layers, layout
from imagemill.pipeline.backends.torch.operators.node import (
    DTYPES,
    OPERATORS,
    Call,
    Node,
    Tensor,
    Unsupported,
    bind,
)

__all__ = [
    "DTYPES",
    "OPERATORS",
    "Call",
    "Node",
    "Tensor",
    "Unsupported",
    "bind",
    "elementwise",
    "layers",
    "layout",
]
