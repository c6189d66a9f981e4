"""The 2048 transformer: a bidirectional pre-norm encoder over the 16 cells of a board.

The weights of its matrix products may be narrower than the weights of its norms. The residual
stream and the norms are then in the wide dtype, and each input of a product is rounded once to the
narrow one.

Shape letters: B boards in a batch, S cells (16), H hidden size, Q query heads, K key/value heads,
G query heads that share one key/value head (Q = G K), D size of a head, E keys of a cell (E = K D),
I inner size of the MLP, N bins of a value head.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dump_activations.dtypes import CELLS, MOVES
from dump_activations.model.config import HEAD_MODULES, EncoderConfig

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


class PositionEmbedding(nn.Module):
    """One learned vector per cell."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pos_emb = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self) -> Tensor:
        """Return the embeddings of the board's cells, (S, H)."""
        return self.pos_emb.weight[:CELLS]


class DotProduct(nn.Module):
    """Softmax attention in which query head h reads key/value head h % K.

    With attention sinks, each query head has one more logit in its softmax that carries no value.
    Fused attention keeps no weights; `scores` and `pattern` compute them from the same inputs.
    """

    def forward(
        self, q_BSQD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, sinks_Q: Tensor | None
    ) -> Tensor:
        """Return the values weighted by the pattern, (B, S, Q, D)."""
        q_heads = q_BSQD.shape[2]
        q_BQSD = q_BSQD.transpose(1, 2)
        k_BQSD, v_BQSD = _spread(k_BSKD, q_heads), _spread(v_BSKD, q_heads)
        bias_Q1T = None
        if sinks_Q is not None:
            # A zero key scores 0 on every query, so the bias alone is the sink's logit. Its value
            # is zero too, so it only takes weight away.
            k_BQSD, v_BQSD = F.pad(k_BQSD, (0, 0, 0, 1)), F.pad(v_BQSD, (0, 0, 0, 1))
            bias_Q1T = F.pad(sinks_Q.to(q_BSQD.dtype).view(-1, 1, 1), (CELLS, 0))
        z_BQSD: Tensor = F.scaled_dot_product_attention(q_BQSD, k_BQSD, v_BQSD, attn_mask=bias_Q1T)
        return z_BQSD.transpose(1, 2)

    @staticmethod
    def scores(q_BSQD: Tensor, k_BSKD: Tensor) -> Tensor:
        """Return the scaled dot products (B, Q, S, S) in fp32, in every precision."""
        # With TF32 on, CUDA rounds the factors of fp32 products, but never of fp64 products.
        # Narrower factors lose nothing in either.
        on_cuda = q_BSQD.is_cuda and q_BSQD.dtype == torch.float32
        dtype = torch.float64 if on_cuda else torch.float32
        q_BQSD = q_BSQD.transpose(1, 2).to(dtype)
        k_BQSD = _spread(k_BSKD, q_BSQD.shape[2]).to(dtype)
        scores_BQSS = q_BQSD @ k_BQSD.transpose(2, 3) / math.sqrt(q_BQSD.shape[3])
        return scores_BQSS.float()

    @staticmethod
    def pattern(q_BSQD: Tensor, k_BSKD: Tensor, sinks_Q: Tensor | None) -> Tensor:
        """Return the softmax (B, Q, S, S) in fp32; a row sums to 1 less the sink's share."""
        scores_BQSS = DotProduct.scores(q_BSQD, k_BSKD)
        if sinks_Q is None:
            return scores_BQSS.softmax(dim=-1)
        sinks_BQS1 = sinks_Q.float().view(1, -1, 1, 1).expand(*scores_BQSS.shape[:3], 1)
        return torch.cat([scores_BQSS, sinks_BQS1], dim=-1).softmax(dim=-1)[..., :CELLS]


def _spread(x_BSKD: Tensor, q_heads: int) -> Tensor:
    """Give each query head its key/value head, (B, Q, S, D)."""
    x_BKSD = x_BSKD.transpose(1, 2)
    groups = q_heads // x_BSKD.shape[2]
    return x_BKSD if groups == 1 else x_BKSD.repeat(1, groups, 1, 1)


class Attention(nn.Module):
    """Bidirectional grouped-query attention, with sinks where the config has them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.q_heads = config.num_attention_heads
        self.kv_heads = config.kv_heads
        self.head_size = config.head_size
        hidden, kv_width = config.hidden_size, config.kv_heads * config.head_size
        self.wq = nn.Linear(hidden, hidden, bias=False)
        self.wk = nn.Linear(hidden, kv_width, bias=False)
        self.wv = nn.Linear(hidden, kv_width, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_size, eps=config.layer_norm_eps)
            if config.use_qk_norm
            else nn.Identity()
            for _ in ("query", "key")
        )
        self.joined: nn.Linear | None = None  # `wq`, `wk` and `wv`, in a model with joined products
        self.dot_product = DotProduct()
        self.sinks: nn.Parameter | None = None
        if config.use_attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Map the normed hidden states (B, S, H) to the attention's output (B, S, H)."""
        B = x_BSH.shape[0]
        x_BSH = x_BSH.to(self.wq.weight.dtype)
        q_BSH, k_BSE, v_BSE = _products(x_BSH, [self.wq, self.wk, self.wv], self.joined)
        q_BSQD = q_BSH.view(B, CELLS, self.q_heads, self.head_size)
        k_BSKD = k_BSE.view(B, CELLS, self.kv_heads, self.head_size)
        v_BSKD = v_BSE.view(B, CELLS, self.kv_heads, self.head_size)
        q_BSQD, k_BSKD = _normed(self.q_norm, q_BSQD), _normed(self.k_norm, k_BSKD)
        # They are stored by key/value head first: query head h has sinks[(h % K) G + h // K].
        sinks_Q = None if self.sinks is None else self.sinks.view(self.kv_heads, -1).t().flatten()
        z_BSQD = self.dot_product(q_BSQD, k_BSKD, v_BSKD, sinks_Q)
        out_BSH: Tensor = self.wo(z_BSQD.flatten(2))
        return out_BSH


def _normed(norm: nn.Module, heads: Tensor) -> Tensor:
    """Apply a norm, or the identity, in the dtype of the norm's weights."""
    dtype = norm.weight.dtype if isinstance(norm, nn.RMSNorm) else heads.dtype
    normed: Tensor = norm(heads.to(dtype))
    return normed.to(heads.dtype)


class MLP(nn.Module):
    """The gated SiLU MLP."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w_up = nn.Linear(hidden, inner, bias=False)
        self.w_gate = nn.Linear(hidden, inner, bias=False)
        self.w_down = nn.Linear(inner, hidden, bias=False)
        self.joined: nn.Linear | None = None  # `w_gate` and `w_up`, likewise

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Map the normed hidden states (B, S, H) to the MLP's output (B, S, H)."""
        x_BSH = x_BSH.to(self.w_gate.weight.dtype)
        gate_BSI, up_BSI = _products(x_BSH, [self.w_gate, self.w_up], self.joined)
        out_BSH: Tensor = self.w_down(F.silu(gate_BSI) * up_BSI)
        return out_BSH


def _products(
    x_BSH: Tensor, linears: Sequence[nn.Linear], joined: nn.Linear | None
) -> Sequence[Tensor]:
    """Apply linear modules to the same input, in one product where their weights are joined."""
    if joined is None:
        return [linear(x_BSH) for linear in linears]
    products: Sequence[Tensor] = joined(x_BSH).split([each.out_features for each in linears], -1)
    return products


def with_joined_products(model: _ModuleT, hooked: Collection[str]) -> _ModuleT:
    """Return a replica with one product for q, k and v, and one for both branches of an MLP.

    A product stays by itself where its module is in `hooked`, has hooks, or is not a plain
    `nn.Linear` without a bias. Joined products may differ in the last bits.
    """
    replica = replicate(model, next(model.parameters()).device)
    for name, module in replica.named_modules():
        if isinstance(module, Attention):
            names = ["wq", "wk", "wv"]
        elif isinstance(module, MLP):
            names = ["w_gate", "w_up"]
        else:
            continue
        linears = [module.get_submodule(each) for each in names]
        is_hooked = any(f"{name}.{each}" in hooked for each in names)
        if not is_hooked and all(map(_is_plain, linears)):
            module.joined = _join(linears)
    return replica


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    is_linear = type(module) is nn.Linear and module.bias is None
    return is_linear and not has_hooks and "forward" not in vars(module)


def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return one module with all their weights. The given modules' weights become views of it."""
    sizes, first = [each.out_features for each in linears], linears[0]
    joined = nn.Linear(first.in_features, sum(sizes), bias=False, device="meta")
    weights = first.weight.new_empty(joined.weight.shape)
    joined.weight = nn.Parameter(weights, requires_grad=False)
    for linear, view in zip(linears, weights.split(sizes), strict=True):
        view.copy_(linear.weight.detach())
        linear.weight = nn.Parameter(view, requires_grad=False)
    return joined


class Block(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Map the hidden states (B, S, H) before this layer to the states after it."""
        x_BSH = x_BSH + self.attn(self.attn_norm(x_BSH))
        out_BSH: Tensor = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        return out_BSH


class ValueHeads(nn.ModuleList):
    """One linear per move."""

    def __init__(self, config: EncoderConfig) -> None:
        assert config.output_n_bins is not None
        super().__init__(nn.Linear(config.hidden_size, config.output_n_bins) for _ in range(MOVES))

    def forward(self, pooled_BH: Tensor) -> Tensor:
        """Map the mean hidden states (B, H) to the logits of each move, (B, 4, N)."""
        return torch.stack([head(pooled_BH) for head in self], dim=1)


class Encoder(nn.Module):
    """The whole model. Its modules have the names of the checkpoints' state dicts.

    Attributes:
        config: the sizes.
        checkpoint: source of the weights, as given to `--init`.
        checkpoint_files: the files that were read for it.
        hub_commit: the commit that `hf://` led to.
        tokenizer: the text of the checkpoint's `tokenizer.json`, if it is small.
        random_init: True where only the architecture came from the checkpoint.
        weights_sha256: digest of the weights in a run's own model; "" elsewhere.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint = ""
        self.checkpoint_files: tuple[Path, ...] = ()
        self.hub_commit: str | None = None
        self.tokenizer: str | None = None
        self.random_init = False
        self.weights_sha256 = ""
        self.tok_emb = nn.Embedding(config.input_vocab_size, config.hidden_size)
        self.pos_emb = PositionEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_ln = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.head_type == "binned_ev":
            self.ev_heads = ValueHeads(config)
        elif config.head_type == "action_policy":
            self.policy_head = nn.Linear(config.hidden_size, MOVES)

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on boards of exponents.

        Args:
            tokens_BS: integer (B, 16), each below the vocabulary size.

        Returns:
            The final hidden states, (B, 16, H), and the head logits in the order up, down, left,
            right: (B, 4, bins) for binned_ev, (B, 4) for action_policy, (B, 0) without a head.
        """
        x_BSH = self.tok_emb(tokens_BS.long()) + self.pos_emb()
        for block in self.blocks:
            x_BSH = block(x_BSH)
        x_BSH = self.final_ln(x_BSH)
        return x_BSH, self._head_logits(x_BSH.mean(dim=1))

    @property
    def head(self) -> nn.Module | None:
        """The module of the head; None without a head."""
        return getattr(self, HEAD_MODULES.get(self.config.head_type, ""), None)

    def _head_logits(self, pooled_BH: Tensor) -> Tensor:
        if self.head is None:
            return pooled_BH[:, :0]
        logits: Tensor = self.head(pooled_BH.to(next(self.head.parameters()).dtype))
        return logits


def empty_encoder(config: EncoderConfig) -> Encoder:
    """Return an Encoder of fp32 weights on the meta device, which allocates nothing."""
    with torch.device("meta"), _NoInitialisation():
        return Encoder(config).float()


def random_encoder(config: EncoderConfig, *, seed: int) -> Encoder:
    """Return an Encoder with PyTorch's default initialisation, fp32 on the host, by its seed."""
    model = empty_encoder(config).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.Linear | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, Attention) and module.sinks is not None:
                module.sinks.zero_()
    return model


class _NoInitialisation(TorchFunctionMode):
    """Leaves parameters as they are allocated: sampling them on the meta device takes seconds."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def weights_sha256(model: Encoder) -> str:
    """Digest names, dtypes, shapes and bytes of a model's weights, as docs/file-format.md says."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def replicate(
    module: _ModuleT,
    device: torch.device,
    dtype_in: Callable[[nn.Module], torch.dtype | None] = lambda _: None,
) -> _ModuleT:
    """Return a model in eval mode on a device that shares hooks and, where it can, weights.

    A run hooks, moves and casts the replica, and leaves the caller's model as it was. Weights that
    are neither moved nor cast are in the same memory. `dtype_in` gives the dtype to cast a module's
    own weights to; None leaves them as they are.
    """
    replica = copy.copy(module)
    tables = {name: copy.copy(it) for name, it in vars(module).items() if isinstance(it, dict)}
    vars(replica).update(tables)
    for name, child in module.named_children():
        setattr(replica, name, replicate(child, device, dtype_in))
    dtype = dtype_in(module)
    for name, weight in module.named_parameters(recurse=False):
        moved = weight.detach().to(device, dtype or weight.dtype)
        if (moved.device, moved.dtype) != (weight.device, weight.dtype):
            setattr(replica, name, nn.Parameter(moved, requires_grad=weight.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(replica, name, buffer.to(device))
    return replica.eval()
