"""Dump the activations of 2048 transformers, on boards drawn reproducibly from huge pools.

`StepsDataset` reads a pool of recorded steps, `load_encoder` a checkpoint; `dump` writes the
activations of a run to one file and `stream` hands them out a batch at a time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dump_activations.checkpoint import load_encoder
    from dump_activations.dataset import StepsDataset
    from dump_activations.pipeline import dump, stream

__all__ = ["StepsDataset", "dump", "load_encoder", "stream"]

# torch and NumPy take seconds to import, so what needs them is imported when it is first used.
_HOMES = {
    "StepsDataset": "dump_activations.dataset",
    "dump": "dump_activations.pipeline",
    "load_encoder": "dump_activations.checkpoint",
    "stream": "dump_activations.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("dump-activations")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
