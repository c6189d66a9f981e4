"""What a run may be given as its model and its dataset."""

import os

from dump_activations.dataset.dataset import StepsDataset
from dump_activations.model.encoder import Encoder

Init = str | os.PathLike[str] | Encoder
"""A checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`; or a model."""

Dataset = str | os.PathLike[str] | StepsDataset
"""A steps dataset, or its directory."""
