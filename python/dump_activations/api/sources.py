"""Types of the model and the dataset that `dump` and `stream` take."""

import os

from torch import nn

from dump_activations.dataset.dataset import StepsDataset

Init = str | os.PathLike[str] | nn.Module
"""A checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`; or an Encoder."""

Dataset = str | os.PathLike[str] | StepsDataset
"""A steps dataset, or its directory."""
