"""The public functions: `dump` writes a run to disk, `stream` yields its batches."""
