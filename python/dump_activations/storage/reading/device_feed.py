"""Batches of cells on their way to a CUDA device.

While a batch is used the next is copied, from pinned memory and on a stream of its own.
"""

from collections.abc import Generator

import torch

from dump_activations.storage.reading.cell_batch import KeyedCells


def on_device(
    batches: Generator[KeyedCells, None, None], device: torch.device
) -> Generator[KeyedCells, None, None]:
    """Yield the batches with their values on a device, for the current stream of the caller.

    Args:
        batches: in pinned memory.
        device: a CUDA device.
    """
    stream = torch.cuda.Stream(device)
    ahead = None
    try:
        for batch in batches:
            before, ahead = ahead, _start(batch, device, stream)
            if before is not None:
                yield _finish(*before, device)
        if ahead is not None:
            yield _finish(*ahead, device)
    finally:
        if ahead is not None:  # what was not taken is the caller's stream's to use again
            _finish(*ahead, device)
        batches.close()


def _start(
    batch: KeyedCells, device: torch.device, stream: torch.cuda.Stream
) -> tuple[KeyedCells, torch.cuda.Event]:
    """Queue the copy of a batch, behind what the caller's stream does with that memory as yet."""
    with torch.cuda.device(device):
        values = {
            name: torch.empty(host.shape, dtype=host.dtype, device=device)
            for name, host in batch.values.items()
        }
        stream.wait_stream(torch.cuda.current_stream(device))
        copied = torch.cuda.Event()
        with torch.cuda.stream(stream):
            for name, host in batch.values.items():
                values[name].copy_(host, non_blocking=True)
            copied.record(stream)
    return batch._replace(values=values), copied


def _finish(batch: KeyedCells, copied: torch.cuda.Event, device: torch.device) -> KeyedCells:
    """Let the caller's stream wait for the copy."""
    torch.cuda.current_stream(device).wait_event(copied)
    return batch
