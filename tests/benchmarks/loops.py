"""Dumps on the CPU, loop against loop: with each stage's own limit, and with the plain script's.

All run in this process, with the same model; what a dump does before its loop is not counted.

Shape letters: N boards in all, S cells (16).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baseline
from limits import plain_loop, write_speed
from measure import Figure, Section, alternate, ratios, timed
from setting import Setting
from workload import BATCH_50M_CPU, KEYS_50M, KEYS_DEMO

from dump_activations import StepsDataset, demo, dump, load_encoder
from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.run import Summary


def measure_50m(setting: Setting) -> Section:
    """Dump a model that is slow enough on a CPU to hide everything else."""
    checkpoint = setting.checkpoint_50m()
    model = load_encoder(checkpoint)
    tokens_NS = setting.boards(BATCH_50M_CPU)
    plain_loop(model, tokens_NS, BATCH_50M_CPU)
    seconds_a_batch = timed(partial(plain_loop, model, tokens_NS, BATCH_50M_CPU))
    batches = max(round(setting.seconds / seconds_a_batch), 4)
    run = _Run(setting, checkpoint, model, KEYS_50M, BATCH_50M_CPU * batches, BATCH_50M_CPU)
    return run.section("50M model, CPU", forward_share=0.97)


def measure_demo(setting: Setting) -> Section:
    """Dump a model so fast that writing and reading show."""
    model = load_encoder(demo.CHECKPOINT)
    run = _Run(setting, demo.CHECKPOINT, model, KEYS_DEMO, boards=16_384, batch=1024)
    return run.section("Demo checkpoint, CPU", forward_share=None)


@dataclass
class _Run:
    setting: Setting
    checkpoint: Path
    model: Encoder
    keys: str
    boards: int
    batch: int

    def section(self, title: str, *, forward_share: float | None) -> Section:
        dataset = StepsDataset(self.setting.dataset(self.boards))
        indices = dataset.sample_indices(self.boards)
        tokens_NS = self.setting.boards(self.boards)
        nbytes = self._dump(write=True).bytes_written
        waiting = []

        def dump_all() -> float:
            summary = self._dump(write=True)
            waiting.append(summary.waiting_seconds / summary.seconds)
            return self._speed(summary)

        contenders: dict[str, Callable[[], float]] = {
            "boards alone": lambda: self.boards / timed(lambda: dataset.read_boards(indices)),
            "forward alone": lambda: (
                self.boards / timed(lambda: plain_loop(self.model, tokens_NS, self.batch))
            ),
            "write alone": lambda: write_speed(self.setting.scratch, nbytes) / nbytes * self.boards,
            "--no-write": lambda: self._speed(self._dump(write=False)),
            "dump": dump_all,
            "baseline": lambda: self.boards / timed(self._baseline),
        }
        speeds = alternate(contenders, rounds=self.setting.rounds)
        to_forward = {
            name: Figure.of(
                f"{name} to forward alone",
                ratios(speeds, name, "forward alone"),
                "x",
                at_least=forward_share,
            )
            for name in ("--no-write", "dump")
        }
        return Section(
            title,
            f"{self.boards:,} boards, batch {self.batch}, {self.keys}, fp32",
            [
                *(Figure.of(name, values, "boards/s") for name, values in speeds.items()),
                *to_forward.values(),
                Figure.of("dump to baseline", ratios(speeds, "dump", "baseline"), "x"),
                Figure.of(
                    "share of the loop spent waiting for boards", waiting[1:], "x", at_most=0.05
                ),
            ],
        )

    def _dump(self, *, write: bool) -> Summary:
        target = self.setting.scratch / "loops.safetensors"
        summary = dump(
            self.model,
            self.setting.dataset(self.boards),
            target,
            outputs=self.keys,
            n_samples=self.boards,
            batch_size=self.batch,
            device="cpu",
            allow_cpu=True,
            write=write,
        )
        target.unlink(missing_ok=True)
        return summary

    def _speed(self, summary: Summary) -> float:
        return summary.boards / (summary.seconds + summary.commit_seconds)

    def _baseline(self) -> None:
        target = self.setting.scratch / "loops.safetensors"
        baseline.dump(
            Namespace(
                init=self.checkpoint,
                dataset=self.setting.dataset(self.boards),
                n_samples=self.boards,
                batch_size=self.batch,
                seed=0,
                outputs=self.keys,
                output=target,
                dtype="fp32",
                device="cpu",
            )
        )
        target.unlink()
