"""Questions to a server over HTTP: bounded patience, and errors that say who, which and what came.

Every attempt has a connection of its own, whose whole time, from the first byte sent to the last
one read, is bounded. Only what may heal is asked again, after pauses that double: a connection that
is refused or breaks, a time-out, and the statuses 429, 502, 503 and 504. What is asked again was
asked in the same words, so that an answer is the same however often it took. No proxy is used and
no redirection is followed: questions go where the address says, or nowhere.
"""

import email.utils
import http.client
import json
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from diffusion_envs.rewards.contract import RewardError
from diffusion_envs.rewards.daemon_threads import DaemonThreads

NOTICE = 10.0  # seconds after which a wait is shown; then after twice as many, and so on
_MAY_HEAL = (429, 502, 503, 504)
_LONGEST = 2**24  # bytes of an answer
_PIECE = 2**16
_SHOWN = 200  # characters of an answer in a message
_log = logging.getLogger(__name__)


class WrongAnswerError(Exception):
    """An answer came and is not what it must be, in words; it would be the same again."""


class _MayHealError(Exception):
    """No answer came, in words, and one may if asked again."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause  # seconds that the server asks for


@dataclass(frozen=True)
class Question:
    """What is asked, and how the answer is read.

    Attributes:
        path: below the server's address.
        read: what an answer's bytes say; raises ``WrongAnswerError``.
        body: makes what is sent as JSON, in a thread of its own; None asks by GET.
    """

    path: str
    read: Callable[[bytes], Any]
    body: Callable[[], Any] | None = None


class _Asked:
    """One question on its way, which any thread may end."""

    def __init__(self, label: str) -> None:
        self.label, self.began, self.ended = label, math.nan, False
        self.stopped = threading.Event()
        self._socket: socket.socket | None = None

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return not math.isnan(self.began) and not self.ended

    def holds(self, connected: socket.socket) -> None:
        """From now on this connection is its own."""
        self._socket = connected
        if self.stopped.is_set():
            self.cut()

    def cut(self) -> None:
        """Whoever reads from its connection or writes to it is woken with an error."""
        if self._socket is not None:
            with suppress(OSError):  # it has ended already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS must not say goodbye

    def stop(self) -> None:
        """Nobody waits for the answer any more."""
        self.stopped.set()
        self.cut()


class Client:
    """Asks one server, several questions at once; answers come in the order of the questions.

    Args:
        url: of the server, below which paths are.
        kind: what the server is, for messages.
        timeout: seconds for one attempt, from the connection to the last byte of the answer.
        connect_timeout: seconds for a connection.
        patience: seconds for a question with all its attempts and the pauses between them.
        retries: further attempts after the first.
        backoff: seconds before the second attempt; each further pause is twice as long.
        concurrency: questions on their way at once.
        headers: further ones, made anew for each call; an ``Authorization`` is shown nowhere.
        credentials: where they come from, for messages.

    Raises:
        ValueError: ``url`` is no address of a server, or holds a password; or a number is out of
            its range.
    """

    def __init__(
        self,
        url: str,
        *,
        kind: str,
        timeout: float,
        connect_timeout: float,
        patience: float,
        retries: int,
        backoff: float,
        concurrency: int,
        headers: Callable[[], Mapping[str, str]] = dict,
        credentials: str = "none are sent",
    ) -> None:
        self._secure, self._host, self._port, self._path = _address(url)
        seconds = {"timeout": timeout, "connect_timeout": connect_timeout, "patience": patience}
        for name, value in seconds.items():
            if not 0 < value <= threading.TIMEOUT_MAX:
                raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
        if not 0 <= backoff < math.inf:
            raise ValueError(f"backoff must be a number of seconds of at least 0, got {backoff!r}")
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.url, self.kind, self.name = url, kind, ""
        self.timeout, self.connect_timeout, self.patience = timeout, connect_timeout, patience
        self.retries, self.backoff, self.concurrency = retries, backoff, concurrency
        self.asked = self.retried = 0  # questions with a number; further attempts of any
        self._headers, self._lock = headers, threading.Lock()
        self._remedies = {
            401: f"credentials: {credentials}",
            403: f"credentials: {credentials}",
            404: "is url the address below which its paths are?",
            413: "send fewer or smaller pictures at once (batch)",
        }

    @property
    def who(self) -> str:
        """The server, for messages."""
        return f"{self.kind} {self.name} at {self.url}" if self.name else f"{self.kind} {self.url}"

    def ask(self, questions: Sequence[Question], label: str | None = None) -> list[Any]:
        """The answer to every question, in their order; the first failure ends them all.

        Args:
            questions: as many as one likes; ``concurrency`` of them are on their way at once.
            label: of all of them, for messages; "request 17" and so on if left out.

        Raises:
            RewardError: a question is not answered, or wrongly.
        """
        with self._lock:
            first = self.asked + 1
            self.asked += len(questions) if label is None else 0
        labels = [label or f"request {first + k}" for k in range(len(questions))]
        asked, headers = [_Asked(each) for each in labels], self._headers()
        pool = DaemonThreads(min(self.concurrency, len(questions)) or 1)
        try:
            pairs = zip(questions, asked, strict=True)
            futures = [pool.submit(partial(self._answer, *pair, headers)) for pair in pairs]
            self._wait(futures, asked)
            return [future.result() for future in futures]
        finally:  # nothing is left to stop where all went well
            for each in asked:
                each.stop()
            pool.close()

    def _wait(self, futures: Sequence[Future[Any]], asked: Sequence[_Asked]) -> None:
        """Until all have ended or one has failed; a long wait is shown."""
        notice, pending = NOTICE, set(futures)
        while pending:
            done, pending = wait(pending, timeout=notice, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done and (error := future.exception()) is not None:
                    raise error
            if pending:
                oldest = next((a for a in asked if a.running), asked[-1])
                waited = time.monotonic() - oldest.began
                if waited >= notice:
                    _log.warning("waiting for %s, %s, %.3g s", self.who, oldest.label, waited)
                    notice = 2 * notice

    def _answer(self, question: Question, asked: _Asked, headers: Mapping[str, str]) -> Any:
        """The answer to one question, with all its attempts."""
        asked.began = time.monotonic()
        body = None if question.body is None else json.dumps(question.body()).encode()
        ends, attempt = asked.began + self.patience, 0
        try:
            while True:
                attempt += 1
                try:
                    return question.read(self._attempt(question, body, asked, headers, ends))
                except _MayHealError as failure:
                    if asked.stopped.is_set():  # its connection was cut here, not by the server
                        raise RewardError(f"{self.who}, {asked.label} was stopped") from failure
                    pause = max(self.backoff * 2 ** (attempt - 1), failure.pause)
                    if attempt > self.retries or time.monotonic() + pause >= ends:
                        raise self._given_up(asked, attempt, failure, pause) from failure
                    _log.warning(
                        "%s, %s: %s; it is asked again in %.3g s",
                        *(self.who, asked.label, failure, pause),
                    )
                if asked.stopped.wait(pause):
                    raise RewardError(f"{self.who}, {asked.label} was stopped")
                with self._lock:
                    self.retried += 1
        except WrongAnswerError as wrong:
            raise RewardError(f"{self.who}, {asked.label}: {wrong}") from wrong
        finally:
            asked.ended = True

    def _given_up(
        self, asked: _Asked, attempt: int, failure: _MayHealError, pause: float
    ) -> RewardError:
        seconds = time.monotonic() - asked.began
        more = (
            ""
            if attempt > self.retries
            else f" (another attempt after {pause:g} s would exceed patience={self.patience:g} s)"
        )
        tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        return RewardError(
            f"{self.who}, {asked.label}: {failure}; gave up after {tried} in {seconds:.3g} s{more}"
            ": see whether the server is alive and what its log says, then resume the run; raise "
            "timeout, retries or patience if it was only slow"
        )

    def _attempt(
        self,
        question: Question,
        body: bytes | None,
        asked: _Asked,
        headers: Mapping[str, str],
        ends: float,
    ) -> bytes:
        """What the server answers to one attempt with status 200."""
        seconds = max(1e-3, min(self.timeout, ends - time.monotonic()))
        late = threading.Event()

        def cut() -> None:
            late.set()
            asked.cut()

        connect = min(self.connect_timeout, seconds)
        if self._secure:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=connect)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=connect)
        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        try:
            connection.connect()
            asked.holds(connection.sock)
            connection.sock.settimeout(None)  # the timer bounds all that follows together
            timer.start()
            status, pause, content = self._exchange(connection, question, body, headers)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise _MayHealError(f"no answer within {seconds:.3g} s") from error
            raise _classified(error, connect) from error
        finally:
            timer.cancel()
            connection.close()
        if status == 200:
            return content
        secret = headers.get("Authorization", "").rpartition(" ")[2]
        what = f"answered with status {status}: {excerpt(content, secret)}"
        if status in _MAY_HEAL:
            raise _MayHealError(what, pause)
        raise WrongAnswerError(f"{what}; {self._remedies.get(status, 'see the log of the server')}")

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        question: Question,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[int, float, bytes]:
        """Status, seconds to wait before another attempt, content."""
        sent = {"Accept": "application/json", "Connection": "close", **headers}
        method = "GET"
        if body is not None:
            method, sent["Content-Type"] = "POST", "application/json"
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have refused, and said why
            connection.request(method, self._path + question.path, body, sent)
        content = bytearray()
        with connection.getresponse() as response:  # which holds the socket if it is not read out
            while piece := response.read(_PIECE):
                content += piece
                if len(content) > _LONGEST:
                    raise WrongAnswerError(f"answered with more than {_LONGEST} bytes")
        if response.length:  # of Content-Length, what has not come
            raise http.client.IncompleteRead(bytes(content), response.length)
        return response.status, _pause(response.getheader("Retry-After")), bytes(content)


def excerpt(content: bytes, secret: str = "") -> str:
    """The beginning of an answer in one line, for messages; without what is secret."""
    if not content:
        return "nothing"
    text = content.decode(errors="replace")
    if secret:
        text = text.replace(secret, "***")
    text = " ".join(text.split())
    return repr(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")


def read_object(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WrongAnswerError: it is none.
    """
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WrongAnswerError(
            f"answered with what is no JSON: {excerpt(content)}; is url the address of such a "
            "server, and not of a proxy or a page?"
        ) from error
    if not isinstance(read, dict):
        raise WrongAnswerError(f"answered with what is no JSON object: {excerpt(content)}")
    return read


def _address(url: str) -> tuple[bool, str, int | None, str]:
    """Whether by TLS, host, port, and the path before all others."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"url {url!r} is no address: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "url must hold no user name and no password: it is written into settings and logs"
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ValueError(f"url must be such as http://127.0.0.1:8000, got {url!r}")
    return parts.scheme == "https", host, port, parts.path.rstrip("/")


def _classified(error: OSError | http.client.HTTPException, connect: float) -> Exception:
    """Whether what went wrong on the way may heal, and what it was in words."""
    if isinstance(error, ConnectionRefusedError):
        return _MayHealError("connection refused")
    if isinstance(error, http.client.RemoteDisconnected):
        return _MayHealError("the server closed the connection without an answer")
    if isinstance(error, http.client.IncompleteRead):
        return _MayHealError("the connection broke in the middle of the answer")
    if isinstance(error, TimeoutError):
        return _MayHealError(f"no connection within {connect:.3g} s")
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return WrongAnswerError(f"no such host: {error.strerror}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return WrongAnswerError(f"no TLS with this server: {error}")
    if isinstance(error, http.client.HTTPException):
        return WrongAnswerError(f"answered with what is no HTTP: {type(error).__name__}: {error}")
    return _MayHealError(f"{type(error).__name__}: {error}")


def _pause(retry_after: str | None) -> float:
    """Seconds that a ``Retry-After`` asks for: a number of them, or a date."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        until = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, until.timestamp() - time.time())
    except (ValueError, OverflowError):  # no date, or one outside of all calendars
        return 0.0
