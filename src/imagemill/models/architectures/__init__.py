"""Networks built from a checkpoint's arrays as ONNX graphs."""
