"""Dumps on the CPU: against each stage's own limit, and with and without what costs time.

All run in this process, with the same model, and what a dump does before its loop is not counted,
except where the conditions of a section name the whole call.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from limits import write_speed
from measure import Figure, Section, compare, timed
from setting import Setting
from workload import WAITING, Workload, workload_50m_cpu

from dump_activations import StepsDataset, _rust, stream
from dump_activations.pipeline.options import TENSORS

_LAYER = 5


def measure_stages_50m(setting: Setting) -> Section:
    """Dump a model that is slow enough on a CPU to hide everything else."""
    return _stages("50M model, CPU", workload_50m_cpu(setting), forward_share=0.97)


def measure_stages_demo(setting: Setting) -> Section:
    """Dump a model so fast that writing and reading show."""
    return _stages("Demo checkpoint, CPU", Workload(setting=setting), forward_share=None)


def _stages(title: str, work: Workload, *, forward_share: float | None) -> Section:
    dataset = StepsDataset(work.steps)
    indices = dataset.sample_indices(work.boards)
    nbytes = work.dump().bytes_written
    rounds = compare(
        {
            "boards alone": lambda: work.boards / timed(partial(dataset.read_boards, indices)),
            "plain forward loop": work.forward_speed,
            "--no-write": partial(work.dump_speed, write=False),
            "write alone": lambda: work.boards * write_speed(work.target.parent, nbytes) / nbytes,
            "dump": work.dump_figures,
            "baseline": work.script_speed,
        },
        rounds=work.setting.rounds,
    )
    waiting = rounds.pop(WAITING)
    share = {} if forward_share is None else {"at_least": forward_share}
    return Section(
        title,
        str(work),
        [
            *rounds.figures("boards/s"),
            rounds.ratio("--no-write", "plain forward loop", **share),
            rounds.ratio("dump", "--no-write", **share),
            rounds.ratio("dump", "baseline"),
            Figure.of(WAITING, waiting, "x", at_most=0.05),
        ],
    )


def measure_stats_demo(setting: Setting) -> Section:
    """Take statistics of a model so fast that every pass over its activations shows."""
    return _stats(Workload(setting=setting), at_most=1.10)


def measure_stats_50m(setting: Setting) -> Section:
    """Take statistics of a model of a size that is studied."""
    return _stats(workload_50m_cpu(setting), at_most=1.01)


def _stats(work: Workload, *, at_most: float) -> Section:
    runs = {name: partial(work.dump, stats=name == "with") for name in ("with", "without")}
    return _cost("Statistics", work, runs, at_most=at_most)


def measure_digests(setting: Setting) -> Section:
    """Take digests, and counts of NaN and infinite values."""
    work = Workload(setting=setting)

    def without() -> None:
        with undigested():
            work.dump()

    runs = {"with": work.dump, "without": without}
    return _cost("Digests and counts", work, runs, at_most=1.03)


def _cost(
    title: str, work: Workload, runs: Mapping[str, Callable[[], object]], *, at_most: float
) -> Section:
    """Compare calls of `dump`, from call to return, by wall and processor time."""

    def weighed(name: str) -> dict[str, float]:
        before = time.process_time()
        seconds = timed(runs[name])
        return {name: seconds, f"{name}, processor": time.process_time() - before}

    rounds = compare({name: partial(weighed, name) for name in runs}, rounds=work.setting.rounds)
    with_cost, without = runs
    return Section(
        title,
        f"{work}, CPU. dump() from call to return",
        [
            *rounds.figures("s"),
            rounds.ratio(with_cost, without, at_most=at_most),
            # Steadier where other processes take their share of the machine.
            rounds.ratio(f"{with_cost}, processor", f"{without}, processor"),
        ],
    )


@contextmanager
def undigested() -> Iterator[None]:
    """Write every span by a plain pwrite inside the context, so that no byte is looked at."""
    memory = threading.local()

    def write_span(
        fd: int, direct_fd: int | None, offset: int, data: np.ndarray, _dtype: str
    ) -> tuple[int, int, int]:
        if direct_fd is None or offset % 4096 or data.nbytes % 4096:
            return os.pwrite(fd, data, offset) and (0, 0, 0)
        if data.ctypes.data % 512:
            if not hasattr(memory, "page_aligned"):
                memory.page_aligned = np.frombuffer(mmap.mmap(-1, 4 << 20), np.uint8)
            aligned = memory.page_aligned[: data.nbytes]
            aligned[:] = data
            data = aligned
        return os.pwrite(direct_fd, data, offset) and (0, 0, 0)

    with mock.patch.object(_rust, "write_span", write_span):
        yield


def measure_keys(setting: Setting) -> Section:
    """Compare the seconds of keys and layers of the 50M model."""
    work = workload_50m_cpu(setting)
    config = work.model.config
    pattern_nbytes = (
        work.boards * config.num_hidden_layers * config.num_attention_heads * 16 * 16 * 4
    )

    def seconds(outputs: str = "layer_outputs", **options: Any) -> float:
        return work.boards / work.dump_speed(outputs=outputs, **options)

    def pattern_written() -> float:
        return pattern_nbytes / write_speed(work.target.parent, pattern_nbytes)

    both = partial(seconds, "layer_outputs,attn_pattern")
    rounds = compare(
        {
            "stacked": seconds,
            "split": partial(seconds, split_layers=True),
            "with attn_pattern": both,
            "attn_pattern written alone": pattern_written,
            "one layer, not written": partial(seconds, layers=[_LAYER], write=False),
            "plain loop up to the layer": lambda: timed(partial(_first_layers, work)),
        },
        rounds=setting.rounds,
    )
    pairs = zip(rounds["stacked"], rounds["attn_pattern written alone"], strict=True)
    rounds["the two apart"] = [sum(pair) for pair in pairs]
    return Section(
        "Keys and layers, CPU",
        f"layer_outputs; {work}",
        [
            *rounds.figures("s"),
            rounds.ratio("with attn_pattern", "the two apart", at_most=1.1),
            rounds.ratio("one layer, not written", "plain loop up to the layer", at_most=1.03),
            rounds.ratio("stacked", "split", title="speed of split to stacked", at_least=0.95),
        ],
    )


def _first_layers(work: Workload) -> None:
    """Run the blocks up to the chosen layer on one batch after another, and nothing else."""
    model = work.model
    with torch.inference_mode():
        for tokens_BS in work.tokens_NS.split(work.batch):
            hidden_BSH = model.tok_emb(tokens_BS.long()) + model.pos_emb()
            for block in model.blocks[: _LAYER + 1]:
                hidden_BSH = block(hidden_BSH)


def measure_stream(setting: Setting) -> Section:
    """Stream the demo's model on the CPU, where the device's memory is the host's."""
    return stream_section("stream, CPU", Workload(setting=setting))


def stream_section(title: str, work: Workload, **options: Any) -> Section:
    """Take all batches and look at no value: a batch costs this much until it is there."""

    def take(tensors: str) -> None:
        for _ in stream(
            work.model,
            work.steps,
            outputs=work.keys,
            n_samples=work.boards,
            batch_size=work.batch,
            dtype=work.dtype,
            device=work.device,
            allow_cpu=work.device == "cpu",
            tensors=tensors,
            **options,
        ):
            pass
        if work.device == "cuda":
            torch.cuda.synchronize()

    rounds = compare(
        {way: lambda way=way: work.boards / timed(partial(take, way)) for way in TENSORS},
        rounds=work.setting.rounds,
    )
    ratios = [rounds.ratio(way, "copy") for way in TENSORS if way != "copy"]
    return Section(title, str(work), [*rounds.figures("boards/s"), *ratios])
