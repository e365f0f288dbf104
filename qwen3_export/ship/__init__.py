"""Shipping: a checkpoint's bits into ONNX, GGUF and TensorRT. No calibration, no torch."""
