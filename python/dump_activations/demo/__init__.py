"""The checkpoint and the dataset of `--demo`; README.md in this directory describes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dump_activations.model.activations import Layers
    from dump_activations.pipeline.run import Summary

CHECKPOINT = Path(__file__).parent / "checkpoint"
DATASET = Path(__file__).parent / "dataset"


def dump(
    output: str | os.PathLike[str] = "activations.safetensors",
    *,
    outputs: str | Sequence[str] = ("final_hidden",),
    layers: Layers | None = None,
    n_samples: int = 1024,
    labels: str | Sequence[str] = (),
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    stats: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Dump activations of the demo, on a GPU where there is one, and otherwise on the CPU.

    `dump_activations.dump(demo.CHECKPOINT, demo.DATASET, ...)` takes all other options.

    Args:
        output: the output's path; its suffix, `.safetensors`, `.pt` or `.npz`, selects the format.
        outputs: activation keys, globs of them ("attn_*") or names of TransformerLens hooks.
        layers: layers to keep, as Python indexes them: -1, [0, 3] or "0,3,-1,4:8".
        n_samples: steps to sample of the 14,138.
        labels: labels to store with the boards, globs of them, or "all" for every field.
        dtype: storage dtype of floating-point tensors.
        stats: store statistics of each activation, stats/KEY/mean and others.
        overwrite: replace output of other work.

    Returns:
        The work that was done, and how long each stage was busy.

    Raises:
        DumpActivationsError: one line that names what is wrong and the way out.
    """
    import torch

    from dump_activations.api.dump import dump as run

    return run(
        CHECKPOINT,
        DATASET,
        output,
        outputs=outputs,
        layers=layers,
        n_samples=n_samples,
        labels=labels,
        dtype=dtype,
        stats=stats,
        overwrite=overwrite,
        device="cuda" if torch.cuda.is_available() else "cpu",
        allow_cpu=True,
    )
