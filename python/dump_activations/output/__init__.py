"""One writer for all file formats: every byte's place is known before the first is written."""
