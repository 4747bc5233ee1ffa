"""ONNX operators in PyTorch: the ones that image classifiers use, for opset 7 to 28.

A function per operator looks at a node's attributes and constant inputs once, and returns the call
that computes it. Shapes are static, so whatever depends on shapes alone is computed before the
first image.
"""

from imagemill.pipeline.backends.torch.operators import elementwise as elementwise
from imagemill.pipeline.backends.torch.operators import layers as layers
from imagemill.pipeline.backends.torch.operators import layout as layout
