"""Servers on this machine that do what servers do: answer, wrongly too, hang, break off and die."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler", bytes], None]
IDENTITY = {"reward": "beauty", "version": "7"}


class Handler(BaseHTTPRequestHandler):
    """Leaves every request to the server's behaviours: GET to ``health``, POST to the next."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.health(self, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            k = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
        behaviours = self.server.behaviours
        behaviours[min(k, len(behaviours) - 1)](self, body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """One of the behaviours for each POST in turn; the last one for all that follow."""

    daemon_threads = True  # some of them hang

    def __init__(self, *behaviours: Behaviour, health: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours, self.health = behaviours, health
        self.bodies: list[bytes] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()  # whoever hangs ends then

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away: that is what is tested."""


def says(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Behaviour:
    """Answer with these bytes, or this object as JSON."""

    def answer(handler: Handler, body: bytes) -> None:
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent)

    return answer


def scores(*numbers: Any, **more: Any) -> Behaviour:
    """These scores."""
    return says(IDENTITY | {"scores": list(numbers)} | more)


def by_prompt(handler: Handler, body: bytes) -> None:
    """The number that each prompt is, as its score."""
    prompts = json.loads(body)["prompts"]
    scores(*(float(prompt) for prompt in prompts))(handler, body)


def later_first(handler: Handler, body: bytes) -> None:
    """The same; the smaller the numbers, the later."""
    time.sleep(0.3 - 0.1 * min(2.0, float(json.loads(body)["prompts"][0])))
    by_prompt(handler, body)


def slow(seconds: float) -> Behaviour:
    """The right answer, late."""

    def answer(handler: Handler, body: bytes) -> None:
        time.sleep(seconds)
        by_prompt(handler, body)

    return answer


def hangs(handler: Handler, body: bytes) -> None:
    """Never an answer."""
    handler.server.ended.wait(60)
    handler.close_connection = True


def trickles(handler: Handler, body: bytes) -> None:
    """Byte after byte, so that no single read ever takes long."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not handler.server.ended.wait(0.02):
        handler.wfile.write(b" ")


def breaks_off(handler: Handler, body: bytes) -> None:
    """Half an answer."""
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{"scores": [1.0,')


def drops(handler: Handler, body: bytes) -> None:
    """The connection is closed without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def is_no_http(handler: Handler, body: bytes) -> None:
    """Another protocol."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


@contextmanager
def running(*behaviours: Behaviour, health: Any = None) -> Iterator[tuple[str, Server]]:
    """Address and server, which is stopped at the end."""
    told = {"protocol": 1, **IDENTITY, "declaration": {"scale": "0 to 10", "licence": "MIT"}}
    server = Server(*behaviours, health=health or says(told))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def refused() -> str:
    """An address on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
