"""The cost of statistics that a dump takes while it writes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from limits import plain_loop
from measure import Figure, Section, alternate, ratios, timed
from setting import Setting
from workload import BATCH_50M_CPU, KEYS_50M, KEYS_DEMO

from dump_activations import demo, dump, load_encoder
from dump_activations.model.encoder import Encoder


def measure_demo(setting: Setting) -> Section:
    """Dump a model so fast that every pass over its activations shows."""
    model = load_encoder(demo.CHECKPOINT)
    run = _Run(setting, model, KEYS_DEMO, boards=16_384, batch=1024)
    return run.section("demo checkpoint", at_most=1.10)


def measure_50m(setting: Setting) -> Section:
    """Dump a model of a size that is studied."""
    model = load_encoder(setting.checkpoint_50m())
    tokens_NS = setting.boards(BATCH_50M_CPU)
    plain_loop(model, tokens_NS, BATCH_50M_CPU)
    seconds_a_batch = timed(partial(plain_loop, model, tokens_NS, BATCH_50M_CPU))
    boards = BATCH_50M_CPU * max(round(setting.seconds / seconds_a_batch), 4)
    return _Run(setting, model, KEYS_50M, boards, BATCH_50M_CPU).section("50M model", at_most=1.01)


@dataclass
class _Run:
    setting: Setting
    model: Encoder
    keys: str
    boards: int
    batch: int

    def section(self, what: str, *, at_most: float) -> Section:
        processor: dict[str, list[float]] = {"on": [], "off": []}

        def run(name: str) -> float:
            before = time.process_time()
            seconds = timed(partial(self._dump, stats=name == "on"))
            processor[name].append(time.process_time() - before)
            self._target.unlink()
            return seconds

        contenders: dict[str, Callable[[], float]] = {n: partial(run, n) for n in processor}
        seconds = alternate(contenders, rounds=self.setting.rounds)
        return Section(
            "Statistics",
            f"{what}, CPU, {self.boards:,} boards, {self.keys}, fp32; dump() from call to return",
            [
                Figure.of("with", seconds["on"], "s"),
                Figure.of("without", seconds["off"], "s"),
                Figure.of("with to without", ratios(seconds, "on", "off"), "x", at_most=at_most),
                # Steadier where other processes take their share of the machine.
                Figure.of("with to without, processor time", ratios(processor, "on", "off"), "x"),
            ],
        )

    @property
    def _target(self) -> Path:
        return self.setting.scratch / "stats.safetensors"

    def _dump(self, *, stats: bool) -> None:
        dump(
            self.model,
            self.setting.dataset(self.boards),
            self._target,
            outputs=self.keys,
            n_samples=self.boards,
            batch_size=self.batch,
            device="cpu",
            allow_cpu=True,
            stats=stats,
        )
