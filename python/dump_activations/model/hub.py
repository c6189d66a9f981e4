"""Checkpoints on the Hugging Face Hub: `hf://org/repo[/subdir][@revision]` to a local directory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub as client
from huggingface_hub import constants, errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
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


def _parse(uri: str) -> tuple[str, str, str]:
    """Return repository, directory in it, "" for its top, and revision."""
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
    return f"{org}/{repo}", subdir, revision or constants.DEFAULT_REVISION


def _stays_inside(path: str) -> bool:
    return not set("\\\0@") & set(path) and not {"", ".", ".."} & set(path.split("/"))


def download_checkpoint(uri: str, choose_files: _Choice) -> tuple[Path, str]:
    """Download the files of a checkpoint into the hub's cache.

    Where the hub does not answer, or refuses, a checkpoint that is already in the cache is used, as
    the hub's own tools do. `choose_files` takes the names in the checkpoint's directory and returns
    those to download. Returns the directory that holds them, and their commit.
    """
    repo_id, subdir, revision = _parse(uri)
    begin(f"downloading {uri}")
    try:
        with _quiet_client():
            snapshot = _download(repo_id, subdir, revision, choose_files)
    except CheckpointNotFoundError:
        raise
    except errors.HFValidationError as error:
        raise InvalidArgumentError(f"{uri}: must be {_FORM}: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{uri}: no revision {revision}; the form is {_FORM}"
        ) from error
    except Exception as error:
        # The client raises errors of many libraries.
        kind, reason = _explain(error)
        cached = _cached(repo_id, subdir, revision, choose_files)
        if cached is None:
            raise kind(f"{uri}: {reason}; no checkpoint is cached") from error
        warn(f"{uri}: {reason}; using the cached checkpoint")
        snapshot = cached
    return snapshot / subdir, snapshot.name


def _download(repo_id: str, subdir: str, revision: str, choose_files: _Choice) -> Path:
    # The client waits without end unless it is given a timeout.
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = client.HfApi().model_info(repo_id, revision=revision, timeout=timeout)
    # Files are of one commit, even if the branch moves in between.
    commit = info.sha
    assert commit is not None
    below = f"{subdir}/" if subdir else ""
    paths = [file.rfilename for file in info.siblings or []]
    names = [name for path in paths if below + (name := path.rpartition("/")[2]) == path]
    for path in [below + name for name in choose_files(names)]:
        if not isinstance(client.try_to_load_from_cache(repo_id, path, revision=commit), str):
            # Without an answer to this, a download would try for minutes.
            url = client.hf_hub_url(repo_id, path, revision=commit)
            client.get_hf_file_metadata(url, timeout=timeout)
        file = client.hf_hub_download(repo_id, path, revision=commit)
    snapshot = Path(file.removesuffix(path))
    if revision != commit:
        # Asked for a commit, the client does not record where the branch is. The cache needs that
        # once the hub cannot be reached.
        ref = snapshot.parents[1] / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return snapshot


def _explain(error: Exception) -> tuple[type[CheckpointError | CheckpointNotFoundError], str]:
    """Return the kind of error to raise, and the hub's reason with a way out."""
    refusal: BaseException | None = error
    while refusal is not None and not isinstance(refusal, errors.HfHubHTTPError):
        refusal = refusal.__cause__
    if isinstance(refusal, errors.GatedRepoError):
        return CheckpointError, "gated; ask for access, then `hf auth login`"
    if isinstance(refusal, errors.RepositoryNotFoundError):
        return CheckpointNotFoundError, (
            "no such repository, or a private one: check the name or `hf auth login`"
        )
    # The hub's own words where it answered, else the first line of the client's error.
    reason = getattr(refusal or error, "server_message", None) or str(error)
    reason = reason.strip().partition("\n")[0].rstrip(".") or type(error).__name__
    status = 0 if refusal is None else refusal.response.status_code
    if status in _WAYS_OUT:
        return CheckpointError, f"the hub refuses ({status}: {reason}); {_WAYS_OUT[status]}"
    return CheckpointNotFoundError, f"the hub cannot be reached ({reason})"


def _cached(repo_id: str, subdir: str, revision: str, choose_files: _Choice) -> Path | None:
    """Find the checkpoint in the client's cache."""
    try:
        # Without a pattern the client would miss the files that were never asked for.
        found = client.snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=[]
        )
        choose_files([path.name for path in (Path(found) / subdir).iterdir()])
    except (OSError, ValueError):
        return None
    return Path(found)


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
