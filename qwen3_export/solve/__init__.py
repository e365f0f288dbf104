"""Quantization: calibration samples through the block loop, a method's codes to disk. Needs torch."""
