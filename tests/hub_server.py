"""A Hub on the loopback interface, for tests that talk to it with the real `huggingface_hub` client.

It keeps repositories in memory and speaks what the client (2.4, Xet off) sends: create, auth-check, preupload, LFS
batch with single and multipart uploads, commit, info, tree, paths-info, refs, tags, branches, and `resolve` with
ranges, ETags and, for LFS files, a redirect to another host. `Hub.fail` injects faults.

    with Hub() as hub: ...
    python tests/hub_server.py PORT_FILE    # for processes; writes its address into the file
"""

import base64
import functools
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".png", ".jpg")
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+?)(?:/(?P<rest>.*))?$")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
BATCH = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch$")


class Refused(Exception):
    """A request that gets an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What shall go wrong with the next requests of a kind."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """A repository: its commits with all their files, and the names of some."""

    id: str
    kind: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", title: str = "") -> str:
        self.titles.append(title)
        content = sorted((path, sha256(content)) for path, content in files.items())
        oid = hashlib.sha1(f"{self.id} {len(self.titles)} {title} {content}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as tree and paths-info name it."""
    told: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path):
        told["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return told


class Hub:
    """The server with its repositories.

    Attributes:
        url: For `HF_ENDPOINT`.
        part_size: LFS files above it are uploaded in parts.
        requests: (method, path, token) of every request.
        waits: Seconds that the client waited (set by the fixture).
        went_wrong: Requests that a fault was injected into.
    """

    def __init__(self) -> None:
        self.clear()
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def clear(self) -> "Hub":
        """Forget everything."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.went_wrong: list[str] = []
        self.part_size = 10**9
        self.waits: list[float] = []
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, *, times: int = 1, status: int | None = None, **headers: str) -> None:
        """Let the next `times` requests fail: with a status, or without one by dropping the connection."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, re.compile(path), times, status, told))

    def add(self, name: str, files: dict[str, bytes] | Path, kind: str = "models", private: bool = False) -> Repo:
        """Put a repository there, without a client."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        repo = self.repos[kind, name] = Repo(name, kind, private)
        repo.commit({".gitattributes": b"", **files}, title="added")
        return repo

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repos[kind, name].at(revision)[1]


@functools.cache
def shared() -> Hub:
    """The one of this process: its address is needed before anything imports the client."""
    return Hub()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body leave in two writes: 40 ms a request otherwise

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.url = urlsplit(self.path)
        self.where = unquote(self.url.path)
        header = self.headers.get("Authorization")
        self.token = header.removeprefix("Bearer ") if header else None
        with self.hub.lock:
            self.hub.requests.append((self.command, self.where, self.token))
            fault = next((f for f in self.hub.faults if f.times and self.matches(f)), None)
            if fault is not None:
                fault.times -= 1
                self.hub.went_wrong.append(f"{self.command} {self.where}")
        if fault is not None and fault.status is None:
            self.rfile.read(min(64, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.read_body()
        try:
            if fault is not None:
                self.answer({"error": "injected"}, fault.status, fault.headers)
            elif self.token is not None and self.token not in self.hub.tokens:
                raise Refused(401, "Invalid credentials in Authorization header")
            else:
                with self.hub.lock:
                    self.route()
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.answer({"error": refused.message}, refused.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def matches(self, fault: Fault) -> bool:
        return fault.method == self.command and fault.path.search(self.where) is not None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: Any, status: int | None = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status or 200)
        sent = {"Content-Length": str(len(raw)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    # --- who may do what --------------------------------------------------------------------------------------------

    def may_write(self, name: str) -> None:
        if self.token is None:
            raise Refused(401, "Authentication required")
        if self.hub.tokens[self.token] != "write" or name.split("/")[0] not in (USER, "org"):
            raise Refused(403, f"You don't have the rights to write to {name}")

    def repo(self, kind: str | None, name: str) -> Repo:
        found = self.hub.repos.get(((kind or "models").rstrip("/"), name))
        if found is None or (found.private and self.token is None):
            raise Refused(401 if self.token is None else 404, "Repository not found", "RepoNotFound")
        return found

    # --- what it answers --------------------------------------------------------------------------------------------

    def route(self) -> None:
        if self.where == "/api/validate-yaml":
            return self.validate(json.loads(self.body)["content"])
        if self.where == "/api/repos/create":
            return self.create(json.loads(self.body))
        if self.where.startswith("/lfs/"):
            return self.store(self.where.split("/")[2:])
        if self.where.startswith("/cdn/"):
            return self.send_file(self.hub.blobs[self.where.split("/")[2]], {})
        if match := BATCH.match(self.where):
            return self.lfs_batch(match["kind"], match["id"])
        if match := API.match(self.where):
            return self.api(self.repo(match["kind"], match["id"]), (match["rest"] or "").split("/", 2))
        if match := RESOLVE.match(self.where):
            return self.resolve(self.repo(match["kind"], match["id"]), match["revision"], match["path"])
        raise Refused(404, f"no such endpoint {self.command} {self.where}")

    def validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        wrong = {"base_model_relation", "library_name", "pipeline_tag"} & {
            k for k, v in data.items() if not isinstance(v, str)
        }
        if wrong:
            return self.answer({"errors": [{"message": f"{wrong} must be a string"}]}, 400)
        return self.answer({"warnings": [], "errors": []})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        self.may_write(name)
        if (kind, name) in self.hub.repos:
            raise_with = {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"}
            return self.answer(raise_with, 409)
        self.hub.add(name, {}, kind, private=asked.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def api(self, repo: Repo, rest: list[str]) -> None:
        what, revision = rest[0], rest[1] if len(rest) > 1 else "main"
        if what in ("", "revision"):
            oid, files = repo.at(revision)
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            told = {"id": repo.id, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
            return self.answer({**told, "downloads": 0, "likes": 0, "author": repo.id.split("/")[0]})
        if what == "tree":
            return self.tree(repo.at(revision)[1], rest[2] if len(rest) > 2 else "")
        if what == "paths-info":
            return self.paths_info(repo.at(revision)[1])
        if what == "refs":
            return self.answer({"converts": [], **{kind: self.refs(repo, kind) for kind in ("branches", "tags")}})
        if what == "auth-check":
            if revision == "write":
                self.may_write(repo.id)
            return self.answer({})
        if what not in ("preupload", "commit", "tag", "branch"):
            raise Refused(404, f"no such endpoint {self.command} {self.where}")
        self.may_write(repo.id)
        if what == "preupload":
            return self.preupload(repo.at(revision)[1])
        if what == "commit":
            return self.commit(repo, revision)
        return self.name_commit(repo, what, revision)

    def refs(self, repo: Repo, kind: str) -> list[dict[str, str]]:
        ref = {"branches": "heads", "tags": "tags"}[kind]
        named = getattr(repo, kind).items()
        return [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in named]

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = f"{folder.rstrip('/')}/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(inside)}
        if inside and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        everything = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        parents = {str(parent) for path in below for parent in Path(path).parents if str(parent) != "."}
        folders = sorted(path for path in parents if path.startswith(inside))
        told = [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders]
        told += [entry(path, content) for path, content in below.items()]
        self.answer([one for one in told if everything or "/" not in one["path"].removeprefix(inside)])

    def paths_info(self, files: dict[str, bytes]) -> None:
        form = parse_qs(self.body.decode())
        paths = form["paths"] if "paths" in form else json.loads(self.body)["paths"]
        found = [entry(path, files[path]) for path in paths if path in files]
        for path in (path for path in paths if any(file.startswith(f"{path}/") for file in files)):
            found.append({"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())})
        self.answer(found)

    def preupload(self, files: dict[str, bytes]) -> None:
        told = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], files.get(file["path"])
            oid = None if known is None else sha256(known) if is_lfs(path) else git_oid(known)
            mode = "lfs" if is_lfs(path) else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": told})

    def lfs_batch(self, kind: str | None, name: str) -> None:
        self.repo(kind, name)
        self.may_write(name)
        told = []
        for blob in json.loads(self.body)["objects"]:
            oid, size = blob["oid"], blob["size"]
            action: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > self.hub.part_size:
                    parts = range(1, -(-size // self.hub.part_size) + 1)
                    upload["header"] = {f"{part:05}": f"{self.hub.url}/lfs/{oid}/{part}" for part in parts}
                    upload["header"]["chunk_size"] = str(self.hub.part_size)
                action["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            told.append(action)
        self.answer({"objects": told, "transfer": "basic"})

    def store(self, where: list[str]) -> None:
        oid, what = where[0], where[1] if len(where) > 1 else None
        if self.command == "PUT" and what is None:
            self.keep(oid, self.body)
        elif self.command == "PUT":
            self.hub.parts.setdefault(oid, {})[int(what)] = self.body
            return self.answer(b"", headers={"ETag": f'"{sha256(self.body)[:32]}"'})
        elif what is None:
            parts = self.hub.parts.pop(oid)
            self.keep(oid, b"".join(parts[number] for number in sorted(parts)))
        elif oid not in self.hub.blobs:
            raise Refused(404, "not uploaded")
        return self.answer({})

    def keep(self, oid: str, content: bytes) -> None:
        if sha256(content) != oid:
            raise Refused(400, "the content does not match its hash")
        self.hub.blobs[oid] = content

    def commit(self, repo: Repo, branch: str) -> None:
        parent, before = repo.at(branch)
        files, title = dict(before), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:  # deletedFile, deletedFolder
                gone = value["path"].rstrip("/")
                files = {path: content for path, content in files.items() if not f"{path}/".startswith(f"{gone}/")}
        oid = repo.commit(files, branch, title)
        self.answer({"commitUrl": f"{self.hub.url}/{repo.id}/commit/{oid}", "commitOid": oid, "success": True})

    def name_commit(self, repo: Repo, what: str, name: str) -> None:
        names = repo.tags if what == "tag" else repo.branches
        if self.command == "DELETE":
            if names.pop(name, None) is None:
                raise Refused(404, f"no such {what}", "RevisionNotFound")
            return self.answer({})
        asked = json.loads(self.body)
        new, target = (asked["tag"], name) if what == "tag" else (name, asked.get("startingPoint") or "main")
        if new in names:
            raise Refused(409, f"Reference refs/{what}s/{new} exists")
        names[new] = repo.at(target)[0]
        return self.answer({})

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        oid, files = repo.at(revision)
        if path not in files:
            message = json.dumps({"error": "Entry not found"}).encode()
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            return self.answer(message, 404, headers)
        content = files[path]
        if not is_lfs(path):
            return self.send_file(content, {"X-Repo-Commit": oid, "ETag": f'"{git_oid(content)}"'})
        digest = sha256(content)
        self.hub.blobs[digest] = content
        headers = {"X-Repo-Commit": oid, "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
        headers["Location"] = f"http://localhost:{self.hub.server.server_port}/cdn/{digest}"
        return self.answer(b"", 302, headers)

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        headers = {"ETag": f'"{sha256(content)}"', "Accept-Ranges": "bytes", **headers}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2]) if match[2] else len(content) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.answer(content[start : end + 1], 206, headers)
        return self.answer(content, headers=headers)


if __name__ == "__main__":
    with Hub() as served:
        Path(sys.argv[1]).write_text(served.url)
        time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 60)
