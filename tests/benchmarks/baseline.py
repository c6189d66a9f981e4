"""The plain way to dump activations, as the yardstick that benchmarks measure against.

Rows are gathered through NumPy memory maps and decoded in sixteen passes. Hooks append each batch's
activations to lists on the host. At the end everything is concatenated and saved. The flags are
the command's: `python tests/benchmarks/baseline.py --help`.

Shape letters: N boards in all, B boards in a batch, L layers, S cells (16), H hidden size.
"""

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from dump_activations import load_encoder

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LAYER_MODULES = {"layer_outputs": "", "attn_norm": ".attn_norm", "mlp_input": ".mlp_norm"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--init", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--n-samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outputs", default="final_hidden")
    parser.add_argument("-o", "--output", default="activations.safetensors")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda")
    dump(parser.parse_args())


def dump(options: argparse.Namespace) -> None:
    shards = open_shards(Path(options.dataset))
    rows = sum(len(shard) for shard in shards)
    indices = np.random.default_rng(options.seed).choice(rows, options.n_samples, replace=False)
    model = load_encoder(options.init, device=options.device)
    keys = options.outputs.split(",")
    collected, boards = collect(model, shards, indices, keys, options)
    tensors = {key: torch.cat(batches) for key, batches in collected.items()}
    tensors["indices"] = torch.from_numpy(indices)
    tensors["boards"] = torch.cat(boards)
    metadata = {"n_samples": str(options.n_samples), "seed": str(options.seed)}
    safetensors.torch.save_file(tensors, options.output, metadata=metadata)


def open_shards(dataset: Path) -> list[np.ndarray]:
    paths = sorted(dataset.glob("steps-*.npy")) or [dataset / "steps.npy"]
    return [np.load(path, mmap_mode="r") for path in paths]


def gather_rows(shards: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    """Sort, take a shard's rows at a time, unsort."""
    order = np.argsort(indices)
    in_order = indices[order]
    taken = []
    first = 0
    for shard in shards:
        mask = (in_order >= first) & (in_order < first + len(shard))
        if mask.any():
            taken.append(shard[in_order[mask] - first])
        first += len(shard)
    rows = np.empty(len(indices), dtype=shards[0].dtype)
    rows[order] = np.concatenate(taken)
    return rows


def decode_boards(rows: np.ndarray) -> np.ndarray:
    """Unpack one cell of all boards at a time, uint8 (n, 16)."""
    exponents = np.empty((len(rows), 16), dtype=np.uint8)
    packed = rows["board"]
    for cell in range(16):
        exponents[:, cell] = (packed >> np.uint64(60 - 4 * cell)) & np.uint64(15)
    if "tile_65536_mask" in rows.dtype.names:
        for cell in range(16):
            large = (rows["tile_65536_mask"] >> np.uint16(cell)) & np.uint16(1) == 1
            exponents[large, cell] = 16
    return exponents


def collect(
    model: nn.Module,
    shards: list[np.ndarray],
    indices: np.ndarray,
    keys: list[str],
    options: argparse.Namespace,
) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
    """Run the batches, and keep every activation on the host."""
    dtype = _DTYPES[options.dtype]
    hooked: dict[str, list[torch.Tensor]] = {}
    for key in _LAYER_MODULES.keys() & set(keys):
        hooked[key] = []
        for layer in range(len(model.blocks)):
            module = model.get_submodule(f"blocks.{layer}{_LAYER_MODULES[key]}")
            module.register_forward_hook(
                lambda _module, _args, output, key=key: hooked[key].append(output)
            )
    collected: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    boards = []
    for first in range(0, len(indices), options.batch_size):
        exponents = decode_boards(gather_rows(shards, indices[first : first + options.batch_size]))
        boards.append(torch.from_numpy(exponents))
        tokens_BS = torch.from_numpy(exponents.astype(np.int64)).to(options.device)
        for layers in hooked.values():
            layers.clear()
        with torch.inference_mode():
            hidden_BSH, logits = model(tokens_BS)
        values = {key: torch.stack(layers, dim=1) for key, layers in hooked.items()}
        values["final_hidden"] = hidden_BSH
        values["pooled"] = hidden_BSH.mean(dim=1)
        values["head_logits"] = logits
        values["head_probs"] = logits.float().softmax(dim=-1)
        for key in keys:
            collected[key].append(values[key].to(dtype).to("cpu"))
    return collected, boards


if __name__ == "__main__":
    main()
