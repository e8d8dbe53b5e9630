import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl import Estimate
from diffusion_envs.runs import caption_fonts, tracking
from diffusion_envs.runs.contact_sheet import grid, save, tiles
from diffusion_envs.runs.tracking import Tracker, lasts, read_metrics, require_wandb, stays


def numbers(update):
    return {
        "update": update,
        "reward": Estimate(0.1 * update, 0.03, 16),
        "path_kl": Estimate(1e-17 * update, 1 / 3, 16),
        "seconds": 1.7 * update,
        "memory": 2**33 + update,
        "value_loss": None,
    }


def log(folder, updates, first_update=0):
    with Tracker(folder, first_update=first_update) as tracker:
        for update in updates:
            tracker.log(numbers(update))


def test_estimates_are_written_with_their_errors(tmp_path):
    log(tmp_path, [1])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "update": 1,
        "reward": {"mean": 0.1, "standard_error": 0.03, "n": 16},
        "path_kl": {"mean": 1e-17, "standard_error": 1 / 3, "n": 16},
        "seconds": 1.7,
        "memory": 2**33 + 1,
        "value_loss": None,
    }


def test_the_unknown_error_of_one_sample_is_null(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log({"update": 1, "reward": Estimate.of(torch.tensor([2.5]))})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["reward"] == {
        "mean": 2.5,
        "standard_error": None,
        "n": 1,
    }


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Tracker(tmp_path) as tracker:
        for update in (1, 2):
            tracker.log(numbers(update))
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == update


@pytest.mark.parametrize("last", range(6))
@pytest.mark.parametrize("cut", [0, 1, 17, -1])
def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path, last, cut):
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    log(tmp_path / "whole", range(1, 6))
    log(tmp_path / "resumed", range(1, 6))
    path = tmp_path / "resumed" / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"update": 6, "seconds": 3})[:cut])  # a crash
    log(tmp_path / "resumed", range(last + 1, 6), first_update=last)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert not list(path.parent.glob("*.partial"))


def test_resuming_a_run_that_logged_nothing_starts_a_log(tmp_path):
    log(tmp_path, [4], first_update=3)
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4]


@pytest.mark.parametrize("damage", ["{", "[]", '{"reward": 1}', '{"update": "x"}', ""])
def test_a_damaged_line_in_the_middle_is_named_not_dropped(tmp_path, damage):
    log(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_text().splitlines()
    path.write_text(f"{first}\n{damage}\n{third}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        Tracker(tmp_path, first_update=3)
    assert path.read_text() == f"{first}\n{damage}\n{third}\n"


def test_a_run_of_no_updates_has_altered_nothing(tmp_path, caplog):
    for _ in range(2):  # it ends, and is resumed
        with Tracker(tmp_path) as tracker:
            tracker.over_optimisation(0, {"reward": Estimate(0.3, 0.1, 6)})
    assert not caplog.records
    with Tracker(tmp_path) as tracker:
        tracker.over_optimisation(0, {"reward": Estimate(0.4, 0.1, 6)})
    assert "the line of update 0 was altered" in caplog.text
    (line,) = read_metrics(tmp_path / "over_optimisation.jsonl")
    assert line["reward"]["mean"] == 0.4


def test_a_line_that_is_no_text_is_named(tmp_path):
    log(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:5] + b"\xa0" + content[6:])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is damaged"):
        read_metrics(path)


LEGIBLE = {
    "metrics.jsonl": {
        "update": 2,
        "reward": {"mean": 0.5, "standard_error": 0.1, "n": 4},
        "reward_queries": 8,
        "network_calls": 40,
        "seconds": 1.5,
    },
    "training_by_prompt.jsonl": {
        "update": 2,
        "prompt": [0, 1],
        "mean": [0.5, 0.25],
        "standard_error": [0.1, None],
        "n": [2, 1],
    },
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (name, text)
        for name, line in LEGIBLE.items()
        for text in ("standard_error", "mean", '"n"', *[f'"{key}"' for key in line])
        if text in json.dumps(line)
    ],
)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_line_that_its_readers_would_stumble_over_is_named(tmp_path, name, text, place):
    """A bit of a name has flipped: the line is JSON still."""
    path, lines = tmp_path / name, [json.dumps(LEGIBLE[name])] * 3
    path.write_text("\n".join([*lines, ""]))
    assert read_metrics(path) == [LEGIBLE[name]] * 3
    lines[place - 1] = lines[place - 1].replace(text, text[:-2] + "#" + text[-1], 1)
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match=rf"{name}, line [{place}{min(3, place + 1)}] is damaged"):
        read_metrics(path)


@pytest.mark.parametrize(
    "columns", [{"n": [2]}, {"n": [2, 0]}, {"mean": 0.5}, {"mean": [0.5, 0.25, 0.125]}]
)
def test_columns_that_do_not_fit_are_named(tmp_path, columns):
    path = tmp_path / "training_by_prompt.jsonl"
    path.write_text(json.dumps(LEGIBLE[path.name] | columns) + "\n")
    with pytest.raises(ValueError, match="are not columns of one length"):
        read_metrics(path)


@pytest.mark.parametrize("altered", [False, True])
def test_the_last_line_of_a_finished_run_is_made_anew_where_it_was_altered(
    altered, tmp_path, caplog
):
    path, measured = tmp_path / "over_optimisation.jsonl", {"reward": Estimate(0.5, 0.1, 4)}
    with Tracker(tmp_path) as tracker:
        tracker.over_optimisation(2, {"reward": Estimate(0.25, 0.1, 4)})
        tracker.over_optimisation(3, measured)
    whole = path.read_text()
    if altered:
        path.write_text(whole.replace("0.5", "0.7"))
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, first_update=3) as tracker:
        tracker.over_optimisation(3, measured)
    assert path.read_text() == whole
    assert ("the line of update 3 was altered" in caplog.text) == altered


def test_a_new_line_of_an_evaluation_asks_for_no_line_before_it(tmp_path, monkeypatch):
    read = []
    with Tracker(tmp_path) as tracker:
        monkeypatch.setattr(tracking, "read_metrics", lambda path: read.append(path) or [])
        for update in range(1, 6):  # of a long run, all of whose log would be read each time
            tracker.over_optimisation(update, {"reward": Estimate(0.5, 0.1, 4)})
    monkeypatch.undo()
    lines = read_metrics(tmp_path / "over_optimisation.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert read == []


def test_a_last_line_cut_short_is_left_out_with_a_warning(tmp_path, caplog):
    log(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    with caplog.at_level(logging.WARNING):
        assert [line["update"] for line in read_metrics(path)] == [1]
    assert "its last line was cut short" in caplog.text


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, Estimate(math.nan, 1.0, 2), Estimate(1.0, math.nan, 2)]
)
def test_what_is_not_finite_is_refused_by_name_and_not_written(tmp_path, bad):
    with Tracker(tmp_path) as tracker:
        with pytest.raises(ValueError, match="metric ratio_max must be finite"):
            tracker.log({"update": 1, "ratio_max": bad})
        tracker.log(numbers(1))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("bad", ["0.3", torch.tensor(0.3), [1.0], np.float32(1)])
def test_what_is_not_a_number_is_refused_by_name(tmp_path, bad):
    with Tracker(tmp_path) as tracker, pytest.raises(TypeError, match="metric loss must be a num"):
        tracker.log({"update": 1, "loss": bad})


def test_an_update_is_logged_once(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(numbers(2))
        with pytest.raises(ValueError, match="update must be later than 2, already logged; got 2"):
            tracker.log(numbers(2))


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, [1, 2, 3])
    log(tmp_path, [2, 3, 4], first_update=1)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("reward")]
    assert found == [(k, pytest.approx(0.1 * k, rel=1e-7)) for k in (1, 2, 3, 4)]  # float32
    assert "value_loss" not in board.Tags()["scalars"]


def test_tensorboard_has_the_pictures_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path) as tracker:
        for update in (0, 10):
            tracker.pictures(update, torch.zeros(2, 3, 8, 8), ["a cat", "кот"])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = board.Images("samples")
    assert [event.step for event in shown] == [0, 10]
    with Image.open(tmp_path / "samples" / "step-000010.png") as sheet:
        assert (shown[1].width, shown[1].height) == sheet.size


def test_rewards_by_prompt_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path):
    told = {7: Estimate(0.5, 0.1, 4), 9999: Estimate(-1.0, math.inf, 1)}
    for folder, parts in (("whole", ([1, 2, 3],)), ("resumed", ([1, 2, 3], [2, 3]))):
        (tmp_path / folder).mkdir()
        for part in parts:
            with Tracker(tmp_path / folder, first_update=part[0] - 1) as tracker:
                for update in part:
                    tracker.by_prompt(update, told)
    whole, resumed = (tmp_path / n / "training_by_prompt.jsonl" for n in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert read_metrics(whole)[1] == {
        "update": 2,
        "prompt": [7, 9999],
        "mean": [0.5, -1.0],
        "standard_error": [0.1, None],
        "n": [4, 1],
    }


def test_other_processes_write_nothing(tmp_path):
    with Tracker(tmp_path, enabled=False) as tracker:
        tracker.log(numbers(1))
        tracker.by_prompt(1, {0: Estimate(0.5, 0.1, 4)})
        tracker.pictures(0, torch.zeros(1, 3, 8, 8), ["a cat"])
    assert not list(tmp_path.iterdir())


# -- Weights & Biases ------------------------------------------------------------------------------


class FakeWandb:
    """What of the module is used; keeps what it is told."""

    class Error(Exception):
        pass

    def __init__(self, logged_in=True):
        self.logged_in, self.begun, self.logged, self.finished = logged_in, [], [], 0

    def login(self):
        if not self.logged_in:
            raise self.Error("api_key not configured (no-tty)")

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, picture):  # wandb's name
        return ("image", picture.size)


@pytest.fixture
def service(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_numbers_metrics_and_pictures_reach_weights_and_biases(tmp_path, service):
    with Tracker(tmp_path, wandb=True) as tracker:
        tracker.pictures(0, torch.zeros(1, 3, 8, 8), ["a cat"])
        tracker.log(numbers(1))
        tracker.over_optimisation(1, {"path_kl": Estimate(0.3, 0.1, 16)})
    (step, pictures), (_, first), (_, metrics) = service.logged
    assert step == 0
    assert pictures["samples"][0] == "image"
    assert first["reward"] == 0.1
    assert "value_loss" not in first
    assert service.logged[1][0] == 1
    assert metrics == {"over_optimisation/path_kl": 0.3}
    assert service.finished == 1


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(tmp_path, service):
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = {"settings": {"steps": 20}, "commit": "abc"}
    (folder / "config.json").write_text(json.dumps(settings))
    for first_update in (0, 2):
        with Tracker(folder, first_update=first_update, wandb=True):
            pass
    first, second = service.begun
    assert first == second
    assert first["id"]
    assert first["resume"] == "allow"
    assert first["config"] == settings
    assert (first["project"], first["name"]) == ("ctrl", "mine")
    (tmp_path / "other").mkdir()
    with Tracker(tmp_path / "other", wandb=True):
        pass
    assert service.begun[2]["id"] != first["id"]


def test_the_name_of_a_run_can_be_chosen_and_is_kept(tmp_path, service):
    for name in ("first", None, "second", None):
        with Tracker(tmp_path, wandb=True, wandb_name=name):
            pass
    assert [each["name"] for each in service.begun] == ["first", "first", "second", "second"]
    assert len({each["id"] for each in service.begun}) == 1


def test_of_thousands_of_prompts_weights_and_biases_gets_the_first(tmp_path, service):
    prompts = [f"prompt {k}" for k in range(10_000)]
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"prompts": prompts}}))
    with Tracker(tmp_path, wandb=True):
        pass
    settings = service.begun[0]["config"]["settings"]
    assert settings == {"prompts": prompts[:20], "number of prompts": 10_000}


def test_the_project_can_be_chosen_and_is_kept(tmp_path, service):
    for wandb in ("cats", True):
        with Tracker(tmp_path, wandb=wandb):
            pass
    assert [settings["project"] for settings in service.begun] == ["cats", "cats"]
    with pytest.raises(ValueError, match=r"wandb must be the project .*'cats' .*got 'dogs'"):
        Tracker(tmp_path, wandb="dogs")


def test_a_damaged_record_of_the_run_is_named(tmp_path, service):
    (tmp_path / "wandb.json").write_text("{")
    with pytest.raises(ValueError, match=r"wandb\.json is damaged .*delete it"):
        Tracker(tmp_path, wandb=True)


def test_without_weights_and_biases_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for refused in (require_wandb, lambda: Tracker(tmp_path, wandb=True)):
        with pytest.raises(ValueError, match=r"pip install ctrl-diffusion\[wandb\]"):
            refused()
    assert not list(tmp_path.iterdir())


def test_who_is_not_logged_in_is_told_before_anything_is_made(tmp_path, service):
    service.logged_in = False
    for refused in (require_wandb, lambda: Tracker(tmp_path, wandb=True)):
        with pytest.raises(ValueError, match=r"cannot log in \(api_key .*WANDB_MODE=offline"):
            refused()
    assert not list(tmp_path.iterdir())


# -- pictures --------------------------------------------------------------------------------------


def test_pixels_of_small_pictures_stay_exact_and_in_order(generator):
    images = torch.randint(0, 256, (5, 3, 32, 32), generator=generator) / 255
    sheet = np.asarray(grid(images, ["a cat"] * 5, columns=3))
    factor, gap, line = 3, 6, 30  # 96 pixels a side; two lines of caption
    for k, image in enumerate(images):
        left, top = k % 3 * (96 + gap) + gap, k // 3 * (96 + line + gap) + gap
        tile = sheet[top : top + 96, left : left + 96]
        expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
        for row in range(factor):
            for column in range(factor):
                assert np.array_equal(tile[row::factor, column::factor], expected)


@pytest.mark.parametrize(
    ("size", "shown"), [((32, 32), (96, 96)), ((512, 512), (256, 256)), ((512, 256), (256, 128))]
)
def test_pictures_are_shown_at_a_size_to_see(size, shown):
    sheet = grid(torch.zeros(2, 3, *size), ["", ""], columns=1)
    columns = (np.asarray(sheet) == 0).all(2)
    assert (int(columns.any(1).sum()), int(columns.any(0).sum())) == (2 * shown[0], shown[1])


def test_each_caption_stands_under_its_own_picture():
    sheet = np.asarray(grid(torch.ones(3, 3, 32, 32), ["", "a photo of a small horse", ""]))
    ink = (sheet < 128).all(2).any(0)  # columns of the sheet that hold dark letters
    inked = ink.nonzero()[0]
    assert inked.min() >= 6 + 102
    assert inked.max() < 6 + 2 * 102


def test_a_caption_too_long_for_its_picture_stays_in_its_place():
    for words in ("word " * 40, "w" * 200):
        sheet = np.asarray(grid(torch.ones(2, 3, 32, 32), [words, ""]))
        ink = (sheet < 128).all(2).any(0)
        assert ink.nonzero()[0].max() < 6 + 102


SCRIPTS = [
    "größer, café, naïve",
    "кошка и собака",
    "γάτα και σκύλος",
    "猫の写真 고양이",
    "a 🐱 and a 🚀, 👩‍🚀 ❤️",
    "قطة וחתול",
    "e\u0301 as two characters",
    "\ud800 half a pair, \x07 a bell, \U0010ffff no character, \ue000 private",
    "",
]
FONTS = {
    "all": (),
    "of matplotlib": ("_system",),
    "of Pillow": ("_system", "_dejavu"),
}


@pytest.fixture(params=FONTS)
def fonts(request, monkeypatch):
    """All fonts that there are, or fewer."""
    caches = (caption_fonts._font_for, caption_fonts._stand_in, caption_fonts._paths)
    for cache in caches:
        cache.cache_clear()
    for source in FONTS[request.param]:
        monkeypatch.setattr(caption_fonts, source, list)
    yield request.param
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def ink(font, text):
    """The picture of a text, to compare."""
    mask = font.getmask(text)
    return mask.size, bytes(mask)


@pytest.mark.parametrize("text", SCRIPTS)
def test_no_caption_draws_the_box_of_a_missing_glyph_and_each_is_kept(text, fonts, tmp_path):
    for part, font in caption_fonts.stretches(text):
        boxes = {ink(font, missing) for missing in ("\U0010ffff", "\U0010fffe")}
        assert not {ink(font, character) for character in part} & boxes, (part, font.getname())
    path = tmp_path / "sheet.png"
    save(grid(torch.ones(1, 3, 128, 128), [text]), path)
    assert [tile.caption for tile in tiles(path)] == [text]


def test_what_no_font_has_is_spelled_out(fonts):
    few = fonts == "of Pillow"
    assert caption_fonts.drawable("café") == ("cafe" if few else "café")
    assert caption_fonts.drawable("ж") == ("U+0436" if few else "ж")
    assert caption_fonts.drawable("\ue000\ud800") == "U+E000U+D800"
    assert caption_fonts.drawable("a\u200db\ufe0f") == "ab"
    if fonts != "all":
        assert caption_fonts.drawable("猫 🚀") == "U+732B U+1F680"


def test_without_matplotlib_captions_are_drawn_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert caption_fonts._dejavu() == []
    assert caption_fonts._system() == []


def test_accents_change_the_picture_of_a_caption():
    one, other = (np.asarray(grid(torch.ones(1, 3, 64, 64), [c])) for c in ("é", "ж"))
    assert (one != other).any()


def test_the_grid_of_a_step_is_a_png(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.pictures(20, torch.rand(3, 3, 32, 32), ["a cat", "a ship", "ein Schiff, größer"])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000020.png"]
    with Image.open(tmp_path / "samples" / "step-000020.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("images", "captions", "columns", "message"),
    [
        (2, ["a"], 8, "captions must be one for each of at least one picture, got 1 for 2"),
        (0, [], 8, "got 0 for 0"),
        (1, ["a"], 0, "columns must be at least 1, got 0"),
    ],
)
def test_a_grid_needs_pictures_with_captions(images, captions, columns, message):
    with pytest.raises(ValueError, match=message):
        grid(torch.zeros(images, 3, 4, 4), captions, columns=columns)


# -- long runs -------------------------------------------------------------------------------------


def kept_of(updates, every):
    """Updates whose pictures are left when each was made in turn."""
    kept = set()
    for newest in updates:
        kept = {u for u in kept if u >= newest or stays(u, newest, every)} | {newest}
    return sorted(kept)


def test_pictures_thin_out_with_age():
    """The newest 32 stay; then 16 whenever the age doubles; the first one stays for ever."""
    times = list(range(0, 5010, 10))
    kept = kept_of(times, 10)
    assert kept[0] == 0
    assert kept[-32:] == times[-32:]
    ages = [(times[-1] - update) // 10 for update in kept]
    for doublings in range(3):
        assert sum(32 << doublings <= age < 64 << doublings for age in ages) == 16
    assert len(kept) == 96
    # what goes would go later, too: how a run was cut does not matter
    assert kept == [update for update in times if stays(update, times[-1], 10)]
    assert kept == kept_of(times[:200] + times[150:], 10)


def test_what_cannot_be_taken_away_again_is_sent_ever_more_rarely():
    sent = [update for update in range(0, 5010, 10) if lasts(update, 10)]
    assert sent[:36] == [*range(0, 330, 10), 340, 360, 380]
    assert sent[-1] - sent[-2] == 160
    assert len(sent) == 96


def test_files_of_pictures_follow_the_rule_and_the_last_ones_are_sent_everywhere(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = torch.zeros(1, 3, 2, 2)
    with Tracker(tmp_path, picture_every=2) as tracker:
        for update in range(0, 202, 2):
            tracker.pictures(update, images, ["a"], last=update == 200)
    names = sorted(int(path.stem[5:]) for path in (tmp_path / "samples").glob("step-*.png"))
    assert names == [update for update in range(0, 202, 2) if stays(update, 200, 2)]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    steps = [image.step for image in events.Images("samples")]
    assert steps == [u for u in range(0, 202, 2) if lasts(u, 2)] + ([] if lasts(200, 2) else [200])
