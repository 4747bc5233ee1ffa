"""Export the network of a model folder that has no ONNX file, with PyTorch, in a child process."""
