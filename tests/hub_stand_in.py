"""A stand-in for the Hugging Face hub on loopback: what huggingface_hub's uploads and downloads of a model ask for."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_of_alice"
OWNER = "alice"


class Hub(ThreadingHTTPServer):
    """The models by name, as alice sees them.

    Attributes
    ----------
    models : dict
        ``{"private": bool, "commit": str, "files": {path: bytes}}`` by name.
    large_files : dict
        What came through git LFS: bytes by their SHA-256.
    requests : list of str
        Method and path of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.large_files, self.requests = {}, {}, []
        self.refuse_large_files = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running_hub():
    """A hub for the time of a block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def is_large(path):
    """As the hub's own .gitattributes have it."""
    return path.endswith((".ckpt", ".onnx"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer_with(
            {
                r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self._model,
                r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
                r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._file,
            }
        )

    do_HEAD = do_GET

    def do_POST(self):
        self._answer_with(
            {
                r"/api/validate-yaml": lambda: self._send({"errors": [], "warnings": []}),
                r"/api/repos/create": self._create,
                r"/api/models/([^/]+/[^/]+)/preupload/main": self._preupload,
                r"/api/models/([^/]+/[^/]+)/commit/main": self._commit,
                r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._lfs_batch,
                r"/lfs/verify": lambda: self._send({}),
            }
        )

    def do_PUT(self):
        self._answer_with({r"/lfs/([0-9a-f]{64})": self._lfs_put})

    def _answer_with(self, routes):
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                return answer(*match.groups())
        return self._refuse(404, f"no such place: {path}")

    def _read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, message, code=""):
        self._send({"error": message}, status, X_Error_Message=message, X_Error_Code=code)

    @property
    def _is_alice(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, name):
        """The model, or None where it must not be seen: then that was the answer."""
        model = self.server.models.get(name)
        if model is None or (model["private"] and not self._is_alice):
            self._refuse(404 if self._is_alice else 401, "Repository not found", "RepoNotFound")
            return None
        return model

    def _may_write(self, name):
        if not self._is_alice:
            self._refuse(401, "Invalid credentials in Authorization header")
        elif name.split("/")[0] != OWNER:
            self._refuse(403, "You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    def _create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(name):
            return
        answer = {"url": f"{self.server.url}/{name}"}
        if name in self.server.models:
            self._send({"error": "You already created this model repo", **answer}, 409)
            return
        is_private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.models[name] = {"private": is_private, "commit": "0" * 40, "files": {}}
        self._send(answer)

    def _model(self, name, revision=None):
        model = self._find(name)
        if model is None:
            return
        if revision not in (None, "main", model["commit"]):
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in model["files"]]
        self._send({"id": name, "sha": model["commit"], "private": model["private"], "siblings": siblings})

    def _tree(self, name, revision):
        model = self._find(name)
        if model is None:
            return
        entries = []
        for path, content in model["files"].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entries.append({"type": "file", "path": path, "size": len(content), "oid": blob})
            if is_large(path):
                large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entries[-1]["lfs"] = large
        self._send(entries)

    def _file(self, name, revision, path):
        model = self._find(name)
        if model is None:
            return
        if path not in model["files"]:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        content = model["files"][path]
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, ETag=f'"{etag}"', X_Repo_Commit=model["commit"])

    def _preupload(self, name):
        if self._may_write(name):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [
                {"path": p, "uploadMode": "lfs" if is_large(p) else "regular", "shouldIgnore": False} for p in paths
            ]
            self._send({"files": modes})

    def _lfs_batch(self, name):
        if not self._may_write(name):
            return
        if self.server.refuse_large_files:
            self._refuse(403, "Private repository storage limit reached")
            return
        objects = []
        for file in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{file['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/verify"},
            }
            objects.append({**file, **({} if file["oid"] in self.server.large_files else {"actions": actions})})
        self._send({"objects": objects, "transfer": "basic"})

    def _lfs_put(self, digest):
        if hashlib.sha256(self.body).hexdigest() != digest:
            self._refuse(400, "the content is not what was announced")
            return
        self.server.large_files[digest] = self.body
        self._send(b"")

    def _commit(self, name):
        if not self._may_write(name):
            return
        model = self.server.models[name]
        files = dict(model["files"])
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif part["key"] == "deletedFile":
                del files[value["path"]]
        model["files"] = files
        model["commit"] = hashlib.sha1(self.body).hexdigest()
        url = f"{self.server.url}/{name}/commit/{model['commit']}"
        self._send({"commitUrl": url, "commitOid": model["commit"], "success": True})

    def log_message(self, format, *args):
        """Tests do not want it."""
