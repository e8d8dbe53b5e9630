"""A judge's answers: read robustly, asked again, cached by content; its key is shown nowhere."""

import base64
import io
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_envs.rewards import RewardError, VLMJudge, registry, score
from diffusion_envs.runs.settings import describe, differences, rebuild
from tests.diffusion_envs.rewards.servers import (
    Behaviour,
    Handler,
    drops,
    hangs,
    refused,
    running,
    says,
)

KEY = "sk-secret-0123456789"
KEEP: Any = {"retries": 2, "backoff": 0.01, "concurrency": 1, "model": "qwen"}


@pytest.fixture(autouse=True)
def _no_key_of_ours(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def completion(text: Any, model: str = "qwen-7b", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, **more}
    return {"id": "1", "object": "chat.completion", "model": model, "choices": [choice]}


def text(content: Any, **more: Any) -> Behaviour:
    return says(completion(content, **more))


def rated(number: Any) -> Behaviour:
    return text(json.dumps({"score": number}))


def redness(handler: Handler, body: bytes) -> None:
    """Ten times the red of the picture, which has to come through whole."""
    url = json.loads(body)["messages"][0]["content"][1]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    rated(float(pixels[..., 0].mean() / 25.5))(handler, body)


def pictures(*reds: float) -> Tensor:
    """One of each red."""
    images = torch.zeros(len(reds), 3, 4, 6)
    images[:, 0] = torch.tensor(reds)[:, None, None]
    return images


def judge(url: str, **settings: Any) -> VLMJudge:
    return VLMJudge(f"{url}/v1", **KEEP | settings)


def rate(reward: VLMJudge, *reds: float, prompt: str = "a cat") -> list[float]:
    return score(reward, pictures(*reds), [prompt] * len(reds)).tolist()


# -- what is asked ---------------------------------------------------------------------------------


def test_the_picture_the_question_and_the_form_of_the_answer_are_sent():
    with running(rated(7)) as (url, server):
        assert rate(judge(url, scale=(1.0, 7.0)), 1.0, prompt='a "{}" cat') == [7.0]
    asked = json.loads(server.bodies[0])
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("qwen", 0, 256)
    words, image = asked["messages"][0]["content"]
    assert 'show "a "{}" cat"' in words["text"]
    assert "from 1 (" in words["text"]
    assert "to 7 (" in words["text"]
    assert image["type"] == "image_url"
    form = asked["response_format"]["json_schema"]
    assert form["strict"] is True
    assert form["schema"]["properties"] == {
        "score": {"type": "number", "minimum": 1.0, "maximum": 7.0}
    }


def test_fields_can_be_added_and_left_out():
    extra = {"max_tokens": None, "max_completion_tokens": 9, "seed": 1}
    with running(rated(7)) as (url, server):
        rate(judge(url, extra=extra), 1.0)
    asked = json.loads(server.bodies[0])
    assert "max_tokens" not in asked
    assert (asked["max_completion_tokens"], asked["seed"]) == (9, 1)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_ratings_come_in_order(concurrency):
    reds = [k / 5 for k in range(6)]
    with running(redness) as (url, _):
        found = rate(judge(url, concurrency=concurrency), *reds)
    assert found == pytest.approx([10 * red for red in reds], abs=1e-6)  # of 8 bits, exact here


# -- what is answered ------------------------------------------------------------------------------

READABLE: dict[str, Any] = {
    "an integer": '{"score": 7}',
    "spaces": ' \n{ "score" : 7.0 }\n',
    "a fence": '```json\n{"score": 7}\n```',
    "a thought": '<think>It could be {"score": 3}, or {}.</think>\n{"score": 7}',
    "more than asked for": '{"reason": "a cat", "score": 7}',
    "parts": [{"type": "text", "text": '{"score"'}, {"type": "text", "text": ": 7}"}],
}
UNREADABLE: dict[str, tuple[Any, str]] = {
    "prose": ("Seven, I should say.", "no JSON object with a score, but 'Seven, I should say.'"),
    "a bare number": ("7", "no JSON object with a score"),
    "another name": ('{"rating": 7}', "no JSON object with a score"),
    "cut off": ('{"score": ', "no JSON object with a score"),
    "above": ('{"score": 10.5}', "no score from 0 to 10, but"),
    "below": ('{"score": -1}', "no score from 0 to 10, but"),
    "NaN": ('{"score": NaN}', "no score from 0 to 10, but"),
    "null": ('{"score": null}', "no score from 0 to 10, but"),
    "a word": ('{"score": "7"}', "no score from 0 to 10, but"),
    "a truth value": ('{"score": true}', "no score from 0 to 10, but"),
    "nothing": ("", "no text, but ''"),
    "no text": (None, "no text, but None"),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_number_is_read_however_it_is_wrapped(name):
    with running(text(READABLE[name])) as (url, _):
        assert rate(judge(url), 1.0) == [7.0]


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_rating_is_asked_again(name):
    wrong = text(UNREADABLE[name][0])
    with running(wrong, wrong, rated(4)) as (url, _):
        reward = judge(url)
        assert rate(reward, 1.0) == [4.0]
    assert reward.counts == {"asked": 1, "cached": 0, "repeated": 2, "retried": 0}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_stays_no_rating_ends_the_run(name):
    wrong, message = UNREADABLE[name]
    with running(rated(4), text(wrong)) as (url, server):
        reward = judge(url)
        with pytest.raises(
            RewardError,
            match=rf"judge qwen at {url}/v1, request 4: {message}.*, when asked about 'a cat' for "
            r"the 3\. time; .* more than max_tokens=256",
        ):
            rate(reward, 1.0, 0.5)
    assert len(server.bodies) == 4


WRONG: dict[str, tuple[Behaviour, str]] = {
    "no choices": (says({"model": "qwen-7b", "choices": []}), r"without choices\[0\]"),
    "an error as an answer": (says({"error": "no such model"}), r"without choices\[0\].*no such"),
    "HTML": (says(b"<html>"), "no JSON: '<html>'"),
    "another model": (
        text('{"score": 1}', model="qwen-72b"),
        "answered by model 'qwen-72b', but it began with 'qwen-7b'",
    ),
    "an unknown model": (says({"error": "?"}, 404), "status 404.*is url the address"),
    "no credit": (says({"error": "pay"}, 402), "status 402: .*pay"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_answer_of_the_model_ends_the_run_at_once(name):
    behaviour, message = WRONG[name]
    with running(rated(4), behaviour) as (url, server):
        reward = judge(url)
        with pytest.raises(RewardError, match=f"judge qwen at {url}/v1, request 2: .*{message}"):
            rate(reward, 1.0, 0.5)
    assert len(server.bodies) == 2


def test_transport_is_that_of_other_servers():
    with running(says(b"", 429, {"Retry-After": "0"}), drops, hangs, rated(4)) as (url, _):
        reward = judge(url, retries=3, timeout=0.3)
        assert rate(reward, 1.0) == [4.0]
    assert reward.counts["retried"] == 3


# -- the cache -------------------------------------------------------------------------------------


def test_no_picture_is_asked_about_twice():
    with running(redness) as (url, server):
        reward = judge(url)
        first = rate(reward, 0.2, 0.4, 0.2)
        assert rate(reward, 0.4, 0.2, 0.6)[:2] == first[1::-1]
        assert reward.counts == {"asked": 3, "cached": 3, "repeated": 0, "retried": 0}
        rate(reward, 0.2, prompt="a dog")
    assert len(server.bodies) == 4


def test_answers_on_disk_are_read_by_other_processes(tmp_path):
    with running(redness) as (url, server):
        first = rate(judge(url, cache=tmp_path), 0.2, 0.4)
        again = judge(refused(), cache=tmp_path)
        assert rate(again, 0.4, 0.2) == first[::-1]
        assert again.counts["cached"] == 2
        assert len(server.bodies) == 2
        for other in ({"model": "llava"}, {"scale": (0.0, 20.0)}, {"question": "How red is it?"}):
            rate(judge(url, cache=tmp_path, **other), 0.2)
    assert len(server.bodies) == 5
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert all(path.suffix == ".json" for path in files)


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    with running(rated(4), rated(5), says(b"", 500)) as (url, _):
        reward = judge(url, cache=tmp_path)
        with pytest.raises(RewardError, match=r"request 3: .* status 500"):
            rate(reward, 0.2, 0.4, 0.6)
    with running(rated(6)) as (url, server):
        assert rate(judge(url, cache=tmp_path), 0.2, 0.4, 0.6) == [4.0, 5.0, 6.0]
    assert len(server.bodies) == 1


@pytest.mark.parametrize("content", ["", '{"score": ', "[]", '{"score": 99}', '{"rating": 1}'])
def test_a_damaged_answer_is_asked_for_again(content, tmp_path):
    with running(rated(4), rated(5)) as (url, _):
        rate(judge(url, cache=tmp_path), 0.2)
        (file,) = tmp_path.rglob("*.json")
        file.write_text(content)
        assert rate(judge(url, cache=tmp_path), 0.2) == [5.0]
        assert json.loads(file.read_text())["score"] == 5.0


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with running(rated(4)) as (url, _):
        reward = judge(url, cache=tmp_path / "file")
        with pytest.raises(RewardError, match=r"cache .*file cannot be written: "):
            rate(reward, 0.2)


WRITER = """
import sys
import torch
from pathlib import Path
from diffusion_envs.rewards import VLMJudge
judge = VLMJudge(sys.argv[1], model="qwen", cache=Path(sys.argv[2]), backoff=0.01)
images = torch.arange(24.0)[:, None, None, None].expand(24, 3, 4, 6) / 24
print(judge(images, ["a cat"] * 24).sum().item())
"""


@pytest.mark.slow
def test_several_processes_share_a_folder(tmp_path):
    with running(redness) as (url, _):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, f"{url}/v1", str(tmp_path)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[3],
            )
            for _ in range(2)
        ]
        first, second = (process.communicate(timeout=120)[0] for process in started)
    assert first == second != ""
    assert len(list(tmp_path.rglob("*.json"))) == 24
    assert not list(tmp_path.rglob("*.partial"))


# -- the key ---------------------------------------------------------------------------------------


def test_the_key_goes_to_the_endpoint_and_nowhere_else(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    leaking = says({"error": f"Incorrect API key provided: {KEY}"}, 503)
    denied = says({"error": f"Incorrect API key provided: {KEY}"}, 401)
    with running(leaking, denied) as (url, server), caplog.at_level(logging.DEBUG):
        reward = judge(url, cache=tmp_path)
        with pytest.raises(
            RewardError,
            match=r"status 401: .*provided: \*\*\*.*the environment variable OPENAI_API_KEY holds",
        ) as caught:
            rate(reward, 0.2)
    assert server.keys == [f"Bearer {KEY}"] * 2
    told = [str(caught.value), repr(caught.value.__cause__), caplog.text, repr(reward)]
    told += [json.dumps(describe(reward)), str(reward.declaration)]
    assert "***" in caplog.text
    assert not any(KEY in words for words in told)


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with running(rated(4)) as (url, server):
        rate(judge(url), 0.2)
        rate(judge(url, api_key_variable="MY_KEY"), 0.2)
    assert server.keys == [None, f"Bearer {KEY}"]


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(RewardError, match="OPENAI_API_KEY holds what no key holds") as caught:
        rate(judge(refused()), 0.2)
    assert KEY not in str(caught.value)


# -- settings --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a scale upside down": ({"scale": (10.0, 0.0)}, "the lower first"),
    "an endless scale": ({"scale": (0.0, float("inf"))}, "two numbers"),
    "no model": ({"model": ""}, "model must name"),
    "an unknown brace": ({"question": "{picture}?"}, r"\{prompt\}, \{low\} and \{high\}.*picture"),
    "a lone brace": ({"question": "{"}, "other braces twice"),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    "no retries": ({"retries": -1}, "retries must be an integer of at least 0"),
    "a password": ({"url": "http://me:secret@127.0.0.1/v1"}, "no password"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_are_refused_at_once(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        VLMJudge(**{"url": refused(), "model": "qwen"} | settings)


def test_settings_come_back_and_where_it_runs_may_differ(tmp_path):
    reward = judge("http://127.0.0.1:8000", cache=tmp_path, extra={"seed": 1}, scale=(1.0, 5.0))
    assert rebuild(describe(reward)) == reward
    elsewhere = judge("http://127.0.0.1:9", extra={"seed": 1}, scale=(1.0, 5.0))
    stored = json.loads(json.dumps({"reward": describe(reward)}))
    assert not differences(stored, json.loads(json.dumps({"reward": describe(elsewhere)})))
    other = {"reward": describe(judge("http://127.0.0.1:9", extra={"seed": 1}))}
    changed = differences(stored, json.loads(json.dumps(other)))
    assert {name for name, _, _ in changed} == {"reward.scale"}


def test_a_command_line_names_it_by_model_and_url():
    made = registry.make(("vlm-judge",), {"vlm-judge": "org/qwen@7b@http://127.0.0.1:8000/v1"})
    assert made == VLMJudge("http://127.0.0.1:8000/v1", model="org/qwen@7b")
    assert registry.name_of(made) == "vlm-judge"
    for place in ("http://127.0.0.1:8000/v1", "@http://127.0.0.1:8000/v1", "qwen"):
        with pytest.raises(ValueError, match=f"MODEL@URL, got '{place}'"):
            registry.make(("vlm-judge",), {"vlm-judge": place})


def test_pictures_of_any_thread_are_counted_once():
    with running(redness) as (url, _):
        reward = judge(url, concurrency=4)
        threads = [
            threading.Thread(target=rate, args=(reward, *(k / 40 + j / 8 for j in range(4))))
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert reward.counts["asked"] + reward.counts["cached"] == 16
