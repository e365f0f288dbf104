"""Proof: an artifact's logits against the original's, its latency, and the verdict."""
