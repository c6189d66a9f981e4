"""A server on the loopback in the shape of S3: objects, uploads in parts, lists, ranges, faults.

Google's has the same shape.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from reference.loopback import Loopback


class Objects(BaseHTTPRequestHandler):
    """Answers requests for objects."""

    owner: S3
    code_of_missing = "NoSuchKey"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    @property
    def is_list(self) -> bool:
        return "list-type" in self.query

    def named(self, path: str) -> str:
        return path

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.name = self.named(unquote(url.path).strip("/"))
        self.query = {name: values[0] for name, values in parse_qs(url.query, True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.name}?{'&'.join(self.query)}".rstrip("?")
        self.owner.requests.append(request)
        if refusal := self.owner.before_answer(request):
            status, code = refusal
            self._send(status, f"<Error><Code>{code}</Code></Error>".encode())
        elif self.command in ("PUT", "POST"):
            self._write()
        elif self.is_list:
            self._list()
        elif self.name not in self.owner.objects:
            self._send(404, f"<Error><Code>{self.code_of_missing}</Code></Error>".encode())
        else:
            self._read()

    do_GET = do_HEAD = do_PUT = do_POST = _answer

    def do_DELETE(self) -> None:
        self._send(204)

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _write(self) -> None:
        digest = self.headers.get("x-amz-checksum-sha256")
        if digest and digest != b64encode(hashlib.sha256(self.body).digest()).decode():
            self._send(400, b"<Error><Code>BadDigest</Code></Error>")
            return
        upload = self.query.get("uploadId", "")
        if "uploads" in self.query:
            upload = f"upload-{len(self.owner.parts)}"
            self.owner.parts[upload] = {}
            text = f"<UploadId>{upload}</UploadId>"
            self._send(200, f"<InitiateMultipartUploadResult>{text}"
                       "</InitiateMultipartUploadResult>".encode())  # fmt: skip
        elif self.command == "POST":
            parts = self.owner.parts.pop(upload)
            self.owner.objects[self.name] = b"".join(parts[number] for number in sorted(parts))
            self._send(200, b"<CompleteMultipartUploadResult><ETag>&quot;whole&quot;</ETag>"
                       b"</CompleteMultipartUploadResult>")  # fmt: skip
        else:
            if upload:
                self.owner.parts[upload][int(self.query["partNumber"])] = self.body
            else:
                self.owner.objects[self.name] = self.body
                self.owner.types[self.name] = self.headers["Content-Type"]
            self._send(200, ETag=_etag(self.body))

    def _list(self) -> None:
        rows = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{about['ETag'].replace(chr(34), '&quot;')}</ETag><Size>{size}</Size></Contents>"
            for key, size, about in self._listed()
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self._send(200, text.encode())

    def _listed(self) -> Iterator[tuple[str, int, dict[str, str]]]:
        """Yield the objects of a directory: key, size, and what headers show of it."""
        prefix = f"{self.name}/{self.query.get('prefix', '')}"
        for name, content in sorted(self.owner.objects.items()):
            if name.startswith(prefix) and "/" not in name.removeprefix(prefix):
                yield name.partition("/")[2], len(content), _about(content)

    def _read(self) -> None:
        content = self.owner.objects[self.name]
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, content, **_about(content))
            return
        start, stop = int(span[1]), min(int(span[2]) + 1, len(content))
        place = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], Content_Range=place, **_about(content))


class S3(Loopback):
    """Serves objects of any bucket from memory.

    Attributes:
        objects: content by `bucket/key`.
        types: content type by `bucket/key`.
        requests: what was asked for, `PUT bucket/key?partNumber&uploadId`.
        before_answer: called before each answer. It may return a status and a code to refuse with:
            (403, "AccessDenied").
    """

    handler: type[Objects] = Objects

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.types: dict[str, str] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.before_answer: Callable[[str], tuple[int, str] | None] = lambda request: None
        super().__init__(self.handler)


def _about(content: bytes) -> dict[str, str]:
    return {"ETag": _etag(content), "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'
