"""What a run is going to write, known before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dump_activations.dtypes import TensorSpec
from dump_activations.pipeline.plan import Plan
from dump_activations.text import size_text


@dataclass(frozen=True)
class Preview:
    """What a run is going to write.

    Attributes:
        boards: how many go through the model.
        keys: what is captured of them.
        tensors: what becomes of it, `indices` and `boards` with it.
        output: the file; None if nothing is written.
        free_nbytes: space that the file's disk has left; None if nothing is written.
    """

    boards: int
    keys: Sequence[str]
    tensors: Sequence[TensorSpec]
    output: Path | None
    free_nbytes: int | None

    @classmethod
    def of(cls, plan: Plan, output: Path | None = None, free_nbytes: int | None = None) -> Self:
        """Preview a plan, and the file that it is to be written to."""
        keys = [each.key for each in plan.activations]
        return cls(len(plan.indices), keys, plan.tensor_specs(), output, free_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def text(self) -> str:
        """All but the tensors, in a line."""
        what = f"{self.boards:,} boards of {', '.join(self.keys)}: {size_text(self.nbytes)}"
        if self.free_nbytes is None:
            return f"{what}, which are not written"
        return f"{what} to {self.output}; {size_text(self.free_nbytes)} free"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {
            "boards": self.boards,
            "keys": list(self.keys),
            "bytes": self.nbytes,
            "output": None if self.output is None else str(self.output),
            "free_bytes": self.free_nbytes,
            "tensors": [
                {"key": each.name, "dtype": each.dtype, "shape": each.shape, "bytes": each.nbytes}
                for each in self.tensors
            ],
        }
