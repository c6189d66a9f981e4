"""The commands, and all they do to the console and their process."""
