"""A small read-only Hugging Face Hub: serves folders as model repositories to huggingface_hub, over real HTTP.

It answers what `hf_hub_download`, `snapshot_download` and `get_collection` of huggingface_hub 2.4 ask (repository
info, file tree, HEAD and GET with ranges), with the error codes the Hub sends. Weights are served as LFS files are,
without Xet.
"""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hub:
    """The served repositories, `{"owner/name": {"main": folder, "another-revision": folder}}`, and what was asked."""

    repositories: dict[str, dict[str, Path]]
    url: str = ""
    downloads: list[str] = field(default_factory=list)  # "owner/name/path" of every file body sent
    collections: dict[str, list[str]] = field(default_factory=dict)  # slug -> repositories

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit that a branch names, or the commit itself; None if there is no such revision."""
        for branch in self.repositories[repository]:
            commit = hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def folder(self, repository: str, commit: str) -> Path:
        """The folder that holds the files of a commit."""
        revisions = self.repositories[repository]
        return next(folder for branch, folder in revisions.items() if self.commit(repository, branch) == commit)


def _describe(path: Path, name: str) -> dict:
    """A file's entry in the tree."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest[:40]}
    if path.suffix in (".safetensors", ".pt"):
        entry["lfs"] = {"oid": digest, "size": path.stat().st_size, "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._answer_api(*match.groups())
        elif match := re.fullmatch(r"/api/collections/([^/]+/[^/]+)", path):
            self._answer_collection(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._answer_file(*match.groups())
        else:
            self._send(404, b"no such route")

    do_HEAD = do_GET

    def _find(self, repository: str, revision: str) -> str | None:
        """The commit; None after an error was sent."""
        hub = self.server.hub
        if repository not in hub.repositories:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commit = hub.commit(repository, revision)
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid revision"})
        return commit

    def _answer_api(self, repository: str, what: str, revision: str) -> None:
        commit = self._find(repository, revision)
        if commit is None:
            return
        folder = self.server.hub.folder(repository, commit)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if what == "tree":
            answer = [_describe(folder / name, name) for name in names]
        else:
            siblings = [{"rfilename": name} for name in names]
            answer = {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "private": False}
            answer |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_collection(self, slug: str) -> None:
        if slug not in self.server.hub.collections:
            return self._send(404, b"{}")
        items = [
            {"_id": str(number), "id": repository, "type": "model", "position": number}
            for number, repository in enumerate(self.server.hub.collections[slug])
        ]
        answer = {"slug": slug, "title": slug, "owner": {"name": slug.partition("/")[0]}, "items": items}
        answer |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": False, "theme": "orange"}
        answer["upvotes"] = 0
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, repository: str, revision: str, name: str) -> None:
        hub = self.server.hub
        commit = self._find(repository, revision)
        if commit is None:
            return
        path = hub.folder(repository, commit) / name
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        entry = _describe(path, name)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        body, status = path.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, status = body[first : last + 1], 206
        if self.command == "GET":
            hub.downloads.append(f"{repository}/{name}")
        self._send(status, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        # Kept alive, a connection would be answered after the server was stopped.
        for name, value in {**(headers or {}), "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serve_hub(repositories: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    """Serve folders as repositories on a free port of this machine until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(repositories, url=f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
