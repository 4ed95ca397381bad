"""Log-probabilities for trainers: padded batches in, each distinct token computed once, with or without gradients."""
