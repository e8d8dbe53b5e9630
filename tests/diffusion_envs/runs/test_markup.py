"""Markup in whatever a run says of itself is text in its report and in its card."""

import ast
import html.parser
import json
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from diffusion_envs.runs import model_card
from diffusion_envs.runs.contact_sheet import grid, save
from diffusion_envs.runs.report import write_report

HOSTILE = (
    "<script>alert(1)</script>",
    '" onload="alert(1)',
    "' onerror='alert(1)",
    "</style><script src=//a.b></script>",
    "</title><img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "--><b>",
    "<![CDATA[<b>]]>",
    "&lt;script&gt;",
    "</td></tr></table><iframe src=file:///etc/passwd>",
    "javascript:alert(1)",
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
WORDS = st.one_of(
    st.sampled_from(HOSTILE), st.builds("{}{}{}".format, TEXT, st.sampled_from(HOSTILE), TEXT)
)


def estimate(mean: float) -> dict[str, Any]:
    return {"mean": mean, "standard_error": 0.1, "n": 8}


def compared() -> dict[str, Any]:
    return {"before": estimate(1.0), "after": estimate(2.0), "difference": estimate(1.0)}


def run_of(folder: Path, words: str, *, pictures: bool = True) -> Path:
    """A run in which every string that comes from outside is this one."""
    named = {"name": words, "class": "a:b", words: words, "group": 4}
    prompts = [words, {"prompt": words, "metadata": {words: words}}]
    config = {
        "settings": {
            "model": {"name": words, "model": words, "guidance": 3.0, "negative_prompt": words},
            "reward": named,
            "objective": named,
            "prompts": prompts,
            "options": {"judges": {words: named}, "evaluation_prompts": prompts},
            "seed": 0,
            "updates": 4,
            "size": {"samples": 4, words: words},
            "sampler": named,
        },
        "versions": {words: words},
        "commit": words,
    }
    summary = {
        "update": 4,
        "reward": compared(),
        "parts": {words: compared()},
        "judges": {words: compared()},
        "by_prompt": {words: compared()},
        "stop": {"reason": words, "update": 4, "false_stop_bound": 0.01},
        "over_optimisation": {"fallen": [words], "sentence": words},
        "over_optimisation_metrics": {f"judge_gain.{words}": estimate(1.0)},
        "frontier": {"sentences": [words], "fault": words, "kl": {}},
        "path_kl": estimate(1.0),
    }
    lines = [
        {
            "update": k,
            "reward": estimate(k),
            f"reward.{words}": estimate(k),
            f"reward_counts.{words}": k,
            f"a{words}": 1.0 * k,
            "groups_without_signal": 0.9,
            "reward_queries": k,
            "seconds": 1.0 * k,
        }
        for k in range(1, 5)
    ]
    over = [
        {"update": k, **{f"{part}.{words}": estimate(k) for part in ("judge_gain", "distance")}}
        for k in range(1, 4)
    ]
    by_prompt = [
        {
            "update": k,
            "prompt": [0, 1],
            "mean": [1.0, 2.0],
            "standard_error": [0.1, 0.1],
            "n": [2, 2],
        }
        for k in range(1, 5)
    ]
    folder.mkdir(parents=True)
    for name, content in (("config", config), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    logs = {"metrics": lines, "over_optimisation": over, "training_by_prompt": by_prompt}
    for name, log in logs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "samples").mkdir()
    for update in (0, 4) if pictures else ():
        save(grid(torch.zeros(2, 3, 4, 4), [words] * 2), folder / f"samples/step-{update:06d}.png")
    return folder


class Page(html.parser.HTMLParser):
    """Elements with the names of their attributes; declarations and comments too."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.seen: Counter[Any] = Counter()
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag, *sorted(name for name, _ in attrs)] += 1

    def handle_endtag(self, tag: str) -> None:
        self.seen["/" + tag] += 1

    def handle_comment(self, data: str) -> None:
        self.seen["!--"] += 1

    def unknown_decl(self, data: str) -> None:
        self.seen["!["] += 1

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(words: str) -> Page:
    with tempfile.TemporaryDirectory() as folder:
        return Page(write_report(run_of(Path(folder) / "run", words)).read_text("utf-8"))


PLAIN = page_of("plain")


@given(words=WORDS)
@example("".join(HOSTILE))
@settings(max_examples=6)
def test_no_element_or_attribute_of_a_report_comes_from_a_run(words):
    page = page_of(words)
    assert page.seen == PLAIN.seen
    assert not {tag for tag, *_ in page.seen if isinstance(tag, str)} & {"script", "iframe", "link"}
    shown = " ".join("".join(page.words).split())
    assert " ".join(words.split()) in shown  # and is read as it is


def test_a_report_fetches_nothing():
    with tempfile.TemporaryDirectory() as folder:
        source = write_report(run_of(Path(folder) / "run", "plain")).read_text("utf-8")
    assert "http" not in source.replace("http://www.w3.org", "")
    assert "url(" not in source


# -- the card --------------------------------------------------------------------------------------

MARKDOWN = (
    "![x](http://a.b/c.png)",
    "[click](javascript:alert(1))",
    "<http://a.b>",
    "`code`",
    "``` ",
    "# heading",
    "> quoted",
    "- item",
    "1. item",
    "---",
    "===",
    "a | b",
    "**bold** _thin_ ~~gone~~",
    "[a]: http://a.b",
    "\\",
    "\n\n# heading\n\n",
    '"); import os; os.system("',
    "$x$",
)
OF_CARD = st.one_of(
    WORDS,
    st.sampled_from(MARKDOWN),
    st.builds("{} {}".format, st.sampled_from(MARKDOWN), st.sampled_from(MARKDOWN)),
)
READ = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def structure(text: str) -> list[Any]:
    """What a reader of Markdown makes of a card, but for its words."""
    body = text.split("---\n", 2)[2]
    made = []
    for token in READ.parse(body):
        inside = [t.type for t in token.children or [] if t.type != "text"]
        made.append((token.type, token.tag, [t for t in inside if t != "softbreak"]))
    return made


def card_of(words: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        made = run_of(Path(folder) / "run", words, pictures=False)
        (made / "pytorch_lora_weights.safetensors").touch()
        return model_card.card(made)


def program(text: str) -> list[str]:
    """What the code of a card does, but for its strings."""
    code = next(token.content for token in READ.parse(text) if token.type == "fence")
    return [type(node).__name__ for node in ast.walk(ast.parse(code))]


@cache
def plain_card() -> tuple[list[Any], list[str]]:
    text = card_of("plain")
    return structure(text), program(text)


@given(words=OF_CARD)
@example("\n".join(MARKDOWN))
@settings(max_examples=10)
def test_nothing_of_a_card_but_its_words_comes_from_a_run(words):
    text = card_of(words)
    assert (structure(text), program(text)) == plain_card()
