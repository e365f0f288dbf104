"""Statistics of calibration samples: activations, moments, experts' tokens, Fisher information."""
