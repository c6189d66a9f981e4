"""Checkpoints on the Hugging Face Hub: `hf://org/repo[/subdir][@revision]` to a local directory."""

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DumpActivationsError,
    InvalidArgumentError,
    warn,
)
from dump_activations.progress import begin, reporter

_Choice = Callable[[Sequence[str]], Sequence[str]]

_SCHEME = "hf://"
_FORM = "hf://org/repo[/subdir][@revision]"
_OTHER_KINDS = ("buckets", "datasets", "kernels", "models", "spaces")
# By status: what to do where the hub answers and refuses.
_WAYS_OUT = {
    401: "check the token: `hf auth login`, or `hf auth logout` for a public repository",
    403: "check that the token may read the repository: `hf auth whoami`",
    429: "wait, or log in for a higher rate limit: `hf auth login`",
}


class _Location(NamedTuple):
    """A checkpoint on the hub. `subdir` is "" for the top of the repository."""

    repo_id: str
    subdir: str
    revision: str

    @classmethod
    def parse(cls, uri: str) -> Self:
        path, at, revision = uri.removeprefix(_SCHEME).partition("@")
        org, _, rest = path.rstrip("/").partition("/")
        repo, _, subdir = rest.partition("/")
        if not uri.startswith(_SCHEME) or not (org and repo) or org in _OTHER_KINDS:
            raise InvalidArgumentError(f"{uri}: a model repository's address must be {_FORM}")
        view, _, rest = subdir.partition("/")
        if view in ("blob", "resolve", "tree") and rest and not at:
            branch, slash, below = rest.partition("/")
            address = f"{_SCHEME}{org}/{repo}{slash}{below}@{branch}"
            raise InvalidArgumentError(f"{uri}: the address of a web page; give {address}")
        if (subdir and not _stays_inside(subdir)) or (at and not _stays_inside(revision)):
            raise InvalidArgumentError(f"{uri}: subdir and revision must be plain relative names")
        return cls(f"{org}/{repo}", subdir, revision or constants.DEFAULT_REVISION)


def _stays_inside(path: str) -> bool:
    return not set("\\\0@") & set(path) and not {"", ".", ".."} & set(path.split("/"))


def download_checkpoint(uri: str, choose_files: _Choice) -> tuple[Path, str]:
    """Download the files of a checkpoint into the hub's cache.

    Where the hub does not answer, a checkpoint that is already in the cache is used.

    Args:
        uri: `hf://org/repo[/subdir][@revision]`.
        choose_files: names of the files in the checkpoint's directory -> names to download. Raises
            CheckpointNotFoundError where they are not a checkpoint.

    Returns:
        The directory that holds them, and their commit.

    Raises:
        InvalidArgumentError: the form of `uri`.
        CheckpointError: a failed download, or one that the hub refuses.
        CheckpointNotFoundError: no such repository, revision or checkpoint.
    """
    location = _Location.parse(uri)
    begin(f"downloading {uri}")
    try:
        with _quiet_client():
            snapshot = _download(location, choose_files)
    except CheckpointNotFoundError:
        raise
    except HFValidationError as error:
        raise InvalidArgumentError(f"{uri}: must be {_FORM}: {error}") from error
    except Exception as error:
        # The client raises errors of many libraries.
        _raise_refusal(uri, location, error)
        snapshot = _cached(uri, location, choose_files, _reason(error))
    return snapshot / location.subdir, snapshot.name


def _download(location: _Location, choose_files: _Choice) -> Path:
    # The client waits without end unless it is given a timeout.
    info = HfApi().model_info(
        location.repo_id, revision=location.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    below = f"{location.subdir}/" if location.subdir else ""
    paths = [file.rfilename for file in info.siblings or []]
    names = [name for path in paths if below + (name := path.rpartition("/")[2]) == path]
    chosen = [glob.escape(below + name) for name in choose_files(names)]
    # Files are of one commit, even if the branch moves in between.
    assert info.sha is not None
    snapshot = Path(snapshot_download(location.repo_id, revision=info.sha, allow_patterns=chosen))
    if location.revision != info.sha:
        # Asked for a commit, the client does not record where the branch is. The cache needs that
        # once the hub cannot be reached.
        ref = snapshot.parents[1] / "refs" / location.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(info.sha)
    return snapshot


def _raise_refusal(uri: str, location: _Location, error: Exception) -> None:
    """Raise an error with the hub's reason and a way out where the hub answered."""
    refusal: BaseException | None = error
    while refusal is not None and not isinstance(refusal, HfHubHTTPError):
        refusal = refusal.__cause__
    kind: type[DumpActivationsError] = CheckpointError
    match refusal:
        case None:
            return
        case RevisionNotFoundError():
            kind = CheckpointNotFoundError
            text = f"no revision {location.revision}; the form is {_FORM}"
        case GatedRepoError():
            text = "gated; ask for access, then `hf auth login`"
        case RepositoryNotFoundError():
            kind = CheckpointNotFoundError
            text = "no such repository, or a private one: check the name or `hf auth login`"
        case _:
            status = refusal.response.status_code
            if status not in _WAYS_OUT:
                return
            text = f"the hub refuses ({status}: {_reason(refusal)}); {_WAYS_OUT[status]}"
    raise kind(f"{uri}: {text}") from error


def _reason(error: Exception) -> str:
    """Give the hub's own words where it answered, else the first line of the client's error."""
    text = getattr(error, "server_message", None) or str(error)
    return text.strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _cached(uri: str, location: _Location, choose_files: _Choice, reason: str) -> Path:
    repo_id, revision = location.repo_id, location.revision
    try:
        # Without a pattern the client would miss the files that were never asked for.
        found = snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=[]
        )
        snapshot = Path(found)
        choose_files([path.name for path in (snapshot / location.subdir).iterdir()])
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(
            f"{uri}: the hub cannot be reached and no checkpoint is cached ({reason})"
        ) from error
    warn(f"{uri}: the hub cannot be reached ({reason}); using the cached checkpoint")
    return snapshot


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the client from logging its attempts, and from showing bars where progress is shown."""
    logger = logging.getLogger("huggingface_hub")
    level, hides_bars = logger.level, reporter() is not None and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hides_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hides_bars:
            enable_progress_bars()
