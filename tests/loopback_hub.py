"""A small Hugging Face Hub on loopback, for tests that run the real `huggingface_hub` client against it.

It speaks what the clients call to publish and to download a model, and to stream a dataset (`datasets/OWNER/NAME`):
repository creation and settings, info, tree, YAML validation, pre-upload, LFS batch, upload (one part or many) and
verification, commit, and resolve, where large files are redirected to another host as the real Hub does, with Range.
Repositories have a history and private ones are hidden. Uploads by Xet, the real Hub's own protocol, are not spoken:
`Hub.environment` turns it off, and the client then takes the LFS way.

`Hub.fail` makes requests fail; `Hub.requests` lists all that came, for tests that ask what was sent twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png")  # kept as LFS objects, as the Hub's default .gitattributes says
Files = dict[str, bytes]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """commits: hash -> files, the newest last; tags: name -> hash."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: Files) -> str:
        seed = json.dumps([len(self.commits), sorted((n, git_hash(c)) for n, c in files.items())])
        name = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[name] = files
        return name

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.head]

    def resolve(self, revision: str) -> str | None:
        name = self.head if revision == "main" else self.tags.get(revision, revision)
        return name if name in self.commits else None


@dataclass
class Fault:
    """Requests whose "METHOD /path" matches the pattern fail, so many times: with a status, or, where that is 0, with
    the connection cut after `after` bytes of the body, which is the answer's or, when one is sent, the request's."""

    pattern: str
    status: int
    times: int
    headers: dict[str, str]
    after: int
    reached: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event | None = None


class Hub:
    """The server's state. users: token -> user, who may write to repositories of that owner."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.users = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None  # larger objects are uploaded in parts of so many bytes
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.lock = threading.RLock()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self.server.server_address[1]
        self.url, self.storage = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for fault in self.faults:
                if fault.hold is not None:
                    fault.hold.set()
            self.server.shutdown()
            self.server.server_close()

    def environment(self, token: str | None = "hf_alice", home: str = "home", **variables: str) -> dict[str, str]:
        """Variables for a client: this server alone, a cache of its own, no Xet."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home / home),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **variables,
        }

    def add(self, name: str, files: Files, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit(files)
        return repository

    def fail(
        self,
        pattern: str,
        status: int = 0,
        times: int = 1,
        after: int = 0,
        hold: threading.Event | None = None,
        **headers: str,
    ) -> Fault:
        fault = Fault(pattern, status, times, {k.replace("_", "-"): v for k, v in headers.items()}, after, hold=hold)
        self.faults.append(fault)
        return fault

    def asked(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        line = f"{self.command} {unquote(parts.path)}"
        self.fault = None
        with self.hub.lock:
            self.hub.requests.append(line)
            for fault in self.hub.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    self.fault = fault
                    break
        if self.fault and self.fault.status == 0 and self.command in ("POST", "PUT"):
            self.rfile.read(min(self.fault.after, int(self.headers.get("Content-Length") or 0)))
            self._cut()
            return
        self.body = self._read_body()
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        try:
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "as the test asked", "")
            self._route(line)
        except Refusal as refusal:
            headers = dict(self.fault.headers) if self.fault else {}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            headers["X-Error-Message"] = refusal.message
            self._answer(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _cut(self) -> None:
        assert self.fault is not None
        self.fault.reached.set()
        if self.fault.hold is not None:
            self.fault.hold.wait(60)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.fault and self.fault.status == 0:
                self.wfile.write(content[: self.fault.after])
                self.wfile.flush()
                self._cut()
            else:
                self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json", **(headers or {})})

    # --- what is asked

    def _route(self, line: str) -> None:
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, line):
                with self.hub.lock:
                    answer = action(self, **found.groupdict())
                answer()
                return
        raise Refusal(404, f"this Hub does not know {line}")

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if not given:
            return None
        user = self.hub.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, name: str, write: bool = False, content: bool = False) -> Repository:
        user, repository = self._user(), self.hub.repositories.get(name)
        owner = name.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, f"You don't have the rights to write to {name}" if user else "Log in")
        if content and repository.gated and user != owner:
            raise Refusal(403 if user else 401, f"Access to model {name} is restricted", "GatedRepo")
        return repository

    def create(self) -> Any:
        user, asked = self._user(), json.loads(self.body)
        owner = asked.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked.get("visibility") == "private")
        return lambda: self._json({"url": f"{self.hub.url}/{name}"})

    def settings(self, repo: str) -> Any:
        self._repository(repo, write=True).private = json.loads(self.body)["visibility"] == "private"
        return lambda: self._json({})

    def validate_yaml(self) -> Any:
        import yaml

        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        assert front and isinstance(yaml.safe_load(front[1]), dict)
        return lambda: self._json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str | None = None) -> Any:
        repository = self._repository(repo)
        commit = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        value = {"id": repo, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings}
        return lambda: self._json(value)

    @staticmethod
    def _commit_of(repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def tree(self, repo: str, revision: str) -> Any:
        repository = self._repository(repo)
        entries = []
        for name, content in repository.commits[self._commit_of(repository, revision)].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return lambda: self._json(entries)

    def below(self, repo: str, revision: str, path: str | None) -> Any:
        """The files and folders of a dataset below a path, of one level or of all."""
        found, path = self._entries(repo, revision), path or ""
        inside = {name: entry for name, entry in found.items() if name.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        if self.query.get("recursive", "").lower() != "true":
            inside = {name: entry for name, entry in inside.items() if name.count("/") == path.count("/") + bool(path)}
        return lambda: self._json(list(inside.values()))

    def paths_info(self, repo: str, revision: str) -> Any:
        if (self.headers.get("Content-Type") or "").startswith("application/json"):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode())["paths"]
        found = self._entries(repo, revision)
        return lambda: self._json([found[path] for path in asked if path in found])

    def _entries(self, repo: str, revision: str) -> dict[str, dict[str, Any]]:
        """The files and folders of a dataset by their paths."""
        repository, entries = self._repository(repo), dict[str, dict[str, Any]]()
        for name, content in repository.commits[self._commit_of(repository, revision)].items():
            for at in (i for i, letter in enumerate(name) if letter == "/"):
                entries[name[:at]] = {"type": "directory", "path": name[:at], "size": 0, "oid": "0" * 40}
            entries[name] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        return entries

    def preupload(self, repo: str, revision: str) -> Any:
        files, answers = self._repository(repo, write=True).files, []
        for asked in json.loads(self.body)["files"]:
            name, large = asked["path"], asked["path"].endswith(LARGE)
            old = files.get(name)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_hash(old)
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return lambda: self._json({"files": answers})

    def batch(self, repo: str) -> Any:
        self._repository(repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size, chunk = asked["oid"], asked["size"], self.hub.part_size
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.storage}/upload/{oid}"}
                if chunk is not None and size > chunk:
                    count = -(-size // chunk)
                    urls = {str(i): f"{self.hub.storage}/upload/{oid}/{i}" for i in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/complete/{oid}",
                        "header": {"chunk_size": str(chunk), **urls},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}/verify"}}
            objects.append(entry)
        return lambda: self._json({"objects": objects})

    def upload(self, oid: str) -> Any:
        self._signed_url_only()
        self._store(oid, self.body)
        return lambda: self._answer(b"")

    def upload_part(self, oid: str, part: str) -> Any:
        self._signed_url_only()
        self.hub.parts[oid, int(part)] = self.body
        etag = f'"{hashlib.md5(self.body).hexdigest()}"'
        return lambda: self._answer(b"", headers={"ETag": etag})

    def complete(self, oid: str) -> Any:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._store(oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        return lambda: self._json({})

    def _signed_url_only(self) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "a login went to the storage host")

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what its hash says")
        self.hub.objects[oid] = content

    def verify(self, repo: str) -> Any:
        asked = json.loads(self.body)
        if len(self.hub.objects[asked["oid"]]) != asked["size"]:
            raise Refusal(400, "size")
        return lambda: self._json({})

    def commit(self, repo: str, revision: str) -> Any:
        repository = self._repository(repo, write=True)
        files = dict(repository.files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit", repository.head) != repository.head:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, entry["key"])
        oid = repository.commit(files)
        return lambda: self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        repository = self._repository(repo, content=True)
        commit = self._commit_of(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(LARGE):
            return lambda: self._answer(content, headers={**headers, "ETag": f'"{git_hash(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        self.hub.objects[oid] = content
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self.hub.storage}/objects/{oid}"
        return lambda: self._answer(b"", 302, headers)

    def storage(self, oid: str) -> Any:
        self._signed_url_only()
        content, headers, status = self.hub.objects[oid], {"ETag": f'"{oid}"'}, 200
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        return lambda: self._answer(content, status, headers)


NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
DATASET = r"(?P<repo>datasets/[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"PUT /api/models/{NAME}/settings", Handler.settings),
    (rf"GET /api/models/{NAME}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"POST /api/models/{NAME}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"GET /api/models/{NAME}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (rf"POST /{NAME}/verify", Handler.verify),
    (r"PUT /upload/(?P<oid>[0-9a-f]{64})", Handler.upload),
    (r"PUT /upload/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", Handler.upload_part),
    (r"POST /complete/(?P<oid>[0-9a-f]{64})", Handler.complete),
    (rf"(?:GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (rf"GET /api/{DATASET}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (rf"GET /api/{DATASET}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.below),
    (rf"POST /api/{DATASET}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (rf"(?:GET|HEAD) /{DATASET}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (r"GET /objects/(?P<oid>[0-9a-f]{64})", Handler.storage),
]
