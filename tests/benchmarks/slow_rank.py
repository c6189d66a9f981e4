"""Dumps as one of two processes, of which the second is half as fast, and prints its times.

`slow_rank.py CHECKPOINT DATASET OUTPUT KEYS BOARDS BATCH RANK`
"""

import json
import sys
import time
from pathlib import Path

from dump_activations.api.dump import dump_to_file
from dump_activations.options import DumpOptions
from dump_activations.storage.writing.shards import Place


def main() -> None:
    checkpoint, dataset, output, keys, boards, batch, rank = sys.argv[1:]
    times: list[float] = []

    def note_time(_done: int, _of: int) -> None:
        if times and rank == "1":
            time.sleep(time.perf_counter() - times[-1])
        times.append(time.perf_counter())

    options = DumpOptions(
        outputs=keys,
        n_samples=int(boards),
        batch_size=int(batch),
        device="cpu",
        allow_cpu=True,
        progress=note_time,
    )
    summary = dump_to_file(checkpoint, dataset, Path(output), options, place=Place(int(rank), 2))
    # The clock is the machine's: the same in every process.
    first, last = times[0], times[-1]
    print(json.dumps({"first": first, "last": last, "boards": summary.boards - int(batch)}))


main()
