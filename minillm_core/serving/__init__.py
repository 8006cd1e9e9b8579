"""Serving a checkpoint: the playground's page, and what it computes."""
