"""The two entrances: `dump` writes a run to a file, `stream` yields its batches."""

import os
from pathlib import Path
from typing import Any

from dump_activations.api.dumping import dump_to_file, preview
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.model.encoder import Encoder
from dump_activations.options import DEFAULT_OUTPUT, DumpOptions
from dump_activations.pipeline.summary import Summary

__all__ = ["dump", "preview"]


def dump(
    init_or_model: str | os.PathLike[str] | Encoder,
    dataset_or_path: str | os.PathLike[str] | StepsDataset,
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    **options: Any,
) -> Summary:
    """Run boards through a model and write the asked-for activations to one file."""
    return dump_to_file(init_or_model, dataset_or_path, Path(output), DumpOptions(**options))
