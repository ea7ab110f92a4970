"""A Hugging Face Hub of one process: just those calls that huggingface_hub makes to push and pull, by HTTP on this machine.

It keeps what the real one keeps: repositories with branches of commits, and large files by their sha256, which stay where an
upload was interrupted before its commit. What it sends can be cut short or damaged, and every request is noted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pt2", ".so")  # what the real one keeps by sha256, as a repository's .gitattributes say


class Stub:
    """`files` of a commit is path -> bytes. `log` are (method, path, Range) of all requests, in order."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.messages: list[str] = []
        self.private: set[str] = set()
        self.cuts: dict[str, int] = {}  # path -> bytes that are sent of it before the connection breaks, once
        self.flips: set[str] = set()  # paths of which a byte is sent wrong
        self.loses: set[str] = set()  # paths that a commit leaves out
        self.spoils: set[str] = set()  # paths of which a commit changes a byte
        self.meanwhile: dict[str, bytes] | None = None  # what somebody else commits before the next commit
        self.forbidden = False  # whether nobody may commit
        self.refused_after: int | None = None  # uploads of large files that are taken before all are refused
        self.tokens: set[str] = set()  # that came with calls of the API
        self.environment: dict[str, str] = {}  # for processes that are to use this Hub
        self.stalled: dict[str, threading.Event] = {}  # path -> when it may be sent

    def create(self, repo: str, files: dict[str, bytes] | None = None, branch: str = "main") -> str:
        return self.commit(repo, branch, {".gitattributes": b"*.safetensors lfs\n", **(files or {})})

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(json.dumps([repo, branch, len(self.commits)]).encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches.setdefault(repo, {})[branch] = name
        return name

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[repo][branch]]

    @contextmanager
    def stalling(self, path: str):
        """For the length of the block, that file is asked for and does not come."""
        self.stalled[path] = threading.Event()
        try:
            yield
        finally:
            self.stalled.pop(path).set()

    def sent(self, method: str, pattern: str) -> list[str]:
        """The paths of those requests of a method that match."""
        return [path for m, path, _ in self.log if m == method and re.search(pattern, path)]


@contextmanager
def serving(stub: Stub):
    """The endpoint, for the length of the block."""
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flipped(data: bytes) -> bytes:
    """Those bytes, but for a bit of the last one."""
    return data[:-1] + bytes([data[-1] ^ 1])


def entry(path: str, data: bytes) -> dict:
    """A file as the listing of a tree has it: named as git names it, a large one by its pointer there."""
    listed = {"type": "file", "path": path, "size": len(data)}
    if is_large(path):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
        listed["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
        data = pointer
    return listed | {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Nothing on stderr."""

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.stub.log.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            self.stub.tokens.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *match.groups())
        return self.say(404, {"error": f"the stub has no {self.command} {path}"})

    def say(self, status: int, value: object = None, **headers: str):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def lacks(self, what: str):
        self.say(404, {"error": f"{what} not found"}, **{"X-Error-Code": f"{what}NotFound"})

    def files_of(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files); None where there are none, which has been answered then."""
        if repo not in self.stub.branches:
            return self.lacks("Repo")
        commit = self.stub.branches[repo].get(revision, revision)
        if commit not in self.stub.commits:
            return self.lacks("Revision")
        return commit, self.stub.commits[commit]

    # --- reading

    def info(self, body, repo, revision="main"):
        if found := self.files_of(repo, revision):
            self.say(200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": [], "tags": []})

    def tree(self, body, repo, revision):
        if found := self.files_of(repo, revision):
            self.say(200, [entry(path, data) for path, data in found[1].items()])

    def resolve(self, body, repo, revision, path):
        if not (found := self.files_of(repo, revision)):
            return None
        commit, files = found
        if path not in files:
            return self.lacks("Entry")
        data = files[path]
        if self.command == "HEAD" and is_large(path):  # which are elsewhere
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256(data)}"'}
            return self.say(
                302,
                Location=f"http://localhost:{self.server.server_port}/stored/{sha256(data)}/{path}",
                **{"X-Repo-Commit": commit},
                **linked,
            )
        return self.send(path, data, {"X-Repo-Commit": commit, "ETag": f'"{entry(path, data)["oid"]}"'})

    def stored(self, body, oid, path):
        data = next(d for files in self.stub.commits.values() for d in files.values() if sha256(d) == oid)
        self.send(path, data, {"ETag": f'"{oid}"'})

    def send(self, path: str, data: bytes, headers: dict[str, str]):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        begin = int(wanted[1]) if wanted else 0
        if path in self.stub.flips:
            data = flipped(data)
        if wanted:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if wanted else 200)
        for name, text in {"Content-Length": str(len(data) - begin), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if event := self.stub.stalled.get(path):
            event.wait()
        cut = self.stub.cuts.pop(path, None)
        self.wfile.write(data[begin:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    # --- writing

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.stub.branches:
            return self.say(409, {"error": "it exists"})
        self.stub.create(repo)
        if asked.get("visibility") == "private":
            self.stub.private.add(repo)
        return self.say(200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo})

    def branch(self, body, repo, branch):
        self.stub.branches[repo][branch] = self.stub.branches[repo]["main"]
        self.say(201, {})

    def preupload(self, body, repo, revision):
        if found := self.files_of(repo, revision):
            asked = json.loads(body)["files"]
            self.say(200, {"files": [self.upload_mode(each["path"], found[1]) for each in asked]})

    def upload_mode(self, path: str, files: dict[str, bytes]) -> dict:
        mode = "lfs" if is_large(path) else "regular"
        known = None if path not in files else entry(path, files[path])
        oid = known and (known["lfs"]["oid"] if "lfs" in known else known["oid"])
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, body, repo):
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"http://{self.headers['Host']}/large/{each['oid']}"}}
            objects.append(each if each["oid"] in self.stub.large else each | {"actions": upload})
        self.say(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if self.stub.refused_after == 0:
            return self.say(400, {"error": "no more today"})
        if self.stub.refused_after is not None:
            self.stub.refused_after -= 1
        if sha256(body) != oid:
            return self.say(400, {"error": "its sha256 is another"})
        self.stub.large[oid] = body
        return self.say(200, {})

    def make_commit(self, body, repo, branch):
        if self.stub.forbidden:
            return self.say(403, {"error": "this token may only read"})
        if self.stub.meanwhile is not None:
            self.stub.commit(repo, branch, self.stub.meanwhile)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        found = self.files_of(repo, branch)
        if not found:
            return None
        if header["value"].get("parentCommit", found[0]) != found[0]:
            return self.say(412, {"error": "somebody was faster"})
        files = dict(found[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.stub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        for path in self.stub.spoils & files.keys():
            files[path] = flipped(files[path])
        made = self.stub.commit(repo, branch, {p: data for p, data in files.items() if p not in self.stub.loses})
        self.stub.messages.append(header["value"]["summary"])
        return self.say(200, {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{made}", "commitOid": made})


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"GET /api/models/{REPO}", _Handler.info),
    (rf"GET /api/models/{REPO}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{REPO}/tree/([^/]+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (r"(?:GET|HEAD) /stored/(\w+)/(.+)", _Handler.stored),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{REPO}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(\w+)", _Handler.upload),
    (rf"POST /api/models/{REPO}/commit/(.+)", _Handler.make_commit),
)
