"""A mixture of experts of real width through the ONNX export: memory, time, and two runtimes that run the folder."""
