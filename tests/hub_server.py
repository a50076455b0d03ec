"""A small hub on localhost: as much of the Hugging Face Hub's HTTP interface as a download needs, over real sockets.

    with HubServer() as hub:
        hub.add("acme/tiny", Path("model-directory"), revisions=("main", "v1"))
        snapshot_download("acme/tiny", endpoint=hub.url)

It serves /api/models/ID/revision/REV, /api/models/ID/tree/COMMIT and /ID/resolve/REV/FILE with ETag, X-Repo-Commit and
Range, and can ask for a token, call a repository gated, or cut the connection in the middle of a file. It announces no
xet storage, so that clients fetch over plain HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class Refusal(Exception):
    """An answer other than the thing asked for. `error_code` goes into X-Error-Code, which clients read."""

    def __init__(self, status: int, error_code: str) -> None:
        super().__init__(error_code)
        self.status = status
        self.error_code = error_code


@dataclasses.dataclass
class Repo:
    """One model repository: revisions (branch, tag or commit) name directories on disk."""

    revisions: dict[str, Path]
    token: str | None = None
    gated: bool = False

    def commit(self, revision: str) -> str:
        """A made-up commit hash of 40 hex digits, the same for equal directories. Raises Refusal."""
        known = {hashlib.sha1(str(path).encode()).hexdigest(): path for path in self.revisions.values()}
        if revision in known:
            return revision
        if revision not in self.revisions:
            raise Refusal(404, "RevisionNotFound")
        return hashlib.sha1(str(self.revisions[revision]).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, Path]:
        """Name to path of every file of a revision. Raises Refusal."""
        commit = self.commit(revision)
        root = next(path for name, path in self.revisions.items() if self.commit(name) == commit)
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    range: str | None


class HubServer:
    """Runs in a thread of its own between __enter__ and __exit__. Safe to change while it runs."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Seen] = []
        self.cuts: dict[str, int] = {}
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT or `endpoint=` is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(
        self,
        repo: str,
        directory: Path,
        *,
        revisions: tuple[str, ...] = ("main",),
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Serves a directory as `repo` ("owner/name") under these revisions; returns its commit hash.

        With a token, requests without it are answered 401; `gated` answers 403 to everyone.
        """
        found = self.repos.setdefault(repo, Repo({}))
        found.revisions |= dict.fromkeys(revisions, directory)
        found.token, found.gated = token, gated
        return found.commit(revisions[0])

    def cut_once(self, name: str, after: int) -> None:
        """The next GET of a file of this name ends after `after` bytes, the connection closed."""
        self.cuts[name] = after

    def gets(self, name: str) -> list[Seen]:
        """The GETs of a file so far."""
        return [seen for seen in self.requests if seen.method == "GET" and seen.path.endswith(f"/{name}")]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuses connections from now on. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: tests read `requests`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append(Seen(self.command, path, self.headers.get("Range")))
        with contextlib.suppress(ConnectionError):  # the client may leave at any time
            try:
                self._route(path)
            except Refusal as refusal:
                self._json({"error": refusal.error_code}, refusal.status, {"X-Error-Code": refusal.error_code})

    def _route(self, path: str) -> None:
        if match := API.fullmatch(path):
            repo = self._allowed(match["repo"])
            revision = match["revision"] or "main"
            listing = _tree(repo, revision) if match["what"] == "tree" else _info(match["repo"], repo, revision)
            self._json(listing, 200, {})
        elif match := RESOLVE.fullmatch(path):
            self._file(self._allowed(match["repo"]), match["revision"], match["name"])
        else:
            raise Refusal(404, "RepoNotFound")

    def _allowed(self, name: str) -> Repo:
        repo = self.server_hub.repos.get(name)
        if repo is None:
            raise Refusal(404, "RepoNotFound")
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            raise Refusal(401, "RepoNotFound")  # the hub does not say that a private repository exists
        if repo.gated:
            raise Refusal(403, "GatedRepo")
        return repo

    def _json(self, value: Any, status: int, headers: dict[str, str]) -> None:
        body = json.dumps(value).encode()
        self._head(status, headers | {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, repo: Repo, revision: str, name: str) -> None:
        path = repo.files(revision).get(name)
        headers = {"X-Repo-Commit": repo.commit(revision)}
        if path is None:
            self._json({}, 404, headers | {"X-Error-Code": "EntryNotFound"})
            return
        body = path.read_bytes()
        start = _range_start(self.headers.get("Range"), len(body))
        headers |= {"ETag": f'"{_sha256(path)}"', "Accept-Ranges": "bytes", "Content-Length": str(len(body) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._head(206 if start else 200, headers)
        if self.command != "HEAD":
            self._send(name, body[start:])

    def _send(self, name: str, body: bytes) -> None:
        cut = self.server_hub.cuts.pop(name, None)
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True  # fewer bytes than Content-Length announced


def _info(name: str, repo: Repo, revision: str) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in repo.files(revision)]
    return {"_id": name, "id": name, "modelId": name, "sha": repo.commit(revision), "siblings": siblings}


def _tree(repo: Repo, revision: str) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": _sha256(path)[:40]}
        for name, path in repo.files(revision).items()
    ]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _range_start(value: str | None, size: int) -> int:
    match = re.fullmatch(r"bytes=(\d+)-", value or "")
    start = int(match[1]) if match else 0
    if start > size:
        raise Refusal(416, "RangeNotSatisfiable")
    return start
