"""A hub-shaped HTTP server on the loopback, for the real huggingface-hub client."""

import hashlib
import json
import re
from base64 import b64decode
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit


@dataclass
class _Repo:
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: str = "public"

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the main branch."""
        return self.commits[self.refs["main"]]


class Hub:
    """Repositories, and a record of which of their files were downloaded.

    Attributes:
        before_answer: called before each answer. It may return a status and a code to refuse with.
        refusal: status, code and message that requests for files get; None answers them.
        refuses_all: True where all requests get the refusal.
        after_listing: called once a revision's files were listed.
        answers: cleared to accept requests without an answer.
    """

    def __init__(self) -> None:
        self.repos: dict[str, _Repo] = defaultdict(_Repo)
        self.requests: list[str] = []
        self.downloads: list[str] = []
        self.large: dict[str, bytes] = {}
        self.before_answer: Callable[[str], tuple[int, str] | None] = lambda request: None
        self.refusal: tuple[int, str, str] | None = None
        self.refuses_all = False
        self.after_listing: Callable[[], object] = lambda: None
        self.answers = Event()
        self.answers.set()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def is_up(self) -> bool:
        return self._server is not None

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def stop(self) -> None:
        """Close the port: new connections are refused from here on, and open ones are dropped."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def commit(self, repo_id: str, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """Make `files` the content of a branch or pull request, and return the commit's hash."""
        digest = _sha1(repr((repo_id, sorted(files.items()))).encode())
        repo = self.repos[repo_id]
        repo.commits[digest] = dict(files)
        repo.refs[ref] = digest
        return digest


def files_under(directory: Path, *, prefix: str = "") -> dict[str, bytes]:
    """Return a directory's files as a commit holds them, below `prefix`."""
    return {
        prefix + path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        if not self.hub.is_up:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        if self._refused():
            return
        self.hub.answers.wait()
        if self.hub.refusal and (self.hub.refuses_all or "resolve" in parts):
            status, code, message = self.hub.refusal
            headers = {"X-Error-Code": code} if code else {}
            self._send(status, b"", {**headers, "X-Error-Message": message})
            return
        match parts:
            case ["api", "models", org, name]:
                self._info(f"{org}/{name}", "main")
            case ["api", "models", org, name, "revision", revision]:
                self._info(f"{org}/{name}", unquote(revision))
                self.hub.after_listing()
            case ["api", "models", org, name, "tree", revision]:
                self._tree(f"{org}/{name}", unquote(revision))
            case ["api", "datasets", org, name, "revision", revision]:
                self._info(f"{org}/{name}", unquote(revision))
            case ["api", "datasets", org, name, "tree", revision, *below]:
                self._tree(
                    f"{org}/{name}", unquote(revision), "".join(f"{each}/" for each in below)
                )
            case ["datasets", org, name, "resolve", revision, *path]:
                self._file(f"{org}/{name}", unquote(revision), unquote("/".join(path)))
            case [org, name, "resolve", revision, *path]:
                self._file(f"{org}/{name}", unquote(revision), unquote("/".join(path)))
            case ["lfs", org, name, commit, *path]:
                self._send_file(f"{org}/{name}", commit, unquote("/".join(path)))
            case _:
                self._error(404, "NotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Take files as the hub does: large ones by their digests, before the commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["upload", oid]:
                self.hub.large[oid] = body
                self._json({})
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                repo_id = f"{wanted['organization']}/{wanted['name']}"
                self.hub.commit(repo_id, {".gitattributes": b""})
                self.hub.repos[repo_id].visibility = wanted["visibility"]
                self._json({"url": f"{self.hub.endpoint}/datasets/{repo_id}"})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "datasets", _, _, "preupload", _]:
                paths = [each["path"] for each in json.loads(body)["files"]]
                modes = ["regular" if path.endswith(".md") else "lfs" for path in paths]
                files = [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False}
                    for path, mode in zip(paths, modes, strict=True)
                ]
                self._json({"files": files})
            case ["datasets", _, _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                for each in objects:
                    href = f"{self.hub.endpoint}/upload/{each['oid']}"
                    each["actions"] = {"upload": {"href": href}}
                self._json({"transfer": "basic", "objects": objects})
            case ["api", "datasets", org, name, "commit", revision]:
                self._commit(f"{org}/{name}", revision, body)
            case _:
                self._error(404, "NotFound")

    do_PUT = do_POST

    def _refused(self) -> bool:
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        if refusal := self.hub.before_answer(request):
            self._send(refusal[0], b"", {})
        return refusal is not None

    def _commit(self, repo_id: str, revision: str, body: bytes) -> None:
        if not (found := self._find(repo_id, revision)):
            return
        files = dict(found[1])
        for line in body.splitlines():
            match json.loads(line):
                case {"key": "file", "value": {"path": path, "content": content}}:
                    files[path] = b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                    files[path] = self.hub.large[oid]
                    assert hashlib.sha256(files[path]).hexdigest() == oid
        commit = self.hub.commit(repo_id, files, ref=revision)
        url = f"{self.hub.endpoint}/datasets/{repo_id}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo_id not in self.hub.repos:
            self._error(401, "RepoNotFound")
            return None
        repo = self.hub.repos[repo_id]
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._error(404, "RevisionNotFound")
            return None
        return commit, repo.commits[commit]

    def _info(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            commit, files = found
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo_id, "sha": commit, "private": False, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str, below: str = "") -> None:
        if found := self._find(repo_id, revision):
            entries = [
                {"type": "file", "path": name, "oid": _sha1(content), "size": len(content)}
                for name, content in found[1].items()
                if name.startswith(below)
            ]
            self._json(entries)

    def _file(self, repo_id: str, revision: str, path: str) -> None:
        if not (found := self._find(repo_id, revision)):
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self._error(404, "EntryNotFound", headers)
        elif path.endswith(".json"):
            self._send_file(repo_id, commit, path)
        else:
            # Large files are elsewhere. The redirect has their digest and size.
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(files[path]))
            headers["Location"] = f"{self.hub.endpoint}/lfs/{repo_id}/{commit}/{path}"
            self._send(302, b"", headers)

    def _send_file(self, repo_id: str, commit: str, path: str) -> None:
        content = self.hub.repos[repo_id].commits[commit][path]
        if self.command == "GET":
            self.hub.downloads.append(path)
        headers = {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": commit}
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(span[1]), min(int(span[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, content[start:stop], headers)
        else:
            self._send(200, content, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
        self._send(status, json.dumps({"error": code}).encode(), extra)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
