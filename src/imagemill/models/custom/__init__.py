"""Classifiers of any make: an ONNX file and its card become a bundle."""
