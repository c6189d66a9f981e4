"""Dump the activations of 2048 transformers, on boards sampled reproducibly from huge datasets.

`StepsDataset` reads a dataset of recorded steps, `load_encoder` a checkpoint; `dump` writes the
activations of a run to one file and `stream` hands them out a batch at a time; `ActivationsFile`
reads such a file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dump_activations import demo
    from dump_activations.api.dump import dump
    from dump_activations.api.stream import Batch, stream
    from dump_activations.api.stream_cells import stream_cells
    from dump_activations.dataset.dataset import StepsDataset
    from dump_activations.dataset.shards import Shard
    from dump_activations.errors import (
        ActivationNotImplementedError,
        ActivationUnavailableError,
        CheckpointError,
        CheckpointNotFoundError,
        DatasetError,
        DatasetNotFoundError,
        DeviceError,
        DumpActivationsError,
        DumpActivationsNote,
        DumpActivationsWarning,
        IndicesError,
        IndicesNotFoundError,
        InvalidArgumentError,
        MissingKeyError,
        OutputError,
        RowIndexError,
        StepIndexError,
        VocabularyError,
    )
    from dump_activations.model.checkpoint import load_encoder
    from dump_activations.model.config import EncoderConfig
    from dump_activations.model.encoder import Encoder
    from dump_activations.pipeline.run import Summary
    from dump_activations.report.render import write_report
    from dump_activations.storage.reading.activations_file import ActivationsFile
    from dump_activations.storage.reading.array import ActivationArray
    from dump_activations.storage.reading.cells import CellBatch

    __version__: str

__all__ = [
    "ActivationArray",
    "ActivationNotImplementedError",
    "ActivationUnavailableError",
    "ActivationsFile",
    "Batch",
    "CellBatch",
    "CheckpointError",
    "CheckpointNotFoundError",
    "DatasetError",
    "DatasetNotFoundError",
    "DeviceError",
    "DumpActivationsError",
    "DumpActivationsNote",
    "DumpActivationsWarning",
    "Encoder",
    "EncoderConfig",
    "IndicesError",
    "IndicesNotFoundError",
    "InvalidArgumentError",
    "MissingKeyError",
    "OutputError",
    "RowIndexError",
    "Shard",
    "StepIndexError",
    "StepsDataset",
    "Summary",
    "VocabularyError",
    "demo",
    "dump",
    "load_encoder",
    "stream",
    "stream_cells",
    "write_report",
]

# torch and NumPy take seconds to import, so a name's module is imported when it is first used.
_HOMES = {
    "ActivationArray": "storage.reading.array",
    "ActivationsFile": "storage.reading.activations_file",
    "Batch": "api.stream",
    "CellBatch": "storage.reading.cells",
    "Encoder": "model.encoder",
    "EncoderConfig": "model.config",
    "Shard": "dataset.shards",
    "StepsDataset": "dataset.dataset",
    "Summary": "pipeline.run",
    "dump": "api.dump",
    "load_encoder": "model.checkpoint",
    "stream": "api.stream",
    "stream_cells": "api.stream_cells",
    "write_report": "report.render",
}

# Type checkers take a module-level `__getattr__` for any name: they are to refuse a misspelt one.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "__version__":
            return import_module(f"{__name__}._rust").__version__
        if name == "demo":
            return import_module(f"{__name__}.demo")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOMES.get(name, "errors")
        return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
