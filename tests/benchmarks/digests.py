"""The cost of digests and of counting NaN and infinite values."""

import time
from collections.abc import Callable

from measure import Figure, Section, alternate, ratios, timed
from setting import Setting
from undigested import undigested

from dump_activations import demo, dump, load_encoder

BOARDS = 16_384
KEYS = "final_hidden,layer_outputs,head_logits,attn_norm,mlp_input"


def measure(setting: Setting) -> Section:
    """Time dumps with and without them, in turns in this process."""
    model = load_encoder(demo.CHECKPOINT)
    dataset = setting.dataset(BOARDS)
    target = setting.scratch / "digests.safetensors"
    processor: dict[str, list[float]] = {"on": [], "off": []}

    def run() -> None:
        dump(model, dataset, target, outputs=KEYS, n_samples=BOARDS, device="cpu", allow_cpu=True)

    def without() -> None:
        with undigested():
            run()

    def weighed(name: str, work: Callable[[], None]) -> float:
        before = time.process_time()
        seconds = timed(work)
        processor[name].append(time.process_time() - before)
        target.unlink()
        return seconds

    seconds = alternate(
        {"on": lambda: weighed("on", run), "off": lambda: weighed("off", without)},
        rounds=setting.rounds,
    )
    return Section(
        "Digests and counts",
        f"demo checkpoint, CPU, {BOARDS:,} boards, {KEYS}, fp32; dump() from call to return",
        [
            Figure.of("with", seconds["on"], "s"),
            Figure.of("without", seconds["off"], "s"),
            Figure.of("with to without", ratios(seconds, "on", "off"), "x", at_most=1.03),
            # Steadier where other processes take their share of the machine.
            Figure.of("with to without, processor time", ratios(processor, "on", "off"), "x"),
        ],
    )
