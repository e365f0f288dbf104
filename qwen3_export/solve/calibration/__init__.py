"""What calibration rows tell: activations, moments, experts' tokens, the importance of outputs."""
