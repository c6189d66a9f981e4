"""The commands, and all they do to the console and their process."""

import time

STARTED = time.monotonic()
"""When the command began, before its modules are imported."""
