"""Whatever a server does, scores come in order or an error names it, the request and the remedy."""

import json
import logging
import re
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs.rewards import Remote, RewardError, http, score
from diffusion_envs.rewards.picture_formats import decode, encode
from diffusion_envs.runs.settings import describe, differences, rebuild
from tests.diffusion_envs.rewards.servers import (
    IDENTITY,
    Behaviour,
    breaks_off,
    by_prompt,
    drops,
    hangs,
    is_no_http,
    later_first,
    refused,
    running,
    says,
    scores,
    slow,
    trickles,
)

ENOUGH = 30.0  # seconds that no test comes near
HTML = b"<html>\n  <title>It works!</title> " + 300 * b"x"


def remote(url: str, **settings: Any) -> Remote:
    """One request at a time, with little patience."""
    usual: dict[str, Any] = {"retries": 1, "backoff": 0.01, "concurrency": 1, "timeout": ENOUGH}
    return Remote(url, **usual | settings)


def ask(reward: Remote, n: int = 2) -> Tensor:
    """The scores of n pictures, whose prompts are numbers."""
    return score(reward, torch.full((n, 3, 2, 2), 0.25), [f"{k}.0" for k in range(n)])


# -- what is right ---------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_scores_come_in_order_whatever_the_order_of_arrival(concurrency):
    with running(later_first) as (url, server):
        values = ask(remote(url, batch=1, concurrency=concurrency), 3)
    assert values.tolist() == [0.0, 1.0, 2.0]
    assert len(server.bodies) == 3


def test_no_more_requests_than_asked_for_are_on_their_way_at_once():
    lock, now, most = threading.Lock(), 0, 0

    def counted(handler: Any, body: bytes) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        by_prompt(handler, body)

    with running(counted) as (url, _):
        ask(remote(url, batch=1, concurrency=2), 8)
    assert most == 2


def test_pictures_go_in_batches_with_their_prompts():
    with running(by_prompt) as (url, server):
        assert ask(remote(url, batch=2), 5).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    bodies = [json.loads(body) for body in server.bodies]
    assert [body["prompts"] for body in bodies] == [["0.0", "1.0"], ["2.0", "3.0"], ["4.0"]]
    assert [len(body["images"]) for body in bodies] == [2, 2, 1]
    assert all(body["protocol"] == 1 and body["format"] == "png" for body in bodies)


def test_a_slow_server_is_waited_for_and_shown(caplog, monkeypatch):
    monkeypatch.setattr(http, "NOTICE", 0.1)
    with running(slow(0.5)) as (url, _), caplog.at_level(logging.WARNING):
        assert ask(remote(url)).tolist() == [0.0, 1.0]
    shown = [record.getMessage() for record in caplog.records]
    waits = [
        re.fullmatch(rf"waiting for reward beauty at {url}, request 1, (.*) s", s) for s in shown
    ]
    first, second, *_ = (float(wait[1]) for wait in waits if wait)
    assert first >= 0.1
    assert second >= 0.3  # each wait is twice as long as the last


HEALED: dict[str, tuple[Behaviour, ...]] = {
    "busy": (says({"error": "busy"}, 503),),
    "a gateway": (says(b"<html>", 502),),
    "too many": (says(b"", 429),),
    "dropped": (drops,),
    "half an answer": (breaks_off, breaks_off),
}


@pytest.mark.parametrize("name", HEALED)
def test_what_heals_is_asked_again_and_counted(name):
    failures = HEALED[name]
    with running(*failures, by_prompt) as (url, server):
        reward = remote(url, retries=2)
        assert ask(reward).tolist() == [0.0, 1.0]
    assert reward.counts == {"requests": 1, "requests_retried": len(failures)}
    assert len(set(server.bodies)) == 1  # in the same words


def test_a_server_that_hangs_once_is_asked_again():
    with running(hangs, by_prompt) as (url, _):
        assert ask(remote(url, timeout=0.2)).tolist() == [0.0, 1.0]


def test_pauses_double_and_a_server_may_ask_for_longer_ones():
    busy = says(b"", 503)
    with running(busy, busy, says(b"", 429, {"Retry-After": "1"}), by_prompt) as (url, _):
        reward = remote(url, retries=3, backoff=0.1)
        began = time.monotonic()
        ask(reward)
        took = time.monotonic() - began
    assert 0.1 + 0.2 + 1.0 <= took < 0.1 + 0.2 + 1.0 + ENOUGH


# -- what is wrong ---------------------------------------------------------------------------------

WRONG: dict[str, tuple[Behaviour, str]] = {
    "a short list": (scores(1.0), r"answered with 1 scores for 2 pictures: '\{"),
    "a long list": (scores(1.0, 2.0, 3.0), "answered with 3 scores for 2 pictures"),
    "NaN": (scores(1.0, float("nan")), "answered with nan for picture 1, .* finite"),
    "infinity": (scores(float("inf"), 1.0), "answered with inf for picture 0"),
    "too large for float32": (scores(1.0, 1e39), r"answered with 1e\+39 for picture 1"),
    "a huge integer": (scores(1.0, 10**400), "answered with 1000.* for picture 1"),
    "null": (scores(1.0, None), "answered with None for picture 1"),
    "strings": (scores("1.0", "2.0"), "answered with '1.0' for picture 0"),
    "a truth value": (scores(1.0, True), "answered with True for picture 1"),
    "a nested list": (scores([1.0], [2.0]), r"answered with \[1.0\] for picture 0"),
    "no list": (says(IDENTITY | {"scores": 1.0}), "without a list of scores"),
    "no scores": (says(IDENTITY), "without a list of scores"),
    "HTML": (says(HTML), r"no JSON: '<html> <title>It works!</title> x{168}'\.\.\.; is url "),
    "nothing": (says(b""), "no JSON: nothing"),
    "no object": (says([1.0, 2.0]), "no JSON object"),
    "another version": (
        scores(1.0, 2.0, version="8"),
        "answered as beauty of version '8', but it began as beauty of version '7'.* resume the run",
    ),
    "another reward": (scores(1.0, 2.0, reward="ugliness"), "answered as ugliness of version '7'"),
    "no version": (says({"scores": [1.0, 2.0]}), "must name its reward and version"),
    "a failure of the reward": (
        says({"error": "the reward raised KeyError"}, 500),
        "status 500: '.*the reward raised KeyError.*'; see the log of the server",
    ),
    "a wrong request": (says({"error": "no"}, 400), "status 400: .*no"),
    "no such path": (says(b"", 404), "status 404: nothing; is url the address"),
    "too large": (says(b"", 413), "status 413: nothing; send fewer or smaller pictures"),
    "elsewhere": (says(b"", 307, {"Location": "http://127.0.0.1:1"}), "status 307"),
    "no HTTP": (is_no_http, "no HTTP: BadStatusLine"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_ends_the_run_with_its_words_and_is_not_asked_again(name):
    behaviour, message = WRONG[name]
    with running(by_prompt, behaviour) as (url, server):
        reward = remote(url)
        ask(reward)
        with pytest.raises(RewardError, match=f"reward beauty at {url}, request 2: .*{message}"):
            ask(reward)
    assert len(server.bodies) == 2


FAILS: dict[str, tuple[Behaviour, str]] = {
    "hangs": (hangs, "no answer within 0.3 s"),
    "trickles": (trickles, "no answer within 0.3 s"),
    "drops": (drops, "the server closed the connection without an answer"),
    "breaks off": (breaks_off, "the connection broke in the middle of the answer"),
    "is busy": (says({"error": "busy"}, 503), "answered with status 503: .*busy"),
}


@pytest.mark.parametrize("name", FAILS)
def test_what_does_not_heal_ends_the_run(name):
    behaviour, message = FAILS[name]
    began = time.monotonic()
    with running(by_prompt, behaviour) as (url, server):
        reward = remote(url, timeout=0.3, retries=2)
        ask(reward)
        with pytest.raises(
            RewardError,
            match=f"reward beauty at {url}, request 2: {message}.*; gave up after 3 attempts in .*"
            "see whether the server is alive .* then resume the run",
        ):
            ask(reward)
        assert len(server.bodies) == 4
    assert time.monotonic() - began < ENOUGH


def test_a_server_that_dies_ends_the_run():
    with running(by_prompt) as (url, _):
        reward = remote(url)
        ask(reward)
    with pytest.raises(RewardError, match=f"beauty at {url}, request 2: connection refused; gave"):
        ask(reward)


def test_patience_bounds_all_attempts_together():
    with running(says(b"", 503, {"Retry-After": "3600"})) as (url, server):
        with pytest.raises(
            RewardError, match=r"1 attempt in .* after 3600 s would exceed patience=1800 s"
        ):
            ask(remote(url, retries=9))
        assert len(server.bodies) == 1


def test_a_request_that_is_stopped_here_is_not_said_to_be_the_servers_fault(caplog):
    with running(hangs, scores(), hangs) as (url, _):
        with pytest.raises(RewardError, match="0 scores for 1 pictures"):
            ask(remote(url, batch=1, concurrency=4), 4)
        for thread in threading.enumerate():
            if thread.name == "reward":
                thread.join(ENOUGH)
    assert "asked again" not in caplog.text


def test_one_failure_ends_the_other_requests_at_once():
    began = time.monotonic()
    with running(hangs, scores(), hangs) as (url, _):
        with pytest.raises(RewardError, match="0 scores for 1 pictures"):
            ask(remote(url, batch=1, concurrency=4), 4)
        assert time.monotonic() - began < ENOUGH / 2
        left = [t for t in threading.enumerate() if t.name == "reward"]
        for thread in left:  # none of them stays in a read that nobody ends
            thread.join(ENOUGH)
            assert not thread.is_alive()


# -- who the server is -----------------------------------------------------------------------------

GREETINGS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "another protocol": ({"protocol": 2, **IDENTITY}, {}, "protocol 2, and this version 1"),
    "no protocol": (IDENTITY, {}, "protocol None"),
    "no version": ({"protocol": 1, "reward": "beauty"}, {}, "must name its reward and version"),
    "a number for a version": (
        {"protocol": 1, "reward": "beauty", "version": 7},
        {},
        "must name its reward and version",
    ),
    "another version": (
        {"protocol": 1, **IDENTITY},
        {"version": "6"},
        "beauty has version '7' there, and version='6' is asked for",
    ),
    "HTML": (HTML, {}, "no JSON: '<html>"),
    "a list for a declaration": (
        {"protocol": 1, **IDENTITY, "declaration": [1]},
        {},
        "declaration must be an object",
    ),
}


@pytest.mark.parametrize("name", GREETINGS)
def test_before_the_first_request_the_server_must_say_who_it_is(name):
    told, settings, message = GREETINGS[name]
    with running(by_prompt, health=says(told)) as (url, server):
        with pytest.raises(RewardError, match=f"reward {url}, health check: .*{message}"):
            ask(remote(url, **settings))
        assert not server.bodies


def test_the_version_that_is_asked_for_is_taken():
    with running(by_prompt) as (url, _):
        ask(remote(url, version="7"))


def test_the_declaration_is_the_servers_with_how_pictures_come_to_it():
    with running(by_prompt) as (url, _):
        declared = remote(url).declaration
        exact = remote(url, format="float32").declaration
    assert (declared.scale, declared.licence, declared.version) == ("0 to 10", "MIT", "7")
    assert declared.source == f"beauty at {url}"
    assert "8-bit PNG" in str(declared.preprocessing)
    assert "exact float32" in str(exact.preprocessing)


# -- pictures as text ------------------------------------------------------------------------------


def test_float32_comes_back_exactly_and_png_rounded_to_8_bits(generator):
    images = torch.rand(3, 3, 5, 7, generator=generator)
    exact = decode(json.loads(json.dumps(encode(images, "float32"))), "float32", limit=10**6)
    assert torch.equal(exact, images)
    rounded = decode(json.loads(json.dumps(encode(images, "png"))), "png", limit=10**6)
    assert torch.equal(rounded, (images * 255).round() / 255)


BROKEN: dict[str, tuple[Any, Any, str]] = {
    "no base64": ("png", ["***"], "picture 0 is no png: no base64"),
    "no PNG": ("png", ["AAAA"], "picture 0 is no png: UnidentifiedImageError"),
    "a number": ("png", [1], "picture 0 is no png: TypeError: base64 must be a string, got int"),
    "no shape": ("float32", [{"data": ""}], "picture 0 is no float32: KeyError: 'shape'"),
    "another size": ("float32", [{"shape": [3, 1, 1], "data": "AAAA"}], "of 3 bytes"),
    "a negative size": ("float32", [{"shape": [3, -1, -1], "data": 16 * "A"}], r"\[3, -1, -1\]"),
    "a grey one": ("float32", [{"shape": [1, 1, 3], "data": 16 * "A"}], r"must be \[3, h, w\]"),
    "a cut one": ("png", None, "picture 0 is no png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused(name):
    form, pictures, message = BROKEN[name]
    if pictures is None:
        pictures = [encode(torch.rand(1, 3, 64, 64), "png")[0][:400]]
    with pytest.raises(ValueError, match=message):
        decode(pictures, form, limit=10**6)


@pytest.mark.parametrize("form", ["png", "float32"])
def test_pictures_over_the_limit_are_refused_before_they_are_decoded(form):
    encoded = encode(torch.zeros(2, 3, 64, 64), form)
    decode(encoded, form, limit=2 * 12 * 64 * 64)
    with pytest.raises(ValueError, match=r"picture 1 .* more than 98303 bytes in float32"):
        decode(encoded, form, limit=2 * 12 * 64 * 64 - 1)


def test_pictures_of_two_sizes_are_refused():
    encoded = encode(torch.zeros(1, 3, 4, 4), "png") + encode(torch.zeros(1, 3, 4, 5), "png")
    with pytest.raises(ValueError, match=r"picture 1 is \[3, 4, 5\] and the first \[3, 4, 4\]"):
        decode(encoded, "png", limit=10**6)


# -- settings --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another scheme": ({"url": "ftp://127.0.0.1"}, "url must be such as http://127.0.0.1:8000"),
    "no scheme": ({"url": "127.0.0.1:8000"}, "url must be such as"),
    "no host": ({"url": "http://"}, "url must be such as"),
    "a port that is none": ({"url": "http://127.0.0.1:123456"}, "is no address"),
    "a password": ({"url": "http://me:secret@127.0.0.1"}, "no user name and no password"),
    "a query": ({"url": "http://127.0.0.1/?key=1"}, "url must be such as"),
    "timeout": ({"timeout": 0.0}, "timeout must be a positive number of seconds, got 0.0"),
    "timeout NaN": ({"timeout": float("nan")}, "timeout must be a positive"),
    "patience": ({"patience": float("inf")}, "patience must be a positive number"),
    "retries": ({"retries": -1}, "retries must be an integer of at least 0, got -1"),
    "concurrency": ({"concurrency": 0}, "concurrency must be an integer of at least 1, got 0"),
    "backoff": ({"backoff": -1.0}, "backoff must be a number of seconds of at least 0, got -1.0"),
    "batch": ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_are_refused_at_once_and_a_password_is_not_shown(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        Remote(**{"url": refused(), **settings})
    assert "secret" not in str(caught.value)


def test_settings_come_back_and_how_the_server_is_reached_may_differ():
    reward = Remote("http://127.0.0.1:8000", version="7", format="float32", timeout=5.0)
    assert rebuild(describe(reward)) == reward
    stored = {"reward": describe(reward), "options": {}}
    other = Remote("http://127.0.0.1:9", version="7", format="float32", retries=3)
    assert not differences(stored, {"reward": describe(other), "options": {}})
    rounded = {"reward": describe(Remote("http://127.0.0.1:9", version="7")), "options": {}}
    assert differences(stored, rounded) == [("reward.format", "float32", "png")]


def test_pictures_that_are_no_numbers_are_refused_before_anything_is_asked():
    with pytest.raises(ValueError, match="must have values in"):
        Remote(refused())(torch.full((1, 3, 2, 2), float("nan")), ["a cat"])
