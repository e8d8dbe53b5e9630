"""The metrics against independent formulas, and the verdict on constructed and simulated runs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import bdtr

from benchmarks.over_optimisation import Setting, simulate
from diffusion_envs import rewards
from diffusion_envs.runs.distances import (
    cosine_distances,
    mean_over_pairs,
    pixel_distances,
    standard_deviation,
)
from diffusion_envs.runs.evaluation import Evaluation, by_prompt
from diffusion_envs.runs.over_optimisation import FAR, LEVEL, embeddings, metrics, verdict

PROMPTS = ["cat", "dog", "cat", "ship", "dog", "cat", "dog", "dog"]  # 3, 4 and 1


class Tail:
    """A judge with an embedding: six numbers of the picture."""

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def embedding(self, images):
        return images.flatten(1)[:, :6] + 0.1


def evaluation(generator, n=8, prompts=PROMPTS):
    return Evaluation(
        rewards=torch.randn(n, generator=generator),
        judged={"clarity": torch.randn(n, generator=generator)},
        path_kl=torch.rand(n, generator=generator),
        chain_kl=torch.rand(n, generator=generator),
        images=torch.rand(n, 3, 4, 5, generator=generator),
        prompts=list(prompts),
    )


def jackknife(distance: np.ndarray, prompts: list[str]) -> tuple[float, float]:
    """Every sample is left out in turn and the whole statistic computed again."""

    def statistic(kept: list[int]) -> dict[str, float]:
        found = {}
        for prompt in set(prompts):
            pairs = [
                distance[i, j]
                for i, j in itertools.combinations(kept, 2)
                if prompts[i] == prompts[j] == prompt
            ]
            if pairs:
                found[prompt] = float(np.mean(pairs))
        return found

    everything = list(range(len(prompts)))
    whole = statistic(everything)
    variance = 0.0
    for prompt in whole:
        members = [i for i in everything if prompts[i] == prompt]
        left = [statistic([i for i in everything if i != out])[prompt] for out in members]
        variance += (len(left) - 1) * np.var(left)
    return float(np.mean(list(whole.values()))), math.sqrt(variance) / len(whole)


def test_every_number_is_that_of_its_definition(generator):
    before, after = evaluation(generator), evaluation(generator)
    numbers = metrics(before, after, {"tail": Tail()})
    new, old = (e.images.double().numpy().reshape(8, -1) for e in (after, before))
    pixels, was = (np.sqrt(((v[:, None] - v[None]) ** 2).mean(-1)) for v in (new, old))  # [n, n]
    vectors, formerly = (v[:, :6] + np.float32(0.1) for v in (new, old))

    def cosine(a, b):
        lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
        return 1 - a @ b.T / lengths

    expected = {
        "diversity.pixels": jackknife(pixels, PROMPTS),
        "diversity_gain.pixels": jackknife(pixels - was, PROMPTS),
        "diversity.tail": jackknife(cosine(vectors, vectors), PROMPTS),
        "diversity_gain.tail": jackknife(
            cosine(vectors, vectors) - cosine(formerly, formerly), PROMPTS
        ),
        "pretrained_diversity.pixels": jackknife(was, PROMPTS),
        "pretrained_diversity.tail": jackknife(cosine(formerly, formerly), PROMPTS),
        "separation.pixels": jackknife(was, ["any"] * 8),
        "separation.tail": jackknife(cosine(formerly, formerly), ["any"] * 8),
    }
    singles = {
        "distance.pixels": np.sqrt(((new - old) ** 2).mean(1)),
        "distance.tail": np.diag(cosine(vectors, formerly)),
        "reward": after.rewards.double().numpy(),
        "reward_gain": (after.rewards - before.rewards).double().numpy(),
        "judge.clarity": after.judged["clarity"].double().numpy(),
        "judge_gain.clarity": (after.judged["clarity"] - before.judged["clarity"]).double().numpy(),
        "path_kl": after.path_kl.double().numpy(),
        "chain_kl": after.chain_kl.double().numpy(),
    }
    for name, values in singles.items():
        expected[name] = values.mean(), values.std(ddof=1) / math.sqrt(8)
    judged = before.judged["clarity"].double().numpy()
    std, squares = judged.std(ddof=1), (judged - judged.mean()) ** 2
    error = squares.std(ddof=1) / math.sqrt(8) / (2 * std)  # of the variance, by the delta method
    expected["judge_std.clarity"] = std, error
    assert numbers.keys() == expected.keys()
    for name, (mean, error) in expected.items():
        # embeddings are float32: 1e-6 of 1 - cosine
        tolerance = 3e-6 if "tail" in name else 1e-9
        assert numbers[name].mean == pytest.approx(mean, abs=tolerance), name
        assert numbers[name].standard_error == pytest.approx(error, abs=tolerance), name
    assert numbers["diversity.pixels"].n == 7  # the only ship has no pair


@pytest.mark.parametrize(("n", "excess"), [(4, 1.624), (8, 1.217)])
def test_the_jackknife_is_never_too_small_on_average(n, excess):
    """All samples of n from three points, with their probabilities: E[jackknife] / Var exactly."""
    points, masses = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.5, 0.3, 0.2])
    distance = (points[:, None] - points).abs()
    means, jackknifed, weights = [], [], []
    for drawn in itertools.combinations_with_replacement(range(3), n):
        rows = torch.tensor(drawn)
        found = mean_over_pairs(lambda of, rows=rows: distance[rows[of]][:, rows[of]], ["-"] * n)
        assert found is not None
        means.append(found.mean)
        jackknifed.append(found.standard_error**2)
        orders = math.factorial(n) / math.prod(math.factorial(drawn.count(k)) for k in range(3))
        weights.append(orders * masses[rows].double().prod().item())
    w, m = np.array(weights), np.array(means)
    variance = w @ m**2 - (w @ m) ** 2
    assert w @ m == pytest.approx(float(masses @ distance @ masses), rel=1e-6)  # unbiased
    assert w @ np.array(jackknifed) / variance == pytest.approx(excess, abs=0.001)


def test_pictures_that_are_all_alike_have_no_diversity():
    image = torch.rand(1, 3, 4, 5)
    one = torch.full((4,), 0.5)
    same = Evaluation(one, {}, one, one, image.repeat(4, 1, 1, 1), ["a"] * 4)
    found = metrics(same, same, {"tail": Tail()})
    for name in ("diversity.pixels", "diversity.tail", "distance.pixels", "distance.tail"):
        assert found[name].mean == 0
        assert found[name].standard_error == 0


def test_two_samples_of_a_prompt_have_a_diversity_of_unknown_error_and_one_has_none(generator):
    two = evaluation(generator, 4, ["a", "b", "a", "b"])
    assert metrics(two, two)["diversity.pixels"].standard_error == math.inf
    one = evaluation(generator, 3, ["a", "b", "c"])
    assert not any("diversity" in name for name in metrics(one, one))


def test_the_pretrained_model_may_have_more_samples(generator):
    before, after = evaluation(generator), evaluation(generator)
    few = metrics(before.first(5), after.first(5))
    assert metrics(before, after.first(5)) == few
    with pytest.raises(ValueError, match="same prompts"):
        metrics(before.first(5), after)


def test_what_an_ode_pays_is_left_out(generator):
    seen = evaluation(generator)
    ode = dataclasses.replace(seen, path_kl=torch.full((8,), math.inf))
    assert "path_kl" not in metrics(seen, ode)


def test_distances_are_metrics_of_pictures():
    black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert pixel_distances(black, white).item() == 1
    east, north, west = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]), -torch.eye(2)[:1]
    assert cosine_distances(east, north).item() == pytest.approx(1)
    assert cosine_distances(east, west).item() == pytest.approx(2)
    assert cosine_distances(east, 7 * east).item() == 0


def test_the_shipped_classifier_has_an_embedding_and_a_colour_has_none():
    judge = rewards.PromptAlignment("judge")
    found = embeddings(rewards.Colour("red"), {"classifier": judge})
    assert found == {"classifier": judge}
    images = torch.rand(3, 3, 32, 32)
    vectors = rewards.embed(judge, images)
    assert vectors.shape == (3, 160)
    assert (vectors.std(0) > 0).any()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2), r"must return a tensor \[2, width\], got \[2\]"),
        (torch.zeros(3, 4), r"\[2, width\]"),
        ([[1.0], [2.0]], "got list"),
        (torch.full((2, 4), math.nan), "finite"),
    ],
)
def test_embeddings_are_checked(returned, message):
    class Bad:
        def embedding(self, images):
            return returned

    with pytest.raises(rewards.RewardError, match=f"embedding of Bad .*{message}"):
        rewards.embed(Bad(), torch.rand(2, 3, 4, 4))


def test_an_embedding_that_raises_is_named():
    class Broken:
        def embedding(self, images):
            raise KeyError("weights")

    with pytest.raises(rewards.RewardError, match="embedding of Broken raised KeyError"):
        rewards.embed(Broken(), torch.rand(2, 3, 4, 4))


def test_rewards_by_prompt_are_those_of_its_own_samples(generator):
    before, after = evaluation(generator), evaluation(generator)
    table = by_prompt(before, after)
    assert list(table) == ["cat", "dog", "ship"]
    rows = [1, 4, 6, 7]  # of the dog
    new, old = (e.rewards.double().numpy()[rows] for e in (after, before))
    for part, values in (("before", old), ("after", new), ("difference", new - old)):
        number = table["dog"][part]
        assert number.mean == pytest.approx(values.mean(), rel=1e-6), part
        assert number.standard_error == pytest.approx(values.std(ddof=1) / 2, rel=1e-6), part
    assert table["ship"]["after"].standard_error == math.inf  # one picture


def test_a_standard_deviation_has_an_error_that_its_scatter_over_samples_confirms(generator):
    drawn = [standard_deviation(torch.randn(400, generator=generator)) for _ in range(400)]
    values = np.array([estimate.mean for estimate in drawn])
    claimed = np.mean([estimate.standard_error for estimate in drawn])
    assert claimed == pytest.approx(math.sqrt(1 / 800), rel=0.02)  # normal: std / sqrt(2 n)
    assert values.std() == pytest.approx(claimed, rel=4 / math.sqrt(2 * 400))
    assert standard_deviation(torch.tensor([2.0])).standard_error == math.inf
    assert standard_deviation(torch.tensor([2.0, 2.0, 2.0])).mean == 0


# -- the verdict ---------------------------------------------------------------------------------

MINUS = "\N{MINUS SIGN}"


def estimate(mean, error=0.05, n=32):
    return {"mean": mean, "standard_error": error, "n": n}


def line(update, reward, judge=None, pixels=None, error=0.05, **others):
    """A line of a run: the judge's std is 1, the pretrained model's diversity 0.5."""
    numbers = {"update": update, "reward_gain": estimate(reward, error)}
    if judge is not None:
        numbers["judge_gain.clarity"] = estimate(judge, error)
        numbers["judge_std.clarity"] = estimate(1.0, 0.01)
    if pixels is not None:
        numbers["diversity_gain.pixels"] = estimate(pixels, 0.1 * error)
        numbers["pretrained_diversity.pixels"] = estimate(0.5, 0.005)
    return numbers | {name: estimate(value, 0.004) for name, value in others.items()}


def pictures(update, reward, distance, nats, **others):
    """A line about pictures whose pretrained ones are 0.2 from each other, without a judge."""
    numbers = line(update, reward) | {
        "distance.pixels": estimate(distance, 0.004),
        "separation.pixels": estimate(0.2, 0.004),
    }
    return numbers | ({} if nats is None else {"path_kl": estimate(nats, 0.02 * nats)}) | others


def test_a_judge_that_falls_below_the_pretrained_model_is_seen():
    said = verdict([line(10, 0.4, -0.05, 0.0), line(20, 0.9, -0.5, 0.01), line(30, 1.2, -0.6, 0.0)])
    assert said.over_optimised
    assert said.fallen == ("judge clarity",)
    assert said.since == 20
    assert said.sentence == (
        "Over-optimisation: since update 20 the reward has risen (+1.2 ± 0.05 over the pretrained "
        f"model) while judge clarity fell ({MINUS}0.6 ± 0.05 over the pretrained model, 0.6 "
        "standard deviations of the pretrained model's samples)."
    )


def test_a_judge_that_rises_first_and_falls_later_is_seen_though_it_ends_higher():
    said = verdict([line(10, 0.4, 0.5), line(20, 0.9, 1.2), line(30, 1.4, 0.3)])
    assert said.over_optimised
    assert said.fallen == ("judge clarity",)
    assert said.since == 30
    assert f"{MINUS}0.9 ± 0.071 from update 20" in said.sentence


def test_a_collapse_of_diversity_is_over_optimisation_for_who_wants_variety():
    said = verdict([line(10, 0.4, 0.3, -0.3)])
    assert said.over_optimised
    assert said.fallen == ("diversity of pixels",)
    assert said.sentence.startswith("Over-optimisation, if variety matters: since update 10")
    assert "60 % of the pretrained model's" in said.sentence
    assert "No judge fell" in said.sentence


def test_a_loss_of_a_fifth_of_the_diversity_is_named_but_no_over_optimisation():
    said = verdict([line(10, 0.4, 0.3, -0.1)])
    assert not said.over_optimised
    assert said.fallen == ("diversity of pixels",)
    assert said.since == 10
    assert said.sentence.startswith("Less variety: since update 10")
    assert "No judge fell" in said.sentence
    assert "There was no judge" in verdict([line(10, 0.4, None, -0.1)]).sentence


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line(10, 0.4, 0.3, 0.0)], "No over-optimisation is seen: the reward has risen"),
        ([line(10, 0.4, 0.3, 0.0)], "diversity of pixels (+0 ± 0.005) have held"),
        ([line(10, 0.4, -0.14, 0.0)], f"too few to tell for judge clarity ({MINUS}0.14 ± 0.05)"),
        ([line(10, 0.4, None, 0.0)], "there was no judge"),
        ([line(10, 0.4)], "over-optimisation would not show"),
        ([line(10, 0.1, 0.0)], "has not risen beyond chance"),
        # the judge falls from its best while the reward falls too
        ([line(10, 0.9, 1.2), line(20, 0.4, 0.4)], "No over-optimisation is seen"),
        # it was there, and is not any more
        ([line(10, 0.4, -0.6), line(20, 0.8, 0.5)], "No over-optimisation is seen"),
        # beyond chance by far, but too little to matter: of the judge's std, of the diversity
        ([line(10, 0.4, -0.1, 0.0, 1e-6)], "No over-optimisation is seen"),
        ([line(1, 0.4, 0.3, -0.00024, 1e-6)], "No over-optimisation is seen"),
        ([line(1, 0.0, 0.0, -0.00024, 1e-6)], "there is no over-optimisation to see"),
        ([line(10, 0.4, 0.9, 0.02, 1e-6), line(20, 0.9, 0.8, -0.02, 1e-6)], "is seen"),
    ],
)
def test_nothing_is_said_to_fall_that_did_not(lines, words):
    said = verdict(lines)
    assert not said.over_optimised
    assert said.fallen == ()
    assert said.since is None
    assert words in said.sentence


@pytest.mark.parametrize(
    ("reward", "gain", "error", "said"),
    [
        (0.7, 0.0, 0.0, True),
        (0.7, -0.3, 0.0, False),  # every sample lost the same
        (0.7, 0.0, 0.02, False),  # no gain, but samples differ
    ],
)
def test_a_reward_that_is_the_same_for_all_samples_is_told(reward, gain, error, said):
    numbers = line(10, gain, pixels=0.0, error=0.0) | {"reward": estimate(reward, error)}
    words = verdict([numbers]).sentence
    told = "Every held-out sample has the reward 0.7, before and after: where all samples have the"
    assert words.startswith(told) == said
    assert words.startswith("The reward has not risen beyond chance") != said
    unknown = numbers | {"reward": estimate(reward, None)}  # of one sample
    assert not verdict([unknown]).sentence.startswith("Every")


def test_a_fall_at_no_gain_is_no_over_optimisation_but_a_worse_model():
    said = verdict([line(10, -0.4, -0.5)])
    assert not said.over_optimised
    assert said.fallen == ("judge clarity",)
    assert f"yet since update 10 judge clarity fell ({MINUS}0.5 ± 0.05" in said.sentence
    assert said.sentence.endswith("the model got worse.")


def test_unknown_errors_prove_nothing():
    said = verdict(
        [
            line(10, 0.4, -0.5)
            | {"judge_gain.clarity": {"mean": -9.0, "standard_error": None, "n": 1}}
        ]
    )
    assert not said.over_optimised
    assert said.fallen == ()


def test_pictures_that_are_lost_are_seen_without_a_judge_and_without_an_embedding():
    said = verdict([pictures(10, 0.2, 0.09, 8.0), pictures(20, 0.5, 0.29, 824.0)])
    assert said.over_optimised
    assert said.fallen == ("pictures",)
    assert said.since == 20
    assert said.sentence == (
        "Over-optimisation: since update 20 the reward has risen (+0.5 ± 0.05 over the pretrained "
        "model) while the pictures have nothing left of the pretrained ones of their seeds. The "
        "path KL from the pretrained model is 824 nats, beyond what choosing the best of a million "
        "pretrained pictures would cost (13). Mean distance of a picture from the pretrained one "
        "of its seed, against that of two pretrained pictures: 0.29 against 0.2 (pixels)."
    )


@pytest.mark.parametrize(
    ("seen", "lost"),
    [
        (pictures(1, 0.5, 0.29, 824.0), True),
        (pictures(1, 0.5, 0.165, 824.0), True),  # beyond the mean picture, 0.2 / sqrt 2
        (pictures(1, 0.5, 0.13, 824.0), False),
        (pictures(1, 0.5, 0.29, FAR), False),  # another picture of nearly the same law
        (pictures(1, 0.5, 0.29, None), True),  # an ODE: further than an independent picture
        (pictures(1, 0.5, 0.2, None), False),  # as far as an independent picture
        # features say that the content is there
        (
            pictures(1, 0.5, 0.29, 824.0)
            | {"distance.eye": estimate(0.1, 0.01), "separation.eye": estimate(0.5, 0.01)},
            False,
        ),
        (
            pictures(1, 0.5, 0.29, 824.0)
            | {"distance.eye": estimate(0.3, 0.01), "separation.eye": estimate(0.5, 0.01)},
            True,
        ),
        # a judge says so
        (
            pictures(1, 0.5, 0.29, 824.0)
            | {"judge_gain.clarity": estimate(0.3), "judge_std.clarity": estimate(1.0)},
            False,
        ),
        # of two samples, whose separation has no known error
        (pictures(1, 0.5, 0.29, 824.0) | {"separation.pixels": estimate(0.2, None, 2)}, False),
        ({k: v for k, v in pictures(1, 0.5, 0.29, 824.0).items() if "sep" not in k}, False),
    ],
)
def test_pictures_are_lost_where_nothing_speaks_for_them(seen, lost):
    assert verdict([seen]).fallen == (("pictures",) if lost else ())
    assert verdict([seen]).over_optimised is lost


def test_lost_pictures_at_no_gain_are_a_worse_model():
    said = verdict([pictures(10, -0.2, 0.29, 824.0)])
    assert not said.over_optimised
    assert said.fallen == ("pictures",)
    assert "the model got worse" in said.sentence


def test_a_model_far_away_that_nobody_judged_is_for_the_reader_to_look_at():
    said = verdict([pictures(10, 0.5, 0.1, 116.0)])
    assert said.sentence.startswith("Over-optimisation cannot be told: the reward has risen")
    assert "The path KL from the pretrained model is 116 nats" in said.sentence
    assert "Look at the pictures before you use the model." in said.sentence
    judged = pictures(10, 0.5, 0.1, 116.0) | line(10, 0.5, 0.3)
    said = verdict([judged])
    assert said.sentence.startswith("No over-optimisation is seen")
    assert "116 nats" in said.sentence
    assert "Look at the pictures" not in said.sentence


def test_pictures_of_noise_are_lost_through_the_metrics_themselves(generator):
    """Structured pictures become independent noise of another colour, 800 nats away."""
    n = 16
    smooth = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, 8, 8) * 0.6
    noise = (
        torch.rand(n, 3, 8, 8, generator=generator) * torch.tensor([1.0, 0.3, 0.3])[:, None, None]
    )
    nats = torch.full((n,), 800.0) + torch.rand(n, generator=generator)
    before = Evaluation(torch.rand(n, generator=generator), {}, nats, nats, smooth, ["-"] * n)
    after = Evaluation(1 + before.rewards, {}, nats, nats, noise, ["-"] * n)
    numbers = {name: value.as_dict() for name, value in metrics(before, after).items()}
    said = verdict([{"update": 1} | numbers])
    assert said.over_optimised
    assert "pictures" in said.fallen
    unchanged = {name: value.as_dict() for name, value in metrics(before, before).items()}
    assert verdict([{"update": 1} | unchanged]).fallen == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        Setting(evaluations=3),
        Setting(correlation=0.0, evaluations=3, gain=1.0),
        Setting(correlation=0.5, tails="lognormal", evaluations=3, gain=1.0),
        # the hardest: everything has fallen by all that does not matter, so margins excuse nothing
        Setting(correlation=0.0, evaluations=1, at_the_margin=True),
        Setting(correlation=0.0, tails="student", evaluations=1, at_the_margin=True),
        Setting(evaluations=3, at_the_margin=True, gain=1.0),
    ],
    ids=lambda setting: f"{setting.tails}-{setting.correlation}-{setting.at_the_margin}",
)
def test_false_alarms_are_no_more_than_five_per_cent(setting, as_users_run_it):
    """Of 400 runs; or of a first part that has fewer than a rate at the bound has once in 1,000."""
    # two standard errors of a rate of 5 % above it: a verdict exactly at its level passes
    bound = LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / 400)
    runs = alarms = 0
    for part in (100, 100, 200):
        rates = simulate(setting, part, seed=5 + runs)
        assert rates["accusations"] <= rates["false_alarms"]
        runs, alarms = runs + part, alarms + round(part * rates["false_alarms"])
        if bdtr(alarms, runs, bound) < 1e-3:
            return
    assert alarms <= bound * runs


@pytest.mark.slow
def test_many_judges_are_not_many_chances_for_a_false_alarm(as_users_run_it):
    """Eight judges at the margin: one comparison in each at 5 % would err in 20 % of runs."""
    setting = Setting(
        correlation=0.0, evaluations=1, samples=96, judges=8, at_the_margin=True, gain=1.0
    )
    rates = simulate(setting, 200, seed=6)
    assert rates["false_alarms"] <= LEVEL


def test_no_line_no_verdict():
    assert verdict([]) is None
