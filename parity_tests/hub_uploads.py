"""A server on this machine that takes uploads as the Hugging Face Hub does."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from parity_tests.test_hub import Hub, served


class Uploads(Hub):
    """The repository `o/n`, the token `good`, and what a client uploads."""

    exists: bool
    private: bool
    blobs: dict[str, bytes]
    """Large files, by their SHA-256. They are in the repository only after a commit that names them."""
    commits: list[dict[str, Any]]
    refused: dict[str, int]
    """Beginning of a path -> status."""
    reached: threading.Event
    """A large file is being sent, and waits for the answer."""
    goes_on: threading.Event

    def do_GET(self) -> None:  # noqa: N802 (the name that http.server calls)
        path = self._path()
        if not self._is_refused(path):
            if path == "/api/whoami-v2":
                self._json({"name": "o", "type": "user"})
            elif path == "/api/models/o/n" and self.exists:
                self._json({"id": "o/n", "sha": "b" * 40, "private": self.private, "tags": [], "siblings": []})
            elif path.startswith("/api/models/o/n/tree/main"):
                self._json([self._entry(name) for name in self.files])
            else:
                self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:  # noqa: N802 (the name that http.server calls)
        path, content = self._path(), self._body()
        self.reached.set()
        assert self.goes_on.wait(60)
        if not self._is_refused(path):
            self.blobs[path.removeprefix("/blobs/")] = content
            self._send(b"")

    def do_POST(self) -> None:  # noqa: N802 (the name that http.server calls)
        path, body = self._path(), self._body()
        if self._is_refused(path):
            return
        if path == "/api/repos/create":
            was_there, Uploads.exists = self.exists, True
            if not was_there:
                Uploads.private = json.loads(body).get("visibility") == "private" or bool(
                    json.loads(body).get("private")
                )
            self._json({"url": f"{self._address()}/o/n"}, 409 if was_there else 200)
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name")
            self._json({"errors": [], "warnings": []})
        elif path == "/api/models/o/n/preupload/main":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in asked}
            self._json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path == "/o/n.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            where = {x["oid"]: {"upload": {"href": f"{self._address()}/blobs/{x['oid']}"}} for x in objects}
            self._json({"transfer": "basic", "objects": [x | {"actions": where[x["oid"]]} for x in objects]})
        elif path == "/api/models/o/n/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._send(b"{}", status=404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        files = dict(self.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        Uploads.files = files
        self.commits.append(lines[0]["value"])
        oid = f"{len(self.commits):040}"
        url = f"{self._address()}/o/n/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _path(self) -> str:
        return urlparse(self.path).path

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while n := int(self.rfile.readline(), 16):
            content += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _is_refused(self, path: str) -> bool:
        is_ours = self.headers["Authorization"] == "Bearer good" or path.startswith("/blobs/")
        statuses = [status for beginning, status in self.refused.items() if path.startswith(beginning)]
        status = next(iter(statuses), None if is_ours else 401)
        if status is not None:
            self._json({"error": "not allowed here"}, status)
        return status is not None

    def _json(self, data: object, status: int = 200) -> None:
        self._send(json.dumps(data).encode(), status=status)


@contextlib.contextmanager
def served_uploads() -> Iterator[str]:
    """The address of such a server. The repository does not exist yet."""
    Uploads.exists, Uploads.private, Uploads.files = False, False, {}
    Uploads.blobs, Uploads.commits, Uploads.refused = {}, [], {}
    Uploads.reached, Uploads.goes_on = threading.Event(), threading.Event()
    Uploads.goes_on.set()
    with served(Uploads) as address:
        yield address
