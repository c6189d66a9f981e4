"""Checkpoints on the Hugging Face Hub: `hf://org/repo[/subdir][@revision]` to a local directory."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
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
    DumpActivationsWarning,
)

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
            CheckpointError: the text is not of that form, or has a part that could leave the cache.
        """
        path, at, revision = uri.removeprefix(_SCHEME).partition("@")
        org, _, rest = path.rstrip("/").partition("/")
        repo, _, subdir = rest.partition("/")
        if not (org and repo):
            raise CheckpointError(f"{uri}: not of the form {_FORM}")
        try:
            validate_repo_id(f"{org}/{repo}")
        except HFValidationError as error:
            raise CheckpointError(f"{uri}: not of the form {_FORM}: {error}") from error
        if (subdir and not _stays_inside(subdir)) or (at and not _stays_inside(revision)):
            raise CheckpointError(f"{uri}: subdir and revision must be plain relative names")
        return cls(f"{org}/{repo}", subdir, revision or None)

    def path_of(self, name: str) -> str:
        """Path of a file of the checkpoint inside the repository."""
        return f"{self.subdir}/{name}" if self.subdir else name


def _stays_inside(path: str) -> bool:
    return not set("\\\0@") & set(path) and not {"", ".", ".."} & set(path.split("/"))


def download_checkpoint(uri: str, choose_files: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """Download the files of a checkpoint into the hub's cache and return their directory.

    Where the hub cannot be reached, a checkpoint that is already in the cache is used.

    Args:
        uri: `hf://org/repo[/subdir][@revision]`.
        choose_files: given the file names in the checkpoint's directory, those to download.

    Raises:
        CheckpointError: the form of `uri`, or a failed download.
        CheckpointNotFoundError: no such repository, revision or directory.
    """
    location = HubLocation.parse(uri)
    with _quiet_client():
        names, offline_reason = _list_names(uri, location)
    chosen = choose_files(names)
    if not chosen:
        raise CheckpointNotFoundError(
            f"{uri}: the hub cannot be reached and no checkpoint is cached ({offline_reason})"
            if offline_reason
            else f"{uri}: no checkpoint there; expected config.json or a .pt bundle"
        )
    if offline_reason:
        warnings.warn(
            f"{uri}: the hub cannot be reached ({offline_reason}); taking what is in the cache",
            DumpActivationsWarning,
            stacklevel=2,
        )
    try:
        directories = {
            Path(
                hf_hub_download(
                    location.repo_id,
                    location.path_of(name),
                    revision=location.revision,
                    local_files_only=offline_reason is not None,
                )
            ).parent
            for name in chosen
        }
    except Exception as error:
        raise CheckpointError(f"{uri}: download failed: {_first_line(error)}") from error
    if len(directories) > 1:
        raise CheckpointError(f"{uri}: the repository changed during the download; run it again")
    return directories.pop()


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


def _list_names(uri: str, location: HubLocation) -> tuple[list[str], str | None]:
    """Names in the checkpoint's directory; and, where they come from the cache, the reason."""
    try:
        paths = HfApi().list_repo_files(location.repo_id, revision=location.revision)
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
        return _cached_names(location), _first_line(error)
    return [
        name for path in paths if location.path_of(name := path.rpartition("/")[2]) == path
    ], None


def _cached_names(location: HubLocation) -> list[str]:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=location.repo_id, repo_type="model"
    )
    revision = location.revision or constants.DEFAULT_REVISION
    ref = folder / "refs" / revision
    try:
        commit = ref.read_text().strip() if ref.is_file() else revision
        return [path.name for path in (folder / "snapshots" / commit / location.subdir).iterdir()]
    except (OSError, ValueError):  # Not in the cache, or no name that could be.
        return []


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
