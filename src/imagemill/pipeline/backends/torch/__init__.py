"""The PyTorch backend: a small interpreter of a bundle's ONNX graph, on NVIDIA GPUs and the CPU."""
