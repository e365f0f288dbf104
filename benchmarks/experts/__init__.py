"""A mixture of experts of real width: ONNX export and two runtimes."""
