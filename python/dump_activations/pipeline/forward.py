"""Runs a batch through the model, as a whole on a GPU, in chunks on the cores of a CPU.

Shape letters: B boards in a batch, S cells (16).
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from dump_activations.chunks import Chunk
from dump_activations.dtypes import CELLS
from dump_activations.errors import DeviceError, DumpActivationsError, option
from dump_activations.model.capture import Capture
from dump_activations.pipeline.compile_cache import use_own_cache
from dump_activations.pipeline.cuda_timing import CudaStopwatch
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.precision import arithmetic, in_precision
from dump_activations.pipeline.shortage import shortage
from dump_activations.pipeline.transfer import Buffers
from dump_activations.timing import Stopwatch

# Boards in a chunk on the CPU: its temporaries stay in a core's cache and in the heap, while those
# of a whole batch are mapped afresh for each operation.
_CHUNK_ROWS = 128


class Forward:
    """Forward passes that fill buffers with activations, as a context manager.

    On the CPU each core takes chunks of the batch and runs them by itself: threads that share
    each operation would wait for one another a hundred times a batch, and longest when a core is
    busy with something else. A batch is only queued, so that no core waits for the end of one
    before the chunks of the next.

    Entering compiles the model, if the plan wants that, and so comes before a run's loop and before
    its file.

    Args:
        plan: what to run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.rows = min(plan.options.batch_size, len(plan.indices))
        on_cuda, compiled = plan.device.type == "cuda", plan.options.compile
        if compiled:
            use_own_cache()
        self._capture = Capture(
            in_precision(plan.model, plan.options.precision, plan.device),
            plan.board_tensors,
            compiled_rows=self.rows if compiled else None,
        )
        self._computing: Stopwatch | CudaStopwatch = (
            CudaStopwatch(torch.cuda.current_stream(plan.device)) if on_cuda else Stopwatch()
        )
        self.workers = 1 if on_cuda or compiled else torch.get_num_threads()
        # Chunks are for workers; without them a batch is run as a whole.
        self._chunk_rows = min(_CHUNK_ROWS, -(-self.rows // self.workers))
        self._executor: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Make ready to run.

        Raises:
            DeviceError: torch cannot compile the model on this machine.
        """
        with ExitStack() as exits:
            exits.enter_context(self._capture)
            if self._plan.options.compile:
                self._compile()
            if self.workers > 1:
                # A thread takes its number of threads from the process's setting when it begins.
                exits.callback(torch.set_num_threads, self.workers)
                self._executor = ThreadPoolExecutor(
                    self.workers,
                    thread_name_prefix="forward",
                    initializer=torch.set_num_threads,
                    initargs=(1,),
                )
                exits.callback(self._executor.shutdown, wait=True, cancel_futures=True)
            self._exits = exits.pop_all()
        return self

    def _compile(self) -> None:
        """Run a full batch of empty boards, for torch to compile the model meanwhile."""
        plan = self._plan
        tokens_BS = torch.zeros((self.rows, CELLS), dtype=torch.uint8, device=plan.device)
        buffers = {
            tensor.name: torch.empty(
                (self.rows, *tensor.shape), dtype=plan.storage_dtype, device=plan.device
            )
            for tensor in plan.board_tensors
        }
        try:
            self._fill(tokens_BS, buffers)
        except Exception as error:
            if isinstance(error, DumpActivationsError) or shortage(error):
                raise
            reason = getattr(error, "inner_exception", error)
            raise DeviceError(
                f"{option('compile')}: torch.compile fails here ({type(reason).__name__}: "
                f"{str(reason).strip().partition(chr(10))[0]}); leave it out"
            ) from error

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @property
    def seconds(self) -> float:
        """How long the device was busy; with several workers, the mean of them."""
        return self._computing.seconds / self.workers

    def start(self, tokens_BS: Tensor, buffers: Buffers) -> list[Chunk]:
        """Queue a batch, which is run as far as needed to fill the buffers.

        Args:
            tokens_BS: exponents (B, 16), any integer dtype, on the device.
            buffers: for each tensor's name, one (B, *shape) on the device.

        Returns:
            The chunks of the batch, in order. On CUDA there is nothing to wait for: what the stream
            is given next finds the buffers full.
        """
        rows = len(tokens_BS)
        if self._executor is None:
            self._run_chunk(tokens_BS, buffers)
            return [Chunk(0, rows)]
        chunks = []
        for start in range(0, rows, self._chunk_rows):
            stop = min(start + self._chunk_rows, rows)
            cut = {key: tensor[start:stop] for key, tensor in buffers.items()}
            run = self._executor.submit(self._run_chunk, tokens_BS[start:stop], cut)
            chunks.append(Chunk(start, stop, run.result))
        return chunks

    def abandon(self) -> None:
        """Drop what is queued and not begun; whoever waits for it gets an error."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _run_chunk(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        with self._computing:
            self._fill(tokens_BS, buffers)

    def _fill(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        plan = self._plan
        with torch.inference_mode(), arithmetic(plan.options.precision, plan.device):
            self._capture.run(tokens_BS, buffers)
