"""A Hugging Face Hub on 127.0.0.1: repositories in memory, the requests of a push and a pull, and faults on demand.

It speaks what huggingface_hub 2.4.0 asks (measured): create, validate-yaml, revision, tree, preupload,
commit, LFS batch / PUT / verify, resolve, whoami.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKENS = {"hf_dummy": ("user", True), "hf_read": ("user", False), "hf_other": ("other", True)}
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repo:
    private: bool = False
    commits: dict = field(default_factory=dict)  # oid -> files
    branches: dict = field(default_factory=dict)  # name -> oid
    messages: list = field(default_factory=list)

    def commit(self, files, message, branch="main", parent=None):
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}{message}{parent}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong with requests that match: ``action`` is given the handler; False: the request was answered."""

    method: str
    path: str
    action: object
    times: int = 1


class Hub:
    def __init__(self, lfs=False):
        self.lfs, self.repos, self.objects = lfs, {}, {}
        self.log, self.faults, self.lock = [], [], threading.Lock()
        self.after = None  # called with (method, path) once a request was answered
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add_repo(self, repo_id, files=(), private=False):
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n", **dict(files)}, "initial commit")
        return repo

    def fail(self, method, path, action, times=1):
        self.faults.append(Fault(method, path, action, times))

    def requests(self):
        """The log so far, emptied: commits as SHA, objects as OID."""
        with self.lock:
            log, self.log = self.log, []
        return [re.sub(r"[0-9a-f]{64}", "OID", re.sub(r"\b[0-9a-f]{40}\b", "SHA", line)) for line in log]


def is_lfs(hub, path, size=1):
    return hub.lfs and path.endswith((".safetensors", ".png")) and size > 0


def blob_id(hub, path, data):
    if is_lfs(hub, path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", rf"/api/models/{ID}", "info"),
        ("GET", rf"/api/models/{ID}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "put"),
        ("POST", r"/verify/(?P<oid>[0-9a-f]{64})", "verify"),
        ("HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_POST(self):
        self.serve("POST")

    def do_PUT(self):
        self.serve("PUT")

    def do_GET(self):
        self.serve("GET")

    def do_HEAD(self):
        self.serve("HEAD")

    def serve(self, method):
        url = urlparse(self.path)
        self.query = parse_qs(url.query)
        self.method, self.where = method, unquote(url.path)
        line = f"{method} {url.path}" + ("?create_pr=1" if "create_pr" in self.query else "")
        with self.hub.lock:
            self.hub.log.append(line)
            fault = next(
                (f for f in self.hub.faults if f.times > 0 and f.method == method and re.search(f.path, self.where)),
                None,
            )
            if fault is not None:
                fault.times -= 1
        self.corrupt = self.cut = None
        if fault is not None and fault.action(self) is False:
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for verb, pattern, name in self.routes:
            match = re.fullmatch(pattern, url.path)
            if verb == method and match:
                named = {key: unquote(value) for key, value in match.groupdict().items()}
                getattr(self, name)(**{"repo_id" if key == "id" else key: value for key, value in named.items()})
                break
        else:
            self.answer(404, {"error": "unknown route"})
        if self.hub.after is not None:
            self.hub.after(method, self.where)

    # Answers

    def answer(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = len(data)
        if self.corrupt is not None and data:
            data = self.corrupt(data)
        self.send_response(status)
        headers.setdefault("Content_Type", "application/json")
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.method == "HEAD":
            return
        self.wfile.write(data if self.cut is None else data[: self.cut(len(data))])
        if self.cut is not None:
            self.wfile.flush()
            self.drop()

    def drop(self):
        """Close the connection without a further word."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def error(self, status, code="", message=""):
        headers = {"X_Error_Code": code} if code else {}
        headers |= {"X_Error_Message": message} if message else {}
        self.answer(status, {"error": message or code}, **headers)

    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return TOKENS.get(token), bool(token)

    def repo(self, repo_id, *, write=False):
        """The repository, or None after answering why not, as the Hub does."""
        user, has_token = self.user()
        if has_token and user is None:
            return self.error(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and (user is None or user[0] != owner)):
            return self.error(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            return self.error(401, message="Invalid username or password.")
        if write and (not user[1] or user[0] != owner):
            return self.error(403, message="You don't have write access to this repository")
        return repo

    def files(self, repo, revision):
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}"), None
        return oid, repo.commits[oid]

    # The API

    def create(self):
        wanted = json.loads(self.body)
        user, _ = self.user()
        if user is None:
            return self.error(401, message="Invalid credentials in Authorization header")
        owner = wanted.get("organization") or user[0]
        repo_id = f"{owner}/{wanted['name']}"
        if repo_id in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.endpoint}/{repo_id}"})
        if owner != user[0] or not user[1]:
            return self.error(403, message="You don't have the rights to create a model under this namespace")
        self.hub.add_repo(repo_id, private=wanted.get("visibility") == "private")
        return self.answer(200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def validate(self):
        errors = card_errors(json.loads(self.body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def whoami(self):
        user, _ = self.user()
        if user is None:
            return self.error(401, message="Invalid credentials in Authorization header")
        return self.answer(200, {"type": "user", "name": user[0], "orgs": [], "auth": {"type": "access_token"}})

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        if repo is None:
            return
        oid, files = self.files(repo, revision)
        if oid is not None:
            siblings = [{"rfilename": path} for path in files]
            self.answer(
                200, {"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "siblings": siblings}
            )

    def tree(self, repo_id, revision):
        repo = self.repo(repo_id)
        if repo is None:
            return
        oid, files = self.files(repo, revision)
        if oid is not None:
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": blob_id(self.hub, path, data)}
                for path, data in files.items()
            ]
            self.answer(200, rows)

    def preupload(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        oid, there = self.files(repo, revision)
        if oid is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if is_lfs(self.hub, path, file["size"]) else "regular"
            if path in there:
                answer["oid"] = blob_id(self.hub, path, there[path])
            answers.append(answer)
        self.answer(200, {"files": answers})

    def commit(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            oid = repo.branches.get(revision)
            if oid is None:
                return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if header.get("parentCommit") not in (None, oid):
                return self.error(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[oid])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self.error(400, message=f"LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            pull_request = "create_pr" in self.query
            branch = f"refs/pr/{len(repo.commits)}" if pull_request else revision
            new = repo.commit(files, header["summary"], branch, oid)
        url = f"{self.hub.endpoint}/{repo_id}"
        number = branch.rpartition("/")[2]
        pr_url = f"{url}/discussions/{number}" if pull_request else None
        return self.answer(
            200, {"success": True, "commitUrl": f"{url}/commit/{new}", "commitOid": new, "pullRequestUrl": pr_url}
        )

    def batch(self, repo_id):
        if self.repo(repo_id, write=True) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/objects/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/verify/{wanted['oid']}"},
                }
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, message="checksum differs")
        self.hub.objects[oid] = self.body
        return self.answer(200)

    def verify(self, oid):
        self.answer(200 if oid in self.hub.objects else 404, {})

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        if repo is None:
            return None
        oid, files = self.files(repo, revision)
        if oid is None:
            return None
        if path not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        data = files[path]
        headers = {"ETag": f'"{blob_id(self.hub, path, data)}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if is_lfs(self.hub, path, len(data)):
            headers |= {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": len(data)}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            first = int(start[1])
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[first:], **headers)
        return self.answer(200, data, Content_Type="application/octet-stream", **headers)


def card_errors(text):
    """What the Hub's checker says of a card's metadata (the rules that concern a model of ours)."""
    match = re.match(r"\s*---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a dictionary"]
    errors = []
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, (str, list)) or not all(isinstance(item, str) for item in value):
            errors.append(f'"{key}" must be a list of texts')
    for key in ("base_model", "datasets"):
        for value in [data[key]] if isinstance(data.get(key), str) else data.get(key, []):
            if not HUB_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid')
    for model in data.get("model-index", []):
        for result in model.get("results", []):
            for part in ("task", "dataset"):
                if not isinstance(result.get(part, {}).get("type"), str):
                    errors.append(f'"model-index[0].results[0].{part}.type" is required')
            if not re.fullmatch(r"[\w./-]+", result["dataset"]["type"]):
                errors.append(f'"dataset.type" with value "{result["dataset"]["type"]}" is not valid')
    return errors


# Faults


def status(code):
    def action(handler):
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.error(code, message="a fault on demand")
        return False

    return action


def drop(handler):
    """The connection is lost before an answer; what was sent is not looked at."""
    handler.drop()
    return False


def drop_in_the_body(handler):
    """The connection is lost while the client still sends."""
    handler.rfile.read(min(1000, int(handler.headers.get("Content-Length") or 0)))
    handler.drop()
    return False


def cut(share):
    """The connection is lost in the middle of the answer."""

    def action(handler):
        handler.cut = lambda length: int(share * length)

    return action


def lose_answer(handler):
    """The request takes effect, but its answer is lost."""
    handler.answer = lambda *args, **kwargs: handler.drop()


def slow(seconds):
    def action(handler):
        time.sleep(seconds)

    return action


def flip(position=0.6):
    """One bit differs in what arrives."""

    def corrupt(data):
        index = int(position * len(data))
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    def action(handler):
        handler.corrupt = corrupt

    return action
