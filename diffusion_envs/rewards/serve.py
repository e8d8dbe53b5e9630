"""A reward as a server: ``python -m diffusion_envs.rewards.serve REWARD``, for ``rewards.Remote``.

``docs/reward_servers.md`` has the protocol. There is no authentication and no encryption: it
listens on this machine alone unless told otherwise, and elsewhere belongs behind a firewall.
Requests are read at once and scored one at a time, since networks are not safe in threads. SIGTERM
or Ctrl-C ends it after the requests that are being scored.
"""

import importlib.metadata
import json
import logging
import signal
import socketserver
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

import tyro

from diffusion_envs.prompt import Prompt
from diffusion_envs.rewards import registry
from diffusion_envs.rewards.contract import Reward, RewardError, reward_name, score
from diffusion_envs.rewards.declaration import Declaring
from diffusion_envs.rewards.picture_formats import FORMATS, decode
from diffusion_envs.rewards.remote import PROTOCOL

_IDLE = 60  # seconds after which a connection that sends nothing is closed
_PIECE = 2**16
_DIGITS = 18  # of a request's length in bytes
_log = logging.getLogger(__name__)


class _Refused(Exception):
    """A request that is answered with a status of failure."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Answers ``GET /health`` and ``POST /score`` by one reward.

    Args:
        reward: that scores.
        name: of the reward; its class's or function's if left out.
        version: of the reward; that of its declaration, or of this library, if left out.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        limit: bytes of one request, and of its pictures in float32.

    Raises:
        OSError: the port is taken, or the address is none of this machine.
    """

    daemon_threads = False  # to end is to wait for what is being scored
    request_queue_size = 128

    def __init__(
        self,
        reward: Reward,
        *,
        name: str | None = None,
        version: str | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        limit: int = 2**28,
    ) -> None:
        self.reward, self.limit, self.scoring = reward, limit, threading.Lock()
        own_name = reward_name(reward)
        declaration = reward.declaration if isinstance(reward, Declaring) else None
        own = f"diffusion_envs {importlib.metadata.version('ctrl-diffusion')}"
        self.identity = {
            "reward": name or own_name,
            "version": version or (own if declaration is None else declaration.version),
        }
        parts = ("scale", "licence", "version", "source", "preprocessing")
        told = {} if declaration is None else {p: str(getattr(declaration, p)) for p in parts}
        self.health = {"protocol": PROTOCOL, **self.identity, "declaration": told}
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Take the address; http.server would also ask for its name, which can take long."""
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours; nothing else comes here."""
        _log.info("%s: %s", client_address, sys.exception())


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer  # pyright: ignore[reportIncompatibleVariableOverride]  # no other makes it
    timeout = _IDLE

    def do_GET(self) -> None:
        """Who the reward is."""
        known = self.path == "/health"
        error = {"error": f"there is GET /health and POST /score, not GET {self.path:.80}"}
        self._answer(*((200, self.server.health) if known else (404, error)))

    def do_POST(self) -> None:
        """Score pictures."""
        try:
            status, answer = 200, self._scored(self._body())
        except _Refused as refused:
            status, answer = refused.status, {"error": str(refused)}
        except RewardError as error:
            status, answer = 500, {"error": str(error)}
        self._answer(status, answer)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > _DIGITS:
            raise _Refused(411, "a request must say its Content-Length")
        size = int(length)
        if size > self.server.limit:
            left = min(size, 4 * self.server.limit)  # read on: otherwise the answer is not heard
            while left > 0 and (piece := self.rfile.read(min(left, _PIECE))):
                left -= len(piece)
            raise _Refused(
                413,
                f"a request of {size} bytes is larger than {self.server.limit}: send fewer "
                "pictures at once (batch), as PNG, or start the server with a higher --megabytes",
            )
        if self.path != "/score":
            self.rfile.read(size)
            raise _Refused(404, f"there is POST /score, not POST {self.path:.80}")
        return self.rfile.read(size)

    def _scored(self, body: bytes) -> dict[str, Any]:
        """Scores of a request's pictures.

        Raises:
            _Refused: it is no request.
            RewardError: the reward raised, or returned something unusable.
        """
        try:
            asked = json.loads(body)
            form, pictures, prompts = asked["format"], asked["images"], asked["prompts"]
            if asked["protocol"] != PROTOCOL:
                raise ValueError(f"this server speaks protocol {PROTOCOL}")
            if form not in FORMATS:
                raise ValueError(f"format must be one of {', '.join(FORMATS)}")
            if not isinstance(pictures, list) or not pictures:
                raise ValueError("images must be a list of at least one")
            if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
                raise ValueError("prompts must be a list of strings")
            if len(prompts) != len(pictures):
                raise ValueError(f"{len(pictures)} images need as many prompts, not {len(prompts)}")
            prompts = _with_columns(prompts, asked.get("metadata"))
            images = decode(pictures, form, limit=self.server.limit)
            if not bool(((images >= 0) & (images <= 1)).all()):
                raise ValueError("images must have values in [0, 1]")
        except KeyError as error:
            raise _Refused(400, f"a request must have {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise _Refused(400, f"{error}") from error
        with self.server.scoring:
            scores = score(self.server.reward, images, prompts)
        return {**self.server.identity, "scores": scores.tolist()}

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """To the log, not to the terminal."""
        _log.info(format, *args)


def _with_columns(prompts: list[str], columns: Any) -> list[Prompt]:
    """Prompts with what a request says of each, if it does.

    Raises:
        ValueError: it is no list of objects, one for each prompt.
    """
    if columns is None:
        return [Prompt(prompt) for prompt in prompts]
    objects = isinstance(columns, list) and all(isinstance(each, dict) for each in columns)
    if not objects or len(columns) != len(prompts):
        raise ValueError("metadata must be a list of objects, one for each prompt")
    return [Prompt(*pair) for pair in zip(prompts, columns, strict=True)]


@dataclass(frozen=True)
class Serve:
    """Put a reward behind a server, for rewards.Remote.

    There is no authentication: whoever reaches the address can ask.

    Attributes:
        reward: name of a reward, or your own as my_module:my_function.
        reward_model: folder, file or hub id of its weights, where it has some.
        host: address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 is every network.
        port: to listen on; 0 takes a free one.
        version: of the reward, which clients may ask for; its own if left out.
        megabytes: of a request, and of its pictures in float32, at most.
    """

    reward: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REWARD")]
    reward_model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    version: str | None = None
    megabytes: int = 256


def named(word: str, source: str | None = None) -> Reward:
    """A reward by its name on the command line.

    Args:
        word: one of the names, or "my_module:my_function".
        source: folder, file or hub id of its weights.

    Raises:
        ValueError: there is no such name; or it needs weights and there are none, or the opposite.
        FileNotFoundError: its weights are not there.
    """
    if ":" in word:
        sys.path.insert(0, "")  # a user's module beside them
    names = registry.weights((word,))
    return registry.make((word,), registry.places([] if source is None else [source], names))


def serve(server: RewardServer) -> None:
    """Answer until SIGTERM or Ctrl-C, then what is being scored; a second signal kills."""
    former = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def obey(number: int, frame: Any) -> None:
        for each in former:
            signal.signal(each, signal.SIG_DFL)
        threading.Thread(target=server.shutdown).start()  # it waits for the loop, which is here

    for each in former:
        signal.signal(each, obey)
    try:
        server.serve_forever(poll_interval=0.1)
    finally:
        server.server_close()
        for each, handler in former.items():
            signal.signal(each, handler)


def main(arguments: Sequence[str]) -> int:
    """Serve one reward; its name, version and address go to stdout as one line of JSON."""
    try:
        options = tyro.cli(
            Serve, args=list(arguments), prog="python -m diffusion_envs.rewards.serve"
        )
        if options.megabytes < 1:
            raise ValueError(f"megabytes must be at least 1, got {options.megabytes}")
        server = RewardServer(
            named(options.reward, options.reward_model),
            name=options.reward,
            version=options.version,
            host=options.host,
            port=options.port,
            limit=options.megabytes * 2**20,
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    sys.stdout.write(json.dumps({**server.identity, "url": server.url}) + "\n")
    sys.stdout.flush()
    serve(server)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
