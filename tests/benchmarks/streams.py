"""`stream` three ways: tensors of the caller's own, borrowed ones, and where they were computed.

The caller looks at no value: what is measured is what a batch costs until it is there.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Figure, Section, alternate, ratios, timed
from setting import Setting
from workload import KEYS_50M, KEYS_DEMO

from dump_activations import Encoder, demo, load_encoder, stream
from dump_activations.options import TENSORS

_BATCH = 1024
_BOARDS_CPU, _BOARDS_GPU = 16 * _BATCH, 64 * _BATCH


def measure_cpu(setting: Setting) -> Section:
    """Stream the demo's model on the CPU, where the device's memory is the host's."""
    options = {"outputs": KEYS_DEMO, "device": "cpu", "allow_cpu": True}
    model = load_encoder(demo.CHECKPOINT)
    return _section("stream, CPU, demo checkpoint", setting, model, _BOARDS_CPU, options)


def measure_gpu(setting: Setting) -> Section:
    """Stream the 50M model, computed and stored in bf16 so that copies count, on a GPU."""
    title = "stream, GPU, 50M model"
    if not torch.cuda.is_available():
        return Section(title, "skipped: no CUDA device", [])
    options = {"outputs": KEYS_50M, "dtype": "bf16", "precision": "bf16", "device": "cuda"}
    model = load_encoder(setting.checkpoint_50m(), device="cuda")
    return _section(title, setting, model, _BOARDS_GPU, options)


def _section(
    title: str, setting: Setting, model: Encoder, boards: int, options: Mapping[str, Any]
) -> Section:
    dataset = setting.dataset(boards)
    take = partial(_take_all, model, dataset, n_samples=boards, batch_size=_BATCH, **options)
    speeds = alternate(
        {
            tensors: lambda tensors=tensors: boards / timed(partial(take, tensors=tensors))
            for tensors in TENSORS
        },
        rounds=setting.rounds,
    )
    return Section(
        title,
        f"{boards:,} boards, batch {_BATCH}, {options['outputs']}",
        [
            *(Figure.of(name, values, "boards/s") for name, values in speeds.items()),
            *(
                Figure.of(f"{name} to copy", ratios(speeds, name, "copy"), "x")
                for name in TENSORS
                if name != "copy"
            ),
        ],
    )


def _take_all(model: Encoder, dataset: Path, **options: Any) -> None:
    for _ in stream(model, dataset, **options):
        pass
    if model.tok_emb.weight.is_cuda:
        torch.cuda.synchronize()
