"""The command from start to exit against the plain script."""

from measure import Figure, Process, Section, alternate, ratios, run_process
from setting import Setting, baseline, command
from workload import KEYS_DEMO

from dump_activations import demo

BOARDS = 16_384


def measure(setting: Setting) -> Section:
    """Time both as processes, in turns."""
    target = setting.scratch / "whole.safetensors"
    same = (
        *("--init", demo.CHECKPOINT, "--dataset", setting.dataset(BOARDS), "--n-samples", BOARDS),
        *("--outputs", KEYS_DEMO, "--device", "cpu", "-o", target),
    )
    peaks: dict[str, list[float]] = {"dump": [], "baseline": []}
    waiting = []

    def run(name: str, arguments: list[str]) -> Process:
        process = run_process(arguments, setting.environment)
        peaks[name].append(process.peak_mib)
        target.unlink()
        return process

    def dump() -> float:
        process = run("dump", command(*same, "--allow-cpu", "--json"))
        summary = process.summary
        waiting.append(summary["waiting_seconds"] / summary["seconds"])
        return process.seconds

    def plain() -> float:
        return run("baseline", baseline(*same)).seconds

    seconds = alternate({"dump": dump, "baseline": plain}, rounds=setting.rounds)
    return Section(
        "Whole process",
        f"demo checkpoint, CPU, {BOARDS:,} boards, {KEYS_DEMO}, fp32",
        [
            Figure.of("dump-activations", seconds["dump"], "s"),
            Figure.of("baseline", seconds["baseline"], "s"),
            Figure.of("dump to baseline", ratios(seconds, "dump", "baseline"), "x", at_most=0.5),
            Figure.of("dump-activations, peak memory", peaks["dump"], "MiB"),
            Figure.of("baseline, peak memory", peaks["baseline"], "MiB"),
            Figure.of("share of the loop spent waiting for boards", waiting, "x", at_most=0.05),
        ],
    )
