"""Breaks whole runs of the command: kills, signals, failing system calls, hostile files."""
