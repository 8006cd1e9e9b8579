"""From text to batches: corpora, token files, and batches as a pure function of (seed, step)."""
