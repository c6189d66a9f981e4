"""`python -m dump_activations` is the command `dump-activations`."""

from dump_activations.commands.dump import run

run()
