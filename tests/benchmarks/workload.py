"""The workload: keys, the 50M model, and datasets of any size made from the demo's."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dump_activations import demo
from dump_activations.model.encoder import Encoder, EncoderConfig

KEYS_DEMO = "final_hidden,layer_outputs,head_logits,attn_norm,mlp_input"
KEYS_50M = "final_hidden,layer_outputs,attn_norm,mlp_input"
CONFIG_50M = {
    "input_vocab_size": 17,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-6,
    "output_n_bins": 34,
}
BATCH_50M_CPU = 128
STORED_NBYTES = {"fp32": 4, "bf16": 2}


def board_nbytes(dtype: str) -> int:
    """Bytes that KEYS_50M take for one board: three keys of 12 layers and one, each (16, 512)."""
    return STORED_NBYTES[dtype] * (3 * 12 + 1) * 16 * 512


def make_checkpoint_50m(directory: Path) -> Path:
    """Write an untrained model, unless it is there."""
    if not directory.exists():
        directory.mkdir()
        torch.manual_seed(0)
        model = Encoder(EncoderConfig.from_dict(CONFIG_50M))
        safetensors.torch.save_file(model.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(CONFIG_50M))
    return directory


def make_dataset(directory: Path, rows: int) -> Path:
    """Write a dataset of at least so many steps, the demo's over and over, unless it is there."""
    if not directory.exists():
        directory.mkdir()
        steps = np.concatenate([np.load(path) for path in sorted(demo.DATASET.glob("steps-*.npy"))])
        np.save(directory / "steps-00000.npy", np.tile(steps, -(-rows // len(steps))))
    return directory
