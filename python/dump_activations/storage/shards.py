"""Names of a dump's shards, `NAME-00003-of-00040.SUFFIX`, and the shards in a directory.

docs/file-format.md has the names and the rules of the cut.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dump_activations.errors import OutputError

MAX_SHARDS = 99_999

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")


@dataclass(frozen=True)
class Shard:
    """A shard's place in its dump."""

    whole: Path  # name of the whole dump: `activations.safetensors`
    number: int  # 1 to `count`
    count: int  # shards of the dump

    @property
    def path(self) -> Path:
        """Return the name of the finished shard."""
        numbers = f"{self.number:05}-of-{self.count:05}"
        return self.whole.with_name(f"{self.whole.stem}-{numbers}{self.whole.suffix}")

    @property
    def text(self) -> str:
        """Return the value of the metadata key `shard`: `3/40`."""
        return f"{self.number}/{self.count}"


def parse_shard(path: Path) -> Shard | None:
    """Split a shard's name; None for any other name."""
    match = _SHARD.fullmatch(path.stem)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return None
    whole = path.with_name(match["stem"] + path.suffix)
    return Shard(whole, int(match["number"]), int(match["count"]))


def list_names(directory: Path) -> set[str]:
    """List a directory, which may be missing; OutputError where it cannot be listed."""
    with OutputError.when(f"cannot list {directory}"), suppress(FileNotFoundError):
        return set(os.listdir(directory))  # noqa: PTH208 -- names, not paths
    return set()


def list_shards(
    whole: Path, ending: str = "", names: Iterable[str] | None = None
) -> Mapping[Shard, Path]:
    """Find the shards of a dump in its directory, or among `names`, in order.

    `ending` follows the name of a finished shard: `.partial` lists unfinished ones.
    """
    found = {}
    for name in list_names(whole.parent) if names is None else names:
        if name.endswith(ending):
            shard = parse_shard(whole.with_name(name.removesuffix(ending)))
            if shard is not None and shard.whole == whole:
                found[shard] = whole.with_name(name)
    return dict(sorted(found.items(), key=lambda each: (each[0].count, each[0].number)))
