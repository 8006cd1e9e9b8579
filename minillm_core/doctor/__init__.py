"""The doctor: runs two checkpoints stage by stage, and finds the known faults that explain why they differ."""
