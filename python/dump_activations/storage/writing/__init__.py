"""Writing one file from many threads, safe against kills."""
