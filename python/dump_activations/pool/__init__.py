"""Pools of recorded steps: shards, step indices, boards."""
