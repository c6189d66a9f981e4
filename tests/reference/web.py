"""A web server on the loopback that serves a directory, with ranges, an index and faults."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

from reference.loopback import Loopback


class Web(Loopback):
    """Serves a directory.

    Attributes:
        requests: what was asked for, `GET /name 0-4095`.
        sent: bytes of files that were sent.
        fault: `no-ranges`, `short` (half of each answer), `hang`, or a status that refuses ranges.
        before_answer: called before each answer. It may return a status and a code to refuse with.
        user: a user and password, `name:secret`, that requests must carry.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[str] = []
        self.sent = 0
        self.fault: str | int | None = None
        self.before_answer: Callable[[str], tuple[int, str] | None] = lambda request: None
        self.user: str | None = None
        super().__init__(_Handler)

    @property
    def ranges(self) -> list[str]:
        """The requests for ranges of bytes."""
        return [each for each in self.requests if re.search(r"\d-\d", each)]


class _Handler(SimpleHTTPRequestHandler):
    owner: Web
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: object) -> None:
        super().__init__(*args, directory=str(self.owner.directory))  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = f" {span[1]}-{span[2]}" if span else ""
        self.owner.requests.append(f"{self.command} {self.path}{asked}")
        if refusal := self.owner.before_answer(self.owner.requests[-1]):
            self.send_error(refusal[0])
        elif self.owner.user and "Basic" not in self.headers.get("Authorization", ""):
            self.send_error(401)
        elif span and isinstance(self.owner.fault, int):
            self.send_error(self.owner.fault)
        elif span and self.owner.fault == "hang":
            time.sleep(60)
        elif span and self.owner.fault != "no-ranges":
            self._send_range(int(span[1]), int(span[2]) + 1)
        else:
            super().do_GET()

    def _send_range(self, start: int, stop: int) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        stop = min(stop, len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        modified = Path(self.translate_path(self.path)).stat().st_mtime
        self.send_header("Last-Modified", self.date_time_string(int(modified)))
        self.end_headers()
        if self.owner.fault == "short":
            stop = start + (stop - start) // 2
            self.close_connection = True
        self.owner.sent += stop - start
        self.wfile.write(content[start:stop])
