"""Compares ONNX folders of any tool, by a judge without code of ours."""
