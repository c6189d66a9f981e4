"""Peak memory of a dump of many boards and of few boards: it must not grow."""

from measure import Figure, Section, run_process
from setting import Setting, command

from dump_activations import demo
from dump_activations.storage.formats.registry import FORMATS

FEW, MANY = 16_384, 131_072
KEYS = "layer_outputs,attn_norm,mlp_input"
LARGEST_GROWTH_MIB = 64


def measure(setting: Setting) -> Section:
    """Weigh dumps of both sizes in every format, as processes of their own."""
    figures = []
    for suffix in FORMATS:
        growth, few, many = [], [], []
        for _ in range(setting.rounds):
            few.append(_peak_mib(setting, FEW, suffix))
            many.append(_peak_mib(setting, MANY, suffix))
            growth.append(many[-1] - few[-1])
        figures += [
            Figure.of(f"{suffix}: {FEW:,} boards", few, "MiB"),
            Figure.of(f"{suffix}: {MANY:,} boards", many, "MiB"),
            Figure.of(f"{suffix}: growth", growth, "MiB", at_most=LARGEST_GROWTH_MIB),
        ]
    return Section("Peak memory", f"demo checkpoint, CPU, {KEYS}, fp32", figures)


def _peak_mib(setting: Setting, boards: int, suffix: str) -> float:
    target = setting.scratch / f"memory{suffix}"
    arguments = command(
        *("--init", demo.CHECKPOINT, "--dataset", setting.dataset(MANY), "--n-samples", boards),
        *("--outputs", KEYS, "--device", "cpu", "--allow-cpu", "-o", target),
    )
    try:
        return run_process(arguments, setting.environment).peak_mib
    finally:
        target.unlink(missing_ok=True)
