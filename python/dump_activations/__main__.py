"""The processes of the commands: `python -m dump_activations` is `dump-activations`.

Everything is imported inside `_run`, so that Ctrl-C prints a line from the first moment on.
"""

from importlib import import_module
from typing import NoReturn


def run_dump() -> NoReturn:
    """Run `dump-activations` and end the process."""
    _run("dump")


def run_inspect() -> NoReturn:
    """Run `inspect-activations` and end the process."""
    _run("inspect")


def _run(command: str) -> NoReturn:
    try:
        code = import_module(f"dump_activations.commands.{command}").main()
    except KeyboardInterrupt as interrupt:
        from dump_activations.commands.process import interrupted

        code = interrupted(interrupt)
    from dump_activations.commands.process import leave

    leave(code)


if __name__ == "__main__":
    run_dump()
