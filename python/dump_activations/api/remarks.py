"""What a run finds at its target and beside it, and what it says of that and of its values."""

import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dump_activations.dtypes import LABEL_PREFIX
from dump_activations.errors import OutputError, option, switch, warn
from dump_activations.pipeline.board_feed import read_batch
from dump_activations.pipeline.group import Group
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.summary import STAGES, Summary
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.output_file import OutputFile
from dump_activations.storage.writing.work import Existing
from dump_activations.text import size_text


def beginning(file: OutputFile, existing: Existing | None, n: int) -> Iterator[str]:
    """Say what a run finds at its target and beside it."""
    if file.unusable:
        yield f"{file.partial} is started anew: {file.unusable}"
    if file.resumed_rows:
        yield f"going on with {file.partial}, which has {file.resumed_rows:,} of {n:,} boards"
    if existing:
        holds = size_text(existing.size)
        boards = existing.metadata.get("n_samples", "")
        if boards.isdecimal() and len(boards) < 20:
            holds += f", {int(boards):,} boards"
        yield f"{file.target} ({holds}) is replaced when the new file is whole"


def nothing_done(
    group: Group, plan: Plan, path: Path, existing: Existing, started: float
) -> Summary:
    """Sum up a run whose file was complete already."""
    return Summary(
        output=path,
        boards=0,
        boards_by_rank=(0,) * group.place.size,
        resumed_boards=len(plan.indices),
        bytes_written=existing.size,
        seconds=0.0,
        setup_seconds=time.perf_counter() - started,
        commit_seconds=0.0,
        stage_seconds=dict.fromkeys(STAGES, 0.0),
        waiting_seconds=0.0,
        nonfinite=_counted(existing.digests),
    )


def check_resumed_boards(file: OutputFile, plan: Plan) -> None:
    """Refuse to go on where the dataset's rows are no longer those of the batch resumed last."""
    last = file.last_resumed
    if last is None:
        return
    rows, digests = last
    indices = plan.indices[rows.start : rows.stop]
    tensors = read_batch(plan.dataset, plan.labels, indices, first_row=rows.start).tensors
    if any(
        zlib.crc32(bytes_of(tensor).data) != digests[name].crc32 for name, tensor in tensors.items()
    ):
        raise OutputError(
            f"{file.partial} holds other boards than {plan.dataset.path} has now; restore the "
            f"dataset, or drop the file with {switch('overwrite')}"
        )


def nonfinite(digests: Mapping[str, Digest]) -> dict[str, dict[str, int]]:
    """Count what is not finite in each tensor that has any, with a warning for each."""
    counts = _counted(digests)
    for name, count in counts.items():
        warn(
            f"{name}: {count['nan']:,} NaN and {count['inf']:,} infinite values were stored; "
            f"infinite ones come from an overflow where {option('dtype')} is fp16"
        )
    return counts


def _counted(digests: Mapping[str, Digest]) -> dict[str, dict[str, int]]:
    return {
        name: {"nan": digest.nan, "inf": digest.inf}
        for name, digest in digests.items()
        # Labels are as the dataset has them.
        if (digest.nan or digest.inf) and not name.startswith(LABEL_PREFIX)
    }


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """View a contiguous host tensor as its bytes, uint8 (nbytes,)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
