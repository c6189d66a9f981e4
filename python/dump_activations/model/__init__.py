"""The 2048 transformer: its config, its checkpoints, and what can be captured of it."""
