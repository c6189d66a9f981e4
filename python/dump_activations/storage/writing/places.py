"""Where in a file the tensors of its batches lie."""

from dump_activations.storage.formats.layout import Layout
from dump_activations.storage.writing.records import BatchDigests, Header
from dump_activations.storage.writing.work import Work


class Places:
    """The places of all batches in a file.

    Attributes:
        header: what batches there are.
        layout: of the finished file.
        dtypes, row_nbytes: of each tensor.
    """

    def __init__(self, work: Work, layout: Layout) -> None:
        self.header: Header = work.header
        self.layout = layout
        self.dtypes = {spec.name: spec.dtype for spec in work.specs}
        self.row_nbytes = {spec.name: spec.row_nbytes for spec in work.specs}

    def of(self, batches: range, name: str) -> tuple[int, int]:
        """Return (start, stop) of the bytes of consecutive batches of a tensor, in the file."""
        rows = self.header.rows_of(batches)
        offset, row_nbytes = self.layout.offsets[name], self.row_nbytes[name]
        return offset + rows.start * row_nbytes, offset + rows.stop * row_nbytes

    def fit(self, batch: int, digests: BatchDigests) -> bool:
        """Whether digests are those of as many bytes as a batch has."""
        places = {name: self.of(range(batch, batch + 1), name) for name in digests}
        return all(digests[name].nbytes == stop - at for name, (at, stop) in places.items())
