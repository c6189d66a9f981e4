"""A workload: a model, keys and boards, dumped by the package, by a plain script, or only run.

Shape letters: N boards in all, S cells (16).
"""

import json
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import baseline
import safetensors.torch
import torch
from limits import plain_loop
from measure import timed
from setting import Setting
from torch import Tensor

from dump_activations import Encoder, EncoderConfig, Summary, demo, dump, load_encoder

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
WAITING = "share of the loop spent waiting for boards"


def checkpoint_50m(setting: Setting) -> Path:
    """Write an untrained model of 50M parameters, unless it is there."""
    directory = setting.scratch / "50m"
    if not directory.exists():
        directory.mkdir()
        torch.manual_seed(0)
        model = Encoder(EncoderConfig.from_dict(CONFIG_50M))
        safetensors.torch.save_file(model.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(CONFIG_50M))
    return directory


@dataclass(kw_only=True)
class Workload:
    """Boards to dump, and how.

    Attributes:
        setting: how to measure.
        checkpoint: directory of the model.
        keys: value of `--outputs`.
        boards, batch: boards in all, and per forward pass.
        device, dtype: options of both dumps.
        directory: where files are written. By default, the scratch directory.
        dataset: directory of the dataset. By default, the demo's steps, repeated.
    """

    setting: Setting
    checkpoint: Path = demo.CHECKPOINT
    keys: str = KEYS_DEMO
    boards: int = 16_384
    batch: int = 1024
    device: str = "cpu"
    dtype: str = "fp32"
    directory: Path | None = None
    dataset: Path | None = None

    def __str__(self) -> str:
        size = "demo checkpoint" if self.checkpoint == demo.CHECKPOINT else "50M model"
        return f"{size}, {self.boards:,} boards, batch {self.batch}, {self.keys}, {self.dtype}"

    @cached_property
    def model(self) -> Encoder:
        """The model on the device."""
        return load_encoder(self.checkpoint, device=self.device)

    @cached_property
    def tokens_NS(self) -> Tensor:  # noqa: N802
        """All boards on the device."""
        return self.setting.boards(self.boards).to(self.device)

    @property
    def target(self) -> Path:
        """The file that is written."""
        return (self.directory or self.setting.scratch) / "workload.safetensors"

    @property
    def steps(self) -> Path:
        """Directory of the dataset."""
        return self.dataset or self.setting.dataset(self.boards)

    def dump(self, **options: Any) -> Summary:
        """Dump, and remove the file."""
        chosen = {"outputs": self.keys, "n_samples": self.boards, "dtype": self.dtype, **options}
        try:
            return dump(
                self.model,
                self.steps,
                self.target,
                batch_size=self.batch,
                device=self.device,
                allow_cpu=self.device == "cpu",
                **chosen,
            )
        finally:
            self.target.unlink(missing_ok=True)

    def dump_speed(self, **options: Any) -> float:
        """Boards per second from the first read until the file is durable under its name."""
        return self.dump_figures(**options)["dump"]

    def dump_figures(self, **options: Any) -> dict[str, float]:
        """Boards per second of the loop and of the whole call, and the share of waiting."""
        started = time.perf_counter()
        summary = self.dump(**options)
        return {
            "dump": self.boards / (summary.seconds + summary.commit_seconds),
            "dump, whole call": self.boards / (time.perf_counter() - started),
            WAITING: summary.waiting_seconds / summary.seconds,
        }

    def forward_speed(self) -> float:
        """Boards per second of a plain loop of forward passes."""
        return self.boards / timed(partial(plain_loop, self.model, self.tokens_NS, self.batch))

    def script_speed(self, boards: int | None = None) -> float:
        """Boards per second of the plain script, which loads the model too."""
        boards = boards or self.boards
        options = Namespace(
            init=self.checkpoint,
            dataset=self.steps,
            n_samples=boards,
            batch_size=self.batch,
            seed=0,
            outputs=self.keys,
            output=self.target,
            dtype=self.dtype,
            device=self.device,
        )
        try:
            return boards / timed(partial(baseline.dump, options))
        finally:
            self.target.unlink()


def workload_50m_cpu(setting: Setting) -> Workload:
    """Return a workload of the 50M model that takes about `setting.seconds` on this CPU."""
    one_batch = Workload(
        setting=setting,
        checkpoint=checkpoint_50m(setting),
        keys=KEYS_50M,
        boards=BATCH_50M_CPU,
        batch=BATCH_50M_CPU,
    )
    one_batch.forward_speed()
    batches = max(round(setting.seconds * one_batch.forward_speed() / BATCH_50M_CPU), 4)
    return replace(one_batch, boards=batches * BATCH_50M_CPU)
