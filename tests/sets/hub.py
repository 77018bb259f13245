"""A stand-in for the Hugging Face hub on loopback: what pushing a folder asks of its HTTP API."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each its files by path; `commits` are their messages in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.private, self.commits, self.blobs = {}, {}, [], {}
        self.refuses_yaml = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def content(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        body = self.content()
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.content()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = (
                [{"message": '"license" must be one of ...'}] if self.server.refuses_yaml else []
            )
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.answer({"files": [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if
                 f["path"].endswith((".safetensors", ".png")) else "regular"} for f in files
            ]})  # fmt: skip
        if "/commit/" in path:
            return self.commit(path, [json.loads(line) for line in body.splitlines()])
        return self.answer({"error": f"{path} is not known here"}, 404)

    def create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        if not there:
            self.server.private[name] = asked.get("visibility") == "private"
        said = {"url": f"{self.server.url}/{name}", "id": name, "name": name}
        self.answer(said if not there else {**said, "error": "exists"}, 409 if there else 200)

    def batch(self, asked):
        self.answer({"transfer": "basic", "objects": [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/blobs/{o['oid']}"}}}
            for o in asked["objects"]
        ]})  # fmt: skip

    def commit(self, path, lines):
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.url}/{name}/commit/0"
        self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})


@contextmanager
def a_hub(monkeypatch):
    """A running stand-in, which huggingface_hub takes for the hub, without a token."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        for name, value in (
            ("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
        ):  # fmt: skip
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
        yield hub
        hub.shutdown()
