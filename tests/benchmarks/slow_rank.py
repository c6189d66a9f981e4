"""Dumps nothing, as one of several processes of which the last is half as fast; prints its times.

A script for torchrun: `slow_rank.py CHECKPOINT DATASET KEYS BOARDS BATCH`.
"""

import json
import os
import sys
import time

import torch

from dump_activations import dump
from dump_activations.pipeline.forward import Forward

_SLOW = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def main() -> None:
    checkpoint, dataset, keys, boards, batch = sys.argv[1:]
    times: list[tuple[float, float]] = []
    done = 0
    fill = Forward._fill

    def slowed(self: Forward, tokens_BS: torch.Tensor, buffers: dict[str, torch.Tensor]) -> None:
        nonlocal done
        started = time.perf_counter()
        fill(self, tokens_BS, buffers)
        if _SLOW:
            time.sleep(time.perf_counter() - started)
        done += len(tokens_BS)
        times.append((started, time.perf_counter()))

    Forward._fill = slowed
    dump(
        checkpoint,
        dataset,
        outputs=keys,
        n_samples=int(boards),
        batch_size=int(batch),
        device="cpu",
        allow_cpu=True,
        write=False,
    )
    # The clock is the machine's: the same in every process.
    print(json.dumps({"first": times[0][0], "last": times[-1][1], "boards": done}), flush=True)


main()
