"""Solving one block as it streams by: its forward pass, folds, and the ends of the model."""
