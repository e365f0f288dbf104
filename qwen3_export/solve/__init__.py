"""Quantization: calibration rows through the block loop, a method's codes to disk. Needs torch."""
