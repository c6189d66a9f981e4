"""Runs a batch through the model, as a whole on a GPU, in pieces on the cores of a CPU.

Shape letters: B boards in a batch, S cells (16).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from dump_activations.activations import BoardActivation
from dump_activations.capture import Capture
from dump_activations.encoder import Encoder
from dump_activations.options import Options
from dump_activations.precision import arithmetic
from dump_activations.transfer import Buffers

# Boards in a piece on the CPU: its temporaries stay in a core's cache and in the heap, while those
# of a whole batch are mapped afresh for each operation.
_PIECE_ROWS = 128


class Forward:
    """Forward passes that fill buffers with activations, as a context manager.

    On the CPU each core takes pieces of the batch and runs them by itself: threads that share
    each operation would wait for one another a hundred times a batch, and longest when a core is
    busy with something else.

    Args:
        model: in eval mode, on `device`.
        activations: what to capture.
        options: the arithmetic, and whether to compile.
        device: where the model runs.
        rows: boards in a full batch.
    """

    def __init__(
        self,
        model: Encoder,
        activations: Sequence[BoardActivation],
        *,
        options: Options,
        device: torch.device,
        rows: int,
    ) -> None:
        self._capture = Capture(model, activations, compiled_rows=rows if options.compile else None)
        self._precision = options.precision
        self._device = device
        self._cores = 1 if device.type == "cuda" or options.compile else torch.get_num_threads()
        self._piece_rows = rows if self._cores == 1 else min(_PIECE_ROWS, -(-rows // self._cores))
        self._exits = ExitStack()
        self._workers: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._exits.enter_context(self._capture)
        if self._cores > 1:
            # A thread takes its number of threads from the process's setting when it begins.
            self._exits.callback(torch.set_num_threads, self._cores)
            self._workers = ThreadPoolExecutor(
                self._cores,
                thread_name_prefix="forward",
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
            self._exits.callback(self._workers.shutdown, wait=True, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def run(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        """Run a batch as far as needed and fill the buffers; on CUDA the work is only queued.

        Args:
            tokens_BS: exponents (B, 16), any integer dtype, on the host; pinned for CUDA.
            buffers: for each activation's key, a tensor (B, *shape) on the device.
        """
        if self._workers is None:
            self._run_piece(tokens_BS, buffers)
            return
        # The matmul precision is the process's: set here, each piece finds and leaves it as it is.
        with arithmetic(self._precision, self._device):
            self._run_pieces(self._workers, tokens_BS, buffers)

    def _run_pieces(self, workers: ThreadPoolExecutor, tokens_BS: Tensor, buffers: Buffers) -> None:
        pieces = [
            slice(i, i + self._piece_rows) for i in range(0, len(tokens_BS), self._piece_rows)
        ]
        runs = [
            workers.submit(
                self._run_piece,
                tokens_BS[piece],
                {key: tensor[piece] for key, tensor in buffers.items()},
            )
            for piece in pieces
        ]
        for run in runs:
            run.result()

    def _run_piece(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        with torch.inference_mode(), arithmetic(self._precision, self._device):
            self._capture.run(tokens_BS.to(self._device, non_blocking=True), buffers)
