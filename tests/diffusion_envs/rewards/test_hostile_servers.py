"""Servers that lead elsewhere or answer without end, and requests that are bombs."""

import base64
import gzip
import http.client
import inspect
import json
import re
import struct
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.rewards import Remote, RewardError, score
from diffusion_envs.rewards.http import _pause
from diffusion_envs.rewards.picture_formats import decode
from diffusion_envs.rewards.serve import RewardServer, Serve
from tests.diffusion_envs.rewards.servers import IDENTITY, Behaviour, by_prompt, running, says
from tests.diffusion_envs.rewards.test_serve import serving


def ask(url: str) -> Tensor:
    reward = Remote(url, retries=1, backoff=0.01, concurrency=1, timeout=30.0)
    return score(reward, torch.full((2, 3, 2, 2), 0.25), ["0.0", "1.0"])


PLACES = ("{other}/score", "{own}/score", "file:///etc/passwd", "//{other_host}/score", "/health")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirection_is_followed_wherever_it_leads(status):
    """To another host, to a file, in a circle: the pictures go where the address says, or nowhere.

    One question each, since a redirection does not heal.
    """
    with running(by_prompt) as (other, elsewhere):
        for place in PLACES:
            asked: list[Behaviour] = []
            with running(lambda handler, body, asked=asked: asked[0](handler, body)) as (own, here):
                host = other.removeprefix("http://")
                where = place.format(other=other, own=own, other_host=host)
                asked.append(says(b"", status, {"Location": where}))
                with pytest.raises(RewardError, match=f"answered with status {status}"):
                    ask(own)
                assert len(here.bodies) == 1
        assert not elsewhere.bodies


def endless(handler: Any, body: bytes) -> None:
    """Zeros, as long as they are read."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not handler.server.ended.is_set():
        handler.wfile.write(bytes(2**16))


def endless_headers(handler: Any, body: bytes) -> None:
    """More lines than a browser would take."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n")


ANSWER = json.dumps(IDENTITY | {"scores": [0.0, 1.0]}).encode()
ANSWERS: dict[str, tuple[Behaviour, str]] = {
    "without end": (endless, "answered with more than 16777216 bytes"),
    "headers without end": (endless_headers, "no HTTP: .*got more than 100 headers"),
    "packed": (  # a bomb would be unpacked by whoever unpacks: nobody does
        says(gzip.compress(ANSWER), 200, {"Content-Encoding": "gzip"}),
        "answered with what is no JSON",
    ),
    "nested without end": (says(b"[" * 100_000), "answered with what is no JSON"),
    "a page": (says(b"<script>alert(1)</script>", 200, {"Content-Type": "text/html"}), "no JSON"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_a_bomb_ends_the_run_in_words(name):
    behaviour, message = ANSWERS[name]
    with running(behaviour) as (url, _), pytest.raises(RewardError, match=f"(?s){message}"):
        ask(url)


@pytest.mark.parametrize(
    "asked", ["9" * 400, "Mon, 01 Jan 0001 00:00:00 +2359", "Fri, 31 Dec 9999 23:59:59 -2359", "x"]
)
def test_a_server_cannot_ask_for_a_pause_that_breaks_the_clock(asked):
    assert _pause(asked) >= 0


def png(width: int, height: int, content: bytes = b"") -> str:
    """A PNG that says it is so large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = b"\x89PNG\r\n\x1a\n" + header + content
    return base64.b64encode(
        parts + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    ).decode()


TRUNCATED = base64.b64encode(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01").decode()
PICTURES = {
    "100,000 pixels a side": (png(100_000, 100_000), "exceeds limit|more than .* bytes in float32"),
    "more pixels than 32 bits": (png(2**31 - 1, 2**31 - 1), "picture 0 is no png"),
    "a text of gigabytes": (
        png(2, 2, struct.pack(">I", 2**31 - 1) + b"zTXt" + bytes(8)),
        "picture 0 is no png",
    ),
    "half a JPEG": (TRUNCATED, "picture 0 is no png: UnidentifiedImageError"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("error")
def test_a_picture_that_is_a_bomb_is_refused_by_its_header(name):
    picture, message = PICTURES[name]
    with pytest.raises(ValueError, match=message):
        decode([picture], "png", limit=2**28)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1e9", "\xb2"])
def test_a_request_of_no_sensible_length_is_refused(length):
    with serving(rewards.Colour("red")) as server:
        host, port = server.server_address[:2]
        connection = http.client.HTTPConnection(str(host), port, timeout=30)
        connection.putrequest("POST", "/score")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 411
        assert re.search("Content-Length", answer.read().decode())
        connection.close()


def test_a_server_listens_on_this_machine_alone_unless_told_otherwise():
    assert inspect.signature(RewardServer).parameters["host"].default == "127.0.0.1"
    assert Serve("colour").host == "127.0.0.1"
    with serving(rewards.Colour("red")) as server:
        assert server.server_address[0] == "127.0.0.1"
