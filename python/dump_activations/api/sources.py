"""What a run may be given as its model and its pool."""

import os

from dump_activations.model.encoder import Encoder
from dump_activations.pool.dataset import StepsDataset

Init = str | os.PathLike[str] | Encoder
"""A checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`; or a model."""

Pool = str | os.PathLike[str] | StepsDataset
"""A steps dataset, or its directory."""
