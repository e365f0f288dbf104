"""Slices of large models on a small machine, measured beside the predictions of `plan`."""
