"""A small Hugging Face Hub: serves folders as repositories to huggingface_hub, and takes commits, over real HTTP.

It answers what huggingface_hub 2.4 asks to look at, download, create, write and tag repositories and to list
collections, with the error codes the Hub sends. Weights and audio are LFS files, without Xet.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import secrets
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import yaml

from tests.loopback import serving

# Who a token makes its user, and what it may do there.
TOKENS = {
    "hf_write": {"role": "write"},
    "hf_read": {"role": "read"},
    "hf_fine": {
        "role": "fineGrained",
        "fineGrained": {"scoped": [{"entity": {"type": "user", "name": "tester"}, "permissions": ["repo.write"]}]},
    },
    "hf_fine_read": {
        "role": "fineGrained",
        "fineGrained": {"scoped": [{"entity": {"type": "user", "name": "tester"}, "permissions": ["repo.read"]}]},
    },
}  # fmt: skip
USER, ORGANISATION = "tester", "band"
_LFS_SUFFIXES = (".safetensors", ".pt", ".wav", ".ogg", ".flac", ".arrow", ".png")
_LICENSES = ("mit", "apache-2.0", "cc-by-4.0", "cc0-1.0", "openrail", "other")
_FOLDER = r"(?:datasets/)?[^/]+/[^/]+"


@dataclass
class Repository:
    """Branches and tags name commits, a commit is {path: file with its content}."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # (commit, its title), the latest last

    def find(self, revision: str) -> str | None:
        """The commit that a branch or tag names, or the commit itself; None if there is no such revision."""
        revision = urllib.parse.unquote(revision)
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The repositories by "owner/name" or "datasets/owner/name", and what was asked."""

    directory: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    downloads: list[str] = field(default_factory=list)  # "owner/name/path" of every file body sent
    uploads: list[str] = field(default_factory=list)  # SHA-256 of every LFS file received
    requests: list[str] = field(default_factory=list)  # "METHOD /path"
    collections: dict[str, list[str]] = field(default_factory=dict)  # slug -> repositories
    # What goes wrong: (pattern of "METHOD /path", status); taken out once it has.
    faults: list[tuple[str, int]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, revisions: dict[str, Path], *, private: bool = False) -> Repository:
        """Serve folders as the branches of a repository."""
        repository = self.repositories[name] = Repository(private)
        for branch, folder in revisions.items():
            commit = hashlib.sha1(f"{name}@{branch}".encode()).hexdigest()
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            repository.branches[branch], repository.commits[commit] = commit, files
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repository = self.repositories[name]
        return {path: file.read_bytes() for path, file in repository.commits[repository.find(revision)].items()}

    def keep(self, content: bytes) -> Path:
        """Where content lies, by its SHA-256."""
        path = self.directory / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path


@functools.lru_cache(maxsize=4096)
def _digests(path: Path, size: int, modified: int) -> tuple[str, str]:
    """A file's SHA-256, and its git SHA-1."""
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % size + content).hexdigest()


def _describe(path: Path, name: str) -> dict:
    """A file's entry in the tree."""
    status = path.stat()
    sha256, blob = _digests(path, status.st_size, status.st_mtime_ns)
    entry = {"type": "file", "path": name, "size": status.st_size, "oid": blob}
    if name.endswith(_LFS_SUFFIXES):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {status.st_size}\n".encode()
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": status.st_size, "pointerSize": len(pointer)}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _answer(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.content = self._read_body()
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if re.search(fault[0], f"{self.command} {path}"):
                self.hub.faults.remove(fault)
                return self._send(fault[1], b'{"error": "as asked"}', {"X-Error-Message": "as asked"})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = TOKENS.get(token)
        if token and self.token is None:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        writes = self.command != "HEAD" and self.command != "GET" and not path.startswith(("/lfs", "/api/validate"))
        if writes and self.token is None:
            return self._refuse(401, "", "Invalid username or password.")
        with self.hub.lock:
            for pattern, answer in self._ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}".replace("HEAD ", "GET ", 1)):
                    return answer(self, *match.groups())
        self._send(404, b"no such route")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # --- who, and which repository -----------------------------------------------------------------------------------

    def _whoami(self):
        if self.token is None:
            return self._refuse(401, "", "Invalid username or password.")
        organisations = [{"name": ORGANISATION, "type": "org", "roleInOrg": "write"}]
        self._json({"name": USER, "type": "user", "orgs": organisations, "auth": {"accessToken": self.token}})

    def _may_write(self, name: str) -> bool:
        owner = name.removeprefix("datasets/").partition("/")[0]
        if self.token is None or owner not in (USER, ORGANISATION):
            return False
        scopes = self.token.get("fineGrained", {}).get("scoped", [])
        scoped = any(s["entity"]["name"] == owner and "repo.write" in s["permissions"] for s in scopes)
        return self.token["role"] == "write" or scoped

    def _repository(self, name: str) -> Repository | None:
        """The repository; None after an error was sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token is None):
            status = 404 if self.token else 401
            return self._refuse(status, "RepoNotFound", "Repository not found")
        return repository

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit; None after an error was sent."""
        if (repository := self._repository(name)) is None:
            return None
        commit = repository.find(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", "Invalid revision")
        return repository, commit

    def _auth_check(self, kind: str, name: str, write: str | None):
        if self._repository(_name(kind, name)) is not None:
            if write and not self._may_write(_name(kind, name)):
                return self._refuse(403, "", "You don't have write permission on this repository.")
            self._json({})

    # --- reading -----------------------------------------------------------------------------------------------------

    def _front(self):
        self._send(200, b"the Hub")

    def _info(self, kind: str, name: str, revision: str | None):
        if (found := self._find(_name(kind, name), revision or "main")) is None:
            return
        repository, commit = found
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        answer = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": repository.private}
        answer["lastModified"] = "2026-01-01T00:00:00.000Z"
        self._json(answer | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, kind: str, name: str, revision: str):
        if found := self._find(_name(kind, name), revision):
            repository, commit = found
            self._json([_describe(file, path) for path, file in sorted(repository.commits[commit].items())])

    def _refs(self, kind: str, name: str):
        if repository := self._repository(_name(kind, name)):
            kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
            answer = {
                key: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in refs.items()]
                for key, (ref, refs) in kinds.items()
            }
            self._json(answer | {"converts": []})

    def _commits(self, kind: str, name: str, revision: str):
        if found := self._find(_name(kind, name), revision):
            entries = [
                {"id": c, "title": t, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for c, t in reversed(found[0].log)
            ]
            self._json(entries)

    def _collection(self, slug: str):
        if slug not in self.hub.collections:
            return self._send(404, b"{}")
        items = [
            {"_id": str(number), "id": repository, "type": "model", "position": number}
            for number, repository in enumerate(self.hub.collections[slug])
        ]
        answer = {"slug": slug, "title": slug, "owner": {"name": slug.partition("/")[0]}, "items": items}
        answer |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": False, "theme": "orange"}
        self._json(answer | {"upvotes": 0})

    def _file(self, name: str, revision: str, path: str):
        if (found := self._find(name, revision)) is None:
            return
        repository, commit = found
        if path not in repository.commits[commit]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        file = repository.commits[commit][path]
        entry = _describe(file, path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        body, status = file.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, status = body[first : last + 1], 206
        if self.command == "GET":
            self.hub.downloads.append(f"{name}/{path}")
        self._send(status, body, headers)

    # --- writing -----------------------------------------------------------------------------------------------------

    def _create(self):
        asked = json.loads(self.content)
        name = _name(f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or USER}/{asked['name']}")
        if not self._may_write(name):
            return self._refuse(403, "", "You don't have the rights to create a repository there.")
        if name in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, status=409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repository = self.hub.repositories[name] = Repository(private)
        self._commit_to(
            repository, "main", {".gitattributes": self.hub.keep(b"*.safetensors filter=lfs\n")}, "initial"
        )
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _commit_to(self, repository: Repository, branch: str, files: dict[str, Path], title: str) -> str:
        commit = secrets.token_hex(20)
        repository.commits[commit], repository.branches[branch] = files, commit
        repository.log.append((commit, title))
        return commit

    def _validate_yaml(self):
        """Some of what the Hub refuses in a card's metadata."""
        content = json.loads(self.content)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError:
            metadata = None
        errors = [] if isinstance(metadata, dict) else ["the metadata is no YAML mapping"]
        for key, allowed in (("license", _LICENSES), ("base_model_relation", ("adapter", "finetune"))):
            if not errors and metadata.get(key) not in (None, *allowed):
                errors.append(f'"{key}" must be one of {list(allowed)}')
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._json(answer, status=400 if errors else 200)

    def _preupload(self, kind: str, name: str, revision: str):
        if (found := self._find(_name(kind, name), revision)) is None:
            return
        there, answer = found[0].commits[found[1]], []
        for asked in json.loads(self.content)["files"]:
            lfs = asked["path"].endswith(_LFS_SUFFIXES) or asked["size"] > 10_000_000
            entry = _describe(there[asked["path"]], asked["path"]) if asked["path"] in there else {}
            oid = entry.get("lfs", entry).get("oid")
            answer.append({"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "oid": oid})
        self._json({"files": [{**each, "shouldIgnore": False} for each in answer]})

    def _lfs_batch(self, name: str):
        if not self._may_write(name):
            return self._refuse(403, "", "You don't have write permission on this repository.")
        objects = []
        for asked in json.loads(self.content)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.directory / asked["oid"]).exists():
                upload = {"href": f"{self.hub.url}/lfs/put/{asked['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str):
        if hashlib.sha256(self.content).hexdigest() != oid:
            return self._refuse(400, "", "another SHA-256 than was said")
        self.hub.keep(self.content)
        self.hub.uploads.append(oid)
        self._send(200, b"")

    def _commit(self, kind: str, name: str, revision: str):
        if (found := self._find(_name(kind, name), revision)) is None:
            return
        if not self._may_write(_name(kind, name)):
            return self._refuse(403, "", "You don't have write permission on this repository.")
        repository, head = found
        header, *operations = [json.loads(line) for line in self.content.splitlines() if line.strip()]
        if header["value"].get("parentCommit") not in (None, head):
            return self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[head])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if not (self.hub.directory / value["oid"]).exists():
                    return self._refuse(400, "", "LFS pointer to a missing object")
                files[value["path"]] = self.hub.directory / value["oid"]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = self._commit_to(repository, revision, files, header["value"]["summary"])
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _make_ref(self, kind: str, name: str, what: str, argument: str):
        if (repository := self._repository(_name(kind, name))) is None:
            return
        argument = urllib.parse.unquote(argument)
        if what == "tag":
            refs, tag, start = repository.tags, json.loads(self.content)["tag"], argument
        else:
            refs, tag, start = repository.branches, argument, json.loads(self.content or b"{}").get("startingPoint")
        if tag in refs:
            return self._refuse(409, "", "it exists already")
        refs[tag] = repository.find(start or "main")
        self._json({})

    # --- answers -----------------------------------------------------------------------------------------------------

    def _json(self, answer: object, *, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        # Kept alive, a connection would be answered after the server was stopped.
        for name, value in {**(headers or {}), "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    _REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"
    _ROUTES = (
        (r"GET /?", _front),
        (r"GET /api/whoami-v2", _whoami),
        (r"POST /api/repos/create", _create),
        (r"POST /api/validate-yaml", _validate_yaml),
        (r"PUT /lfs/put/([0-9a-f]{64})", _lfs_put),
        (r"POST /lfs/verify", _front),
        (rf"POST /({_FOLDER})\.git/info/lfs/objects/batch", _lfs_batch),
        (rf"GET {_REPO}(?:/revision/(.+))?", _info),
        (rf"GET {_REPO}/tree/([^/]+)", _tree),
        (rf"GET {_REPO}/refs", _refs),
        (rf"GET {_REPO}/commits/(.+)", _commits),
        (rf"GET {_REPO}/auth-check(/write)?", _auth_check),
        (rf"POST {_REPO}/preupload/(.+)", _preupload),
        (rf"POST {_REPO}/commit/(.+)", _commit),
        (rf"POST {_REPO}/(tag|branch)/(.+)", _make_ref),
        (r"GET /api/collections/([^/]+/[^/]+)", _collection),
        (rf"GET /({_FOLDER})/resolve/([^/]+)/(.+)", _file),
    )


def _name(kind: str, name: str) -> str:
    return f"datasets/{name}" if kind == "datasets" else name


@contextlib.contextmanager
def serve_hub(repositories: dict[str, dict[str, Path]], directory: Path | None = None) -> Iterator[Hub]:
    """Serve folders as repositories, `{"owner/name": {"main": folder, "another-branch": folder}}`, on a free port of
    this machine until the block ends; what is pushed is kept in `directory`."""
    with serving(_Handler) as server:
        server.hub = hub = Hub(directory, url=f"http://127.0.0.1:{server.server_port}")
        for name, revisions in repositories.items():
            hub.add(name, revisions)
        yield hub
