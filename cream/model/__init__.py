"""One model: its folder, its weights, its batches, its log-probabilities."""
