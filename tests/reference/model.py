"""The encoder in its plainest form, in float64, and a dump of all that its blocks see.

Shape letters: B boards, S the 16 cells, H hidden size, D head size, I the MLP's width,
L layers, Q query heads, K key/value heads.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

PER_BOARD_KEYS = (
    "final_hidden",
    "pooled",
    "head_logits",
    "head_probs",
    "layer_outputs",
    "attn_norm",
    "mlp_input",
)

LAYER_KEYS = (
    "resid_pre",
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_scores",
    "attn_pattern",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_input",
    "mlp_pre",
    "mlp_pre_linear",
    "mlp_post",
    "mlp_out",
    "layer_outputs",
)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The true sizes of a checkpoint's weights. Its config.json may differ."""

    vocab: int = 17
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 48
    eps: float = 1e-6
    head_type: str = "binned_ev"
    n_bins: int = 6
    sinks: bool = False
    qk_norm: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def logits_per_move(self) -> int:
        return self.n_bins if self.head_type == "binned_ev" else 4


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """One query head after another, with its softmax written out."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_size
        self.wq = nn.Linear(config.hidden, config.hidden, bias=False)
        self.wk = nn.Linear(config.hidden, kv_width, bias=False)
        self.wv = nn.Linear(config.hidden, kv_width, bias=False)
        self.wo = nn.Linear(config.hidden, config.hidden, bias=False)
        if config.qk_norm:
            self.q_norm = Norm(config.head_size, config.eps)
            self.k_norm = Norm(config.head_size, config.eps)
        if config.sinks:
            self.sinks = nn.Parameter(torch.empty(config.heads))

    def forward(self, x_BSH):
        config, d = self.config, self.config.head_size
        q_BSH, k_BSH, v_BSH = self.wq(x_BSH), self.wk(x_BSH), self.wv(x_BSH)
        heads = defaultdict(list)
        for h in range(config.heads):
            kv = h % config.kv_heads
            q_BSD = q_BSH[..., h * d : (h + 1) * d]
            k_BSD = k_BSH[..., kv * d : (kv + 1) * d]
            v_BSD = v_BSH[..., kv * d : (kv + 1) * d]
            if config.qk_norm:
                q_BSD, k_BSD = self.q_norm(q_BSD), self.k_norm(k_BSD)
            scores_BSS = q_BSD @ k_BSD.transpose(1, 2) / math.sqrt(d)
            exp_BSS = torch.exp(scores_BSS)
            total_BS1 = exp_BSS.sum(dim=-1, keepdim=True)
            if config.sinks:
                sink = self.sinks[kv * (config.heads // config.kv_heads) + h // config.kv_heads]
                total_BS1 = total_BS1 + torch.exp(sink)
            heads["attn_q"].append(q_BSD)
            if h < config.kv_heads:
                heads["attn_k"].append(k_BSD)
                heads["attn_v"].append(v_BSD)
            heads["attn_scores"].append(scores_BSS)
            heads["attn_pattern"].append(exp_BSS / total_BS1)
            heads["attn_z"].append((exp_BSS / total_BS1) @ v_BSD)
        # The key's axis of heads: before the queries of a pattern, after the cells of a vector.
        axis = {"attn_scores": 1, "attn_pattern": 1}
        self.seen = {key: torch.stack(each, axis.get(key, 2)) for key, each in heads.items()}
        self.seen["attn_out"] = self.wo(torch.cat(heads["attn_z"], dim=-1))
        return self.seen["attn_out"]


class Mlp(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.w_up = nn.Linear(config.hidden, config.mlp, bias=False)
        self.w_gate = nn.Linear(config.hidden, config.mlp, bias=False)
        self.w_down = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x_BSH):
        gate_BSI, up_BSI = self.w_gate(x_BSH), self.w_up(x_BSH)
        inner_BSI = gate_BSI / (1 + torch.exp(-gate_BSI)) * up_BSI
        out_BSH = self.w_down(inner_BSI)
        self.seen = {
            "mlp_pre": gate_BSI,
            "mlp_pre_linear": up_BSI,
            "mlp_post": inner_BSI,
            "mlp_out": out_BSH,
        }
        return out_BSH


class Block(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.attn_norm = Norm(config.hidden, config.eps)
        self.attn = Attention(config)
        self.mlp_norm = Norm(config.hidden, config.eps)
        self.mlp = Mlp(config)

    def forward(self, x_BSH):
        normed_BSH = self.attn_norm(x_BSH)
        mid_BSH = x_BSH + self.attn(normed_BSH)
        mlp_input_BSH = self.mlp_norm(mid_BSH)
        out_BSH = mid_BSH + self.mlp(mlp_input_BSH)
        self.seen = {
            "resid_pre": x_BSH,
            "attn_norm": normed_BSH,
            **self.attn.seen,
            "resid_mid": mid_BSH,
            "mlp_input": mlp_input_BSH,
            **self.mlp.seen,
            "layer_outputs": out_BSH,
        }
        return out_BSH


class PositionEmbedding(nn.Module):
    def __init__(self, positions: int, hidden: int) -> None:
        super().__init__()
        self.pos_emb = nn.Embedding(positions, hidden)


class ReferenceEncoder(nn.Module):
    """The whole model, with the parameter names of the state dicts in the field."""

    def __init__(self, config: ReferenceConfig, *, positions: int = 16) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab, config.hidden)
        self.pos_emb = PositionEmbedding(positions, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_ln = Norm(config.hidden, config.eps)
        if config.head_type == "binned_ev":
            self.ev_heads = nn.ModuleList(nn.Linear(config.hidden, config.n_bins) for _ in range(4))
        else:
            self.policy_head = nn.Linear(config.hidden, 4)

    def forward(self, tokens_BS):
        x_BSH = self.tok_emb(tokens_BS) + self.pos_emb.pos_emb.weight[:16]
        for block in self.blocks:
            x_BSH = block(x_BSH)
        hidden_BSH = self.final_ln(x_BSH)
        pooled_BH = hidden_BSH.sum(dim=1) / 16
        if self.config.head_type == "binned_ev":
            logits = torch.stack([head(pooled_BH) for head in self.ev_heads], dim=1)
        else:
            logits = self.policy_head(pooled_BH)
        return hidden_BSH, logits


def naive_dump(
    state_dict: Mapping[str, torch.Tensor],
    config: ReferenceConfig,
    boards: np.ndarray,
    keys: Sequence[str] = PER_BOARD_KEYS,
) -> dict[str, np.ndarray]:
    """Return what a dump of these boards holds, in float64, as the plain model's blocks saw it."""
    positions = state_dict["pos_emb.pos_emb.weight"].shape[0]
    model = ReferenceEncoder(config, positions=positions).double().eval()
    model.load_state_dict({key: value.double() for key, value in state_dict.items()}, strict=True)
    with torch.no_grad():
        hidden, logits = model(torch.from_numpy(boards.astype(np.int64)))
    everything = {
        key: torch.stack([block.seen[key] for block in model.blocks], dim=1) for key in LAYER_KEYS
    }
    everything["final_hidden"] = hidden
    everything["pooled"] = hidden.mean(dim=1)
    everything["head_logits"] = logits
    exp = torch.exp(logits - logits.max(dim=-1, keepdim=True).values)
    everything["head_probs"] = exp / exp.sum(dim=-1, keepdim=True)
    dumped = {key: everything[key].numpy() for key in keys if key in everything}
    if "rmsnorm_gammas" in keys:
        for name, module in model.named_modules():
            if isinstance(module, Norm):
                dumped[f"rmsnorm_gammas/{name}"] = module.weight.detach().numpy()
    if "attn_sinks" in keys:
        dumped["attn_sinks"] = torch.stack(
            [block.attn.sinks.detach() for block in model.blocks]
        ).numpy()
    return dumped


def naive_forward(
    state_dict: Mapping[str, torch.Tensor], config: ReferenceConfig, boards: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the final hidden states (B, 16, H) and the head logits, in float64."""
    dumped = naive_dump(state_dict, config, boards, ["final_hidden", "head_logits"])
    return dumped["final_hidden"], dumped["head_logits"]


def expected_shapes(config: ReferenceConfig, n: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each per-board key, from the seed document's table."""
    logits = (n, 4, config.n_bins) if config.head_type == "binned_ev" else (n, 4)
    stacked = (n, config.layers, 16, config.hidden)
    return {
        "final_hidden": (n, 16, config.hidden),
        "pooled": (n, config.hidden),
        "head_logits": logits,
        "head_probs": logits,
        "layer_outputs": stacked,
        "attn_norm": stacked,
        "mlp_input": stacked,
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, *, tolerance: float = 1e-5) -> None:
    """Assert that `actual` has the shape and the values of `expected`.

    The largest error may be `tolerance` times the largest value. The same holds for the norms.
    """
    assert actual.shape == expected.shape
    error = actual.astype(np.float64) - expected
    assert np.isfinite(error).all()
    assert np.abs(error).max() <= tolerance * np.abs(expected).max()
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected)
