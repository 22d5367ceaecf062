# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A model hub in memory, over HTTP on the loopback interface.

It answers what `push_to_hub` and `from_pretrained` ask of the real one. Every file is uploaded as a regular one, which
leaves out LFS and Xet. Clients find it through `HF_ENDPOINT`, which huggingface_hub reads when it is imported: run
them in a process of their own, with `FakeHub.environment`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """The hub: `files` maps a repository to its files, `requests` lists what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process that keeps its caches in `home`."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        return {
            **inherited,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def commit_hash(self, repo: str) -> str:
        """A hash of the repository's files, in the place of git's."""
        state = json.dumps({path: _etag(content) for path, content in sorted(self.files[repo].items())})
        return hashlib.sha1(state.encode()).hexdigest()

    def info(self, repo: str) -> dict:
        """What `/api/models/{repo}` answers; task and library come from the model card, as on the real hub."""
        card = self.files[repo].get("README.md", b"").decode()
        fields = dict(re.findall(r"^(pipeline_tag|library_name): (\S+)$", card, flags=re.MULTILINE))
        return {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": self.commit_hash(repo),
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            **fields,
            "siblings": [{"rfilename": path} for path in sorted(self.files[repo])],
        }


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        path = self._path()
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "org", "orgs": [], "auth": {"type": "access_token"}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            repo = match.group(1)
            return self._json(self.hub.info(repo)) if repo in self.hub.files else self._missing("RepoNotFound")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/.*)?", path):
            return self._tree(match.group(1))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(*match.groups())
        return self._missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self._path()
        body = self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'org'}/{asked['name']}"
            self.hub.files.setdefault(repo, {})
            return self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": "0"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            return self._commit(match.group(1), body)
        return self._missing("EntryNotFound")

    def _commit(self, repo: str, body: bytes) -> None:
        for operation in map(json.loads, body.splitlines()):
            if operation["key"] == "file":
                self.hub.files[repo][operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        commit = self.hub.commit_hash(repo)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}"})

    def _tree(self, repo: str) -> None:
        files = self.hub.files.get(repo)
        if files is None:
            return self._missing("RepoNotFound")
        return self._json(
            [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()]
        )

    def _file(self, repo: str, path: str) -> None:
        if repo not in self.hub.files:
            return self._missing("RepoNotFound")
        content = self.hub.files[repo].get(path)
        if content is None:
            return self._missing("EntryNotFound")
        return self._answer(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": self.hub.commit_hash(repo)})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """No log on stderr."""
