"""A run from its plan to its batches of activations."""
