"""Names of an output file's tensors, where more than one room has to know them."""

LABEL_PREFIX = "labels/"
"""Stands before the name of a label."""
