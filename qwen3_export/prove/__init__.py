"""Proof: measures an artifact's drift from the original and its latency, and judges limits."""
