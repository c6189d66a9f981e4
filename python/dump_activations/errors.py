"""What can go wrong: one base class; each error is also the builtin a caller expects."""


class DumpActivationsError(Exception):
    """Base of every error this package raises on purpose. Its text is one line for the user."""

    exit_code = 1


class InvalidArgumentError(DumpActivationsError, ValueError):
    """A call that no file or machine could make right: a bad option or combination."""

    exit_code = 2


class ActivationNotImplementedError(DumpActivationsError, NotImplementedError):
    """An activation key that is reserved but has no implementation."""

    exit_code = 2


class DatasetNotFoundError(DumpActivationsError, FileNotFoundError):
    """No such dataset directory, or no shards in it."""


class DatasetError(DumpActivationsError, ValueError):
    """A shard that cannot be read: its header, its fields, its size or its rows."""


class StepIndexError(DumpActivationsError, IndexError):
    """A step index outside the pool."""


class IndicesError(DumpActivationsError, ValueError):
    """A list of step indices that cannot be used: its dtype, or no entries."""


class IndicesNotFoundError(DumpActivationsError, FileNotFoundError):
    """No such file of step indices."""


class CheckpointNotFoundError(DumpActivationsError, FileNotFoundError):
    """No such checkpoint, or no weights in it."""


class CheckpointError(DumpActivationsError, ValueError):
    """A checkpoint whose config or weights are missing, damaged or contradictory."""


class ActivationUnavailableError(DumpActivationsError, ValueError):
    """An activation key that this model does not have."""


class VocabularyError(DumpActivationsError, ValueError):
    """A board with an exponent that the model has no embedding for."""


class DeviceError(DumpActivationsError, RuntimeError):
    """A compute device that is not there, or ran out of memory."""


class OutputError(DumpActivationsError, OSError):
    """An output file that cannot be written, resumed or read back."""


class DumpActivationsWarning(UserWarning):
    """Something a user should know that does not stop the run."""
