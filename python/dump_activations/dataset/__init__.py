"""Datasets of recorded steps: shards, step indices, boards."""
