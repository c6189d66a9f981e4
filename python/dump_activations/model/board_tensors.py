"""The tensors that the asked-for activations become, and which modules fill them."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from dump_activations.model.activations import BoardActivation
from dump_activations.model.config import EncoderConfig


@dataclass(frozen=True)
class BoardTensor:
    """A tensor with one value a board.

    Attributes:
        name: in the file.
        activation: what is captured.
        shape: of one board's value.
        modules: the modules to hook, as `named_modules()` names them.
        stacked: whether the i-th module fills index i of the value's first axis; else there is one
            module and it fills all of the value.
    """

    name: str
    activation: BoardActivation
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    _: KW_ONLY
    stacked: bool


def board_tensors(
    activation: BoardActivation, config: EncoderConfig, *, layers: Sequence[int], split: bool
) -> list[BoardTensor]:
    """Return the tensors of one activation.

    Args:
        activation: what is captured.
        config: of the model.
        layers: numbers of the wanted layers.
        split: whether each layer gets a tensor of its own, `KEY.LAYER`, of an activation that has
            layers; else they are stacked in one.
    """
    key, shape = activation.key, activation.shape_in(config)
    inner = tuple(activation.modules(config))
    if not activation.per_layer:
        return [BoardTensor(key, activation, shape, inner, stacked=len(inner) > 1)]
    (module,) = inner
    modules = {layer: f"blocks.{layer}.{module}".rstrip(".") for layer in layers}
    if split:
        return [
            BoardTensor(f"{key}.{layer}", activation, shape, (name,), stacked=False)
            for layer, name in modules.items()
        ]
    stack = (len(layers), *shape)
    return [BoardTensor(key, activation, stack, tuple(modules.values()), stacked=True)]
