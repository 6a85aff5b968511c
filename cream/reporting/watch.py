"""A page served on this machine alone while its outputs grow.

Who may see it: whoever knows the URL, which has a random token, and reaches the loopback address. The server answers
GET only, writes nothing, and serves nothing but the page and its version.
"""

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST = "127.0.0.1"


class Watched:
    """A page that is built again when its files have changed.

    `build` makes the page of a version; `files` lists the files that it is made of, those that appear later included.
    """

    def __init__(self, build: Callable[[str], str], files: Callable[[], Iterable[Path]]):
        self._build, self._files, self._lock = build, files, threading.Lock()
        self._made: tuple[str, str] | None = None

    def version(self) -> str:
        """A hash of the files' sizes and times."""
        states = []
        for path in sorted(self._files()):
            try:
                about = path.stat()
            except OSError:  # it was replaced just now
                continue
            states.append((str(path), about.st_size, about.st_mtime_ns))
        return hashlib.sha256(repr(states).encode()).hexdigest()

    def page(self) -> str:
        """The page as of now. Raises whatever `build` raises."""
        with self._lock:
            version = self.version()  # first: what changes meanwhile is a newer one
            if self._made is None or self._made[0] != version:
                self._made = (version, self._build(version))
            return self._made[1]


def serve(watched: Watched, port: int = 0, token: str | None = None) -> ThreadingHTTPServer:
    """A server of the page at http://127.0.0.1:PORT/TOKEN/, to be run by its `serve_forever`; see `url`. Port 0 takes a
    free one. Raises OSError where the port is taken."""
    token = token or secrets.token_urlsafe(18)

    class Handler(BaseHTTPRequestHandler):
        """GET of the page and of its version; anything else is not found."""

        server_version, sys_version = "report", ""

        def do_GET(self) -> None:  # noqa: N802
            """Answer with the page, or its version."""
            path = self.path.partition("?")[0]
            names = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
            if self.headers.get("Host") not in names:  # another site's name that leads here
                return self.send_error(404)
            made = {f"/{token}/": (watched.page, "text/html"), f"/{token}/version": (watched.version, "text/plain")}
            found = [how for name, how in made.items() if secrets.compare_digest(path.encode(), name.encode())]
            if not found:
                return self.send_error(404)
            make, kind = found[0]
            try:
                return self._answer(make(), kind)
            except Exception as error:  # an output is being replaced: a later request finds it whole
                return self._answer(f"not now: {error}", "text/plain", 503)

        def _answer(self, text: str, kind: str, status: int = 200) -> None:
            content = text.encode()
            self.send_response(status)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(content)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "no-referrer",
            }
            if status == 503:
                headers["Refresh"] = "5"
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            """Nothing: the URL has the token."""

    server = ThreadingHTTPServer((HOST, port), Handler)
    server.daemon_threads = True
    server.url = f"http://{HOST}:{server.server_port}/{token}/"
    return server
