"""Files behind a URL: their names, sizes and versions, and ranges of their bytes.

obstore makes the requests, and takes credentials from where its stores look for them: the
environment, profiles, instance metadata, `hf auth login`. None is kept, printed or recorded.
"""

import html
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from dump_activations.errors import InvalidArgumentError, RemoteError, note
from dump_activations.remote.requests import (
    RETRIES,
    RemoteNotFoundError,
    ask,
    client_errors,
    run_all,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

_SCHEMES = ("s3", "gs", "az", "http", "https", "hf")
_HUB_FORM = "hf://datasets/ORG/NAME[@REVISION]/PATH"
# A server that accepts and never answers is given up within a minute, with all retries.
_CLIENT: "ClientConfig" = {"connect_timeout": "5s", "read_timeout": "12s", "timeout": "10m"}
_TIMEOUT = 30
_BODIES = 3
# The hub refuses a commit that begins before another one is complete.
_one_commit = Lock()
_LARGEST_PAGE = 64 << 20
_LINK = re.compile(r"""<a\s[^>]*?href\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE)


class RemoteFile(NamedTuple):
    """A file behind a URL.

    `etag` and `modified` change with its content. A server may lack the first, and some lists do.
    """

    name: str
    size: int
    etag: str | None = None
    modified: int | None = None

    def is_same(self, other: Self) -> bool:
        """Return False where the content has changed, as far as the server tells."""
        tells_tags = self.etag is not None and other.etag is not None
        return self.size == other.size and (
            self.etag == other.etag if tells_tags else self.modified == other.modified
        )


def without_secrets(url: str) -> str:
    """Return a URL without its query, fragment, user and password."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


@dataclass(frozen=True)
class Location:
    """A directory behind a URL."""

    url: str  # without secrets and without a final slash
    store: "ObjectStore"  # its files are named relative to `prefix`
    prefix: str  # what the store's paths begin with: "" or a path with a final slash
    commit: str | None = None  # of a repository on the hub
    headers: dict[str, str] = field(default_factory=dict, repr=False)  # for a web server

    @classmethod
    def of(cls, url: str, commit: str | None = None, *, make: bool = False) -> Self:
        """Connect to the store of a URL. No request is made, except for the commit on the hub.

        `make` makes a private dataset on the hub where there is none. A bucket must be there.

        Raises:
            InvalidArgumentError: no store serves the scheme, or the URL is not of its form.
            RemoteError: the package's extra `remote` is not installed.
        """
        shown = without_secrets(url).rstrip("/")
        scheme = shown.partition("://")[0].lower()
        if scheme not in _SCHEMES:
            raise InvalidArgumentError(
                f"{shown}: must be a path, or a URL that begins with "
                f"{', '.join(f'{each}://' for each in _SCHEMES)}"
            )
        if re.search(r"[?#]", url):
            raise InvalidArgumentError(f"{shown}: a URL with a query cannot be read; leave it out")
        if find_spec("obstore") is None:
            raise RemoteError(f"{shown}: run `pip install 'dump-activations[remote]'` to read URLs")
        if scheme == "hf":
            return cls._on_hub(shown, commit, make=make)
        from obstore.store import HTTPStore, from_url

        options: Any = {"client_options": dict(_CLIENT), "retry_config": RETRIES}
        with client_errors(shown):
            if scheme in ("http", "https"):
                user = unquote(urlsplit(url).netloc.rpartition("@")[0])
                basic = f"Basic {b64encode(user.encode()).decode()}"
                headers = {"Authorization": basic} if user else {}
                options["client_options"] |= {
                    "allow_http": scheme == "http",
                    "default_headers": headers,
                }
                return cls(shown, HTTPStore(shown, **options), "", headers=headers)
            # Only an endpoint that the environment names can be without TLS.
            options["client_options"]["allow_http"] = True
            bucket, _, path = shown.partition("://")[2].partition("/")
            if scheme == "s3":
                options["checksum_algorithm"] = "sha256"  # of what is written
                if (provider := _profile()) is not None:
                    options["credential_provider"] = provider
            store = from_url(f"{scheme}://{bucket}", **options)
            return cls(shown, store, f"{path}/" if path else "")

    @classmethod
    def _on_hub(cls, shown: str, commit: str | None, *, make: bool) -> Self:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import RepositoryNotFoundError
        from obstore.store import HTTPStore

        repo, revision, path = _repository(shown)
        if commit is None:
            look = partial(HfApi().dataset_info, repo, revision=revision, timeout=_TIMEOUT)
            create = partial(HfApi().create_repo, repo, repo_type="dataset", private=True)
            with client_errors(shown):
                try:
                    info = ask(look)
                except RepositoryNotFoundError:
                    if not make:
                        raise
                    ask(partial(create, exist_ok=True))
                    note(f"made a private dataset for {shown}")
                    info = ask(look)
            commit = info.sha
        client: Any = {**_CLIENT, "allow_http": constants.ENDPOINT.startswith("http://")}
        if token := get_token():
            client["default_headers"] = {"Authorization": f"Bearer {token}"}
        base = f"{constants.ENDPOINT}/datasets/{repo}/resolve/{commit}"
        store = HTTPStore(base, client_options=client, retry_config=RETRIES)
        return cls(shown, store, f"{path}/" if path else "", commit)

    def list(self, wanted: Callable[[str], bool]) -> list[RemoteFile]:
        """List the files of the directory whose names are wanted, sorted by name.

        Raises:
            RemoteNotFoundError: there is no such directory.
            RemoteError: the server refuses or does not answer.
        """
        if self.commit is not None:
            listed = self._list_hub
        elif self.url.startswith("http"):
            listed = partial(self._list_index, wanted)
        else:
            listed = self._list_bucket
        with client_errors(self.url):
            return sorted(file for file in ask(listed) if wanted(file.name))

    def head(self, name: str) -> RemoteFile | None:
        """Look at one file of the directory; None where there is none."""
        return ask(lambda: self._head(name))

    def _head(self, name: str) -> RemoteFile | None:
        import obstore

        try:
            with client_errors(f"{self.url}/{name}"):
                found = obstore.head(self.store, self.prefix + name)
        except RemoteNotFoundError:
            return None
        return RemoteFile(name, found["size"]) if self.commit else _described(name, found)

    def first_bytes(self, name: str, nbytes: int) -> bytes | None:
        """Read the first bytes of one file of the directory; None where there is none."""
        if (found := self.head(name)) is None:
            return None
        stop = min(found.size, nbytes)
        return bytes(ask(lambda: self.read(found, 0, stop))) if stop else b""

    def read(self, file: RemoteFile, start: int, stop: int) -> memoryview:
        """Read a range of a file's bytes.

        Raises:
            RemoteError: the server refuses, does not answer, has no ranges, or the file changed.
        """
        import obstore

        with client_errors(f"{self.url}/{file.name}"):
            for attempt in range(_BODIES):
                try:
                    found = obstore.get(
                        self.store, self.prefix + file.name, options={"range": (start, stop)}
                    )
                    data = memoryview(found.bytes())
                    break
                except obstore.exceptions.GenericError as error:
                    # The client repeats requests, but not answers that are cut short.
                    if "body error" not in str(error) or attempt == _BODIES - 1:
                        raise
        # On the hub the commit names the content, and the file may come from another server.
        if self.commit is None and not file.is_same(_described(file.name, found.meta)):
            raise RemoteError(f"{self.url}/{file.name} changed while it was read; run it again")
        if len(data) != stop - start:
            raise RemoteError(
                f"{self.url}/{file.name}: the server sent {len(data)} bytes of "
                f"{stop - start}; try again"
            )
        return data

    def write(self, name: str, data: Path | bytes) -> None:
        """Write a file of the directory, which appears there when it is whole.

        S3 and the hub compare checksums of what they receive.

        Raises:
            RemoteError: the server refuses, or does not answer.
        """
        import obstore

        with client_errors(f"{self.url}/{name}"):
            if self.commit is None:
                attributes = {"Content-Type": guess_type(name)[0] or "application/octet-stream"}
                path = self.prefix + name
                ask(lambda: obstore.put(self.store, path, data, attributes=attributes))
            else:
                ask(lambda: self._commit(name, data))

    def _commit(self, name: str, data: Path | bytes) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        repo, revision, _ = _repository(self.url)
        with _one_commit:
            # The dump has bars of its own.
            are_hidden = are_progress_bars_disabled()
            disable_progress_bars()
            try:
                HfApi().upload_file(
                    path_or_fileobj=data,
                    path_in_repo=self.prefix + name,
                    repo_id=repo,
                    repo_type="dataset",
                    revision=revision,
                    commit_message=f"Add {name}",
                )
            finally:
                if not are_hidden:
                    enable_progress_bars()

    def _list_bucket(self) -> Iterable[RemoteFile]:
        import obstore

        listing = obstore.list_with_delimiter(self.store, self.prefix.rstrip("/") or None)
        return [
            _described(str(each["path"]).rpartition("/")[2], each) for each in listing["objects"]
        ]

    def _list_hub(self) -> Iterable[RemoteFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        repo, path = _repository(self.url)[0], self.prefix.rstrip("/") or None
        return [
            RemoteFile(each.path.rpartition("/")[2], each.size)
            for each in HfApi().list_repo_tree(
                repo, path, revision=self.commit, repo_type="dataset"
            )
            if isinstance(each, RepoFile)
        ]

    def _list_index(self, wanted: Callable[[str], bool]) -> Iterable[RemoteFile]:
        """Read the names from the page that web servers make of a directory."""
        request = Request(f"{self.url}/")
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)  # No other server gets the password.
        with urlopen(request, timeout=_TIMEOUT) as answer:
            page = answer.read(_LARGEST_PAGE).decode(errors="replace")
        links = (urlsplit(html.unescape(link)).path for link in _LINK.findall(page))
        names = {unquote(path).removeprefix("./") for path in links}
        heads = [partial(self._head, each) for each in names if "/" not in each and wanted(each)]
        return filter(None, run_all(heads))


def _repository(url: str) -> tuple[str, str, str]:
    """Split the URL of a directory on the hub into repository, revision and path."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", url)
    if match is None:
        raise InvalidArgumentError(f"{url}: the address of a dataset must be {_HUB_FORM}")
    return match[1], unquote(match[2] or "main"), match[3] or ""


def _described(name: str, meta: Any) -> RemoteFile:
    return RemoteFile(name, meta["size"], meta["e_tag"], int(meta["last_modified"].timestamp()))


def _profile() -> Any:
    """Return what reads AWS profiles, if boto3 is installed and no key is in the environment."""
    if "AWS_ACCESS_KEY_ID" in os.environ or find_spec("boto3") is None:
        return None
    if "AWS_PROFILE" not in os.environ and not Path("~/.aws/credentials").expanduser().exists():
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()
