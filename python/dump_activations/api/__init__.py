"""The two entrances: `dump` writes a run to a file, `stream` hands out its batches."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, Protocol

from dump_activations.api.dumping import dump_to_file, preview
from dump_activations.api.signatures import check_names, documented
from dump_activations.api.sources import Dataset, Init
from dump_activations.api.streaming import Batch, stream_batches
from dump_activations.options import DEFAULT_OUTPUT, DumpOptions, StreamOptions
from dump_activations.pipeline.summary import Summary

__all__ = ["Batch", "dump", "preview", "stream"]

_P = ParamSpec("_P")


class _Dump(Protocol[_P]):
    def __call__(
        self,
        init_or_model: Init,
        dataset_or_path: Dataset,
        output: str | os.PathLike[str] = ...,
        *args: _P.args,
        **options: _P.kwargs,
    ) -> Summary: ...


class _Stream(Protocol[_P]):
    def __call__(
        self, init_or_model: Init, dataset_or_path: Dataset, *args: _P.args, **options: _P.kwargs
    ) -> Iterator["Batch"]: ...


def _dump_taking(options_of: Callable[_P, DumpOptions]) -> _Dump[_P]:
    @documented(DumpOptions)
    def dump(
        init_or_model: Init,
        dataset_or_path: Dataset,
        output: str | os.PathLike[str] = DEFAULT_OUTPUT,
        *args: _P.args,
        **options: _P.kwargs,
    ) -> Summary:
        """Run boards through a model and write the asked-for activations to one file.

        Args:
            init_or_model: a checkpoint directory, `.pt` bundle or
                `hf://org/repo[/subdir][@revision]`; or a loaded Encoder.
            dataset_or_path: a steps dataset, or its directory.
            output: the file to write; its suffix, `.safetensors`, `.pt` or `.npz`, is its format.
            *args: none.
            **options: as below.

        Returns:
            What was done, and how long each stage was busy.

        Raises:
            DumpActivationsError: with one line that names what is wrong and the way out. No file of
                the target's name appears then, and one that was there is left as it was.
        """
        check_names("dump", DumpOptions, options)
        return dump_to_file(
            init_or_model, dataset_or_path, Path(output), options_of(*args, **options)
        )

    return dump


def _stream_taking(options_of: Callable[_P, StreamOptions]) -> _Stream[_P]:
    @documented(StreamOptions)
    def stream(
        init_or_model: Init, dataset_or_path: Dataset, *args: _P.args, **options: _P.kwargs
    ) -> Iterator[Batch]:
        """Run boards through a model and yield the asked-for activations, a batch at a time.

        Everything is loaded, checked and compiled before the call returns. On a GPU the next batch
        is computed while the caller works on the one before it, in the stream that is current now;
        the caller's own work may be in any, the one that is current at each batch is waited for.

        Args:
            init_or_model: a checkpoint directory, `.pt` bundle or
                `hf://org/repo[/subdir][@revision]`; or a loaded Encoder.
            dataset_or_path: a steps dataset, or its directory.
            *args: none.
            **options: as below.

        Raises:
            DumpActivationsError: with one line that names what is wrong and the way out.
        """
        check_names("stream", StreamOptions, options)
        return stream_batches(init_or_model, dataset_or_path, options_of(*args, **options))

    return stream


# Their keyword arguments are the fields of the options classes, for type checkers too.
dump = _dump_taking(DumpOptions)
stream = _stream_taking(StreamOptions)
