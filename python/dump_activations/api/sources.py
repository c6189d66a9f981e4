"""What a run may be given as its model and its dataset."""

import os

from torch import nn

from dump_activations.dataset.dataset import StepsDataset

Init = str | os.PathLike[str] | nn.Module
"""A checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`; or an Encoder."""

Dataset = str | os.PathLike[str] | StepsDataset
"""A steps dataset, or its directory."""
