"""The reference server: the same scores bit for bit, errors as JSON, an end in good order."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.prompt import Prompt, metadata_of
from diffusion_envs.rewards import Remote, RewardError, score, serve
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.picture_formats import encode
from diffusion_envs.rewards.serve import RewardServer

PROMPTS = ["a photo of a cat", "a photo of a ship", "a photo of a dog"]


@contextmanager
def serving(reward: Any, **settings: Any) -> Iterator[RewardServer]:
    server = RewardServer(reward, port=0, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def post(server: RewardServer, body: bytes, path: str = "/score") -> tuple[int, dict[str, Any]]:
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(str(host), port, timeout=30)
    connection.request("POST", path, body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def request(images: Tensor, /, **changes: Any) -> bytes:
    asked = {
        "protocol": 1,
        "format": "float32",
        "images": encode(images, "float32"),
        "prompts": PROMPTS[: len(images)],
    }
    kept = {k: v for k, v in (asked | changes).items() if v is not None}
    return json.dumps(kept).encode()


@pytest.mark.parametrize(
    "reward",
    [rewards.Colour("green"), rewards.JpegCompressibility(), rewards.PromptAlignment("judge")],
    ids=rewards.reward_name,
)
def test_behind_a_server_a_reward_scores_bit_for_bit_what_it_scores_here(reward, generator):
    images = torch.rand(3, 3, 32, 32, generator=generator)
    rounded = (images * 255).round() / 255
    with serving(reward) as server:
        assert torch.equal(
            score(Remote(server.url, format="float32"), images, PROMPTS),
            score(reward, images, PROMPTS),
        )
        assert torch.equal(
            score(Remote(server.url), images, PROMPTS), score(reward, rounded, PROMPTS)
        )


def test_columns_of_prompts_reach_a_reward_behind_a_server(generator):
    prompts = [Prompt("a sign", {"weight": 0.5, "words": ["STOP", "é"]}), Prompt("a cat")]
    seen: list[Sequence[str]] = []

    def weighted(images: Tensor, prompts: Sequence[str]) -> list[float]:
        seen.append(prompts)
        return [metadata_of(prompt).get("weight", 2.0) for prompt in prompts]

    images = torch.rand(2, 3, 4, 4, generator=generator)
    with serving(weighted) as server:
        assert score(Remote(server.url), images, prompts).tolist() == [0.5, 2.0]
        status, answer = post(server, request(images, metadata=[{}]))
    assert [metadata_of(prompt) for prompt in seen[0]] == [p.metadata for p in prompts]
    assert status == 400
    assert answer == {"error": "metadata must be a list of objects, one for each prompt"}


class Declared(rewards.Colour):
    """A reward that declares itself."""

    @property
    def declaration(self) -> Declaration:
        return Declaration(
            scale="from -1 to 1", licence="none", version="v3", source="here", preprocessing="none"
        )


def test_its_declaration_comes_through():
    with serving(Declared("red"), name="declared") as server:
        declared = Remote(server.url, version="v3").declaration
    assert (declared.scale, declared.licence, declared.source) == ("from -1 to 1", "none", "here")
    assert str(declared.preprocessing).endswith("then by the server: none")


def test_one_request_is_scored_at_a_time():
    lock, most = threading.Lock(), []

    def alone(images: Tensor, prompts: Sequence[str]) -> Tensor:
        most.append(lock.acquire(blocking=False))
        threading.Event().wait(0.02)
        lock.release()
        return images.mean((1, 2, 3))

    with serving(alone) as server:
        reward = Remote(server.url, batch=1, concurrency=4)
        score(reward, torch.rand(8, 3, 2, 2), ["a cat"] * 8)
    assert most == [True] * 8


def test_a_reward_that_fails_says_so_at_the_other_end():
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("teapot")

    with (
        serving(broken) as server,
        pytest.raises(RewardError, match=r"status 500: .*broken raised KeyError.*teapot"),
    ):
        score(Remote(server.url), torch.rand(1, 3, 2, 2), ["a cat"])


IMAGE = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[bytes, str, int, str]] = {
    "no JSON": (b"<html>", "/score", 400, "Expecting value"),
    "no object": (b"[]", "/score", 400, "list indices"),
    "no prompts": (request(IMAGE, prompts=None), "/score", 400, "must have 'prompts'"),
    "too few prompts": (request(IMAGE, prompts=[]), "/score", 400, "need as many prompts, not 0"),
    "numbers": (request(IMAGE, prompts=[1]), "/score", 400, "must be a list of strings"),
    "no pictures": (request(IMAGE, images=[]), "/score", 400, "a list of at least one"),
    "another format": (request(IMAGE, format="webp"), "/score", 400, "one of png, float32"),
    "another protocol": (request(IMAGE, protocol=2), "/score", 400, "speaks protocol 1"),
    "no picture": (request(IMAGE, images=["x"]), "/score", 400, "picture 0 is no float32"),
    "no colours": (
        request(IMAGE, images=encode(torch.zeros(1, 3, 1, 1), "float32")).replace(
            b"AAAAAAAA", b"AADAfwAA"
        ),
        "/score",
        400,
        "values in",
    ),
    "another path": (request(IMAGE), "/shutdown", 404, "there is POST /score, not POST /shutdown"),
    "too large": (request(torch.zeros(1, 3, 64, 64)), "/score", 413, "larger than 20000: send few"),
    "too large when decoded": (
        json.dumps(
            {
                "protocol": 1,
                "format": "png",
                "images": encode(torch.zeros(1, 3, 64, 64), "png"),
                "prompts": PROMPTS[:1],
            }
        ).encode(),
        "/score",
        400,
        "more than 20000 bytes in float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_in_words(name):
    body, path, status, message = REFUSED[name]
    with serving(rewards.Colour("red"), limit=20_000) as server:
        answered, answer = post(server, body, path)
    assert answered == status
    assert list(answer) == ["error"]
    assert message in answer["error"]


def test_names_are_objects_here():
    assert serve.named("blue") == rewards.Colour("blue")
    assert serve.named("diffusion_envs.rewards:Colour") == rewards.Colour("red")
    with pytest.raises(ValueError, match=r"reward must be one of .* got 'purple'"):
        serve.named("purple")
    with pytest.raises(ValueError, match="reward_model folder is of none of them"):
        serve.named("red", "folder")
    assert serve.named("remote", "http://127.0.0.1:9") == Remote("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purple"], "reward must be one of"),
        (["red", "--megabytes", "0"], "megabytes must be at least 1"),
        (["red", "--host", "192.0.2.1"], "error: "),  # an address of no machine
    ],
)
def test_a_server_that_cannot_be_says_why(arguments, message, capsys):
    assert serve.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_is_being_scored(number):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from diffusion_envs.rewards import serve; sys.exit(serve.main(sys.argv[1:]))"
    )
    words = ["tests.diffusion_envs.rewards.test_serve:slow", "--port", "0", "--version", "7"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    ) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told == {"reward": words[0], "version": "7", "url": told["url"]}
        answers: list[Tensor] = []
        reward = Remote(told["url"], version="7", format="float32", retries=0)
        thread = threading.Thread(
            target=lambda: answers.append(score(reward, IMAGE, PROMPTS[:1])), daemon=True
        )
        thread.start()
        while reward.counts["requests"] == 0:
            thread.join(0.01)
        thread.join(0.5)  # it has reached the server
        process.send_signal(number)
        assert process.wait(60) == 0
        thread.join(60)
    assert torch.equal(answers[0], score(rewards.Colour("red"), IMAGE, PROMPTS[:1]))


def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that takes its time."""
    threading.Event().wait(1.5)
    return rewards.Colour("red")(images, prompts)
