"""The fields of a checkpoint's `config.json` that shape the model."""

import sys
from dataclasses import MISSING, dataclass, fields
from reprlib import repr as brief
from typing import Any, Literal, Self, get_args

from dump_activations.dtypes import CELLS, MOVES
from dump_activations.errors import CheckpointError

HeadType = Literal["binned_ev", "action_policy", "none"]


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
        given = {name: value for name, value in values.items() if value is not None}
        known = {each.name: given[each.name] for each in fields(cls) if each.name in given}
        required = [each.name for each in fields(cls) if each.default is MISSING]
        missing = [name for name in required if name not in known]
        if missing:
            raise CheckpointError(f"missing {', '.join(missing)}")
        return cls(**known)

    def __post_init__(self) -> None:
        _check_size("num_hidden_layers", self.num_hidden_layers, _MOST_LAYERS)
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.num_key_value_heads is not None:
            _check_size("num_key_value_heads", self.num_key_value_heads)
        for name in ("use_attention_sinks", "use_qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise _must_be(name, "true or false", getattr(self, name))
        eps = self.layer_norm_eps
        is_number = isinstance(eps, int | float) and not isinstance(eps, bool)
        if not (is_number and 0 <= eps <= sys.float_info.max):
            raise _must_be("layer_norm_eps", "a number >= 0", eps)
        if self.head_type not in get_args(HeadType):
            raise _must_be("head_type", f"one of {', '.join(get_args(HeadType))}", self.head_type)
        if self.head_type == "binned_ev":
            if self.output_n_bins is None:
                raise CheckpointError("missing output_n_bins, which head_type binned_ev needs")
            _check_size("output_n_bins", self.output_n_bins)
        self._check_divides("num_attention_heads", "hidden_size")
        if self.num_key_value_heads is not None:
            self._check_divides("num_key_value_heads", "num_attention_heads")
        if self.max_position_embeddings < CELLS:
            raise _must_be(
                "max_position_embeddings", f"at least {CELLS}", self.max_position_embeddings
            )

    def _check_divides(self, name: str, of: str) -> None:
        divisor, whole = getattr(self, name), getattr(self, of)
        if whole % divisor:
            raise CheckpointError(f"{name} {divisor} does not divide {of} {whole}")

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


_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "input_vocab_size",
    "max_position_embeddings",
)
# Far above any real model, and far below sizes whose products overflow.
_LARGEST_SIZE = 1 << 20
# So many take about a second to make.
_MOST_LAYERS = 1024


def _check_size(name: str, value: object, largest: int = _LARGEST_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise _must_be(name, f"a whole number from 1 to {largest}", value)


def _must_be(name: str, what: str, value: object) -> CheckpointError:
    return CheckpointError(f"{name} must be {what}; got {brief(value)}")
