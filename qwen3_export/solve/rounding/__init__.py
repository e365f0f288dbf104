"""Grids, scales and rounding to nearest, compiled where that pays."""
