"""Checkpoints on the Hugging Face Hub: `hf://org/repo[/subdir][@revision]` to a local directory."""

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    warn,
)
from dump_activations.model.hub_progress import reported_download

_SCHEME = "hf://"
_FORM = "hf://org/repo[/subdir][@revision]"


@dataclass(frozen=True)
class HubLocation:
    """Where a checkpoint lies on the hub. `subdir` is "" for the top; `revision` None for main."""

    repo_id: str
    subdir: str
    revision: str | None

    @classmethod
    def parse(cls, uri: str) -> "HubLocation":
        """Split `hf://org/repo[/subdir][@revision]`.

        Raises:
            InvalidArgumentError: another form, or a part that could leave the cache.
        """
        path, at, revision = uri.removeprefix(_SCHEME).partition("@")
        org, _, rest = path.rstrip("/").partition("/")
        repo, _, subdir = rest.partition("/")
        if not (org and repo):
            raise InvalidArgumentError(f"{uri}: not of the form {_FORM}")
        try:
            validate_repo_id(f"{org}/{repo}")
        except HFValidationError as error:
            raise InvalidArgumentError(f"{uri}: not of the form {_FORM}: {error}") from error
        if (subdir and not _stays_inside(subdir)) or (at and not _stays_inside(revision)):
            raise InvalidArgumentError(f"{uri}: subdir and revision must be plain relative names")
        return cls(f"{org}/{repo}", subdir, revision or None)

    def path_of(self, name: str) -> str:
        """Path of a file of the checkpoint inside the repository."""
        return f"{self.subdir}/{name}" if self.subdir else name


def _stays_inside(path: str) -> bool:
    return not set("\\\0@") & set(path) and not {"", ".", ".."} & set(path.split("/"))


def download_checkpoint(
    uri: str, choose_files: Callable[[Sequence[str]], Sequence[str]]
) -> tuple[Path, str]:
    """Download the files of a checkpoint into the hub's cache.

    Where the hub cannot be reached, a checkpoint that is already in the cache is used.

    Args:
        uri: `hf://org/repo[/subdir][@revision]`.
        choose_files: given the file names in the checkpoint's directory, those to download; raises
            CheckpointNotFoundError where they make no checkpoint.

    Returns:
        The directory that holds them, and the commit that they are of.

    Raises:
        InvalidArgumentError: the form of `uri`.
        CheckpointError: a failed download.
        CheckpointNotFoundError: no such repository, revision or checkpoint.
    """
    location = HubLocation.parse(uri)
    try:
        with _quiet_client():
            names = _list_names(uri, location)
    except _UnreachableError as error:
        return _take_cached(uri, location, choose_files, str(error))
    chosen = [glob.escape(location.path_of(name)) for name in choose_files(names)]
    try:
        with reported_download(uri) as bar:
            snapshot = Path(
                snapshot_download(
                    location.repo_id,
                    revision=location.revision,
                    allow_patterns=chosen,
                    tqdm_class=bar,
                )
            )
    except Exception as error:
        raise CheckpointError(f"{uri}: download failed: {_first_line(error)}") from error
    return snapshot / location.subdir, snapshot.name


def _take_cached(
    uri: str,
    location: HubLocation,
    choose_files: Callable[[Sequence[str]], Sequence[str]],
    reason: str,
) -> tuple[Path, str]:
    try:
        snapshot = _cached_snapshot(location)
        directory = snapshot / location.subdir
        choose_files([path.name for path in directory.iterdir()])
    except (OSError, ValueError) as error:  # Not in the cache, or no name that could be.
        raise CheckpointNotFoundError(
            f"{uri}: the hub cannot be reached and no checkpoint is cached ({reason})"
        ) from error
    warn(f"{uri}: the hub cannot be reached ({reason}); taking what is in the cache")
    return directory, snapshot.name


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the client from warning of every attempt: one line says in the end what is wrong."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _UnreachableError(Exception):
    """The hub gives no answer; the text says why."""


def _list_names(uri: str, location: HubLocation) -> list[str]:
    """Names in the checkpoint's directory."""
    try:
        info = HfApi().model_info(location.repo_id, revision=location.revision)
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{uri}: no revision {location.revision}") from error
    except GatedRepoError as error:
        raise CheckpointError(f"{uri}: gated; ask for access, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{uri}: no such repository, or a private one: check the name or `hf auth login`"
        ) from error
    except Exception as error:
        # Whatever keeps the hub from answering, a cached checkpoint is still good.
        raise _UnreachableError(_first_line(error)) from error
    paths = [file.rfilename for file in info.siblings or []]
    return [name for path in paths if location.path_of(name := path.rpartition("/")[2]) == path]


def _cached_snapshot(location: HubLocation) -> Path:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=location.repo_id, repo_type="model"
    )
    revision = location.revision or constants.DEFAULT_REVISION
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    return folder / "snapshots" / commit


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
