"""One block solved as it streams by: forward pass, folds, embedding and head."""
