"""A small Hugging Face hub on 127.0.0.1: what `huggingface_hub` and minildm.download ask of the real one.

Repositories are dicts of bytes. A file of ``LFS_BYTES`` or more is stored as the real hub stores weights: its SHA-256
is in the metadata, and its address redirects to a second server, which honours Range. Smaller files have git's SHA-1
and come, by a relative redirect, from the hub itself.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

LFS_BYTES = 1000
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class Hub:
    """The two servers, what they hold, how they misbehave, and what they were asked for."""

    def __init__(self):
        self.repositories = {}  # "owner/name" -> {path: bytes}
        self.licences = {}  # "owner/name" -> cardData
        self.gated = set()  # "owner/name": TOKEN opens them
        self.cuts = []  # bytes after which the next answers with content break off; None: never
        self.statuses = []  # HTTP status of the next answers with content, instead of it
        self.damage = lambda data: data  # what the content becomes on its way
        self.stall = None  # bytes after which answers with content wait for the end of the test
        self.closing = threading.Event()
        self.ranges = True  # whether Range is honoured
        self.requests = []  # (server, method, path, headers)
        self.servers = {name: self._start(name) for name in ("hub", "cdn")}
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers.values())

    def _start(self, name):
        handler = type("Handler", (_Handler,), {"hub": self, "server_name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self):
        self.closing.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def ranges_asked(self):
        """The Range header (None: all) of each request for content, in order."""
        return [
            headers.get("Range") for _, method, path, headers in self.requests if method == "GET" and "/raw/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.server_name, self.command, path, dict(self.headers)))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/raw/([^/]+/[^/]+)/(.+)", path):
            self._content(self.hub.repositories[match[1]][match[2]])
        else:
            self._answer(404)

    def _info(self, repository):
        if repository not in self.hub.repositories:  # the real hub, too, does not say whether it is private
            return self._answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        siblings = [describe(*item) for item in self.hub.repositories[repository].items()]
        card = self.hub.licences.get(repository)
        gated = "auto" if repository in self.hub.gated else False
        facts = {"id": repository, "sha": REVISION, "gated": gated, "cardData": card, "siblings": siblings}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def _resolve(self, repository, revision, path):
        if repository in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if revision != REVISION or path not in self.hub.repositories[repository]:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        data = self.hub.repositories[repository][path]
        facts = describe(path, data)
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{facts["blobId"]}"'}
        if "lfs" in facts:
            headers |= {"X-Linked-Etag": f'"{facts["lfs"]["sha256"]}"', "X-Linked-Size": str(len(data))}
        place = f"/raw/{repository}/{path}"
        self._answer(302 if "lfs" in facts else 307, headers | {"Location": ("lfs" in facts) * self.hub.cdn + place})

    def _content(self, data):
        if self.hub.statuses and self.command == "GET":
            return self._answer(self.hub.statuses.pop(0))
        whole, status, headers = len(data), 200, {"ETag": '"content"', "X-Repo-Commit": REVISION}
        if self.hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start, status = int(match[1]), 206
            data, headers["Content-Range"] = data[start:], f"bytes {start}-{whole - 1}/{whole}"
        cut = self.hub.cuts.pop(0) if self.hub.cuts and self.command == "GET" else None
        stall = self.hub.stall is not None and len(data) > self.hub.stall
        self._answer(status, headers, self.hub.damage(data), self.hub.stall if stall else cut, stall)

    def _answer(self, status, headers=(), body=b"", cut=None, stall=False):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            if stall:
                self.hub.closing.wait()
        if cut is not None:
            self.close_connection = True


def describe(path, data):
    """A file's entry in a repository's metadata."""
    entry = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if len(data) >= LFS_BYTES:
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        entry["blobId"] = "f" * 40  # of the pointer, which nobody downloads
    return entry
