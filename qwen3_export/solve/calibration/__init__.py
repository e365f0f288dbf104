"""What calibration samples tell: activations, moments, experts' tokens, the importance of outputs."""
