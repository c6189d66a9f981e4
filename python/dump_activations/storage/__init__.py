"""Output files: their formats, how they are written, how they are read back."""
