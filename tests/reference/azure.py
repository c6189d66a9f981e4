"""A server on the loopback in the shape of Azure's: blobs, uploads in blocks, lists, ranges."""

from __future__ import annotations

import re

from reference.s3 import S3, Objects


class _Blobs(Objects):
    code_of_missing = "BlobNotFound"

    @property
    def is_list(self) -> bool:
        return self.query.get("comp") == "list"

    def named(self, path: str) -> str:
        return path.partition("/")[2]  # the first is the account

    def _write(self) -> None:
        blocks = self.owner.parts.setdefault(self.name, {})
        match self.query.get("comp"):
            case "block":
                blocks[self.query["blockid"]] = self.body
            case "blocklist":
                names = re.findall(r"<Uncommitted>(.*?)</Uncommitted>", self.body.decode())
                self.owner.objects[self.name] = b"".join(blocks[name] for name in names)
            case None:
                assert self.headers["x-ms-blob-type"] == "BlockBlob"
                self.owner.objects[self.name] = self.body
        self._send(201, ETag='"written"')

    def _list(self) -> None:
        blobs = "".join(
            f"<Blob><Name>{key}</Name><Properties><Last-Modified>{about['Last_Modified']}"
            f"</Last-Modified><Etag>{about['ETag']}</Etag><Content-Length>{size}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key, size, about in self._listed()
        )
        text = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>"
        self._send(200, text.encode())


class Azure(S3):
    """Serves blobs of any container of one account from memory, as `S3` does objects."""

    handler = _Blobs
