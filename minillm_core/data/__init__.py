"""Text to batches: corpora, token files, and the batch of a step as a pure function of (seed, step)."""
