"""Files behind a URL: their names, sizes and versions, and ranges of their bytes.

obstore makes the requests, and takes credentials from where its stores look for them: the
environment, profiles, instance metadata, `hf auth login`. None is kept, printed or recorded.
"""

import asyncio
import atexit
import os
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, TypeVarTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from dump_activations.errors import InvalidArgumentError, RemoteError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_SCHEMES = ("s3", "gs", "az", "http", "https", "hf")
_HUB_FORM = "hf://datasets/ORG/NAME[@REVISION]/PATH"
# A server that accepts and never answers is given up within a minute, with all retries.
_CLIENT = {"connect_timeout": "5s", "read_timeout": "12s", "timeout": "10m"}
_RETRIES = {"max_retries": 10, "retry_timeout": timedelta(seconds=30)}
_TIMEOUT = 30
_BODIES = 3
# Requests at once: over a link of 20 ms, 4,096 rows then take 2.6 s.
_REQUESTS = 32
# Seconds. A child that was forked has the marks of threads that it has not.
_LONGEST_EXIT = 1.0
_FIRST_PROCESS = os.getpid()
_LARGEST_PAGE = 64 << 20
# Signed URLs carry their secret in the query, and clients quote the URL in errors.
_QUERY = re.compile(r"\?\S*")
_ANSWERS = {
    "401": "log in, or check the credentials",
    "403": "check that the credentials may read it",
    "429": "the server asks for a pause: try again later",
    "500": "try again later",
    "503": "the server is overloaded: try again later",
}


class RemoteNotFoundError(RemoteError):
    """A file or directory behind a URL that does not exist."""


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
    """A directory behind a URL.

    Attributes:
        url: the URL, without secrets and without a final slash.
        store: its files are named relative to `prefix`.
        prefix: what the store's paths begin with: "" or a path with a final slash.
        commit: of a repository on the hub; None elsewhere.
        headers: of requests to a web server.
    """

    url: str
    store: "ObjectStore"
    prefix: str
    commit: str | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, url: str, commit: str | None = None) -> Self:
        """Connect to the store of a URL. No request is made, except for the commit on the hub.

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
            return cls._on_hub(shown, commit)
        from obstore.store import HTTPStore, from_url

        options: Any = {"client_options": dict(_CLIENT), "retry_config": _RETRIES}
        with _errors(shown):
            if scheme in ("http", "https"):
                headers = _authorization(url)
                options["client_options"] |= {
                    "allow_http": scheme == "http",
                    "default_headers": headers,
                }
                return cls(shown, HTTPStore(shown, **options), "", headers=headers)
            endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
            bucket, _, path = shown.partition("://")[2].partition("/")
            if scheme == "s3" and (provider := _profile()) is not None:
                options["credential_provider"] = provider
            store = from_url(f"{scheme}://{bucket}", **options)
            return cls(shown, store, f"{path}/" if path else "")

    @classmethod
    def _on_hub(cls, shown: str, commit: str | None) -> Self:
        from huggingface_hub import HfApi, constants, get_token
        from obstore.store import HTTPStore

        match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", shown)
        if match is None:
            raise InvalidArgumentError(f"{shown}: the address of a dataset must be {_HUB_FORM}")
        repo, revision, path = match[1], unquote(match[2] or "main"), match[3] or ""
        if commit is None:
            with _errors(shown):
                info = HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT)
            commit = info.sha
        client: Any = {**_CLIENT, "allow_http": constants.ENDPOINT.startswith("http://")}
        if token := get_token():
            client["default_headers"] = {"Authorization": f"Bearer {token}"}
        base = f"{constants.ENDPOINT}/datasets/{repo}/resolve/{commit}"
        store = HTTPStore(base, client_options=client, retry_config=_RETRIES)  # type: ignore[arg-type]
        return cls(shown, store, f"{path}/" if path else "", commit)

    def list(self, wanted: Callable[[str], bool]) -> list[RemoteFile]:
        """List the files of the directory whose names are wanted, sorted by name.

        Raises:
            RemoteNotFoundError: there is no such directory.
            RemoteError: the server refuses or does not answer.
        """
        with _errors(self.url):
            if self.commit is not None:
                found = self._list_hub()
            elif self.url.startswith("http"):
                found = self._list_index(wanted)
            else:
                found = self._list_bucket()
            return sorted(file for file in found if wanted(file.name))

    def head(self, name: str) -> RemoteFile | None:
        """Look at one file of the directory; None where there is none."""
        return run_all([self._head(name)])[0]

    async def _head(self, name: str) -> RemoteFile | None:
        import obstore

        try:
            with _errors(f"{self.url}/{name}"):
                found = await obstore.head_async(self.store, self.prefix + name)
        except RemoteNotFoundError:
            return None
        return RemoteFile(name, found["size"]) if self.commit else _described(name, found)

    async def read(self, file: RemoteFile, start: int, stop: int) -> memoryview:
        """Read a range of a file's bytes.

        Raises:
            RemoteError: the server refuses, does not answer, has no ranges, or the file changed.
        """
        import obstore

        with _errors(f"{self.url}/{file.name}"):
            for attempt in range(_BODIES):
                try:
                    found = await obstore.get_async(
                        self.store, self.prefix + file.name, options={"range": (start, stop)}
                    )
                    data = memoryview(await found.bytes_async())
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

    def _list_bucket(self) -> Iterator[RemoteFile]:
        import obstore

        listing = obstore.list_with_delimiter(self.store, self.prefix.rstrip("/") or None)
        for each in listing["objects"]:
            yield _described(str(each["path"]).rpartition("/")[2], each)

    def _list_hub(self) -> Iterator[RemoteFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        repo = self.url.removeprefix("hf://datasets/")
        repo = "/".join(repo.split("/")[:2]).partition("@")[0]
        path = self.prefix.rstrip("/") or None
        api = HfApi()
        for each in api.list_repo_tree(repo, path, revision=self.commit, repo_type="dataset"):
            if isinstance(each, RepoFile):
                yield RemoteFile(each.path.rpartition("/")[2], each.size)

    def _list_index(self, wanted: Callable[[str], bool]) -> Iterator[RemoteFile]:
        """Read the names from the page that web servers make of a directory."""
        request = Request(f"{self.url}/")
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)  # No other server gets the password.
        with urlopen(request, timeout=_TIMEOUT) as answer:
            page = answer.read(_LARGEST_PAGE).decode(errors="replace")
        links = _Links()
        links.feed(page)
        heads = [self._head(name) for name in sorted(set(links.names)) if wanted(name)]
        yield from (found for found in run_all(heads) if found is not None)


def run_all(works: Sequence[Coroutine[Any, Any, _T]], at_once: int = _REQUESTS) -> list[_T]:
    """Run requests, some of them at once, and return their results in order.

    Raises the error of the first that fails, or what interrupts the wait.
    """

    async def run() -> list[_T]:
        slots = asyncio.Semaphore(min(at_once, _REQUESTS))

        async def each(work: Coroutine[Any, Any, _T]) -> _T:
            async with slots:
                return await work

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each(work)) for work in works]
        return [task.result() for task in tasks]

    future = asyncio.run_coroutine_threadsafe(run(), _loop(os.getpid()))
    try:
        return future.result()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    except BaseException:
        future.cancel()
        raise


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Start the loop of a process. Its thread ends with the process, whatever is under way."""
    if process != _FIRST_PROCESS:
        raise RemoteError(
            "remote files cannot be read after a fork; give the DataLoader "
            "multiprocessing_context='spawn'"
        )
    loop = _Loop()
    atexit.register(loop.wait_for_clients)
    threading.Thread(target=loop.run_forever, name="remote reads", daemon=True).start()
    return loop


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that knows which threads are inside of its calls.

    A thread of the client hands over an answer. The program may take it, and end before that thread
    is back. Python would then end the thread inside of the client, which aborts the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: dict[int, bool] = {}

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        thread = threading.get_ident()
        self._inside[thread] = True
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        finally:
            # No call may follow: this thread keeps the interpreter until it is back in the client.
            self._inside[thread] = False

    def wait_for_clients(self) -> None:
        """Wait until the threads have left, at the end of the program."""
        ends = time.monotonic() + _LONGEST_EXIT
        while True in list(self._inside.values()) and time.monotonic() < ends:
            time.sleep(0.001)


class _Links(HTMLParser):
    """Collects the names of files that a page links to, next to it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href") if tag == "a" else None
        name = unquote(urlsplit(target or "").path).removeprefix("./")
        if name and "/" not in name:
            self.names.append(name)


def _described(name: str, meta: Any) -> RemoteFile:
    return RemoteFile(name, meta["size"], meta["e_tag"], int(meta["last_modified"].timestamp()))


def _authorization(url: str) -> dict[str, str]:
    """Return the header that carries the user and password of a URL."""
    user = unquote(urlsplit(url).netloc.rpartition("@")[0])
    return {"Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else {}


def _profile() -> Any:
    """Return what reads AWS profiles, if boto3 is installed and no key is in the environment."""
    if "AWS_ACCESS_KEY_ID" in os.environ or find_spec("boto3") is None:
        return None
    if "AWS_PROFILE" not in os.environ and not Path("~/.aws/credentials").expanduser().exists():
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turn what the clients raise into one line that names the file and what to do."""
    try:
        yield
    except (RemoteError, InvalidArgumentError):
        raise
    except FileNotFoundError as error:
        raise RemoteNotFoundError(f"{what}: no such file or directory") from error
    except Exception as error:  # The clients raise errors of many libraries.
        is_missing = "NotFound" in type(error).__name__
        if is_missing or (isinstance(error, HTTPError) and error.code == 404):
            raise RemoteNotFoundError(
                f"{what}: no such repository, revision or file; check the name, or log in"
            ) from error
        raise RemoteError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Shorten the report of a client to its reason, and add what to do."""
    text = str(getattr(error, "server_message", None) or error).strip()
    if "Range request not supported" in text:
        return "the server has no ranges; download it whole, and give its path"
    if answer := re.search(
        r"(?:status code|HTTP Error|Client error):? '?([0-9]{3})[: ]*([\w ]*)", text
    ):
        code = re.search(r"<Code>(\w+)</Code>", text)
        advice = _ANSWERS.get(answer[1], "check the address")
        return f"{answer[1]} {code[1] if code else answer[2].strip()}; {advice}"
    if "error sending request" in text or "urlopen error" in text:
        causes = re.findall(r'message: "([^"]+)"|\[Errno -?[0-9]+\] ([^>]+)', text)
        return f"no answer ({''.join(causes[-1]) if causes else 'timed out'}); try again later"
    if "body error" in text:
        return "the server's answer was cut short; try again"
    return _QUERY.sub("", text.partition("\n")[0])[:300] or type(error).__name__
