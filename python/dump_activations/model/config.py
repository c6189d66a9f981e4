"""The fields of a checkpoint's `config.json` that shape the model."""

import sys
from dataclasses import MISSING, dataclass, fields
from reprlib import repr as brief
from typing import Any, Literal, Self, get_args

from dump_activations.dtypes import CELLS, MOVES
from dump_activations.errors import CheckpointError

HeadType = Literal["binned_ev", "action_policy", "none"]

HEAD_MODULES: dict[HeadType, str] = {"binned_ev": "ev_heads", "action_policy": "policy_head"}
"""The module of each head, as the weights name it."""

_SIZES = (
    *("hidden_size", "num_attention_heads", "intermediate_size"),
    *("input_vocab_size", "max_position_embeddings"),
)
_DIVISORS = {"num_attention_heads": "hidden_size", "num_key_value_heads": "num_attention_heads"}
# Far above any real model, and far below sizes whose products overflow.
_LARGEST_SIZE = 1 << 20
# So many take about a second to make.
_MOST_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The fields of a checkpoint's `config.json` that shape the forward pass.

    Raises:
        CheckpointError: a field is out of range or contradicts another.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    input_vocab_size: int = 16
    num_key_value_heads: int | None = None
    head_type: HeadType = "binned_ev"
    output_n_bins: int | None = None
    max_position_embeddings: int = CELLS
    use_attention_sinks: bool = False
    use_qk_norm: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a config from the JSON object of `config.json`.

        Unknown fields are ignored, and null counts as absent.

        Raises:
            CheckpointError: a field is missing, out of range or contradicts another, or the
                model has blocks that are not read.
        """
        if (backend := values.get("model_backend")) == "transformer_engine":
            raise CheckpointError(
                f"model_backend {backend}: its blocks have other names, which are not read; "
                "save the model with the plain backend"
            )
        known = {each.name for each in fields(cls)}
        given = {key: it for key, it in values.items() if key in known and it is not None}
        required = [each.name for each in fields(cls) if each.default is MISSING]
        if missing := [name for name in required if name not in given]:
            raise CheckpointError(f"missing {', '.join(missing)}")
        return cls(**given)

    def __post_init__(self) -> None:
        if self.head_type not in get_args(HeadType):
            raise _must_be("head_type", f"one of {', '.join(get_args(HeadType))}", self.head_type)
        sizes = dict.fromkeys(_SIZES, _LARGEST_SIZE) | {"num_hidden_layers": _MOST_LAYERS}
        if self.num_key_value_heads is not None:
            sizes["num_key_value_heads"] = _LARGEST_SIZE
        if self.head_type == "binned_ev":
            if self.output_n_bins is None:
                raise CheckpointError("missing output_n_bins, which head_type binned_ev needs")
            sizes["output_n_bins"] = _LARGEST_SIZE
        for name, largest in sizes.items():
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= largest:
                raise _must_be(name, f"a whole number from 1 to {largest}", size)
        for name in ("use_attention_sinks", "use_qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise _must_be(name, "true or false", getattr(self, name))
        eps = self.layer_norm_eps
        if type(eps) not in (int, float) or not 0 <= eps <= sys.float_info.max:
            raise _must_be("layer_norm_eps", "a number >= 0", eps)
        for name, of in _DIVISORS.items():
            divisor, whole = getattr(self, name), getattr(self, of)
            if divisor is not None and whole % divisor:
                raise CheckpointError(f"{name} {divisor} does not divide {of} {whole}")
        if (positions := self.max_position_embeddings) < CELLS:
            raise _must_be("max_position_embeddings", f"at least {CELLS}", positions)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads. Without a value in the config, as many as query heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Shape of a board's logits: (4, bins) for binned_ev, (4,) for action_policy, else (0,)."""
        if self.head_type == "none":
            return (0,)
        if self.head_type == "action_policy":
            return (MOVES,)
        assert self.output_n_bins is not None
        return (MOVES, self.output_n_bins)


def _must_be(name: str, what: str, value: object) -> CheckpointError:
    return CheckpointError(f"{name} must be {what}; got {brief(value)}")
