import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ctrl import Estimate
from diffusion_envs.runs import charts, plots
from diffusion_envs.runs.contact_sheet import grid, save
from diffusion_envs.runs.plots import decimals
from diffusion_envs.runs.prompt_statistics import training_by_prompt
from diffusion_envs.runs.report import write_report
from diffusion_envs.runs.report_pictures import within
from diffusion_envs.runs.summary import extremes

PARTS = ("summary.json", "metrics.jsonl", "over_optimisation.jsonl", "samples", "transfer.json")
VOID = {"meta", "img", "br", "hr", "link", "input"}
AXES = ("updates", "reward queries", "network calls", "minutes")


def estimate(mean, error):
    return {"mean": mean, "standard_error": error, "n": 48}


def make_run(folder):
    """A made-up run with every part, and a name that HTML would misread."""
    folder.mkdir(parents=True)
    settings = {"model": "tiny", "reward": {"name": "Jpeg<b>", "quality": 95}, "prompts": ["a & b"]}
    config = {"settings": settings, "versions": {"torch": "2.6.0"}, "commit": "abc123"}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {
        "reward": {
            "before": estimate(-1.2034, 0.0213),
            "after": estimate(-0.7121, 0.0187),
            "difference": estimate(0.4913, 0.0206),
        },
        "judges": {
            name: {
                "before": estimate(1.5, 0.2),
                "after": estimate(1.1, 0.2),
                "difference": estimate(-0.41, 0.11),
            }
            for name in ("judge", "clarity")
        },
        "path_kl": estimate(1.4213, 0.0834),
        "by_prompt": {
            "a <cat>": {
                "before": estimate(-1.3, 0.05),
                "after": estimate(-1.1, 0.04),
                "difference": estimate(0.2, 0.03),
            },
            "a dog": {
                "before": estimate(-1.1, 0.05),
                "after": estimate(-0.3, 0.04),
                "difference": estimate(0.8, 0.05),
            },
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {
            "update": k,
            "reward": estimate(-1.2 + 0.1 * k, 0.03),
            "path_kl": estimate(0.2 * k, None),
            "reward_queries": 32 * k,
            "network_calls": 2560 * k,
            "seconds": 70.5 * k,
            "gradient_norm": 0.5 / k,
            "clipped_fraction": 0.0 if k < 3 else 0.1,
            "value_loss": None if k == 1 else 0.3 / k,
            "loss_of_its_own": 3.0,
            "memory": 2**30,
        }
        for k in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = [
        {
            "update": k,
            "reward_gain": estimate(0.1 * k, 0.02),
            "judge_gain.cla<rity": estimate(0.3 - 0.1 * k, 0.02),
            "judge_std.cla<rity": estimate(0.2, 0.01),
            "distance.pixels": estimate(0.05 * k, 0.001),
        }
        for k in (2, 3, 4)
    ]
    (folder / "over_optimisation.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in measured)
    )
    (folder / "samples").mkdir()
    for update in (0, 3, 5):
        picture = grid(torch.full((2, 3, 8, 8), update / 5), ["a <cat>", "猫 😀"])
        save(picture, folder / "samples" / f"step-{update:06d}.png")
    rows = [
        {
            "sampler": name,
            "steps": steps,
            "before": estimate(-1.2, 0.02),
            "after": estimate(-0.9, 0.02),
            "difference": estimate(0.3, 0.021),
        }
        for name in ("DDIM(eta=1)", "DDIM(eta=0)")
        for steps in (25, 10)
    ]
    (folder / "transfer.json").write_text(json.dumps(rows))
    return folder


def remove(path):
    if path.is_dir():
        for child in path.iterdir():
            child.unlink()
        path.rmdir()
    else:
        path.unlink()


class Page(HTMLParser):
    """Tags with attributes, text, and a check that every tag is closed where it should be."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.cells, self._open = [], [], [], []
        self.feed(source)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        data = data.replace("\N{MINUS SIGN}", "-")
        if self._open and self._open[-1] != "style":
            self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.cells.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def curves(self):
        """What the charts in the page show, in words."""
        return [svg["aria-label"].replace("\N{MINUS SIGN}", "-") for svg in self.all("svg")]


def read(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read(make_run(tmp_path_factory.mktemp("runs") / "my <run>"))


def test_headline_numbers_have_their_standard_errors(page):
    rows = " | ".join(page.cells)
    gain = "-1.203 ± 0.021 | -0.712 ± 0.019 | +0.491 ± 0.021 | +23.8 | 48"
    assert f"reward | {gain}" in rows
    assert "judge: clarity | 1.50 ± 0.20 | 1.10 ± 0.20 | -0.41 ± 0.11 | -3.7 | 48" in rows
    assert "judge | 1.50" in rows
    assert "path KL 1.421 ± 0.083 nats away from the pretrained model" in page.text


def marks(folder, change=lambda summary: None):
    """The classes of the headline's numbers, after a change of the summary."""
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    return [b.get("class") for b in read(folder).all("b") if b.get("class")]


def scaled(summary, errors):
    """Every difference at so many standard errors."""
    for part in (summary["reward"], *summary["judges"].values()):
        part["difference"]["standard_error"] = abs(part["difference"]["mean"] / errors)


def risen(summary):
    """The judges have risen, too."""
    for part in summary["judges"].values():
        part["difference"]["mean"] = 0.41


def test_a_fall_is_marked_beyond_three_standard_errors(tmp_path):
    folder = make_run(tmp_path / "run")
    assert marks(folder) == ["bad", "bad"]  # and the reward, that rose, is not marked as good
    assert marks(folder, lambda summary: scaled(summary, 2.9)) == []


def test_a_gain_is_marked_as_good_only_where_nothing_speaks_against_it(tmp_path):
    folder = make_run(tmp_path / "run")
    assert marks(folder, risen) == ["good", "good", "good"]
    assert marks(folder, lambda summary: scaled(summary, 2.9)) == []
    scales = [
        lambda summary: summary.update(path_kl=estimate(116.0, 3.0)),
        lambda summary: summary.update(path_kl=estimate(1.0, 0.1)),
        lambda summary: summary.update(
            over_optimisation={"fallen": ["pictures"], "since": 3, "sentence": "Lost."}
        ),
    ]
    marks(folder, lambda summary: scaled(summary, 9.0))
    assert [len(marks(folder, change)) for change in scales] == [0, 3, 0]


def test_the_path_kl_stands_beside_the_gain_and_the_verdict_before_all_numbers(page):
    gain = "+0.491 ± 0.021 +23.8 standard errors, at a path KL of 1.421 ± 0.083 nats"
    assert f"reward, paired gain {gain}" in page.text
    assert page.text.index("Over-optimisation: since update 4") < page.text.index("paired gain")


def test_whatever_an_update_logs_is_drawn_once_against_updates(page):
    axes = dict.fromkeys(("gradient norm", "clipped fraction", "value loss"), ("updates",))
    axes |= {"loss_of_its_own": ("updates",), "reward": AXES, "path KL (nats)": AXES}
    for quantity, expected in axes.items():
        start = f"{quantity} of the training samples against "
        drawn = [words.removeprefix(start) for words in page.curves if words.startswith(start)]
        assert tuple(words.split(":")[0] for words in drawn) == expected, quantity
    assert not any(words.startswith(("memory", "seconds")) for words in page.curves)
    start = "reward of the training samples against updates: from -1.100 ± 0.030 to"
    assert any(words.startswith(start) for words in page.curves)
    start = "clipped fraction of the training samples against updates: from 0 to 0.1"
    assert any(words.startswith(start) for words in page.curves)


def test_one_axis_is_shown_at_a_time_and_the_buttons_need_no_script(page):
    assert [label["for"] for label in page.all("label")] == [f"axis-{k}" for k in range(4)]
    buttons = page.all("input")
    assert [button["id"] for button in buttons] == [f"axis-{k}" for k in range(4)]
    assert [k for k, button in enumerate(buttons) if "checked" in button] == [0]
    assert [
        tag["class"] for tag in page.all("div") if tag.get("class", "").startswith("panel")
    ] == [f"panel axis-{k}" for k in range(4)]
    assert all(f" {axis} " in page.text for axis in AXES)


def test_what_had_been_spent_stands_beside_what_was_reached(page):
    assert "5 updates · 160 reward queries · 12,800 network calls · 5 min 52 s" in page.text
    rows = " | ".join(page.cells)
    heads = "after update | reward queries | network calls | time | reward | path KL (nats)"
    assert f"{heads} | 1 | 32 | 2,560 | 1 min 10 s | -1.100 ± 0.030 | 0.2 | 2 | 64" in rows
    assert "5 | 160 | 12,800 | 5 min 52 s | -0.700 ± 0.030 | 1" in rows


@pytest.mark.parametrize("updates", [1, 2])
def test_one_or_two_points_are_a_table_and_no_chart(tmp_path, updates):
    folder = make_run(tmp_path / "run")
    for name, kept in (("metrics.jsonl", updates), ("over_optimisation.jsonl", updates)):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:kept]))
    page = read(folder)
    assert not [words for words in page.curves if not words.startswith(("reward of", "path KL"))]
    assert len(page.curves) == (0 if updates == 1 else 8)
    rows = " | ".join(page.cells)
    first = "of the training samples | update 1 | gradient norm | 0.5"
    second = "of the training samples | update 1 | update 2 | gradient norm | 0.5 | 0.25"
    assert (first if updates == 1 else second) in rows
    assert "gain of judge: cla<rity | 0.100 ± 0.020" in rows


def test_rewards_are_shown_by_prompt_largest_gain_first(page):
    rows = " | ".join(page.cells)
    dog = "a dog | -1.100 ± 0.050 | -0.300 ± 0.040 | +0.800 ± 0.050 | +16.0 | 48"
    assert f"{dog} | a <cat> | -1.300 ± 0.050 | -1.100 ± 0.040 | +0.200 ± 0.030 | +6.7" in rows
    assert "All 2 prompts" not in page.text


def test_many_prompts_are_folded_and_none_are_no_table(tmp_path):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    one = summary["by_prompt"]["a dog"]
    summary["by_prompt"] = {f"prompt {k}": one for k in range(13)}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = read(folder)
    assert len(page.all("details")) == 1 + 2  # and settings, versions
    assert "All 13 prompts" in page.text
    assert "prompt 12" in page.text
    del summary["by_prompt"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Reward by prompt" not in read(folder).text


def test_of_many_prompts_those_at_both_ends_are_shown_and_all_are_in_a_file():
    def line(k):
        gain = estimate((k * 7919 % 10_000) / 10_000, 0.01)
        return {"prompt": f"prompt {k}", "before": gain, "after": gain, "difference": gain}

    shown = extremes([line(k) for k in range(10_000)])
    assert [round(10_000 * told["difference"]["mean"]) for told in shown.values()] == [
        *range(9999, 9989, -1),
        *range(9, -1, -1),
    ]
    assert len(extremes([line(k) for k in range(20)])) == 20


def test_the_report_says_how_many_prompts_it_does_not_show(tmp_path):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text()) | {"prompts": 10_000}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "The 1 largest and the 1 smallest gains of 10,000 prompts" in read(folder).text


def test_training_by_prompt_compares_earlier_with_later_samples(generator):
    rewards = torch.randn(6, 5, dtype=torch.float64, generator=generator)  # updates, samples
    lines = [
        {"update": k + 1, "prompt": [3], "mean": [e.mean], "n": [5]}
        | {"standard_error": [e.standard_error]}
        for k, e in enumerate(Estimate.of(row) for row in rewards)
    ]
    lines[0] |= {"prompt": [3, 4], "mean": [lines[0]["mean"][0], 1.0], "n": [5, 1]}
    lines[0]["standard_error"] += [None]  # of prompt 4, which the later half has not
    (told,) = training_by_prompt(lines)
    halves = Estimate.of(rewards[:3].flatten()), Estimate.of(rewards[3:].flatten())
    for one, other in zip((told.earlier, told.later), halves, strict=True):
        assert (told.prompt, one.n) == (3, other.n)
        assert one.mean == pytest.approx(other.mean, rel=1e-12)
        assert one.standard_error == pytest.approx(other.standard_error, rel=1e-12)
    assert told.difference.mean == pytest.approx(halves[1].mean - halves[0].mean, rel=1e-12)


def test_training_rewards_are_shown_by_prompt_with_their_columns(tmp_path):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["prompts"] = ["a & b", {"prompt": "a sign", "metadata": {"word": "é<"}}]
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"update": k, "prompt": [0, 1], "mean": [0.5, 0.1 * k], "standard_error": [0.1, 0.1]}
        | {"n": [4, 4]}
        for k in (1, 2)
    ]
    path = folder / "training_by_prompt.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = " | ".join(read(folder).cells)
    assert 'a sign {"word": "é<"} | 0.10 ± 0.10 | 0.20 ± 0.10 | +0.10 ± 0.14 | 4 and 4' in rows


def pictures(page):
    """The first pixel of every picture of a sample, in their order."""
    sources = [image["src"] for image in page.all("img")]
    data = [s.split(",")[1] for s in sources if s.startswith("data:image/png;base64,")]
    return [Image.open(io.BytesIO(base64.b64decode(d))).getpixel((0, 0))[0] for d in data]


def test_before_and_after_stand_side_by_side_with_their_prompt_as_text(page):
    assert pictures(page) == [0, 255, 0, 255]
    assert "Before and after The same prompts and seeds: before on the left" in page.text
    assert "after 5 updates on the right. a <cat> 猫 😀" in page.text


def test_sheets_of_an_earlier_version_are_shown_whole(tmp_path):
    folder = make_run(tmp_path / "run")
    for path in (folder / "samples").iterdir():
        with Image.open(path) as sheet:
            sheet.load()
            sheet.info.clear()
            sheet.save(path)  # without its text
    shown = [i["src"] for i in read(folder).all("img") if i["src"].startswith("data:image/png")]
    for source, step in zip(shown, ("000000", "000005"), strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert data == (folder / "samples" / f"step-{step}.png").read_bytes()


@pytest.mark.parametrize("name", ["step-000000.png", "step-000005.png"])
def test_a_damaged_picture_is_told_and_left_out(name, tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    path = folder / "samples" / name
    path.write_bytes(path.read_bytes()[:-40])
    shown = pictures(read(folder))
    assert shown == ([255, 255] if name == "step-000000.png" else [0, 0])
    assert f"{path} is damaged and left out of the report" in caplog.text


def test_nothing_is_fetched(tmp_path):
    source = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not re.search(r"https?:|url\(|@import", source)


def test_every_plot_is_whole_svg(page):
    drawn = [i["src"] for i in page.all("img") if i["src"].startswith("data:image/svg+xml;base64,")]
    assert len(drawn) == 2  # of transfer
    assert len(page.curves) == 2 * 4 + 4 + 3  # of progress, training and over-optimisation
    for source in drawn:
        root = ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
        assert root.tag.endswith("svg")


def test_pictures_have_words_and_tables_have_headers(page):
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all(len(words) > 20 for words in page.curves)
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == 2 + 2 + len(page.curves)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )


def test_names_are_escaped(page):
    assert "my <run>" in page.words
    assert "Jpeg<b>" in page.words
    assert "a & b" in page.words


def test_transfer_settings_and_versions_are_there(page):
    rows = " | ".join(page.cells)
    assert "DDIM(eta=0) | 25 | -1.200 ± 0.020 | -0.900 ± 0.020 | +0.300 ± 0.021 | +14.3" in rows
    assert "abc123" in page.text
    assert "2.6.0" in page.text


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("summary.json", "This run is not finished"),
        ("metrics.jsonl", "No update is done yet"),
        ("over_optimisation.jsonl", "Nothing is measured yet"),
        ("samples", "No pictures yet"),
        ("transfer.json", "Not measured yet"),
    ],
)
def test_a_missing_part_is_said_to_be_missing(tmp_path, part, words):
    folder = make_run(tmp_path / "run")
    assert words not in read(folder).text
    remove(folder / part)
    assert words in read(folder).text


def test_over_optimisation_is_said_in_words_and_drawn(page):
    words = (
        "Over-optimisation: since update 4 the reward has risen (+0.4 ± 0.02 over the pretrained"
    )
    assert words in page.text
    start = (
        "gain of judge: cla<rity on held-out seeds against updates: from 0.100 ± 0.020 to -0.100"
    )
    assert sum(words.startswith(start) for words in page.curves) == 1
    start = "distance in pixels on held-out seeds"
    assert sum(words.startswith(start) for words in page.curves) == 1


def stopped(folder, reason):
    """The run, with a stop rule."""
    summary = json.loads((folder / "summary.json").read_text())
    metrics = {"diversity.pixels": estimate(0.2, 0.01)}
    summary |= {"update": 3, "over_optimisation_metrics": metrics}
    summary["over_optimisation"] = {"fallen": [], "since": None, "sentence": "All is <well>."}
    summary["stop"] = {"update": 5, "reason": reason, "false_stop_bound": 0.0123}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_stopped_run_says_why_and_when_and_shows_the_model_that_is_exported(tmp_path):
    folder = make_run(tmp_path / "run")
    stopped(folder, "judge clarity fell")
    page = read(folder)
    assert "All is <well>." in page.text
    assert "Stopped after update 5: judge clarity fell (noise alone" in page.text
    assert "at most 0.012). The exported model is that of update 3" in page.text
    assert "diversity of pixels | 0.200 ± 0.010 | 48" in " | ".join(page.cells)
    assert pictures(page) == [0, 153, 0, 153]
    stopped(folder, None)
    assert "The stop rule did not end the run (noise alone" in read(folder).text


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    folder = make_run(tmp_path / "run")
    for part in PARTS:
        remove(folder / part)
    (folder / "config.json").write_text("{}")
    assert read(folder).text.startswith("run: fine-tuning report run")


def test_one_sample_has_no_error_and_no_verdict(tmp_path):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["reward"]["difference"]["standard_error"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "reward, paired gain +0.4913 ? standard errors" in read(folder).text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    folder = make_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert not list(folder.glob("*.partial"))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder must hold a run, but .* no config\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "transfer.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text('{"settings"')
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged"):
        write_report(folder)


@pytest.mark.parametrize(
    ("error", "expected"), [(0.0213, 3), (0.11, 2), (0.98, 2), (1.0, 1), (3.2, 1), (45.0, 0)]
)
def test_a_standard_error_is_shown_to_two_figures(error, expected):
    assert decimals(error) == expected


# -- plots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 200, 2000])
def test_a_curve_of_any_length_has_a_readable_number_of_points(n):
    points = [(k, estimate(math.sin(k / n) + 0.1 * (-1) ** k, 0.01)) for k in range(n)]
    svg = ElementTree.fromstring(charts.chart(points, "updates", "words"))
    (line,) = (e for e in svg.iter() if e.get("class") == "line")
    assert len(line.get("points").split()) == min(n, 100 if n > 200 else n)
    drawn = charts.binned(points)
    assert min(p.low for p in drawn) == pytest.approx(min(e["mean"] for _, e in points), abs=0.02)
    assert max(p.high for p in drawn) == pytest.approx(max(e["mean"] for _, e in points), abs=0.02)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.7e-9, 2e-9), (1e6, 1.2e7), (5, 5), (0, 0), (-1234.5, -1200)]
)
def test_an_axis_covers_its_values_with_few_different_labels(low, high):
    axis = charts._axis(float(low), float(high))
    first, last, ticks = axis.low, axis.high, axis.ticks
    assert first <= low <= high <= last
    assert first - 1e-9 * abs(first) <= ticks[0] < ticks[-1] <= last + 1e-9 * abs(last)
    assert 2 <= len(ticks) <= 8
    assert len(set(charts._labels(ticks))) == len(ticks)


def test_of_many_dots_some_are_drawn_and_the_last_is_among_them():
    points = [(k, estimate(1.0 * k, 0.01)) for k in range(1001)]
    svg = ElementTree.fromstring(charts.chart(points[:2], "updates", "words", dots=points))
    dots = [e for e in svg.iter() if e.get("class") == "other"]
    assert 20 <= len(dots) <= 40
    assert dots[-1].findtext("title").startswith("1,000: ")


def test_no_label_of_a_curve_is_cut_off():
    points = [(k * 1_000_000, estimate(-k * 1.5e-5, 1e-6)) for k in range(5)]
    svg = ElementTree.fromstring(charts.chart(points, "network calls", "words"))
    for text in (e for e in svg.iter() if e.tag == "text"):
        width = charts._LETTER * len(text.text)
        left = float(text.get("x")) - {"end": 1, "middle": 0.5}[text.get("text-anchor")] * width
        assert left >= 0
        assert left + width <= charts.SMALL[0]


def transfer_rows(samplers):
    part = {name: estimate(-0.9, 0.02) for name in ("before", "after", "difference")}
    return [
        {"sampler": name, "steps": steps} | part for name in samplers for steps in (10, 25, 100)
    ]


def laid_out(figure):
    """The figure, with everything at its place."""
    FigureCanvasAgg(figure).draw()
    return figure


LONG = "change in diversity of the aesthetic classifier's features"


@pytest.mark.parametrize(
    "figure",
    [
        plots._transfer(transfer_rows(["DDIM(eta=1.0)", "Heun"]), ("before", "after"), LONG),
        plots._transfer(
            transfer_rows([f"sampler {'x' * 60}{k}" for k in range(9)]), ("after",), "r"
        ),
    ],
    ids=["transfer", "many samplers"],
)
def test_no_word_of_a_plot_is_cut_off(figure):
    drawn, (width, height) = laid_out(figure).get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= -0.01
    assert drawn.y0 >= -0.01
    assert drawn.x1 <= width + 0.01
    assert drawn.y1 <= height + 0.01


def test_the_legend_hides_no_data():
    figure = plots._transfer(transfer_rows(["DDIM(eta=1.0)", "Heun", "UniPC"]), ("after",), "r")
    laid_out(figure)
    (legend,), (axes,) = figure.legends, figure.axes
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_no_two_samplers_look_the_same():
    names = [f"sampler {k}" for k in range(12)]
    figure = plots._transfer(transfer_rows(names), ("after",), "r")
    (axes,) = figure.axes
    lines = [container.lines[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(names)
    assert len({line.get_color() for line in lines[:8]}) == 8


# -- parts of a reward, and groups ----------------------------------------------------------------


def with_lines(folder, **more):
    """A run whose every update logs these numbers too."""
    path = make_run(folder) / "metrics.jsonl"
    lines = [json.loads(line) | more for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_each_part_of_a_reward_has_a_curve_and_its_gain(tmp_path):
    part = {"reward.pick": estimate(20.0, 0.1), "reward.jpeg": estimate(-0.3, 0.01)}
    folder = with_lines(tmp_path / "run", **part)
    summary = json.loads((folder / "summary.json").read_text())
    told = {"before": estimate(20.0, 0.1), "after": estimate(20.5, 0.1)}
    summary["parts"] = {"pick": told | {"difference": estimate(0.5123, 0.0301)}}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(folder).read_text())
    for name in ("pick", "jpeg"):
        start = f"part of the reward: {name} of the"
        assert [words for words in page.curves if words.startswith(start)]
    assert "part: pick" in page.cells
    assert "+0.512 ± 0.030" in page.cells


@pytest.mark.parametrize(("share", "said"), [(0.7, True), (0.51, True), (0.5, False), (0.0, False)])
def test_it_says_when_most_groups_carry_no_gradient(tmp_path, share, said):
    folder = with_lines(tmp_path / "run", groups_without_signal=share)
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["objective"] = {"name": "GRPO", "group": 2}
    (folder / "config.json").write_text(json.dumps(config))
    words = " ".join(Page(write_report(folder).read_text()).words)
    sentence = f"{100 * share:.0f} % of groups of 2 carry no gradient"
    assert (sentence in words) == said
    assert ("raise the group size or use a graded reward" in words) == said
    assert ("share of groups without signal" in words) == (share > 0)


def test_counts_are_drawn_if_anything_was_counted(tmp_path):
    counts = {"reward_counts.prompts_cut": 3, "reward_counts.cache_hits": 0}
    page = Page(write_report(with_lines(tmp_path / "run", **counts)).read_text())
    words = " ".join(page.words)
    assert "counted by the reward: prompts_cut" in words
    assert "cache_hits" not in words


# -- size ------------------------------------------------------------------------------------------


def noisy(side):
    """A picture that no format makes small."""
    random = torch.Generator().manual_seed(side)
    pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=random)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return file.getvalue()


def test_pictures_keep_to_their_budget():
    """As they are where they fit; then as JPEG; then fewer of them."""
    pngs = [noisy(64)] * 6
    assert within(pngs, sum(map(len, pngs))) == ("png", pngs)
    kind, fewer = within(pngs, sum(map(len, pngs)) // 2)
    assert kind == "jpeg"
    assert len(fewer) == 6
    assert sum(map(len, fewer)) <= sum(map(len, pngs)) // 2
    assert Image.open(io.BytesIO(fewer[0])).size == (64, 64)
    kind, fewest = within(pngs, 2 * len(fewer[0]))
    assert 0 < len(fewest) < 6


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_a_report_of_many_updates_prompts_and_large_pictures_is_small(tmp_path):
    """5,000 updates, 2,000 long prompts, 32 pictures of 512 pixels that do not shrink."""
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    prompts = [f"picture {k} " + "with many words " * 100 for k in range(2000)]
    config["settings"]["prompts"] = prompts
    config["settings"]["options"] = {"evaluation_prompts": prompts}
    (folder / "config.json").write_text(json.dumps(config))
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    lines = [line | {"update": k, "seconds": 2.0 * k} for k in range(1, 5001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = json.loads((folder / "over_optimisation.jsonl").read_text().splitlines()[-1])
    measured = [measured | {"update": k, "chain_kl": estimate(k, 1.0)} for k in range(10, 5000, 10)]
    measured = [line | {"reward": estimate(0.0, 0.1)} for line in measured]
    text = "".join(json.dumps(line) + "\n" for line in measured)
    (folder / "over_optimisation.jsonl").write_text(text)
    per_prompt = {"prompt": [*range(8)], **dict.fromkeys(("mean", "standard_error"), [1.5] * 8)}
    text = "".join(
        json.dumps({"update": k, **per_prompt, "n": [1] * 8}) + "\n" for k in range(5000)
    )
    (folder / "training_by_prompt.jsonl").write_text(text)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 256, 256, generator=random)
    for update in (0, 5000):
        save(grid(images, prompts[:32]), folder / "samples" / f"step-{update:06d}.png")
    source = write_report(folder).read_text(encoding="utf-8")
    assert len(source) < 5 * 2**20
    assert len(Page(source).all("img")) >= 2 * 12
