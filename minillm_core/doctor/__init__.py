"""Why two checkpoints differ: both run stage by stage, and known faults are tried until one explains the difference."""
