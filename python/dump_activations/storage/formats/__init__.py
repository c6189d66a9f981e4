"""The file formats: where every byte lies, known before the first is written."""
