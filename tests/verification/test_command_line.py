"""``python -m verification``: selections, exit codes, what it writes."""

import html.parser
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from verification import __main__ as command
from verification import claim, document, report
from verification.__main__ import Options, UnknownClaimError, chosen, main
from verification.claims import CLAIMS
from verification.margins import picture, rejected

NAMES = ("right", "edge", "wrong")
QUICK = "proof-of-the-policy-gradient"


def test_nothing_chosen_is_everything():
    assert chosen(()) == list(CLAIMS)


def test_names_and_patterns_choose():
    assert chosen((QUICK,)) == [QUICK]
    proofs = chosen(("proof-*",))
    assert len(proofs) >= 9
    assert proofs == [name for name in CLAIMS if name.startswith("proof-")]
    assert chosen((QUICK, "proof-*")) == proofs


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownClaimError, match="did you mean"):
        chosen(("path-lk",))
    with pytest.raises(UnknownClaimError, match="see --list"):
        chosen(("zzzzzz",))


def test_an_unknown_name_is_an_error(tmp_path, capsys):
    assert main(Options(names=("path-lk",), output=tmp_path)) == 2
    assert "did you mean" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_empty_selection_is_an_error(tmp_path, capsys):
    """Symbols have no precision, so in float32 nothing is left of a proof."""
    assert main(Options(names=(QUICK,), precision="float32", output=tmp_path)) == 2
    assert "no claim is left" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert main(Options(names=(QUICK,), device="cuda", output=tmp_path)) == 2
    assert "cuda" in capsys.readouterr().out


def test_a_run_says_what_it_did(tmp_path, capsys):
    page = tmp_path / "verification.md"
    output = tmp_path / "run"
    assert main(Options(claim=(QUICK,), output=output, document=page)) == 0
    out = capsys.readouterr().out
    assert "1 of 1 claims hold" in out
    assert "score over std" in out  # one claim alone shows its variants
    record = json.loads((output / "verification.json").read_text())
    assert record["holds"] is True
    (one,) = record["claims"]
    assert one["name"] == QUICK
    assert {"deviation", "tolerance", "verdict", "route"} <= set(one["checks"][0])
    assert all(wrong["rejected"] and wrong["by"] for wrong in one["mistakes"])
    assert one["mistakes"][0]["edits"][0]["right"] != one["mistakes"][0]["edits"][0]["wrong"]
    assert QUICK in page.read_text()


def test_the_document_may_not_overwrite_the_record(tmp_path, capsys):
    options = Options(claim=(QUICK,), output=tmp_path, document=tmp_path / "verification.md")
    assert main(options) == 2
    assert "choose another folder" in " ".join(capsys.readouterr().out.split())


def test_a_claim_that_fails_is_shown_and_named(tmp_path, capsys, monkeypatch):
    def wrong(setting):
        yield claim.pathwise("one", [1.01], [1.0])

    broken = replace(CLAIMS[QUICK], body=wrong)
    monkeypatch.setitem(CLAIMS, QUICK, broken)
    line = command.tolerances.Tolerance("pathwise", 0.0, 1e-2, "v", 1e-9)
    monkeypatch.setattr(command.tolerances, "load", lambda: {"float64": {QUICK: {"one": line}}})
    assert main(Options(claim=(QUICK,), output=tmp_path)) == 1
    out = capsys.readouterr().out
    assert "0 of 1 claims hold" in out
    assert "fail: one: 1.0e-02" in out
    page = (tmp_path / "report.html").read_text()
    assert "1 of 1 claims do not hold" in page


def test_too_few_samples_are_inconclusive_with_the_number_that_would_do(
    tmp_path, capsys, monkeypatch
):
    import torch

    def body(setting):
        stream = (torch.randn(64, dtype=torch.float64) for _ in range(10**6))
        yield claim.sampled("mean", stream, 0.0, variance=1.0, scale=1.0)

    monkeypatch.setitem(CLAIMS, QUICK, replace(CLAIMS[QUICK], body=body))
    line = command.tolerances.Tolerance("sampled", 0.0, 0.1, "v", 0.05)
    monkeypatch.setattr(command.tolerances, "load", lambda: {"float64": {QUICK: {"mean": line}}})
    assert main(Options(claim=(QUICK,), output=tmp_path, most=500)) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "inconclusive: mean" in out
    assert "samples would decide" in out


class Balance(html.parser.HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


RECORD = {
    "versions": {"python": "3"},
    "precision": "float64",
    "device": "cpu",
    "threads": 1,
    "full": True,
    "seed": 0,
    "false_fail": 1e-6,
    "false_pass": 1e-6,
    "seconds": 1.0,
    "holds": False,
    "claims": [
        {
            "name": "one",
            "title": "One.",
            "theme": "ones",
            "statement": "a < b & c",
            "source": "s",
            "file": "f.py",
            "why_double": None,
            "verdict": "fail",
            "holds": False,
            "seconds": 0.1,
            "error": "<Error>",
            "checks": [
                {
                    "name": "x < y",
                    "route": "limit",
                    "verdict": "fail",
                    "deviation": "nan",
                    "tolerance": 0.1,
                    "found": "nan",
                    "claimed": 1.0,
                    "count": 2,
                    "curve": [[0.1, 0.2], [0.05, 0.1], [0.025, 0.0]],
                },
                {
                    "name": "mean",
                    "route": "sampled",
                    "verdict": "inconclusive",
                    "deviation": 0.0,
                    "tolerance": None,
                    "found": 0.0,
                    "claimed": 0.0,
                    "count": 1,
                    "n": 10,
                    "log_evidence": [0.0, 0.0, 0.0],
                    "needed": 99,
                    "note": "few",
                },
            ],
            "mistakes": [
                {
                    "name": "w",
                    "rejected": False,
                    "by": "x < y",
                    "deviations": {"x < y": "inf"},
                    "note": "",
                    "edits": [{"target": "m.f", "right": "a < b", "wrong": "a > b"}],
                },
                {
                    "name": "r",
                    "rejected": True,
                    "by": "",
                    "deviations": {},
                    "note": "refused with ValueError: <no>",
                    "edits": [{"target": "m.f", "right": "a", "wrong": "b"}],
                },
            ],
        }
    ],
}


def test_the_page_is_whole_whatever_happened():
    page = report.page(RECORD)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    for words in ("x &lt; y", "&lt;Error&gt;", "a &lt; b &amp; c", "accepted", "99 samples"):
        assert words in page
    assert "<script" not in page


def test_the_document_is_markdown_with_every_claim(tmp_path):
    document.write(RECORD, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "## Ones\n\n### one\n" in text
    assert "<td>x &lt; y</td><td>limit</td><td>nan</td><td>1</td><td>nan</td>" in text
    assert "**does not hold.**" in text
    assert "(page.svg)" in text
    (one,) = json.loads((tmp_path / "page.json").read_text())["claims"]
    assert one["checks"][0] == {
        "name": "x < y",
        "route": "limit",
        "deviation": "nan",
        "tolerance": 0.1,
        "rejected": 1e6,
    }
    assert [m["by"] for m in one["mistakes"]] == ["x < y", ""]


def test_the_picture_has_a_mark_for_each_number():
    check = {"name": "a", "deviation": 1e-16, "tolerance": 1e-9}
    mistakes = [{"deviations": {"a": size}} for size in (1e-3, "nan", 1e-12)]
    assert rejected(check, mistakes) == 1e-3
    assert rejected(check, mistakes[2:]) is None
    claims = [{"theme": theme, "checks": [check], "mistakes": mistakes} for theme in "vu"]
    drawn = picture({"claims": claims})
    Balance().feed(drawn)
    marks = {name: re.findall(rf"class='{name}' d='((?:M[^']*?)+)' fill", drawn) for name in NAMES}
    assert {name: d[0].count("M") for name, d in marks.items()} == dict.fromkeys(NAMES, 2)
    heights = [float(re.search(r" (\d+)h", marks[name][0])[1]) for name in NAMES]
    assert heights == sorted(heights, reverse=True)  # right code lowest, mistakes highest
    assert drawn.index(">u<") < drawn.index(">v<")
    assert picture({"claims": []}) == ""


def test_places_on_the_axis_increase_and_stay_on_it():
    places = [report._place(v) for v in (0.0, 1e-17, 1e-16, 1e-8, 1.0, 1e9, "inf", "nan")]
    assert places == sorted(places)
    assert places[0] == 0
    assert math.isclose(places[-1], 100)


def test_the_quick_run_and_the_readme_agree_on_the_command():
    root = Path(command.__file__).parent.parent
    assert "make verify" in (root / "README.md").read_text()
