"""`python -m dump_activations` is the command `dump-activations`."""

import sys

from dump_activations.cli import main

sys.exit(main())
