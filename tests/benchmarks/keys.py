"""The cost of keys and layers in a dump of the 50M model on the CPU.

All run in this process, with the same model; what a dump does before its loop is not counted.

Shape letters: N boards in all, B boards in a batch, S cells (16), H hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch
from limits import write_speed
from measure import Figure, Section, alternate, ratios, timed
from setting import Setting
from torch import Tensor
from workload import BATCH_50M_CPU

from dump_activations import Encoder, dump, load_encoder

_LAYER = 5
_STACKED, _SPLIT = "layer_outputs, stacked", "layer_outputs, split"
_WITH_PATTERN, _BYTES = "layer_outputs and attn_pattern", "bytes of attn_pattern, written alone"
_ONE_LAYER, _FORWARD = f"layer {_LAYER} of 12, not written", f"layers 0 to {_LAYER}, plain loop"


def measure(setting: Setting) -> Section:
    """Compare dumps by their seconds."""
    model = load_encoder(setting.checkpoint_50m())
    tokens_NS = setting.boards(BATCH_50M_CPU)
    batches = max(round(setting.seconds / timed(partial(_first_layers, model, tokens_NS))), 2)
    boards = batches * BATCH_50M_CPU
    run = partial(_seconds, setting, model, boards)
    all_tokens_NS = setting.boards(boards)
    config = model.config
    pattern_nbytes = boards * config.num_hidden_layers * config.num_attention_heads * 16 * 16 * 4
    contenders: dict[str, Callable[[], float]] = {
        _STACKED: run,
        _SPLIT: partial(run, split_layers=True),
        _WITH_PATTERN: partial(run, outputs="layer_outputs,attn_pattern"),
        _BYTES: lambda: pattern_nbytes / write_speed(setting.scratch, pattern_nbytes),
        _ONE_LAYER: partial(run, layers=[_LAYER], write=False),
        _FORWARD: lambda: timed(partial(_first_layers, model, all_tokens_NS)),
    }
    seconds = alternate(contenders, rounds=setting.rounds)
    allowed = [sum(pair) for pair in zip(seconds[_STACKED], seconds[_BYTES], strict=True)]
    with_pattern = [a / b for a, b in zip(seconds[_WITH_PATTERN], allowed, strict=True)]
    return Section(
        "Keys and layers, 50M model, CPU",
        f"{boards:,} boards, batch {BATCH_50M_CPU}, fp32",
        [
            *(Figure.of(name, values, "s") for name, values in seconds.items()),
            Figure.of(f"{_WITH_PATTERN} to the two apart", with_pattern, "x", at_most=1.1),
            Figure.of(
                "one layer to the layers up to it",
                ratios(seconds, _ONE_LAYER, _FORWARD),
                "x",
                at_most=1.03,
            ),
            Figure.of(
                "speed of split to stacked",
                ratios(seconds, _STACKED, _SPLIT),
                "x",
                at_least=0.95,
            ),
        ],
    )


def _seconds(
    setting: Setting,
    model: Encoder,
    boards: int,
    *,
    outputs: str = "layer_outputs",
    layers: list[int] | None = None,
    split_layers: bool = False,
    write: bool = True,
) -> float:
    target = setting.scratch / "keys.safetensors"
    summary = dump(
        model,
        setting.dataset(boards),
        target,
        outputs=outputs,
        layers=layers,
        split_layers=split_layers,
        n_samples=boards,
        batch_size=BATCH_50M_CPU,
        device="cpu",
        allow_cpu=True,
        write=write,
    )
    target.unlink(missing_ok=True)
    return summary.seconds + summary.commit_seconds


def _first_layers(model: Encoder, tokens_NS: Tensor) -> None:
    """Run the blocks up to the chosen layer on one batch after another, and nothing else."""
    with torch.inference_mode():
        for tokens_BS in tokens_NS.split(BATCH_50M_CPU):
            hidden_BSH = model.tok_emb(tokens_BS.long()) + model.pos_emb()
            for block in model.blocks[: _LAYER + 1]:
                hidden_BSH = block(hidden_BSH)
