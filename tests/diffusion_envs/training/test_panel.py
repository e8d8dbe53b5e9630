"""The panel's numbers against independent formulas, and its sentence on constructed runs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from diffusion_envs import rewards
from diffusion_envs.runs.evaluation import Evaluation
from diffusion_envs.runs.over_optimisation import (
    cosine_distances,
    embeddings,
    mean_over_pairs,
    panel,
    pixel_distances,
    verdict,
)

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
    found = panel(before, after, {"tail": Tail()})
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
    }
    singles = {
        "distance.pixels": np.sqrt(((new - old) ** 2).mean(1)),
        "distance.tail": np.diag(cosine(vectors, formerly)),
        "reward": after.rewards.double().numpy(),
        "reward_gain": (after.rewards - before.rewards).double().numpy(),
        "judge.clarity": after.judged["clarity"].double().numpy(),
        "judge_gain.clarity": (after.judged["clarity"] - before.judged["clarity"]).double().numpy(),
        "path_kl": after.path_kl.double().numpy(),
    }
    for name, values in singles.items():
        expected[name] = values.mean(), values.std(ddof=1) / math.sqrt(8)
    assert found.keys() == expected.keys()
    for name, (mean, error) in expected.items():
        # embeddings are float32: 1e-6 of 1 - cosine
        tolerance = 3e-6 if "tail" in name else 1e-9
        assert found[name].mean == pytest.approx(mean, abs=tolerance), name
        assert found[name].standard_error == pytest.approx(error, abs=tolerance), name
    assert found["diversity.pixels"].n == 7  # the only ship has no pair


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
    same = Evaluation(one, {}, one, image.repeat(4, 1, 1, 1), ["a"] * 4)
    found = panel(same, same, {"tail": Tail()})
    for name in ("diversity.pixels", "diversity.tail", "distance.pixels", "distance.tail"):
        assert found[name].mean == 0
        assert found[name].standard_error == 0


def test_two_samples_of_a_prompt_have_a_diversity_of_unknown_error_and_one_has_none(generator):
    two = evaluation(generator, 4, ["a", "b", "a", "b"])
    assert panel(two, two)["diversity.pixels"].standard_error == math.inf
    one = evaluation(generator, 3, ["a", "b", "c"])
    assert not any("diversity" in name for name in panel(one, one))


def test_the_pretrained_model_may_have_more_samples(generator):
    before, after = evaluation(generator), evaluation(generator)
    few = panel(before.first(5), after.first(5))
    assert panel(before, after.first(5)) == few
    with pytest.raises(ValueError, match="same prompts"):
        panel(before.first(5), after)


def test_what_an_ode_pays_is_left_out(generator):
    seen = evaluation(generator)
    ode = dataclasses.replace(seen, path_kl=torch.full((8,), math.inf))
    assert "path_kl" not in panel(seen, ode)


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


# -- the sentence --------------------------------------------------------------------------------


def line(update, reward, judge=None, pixels=None, error=0.05):
    def known(mean):
        return {"mean": mean, "standard_error": error, "n": 32}

    numbers = {"reward_gain": reward, "judge_gain.clarity": judge, "diversity_gain.pixels": pixels}
    return {"update": update} | {k: known(v) for k, v in numbers.items() if v is not None}


def test_a_judge_that_falls_below_the_pretrained_model_is_seen():
    said = verdict([line(10, 0.4, -0.05, 0.0), line(20, 0.9, -0.3, 0.01), line(30, 1.2, -0.5, 0.0)])
    assert said.over_optimised
    assert said.fallen == ("judge clarity",)
    assert said.since == 20
    assert said.sentence == (
        "Over-optimisation: since update 20 the reward has risen (+1.2 ± 0.05 over the pretrained "
        "model) while judge clarity (\N{MINUS SIGN}0.5 ± 0.05 over the pretrained model) fell, "
        "each by more than 3 standard errors."
    )


def test_a_judge_that_rises_first_and_falls_later_is_seen_though_it_ends_higher():
    said = verdict([line(10, 0.4, 0.5), line(20, 0.9, 0.8), line(30, 1.4, 0.3)])
    assert said.fallen == ("judge clarity",)
    assert said.since == 30
    assert "\N{MINUS SIGN}0.5 ± 0.071 from update 20" in said.sentence
    assert "+0.5 ± 0.071 from update 20" in said.sentence


def test_lost_variety_is_told_apart():
    said = verdict([line(10, 0.4, 0.3, -0.3)])
    assert said.fallen == ("diversity of pixels",)
    assert said.sentence.startswith("Over-optimisation, if variety matters: since update 10")
    assert "No judge fell" in said.sentence


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line(10, 0.4, 0.3, 0.0)], "No over-optimisation is seen: the reward has risen"),
        ([line(10, 0.4, -0.14, 0.0)], "have not fallen by more than 3 standard errors"),
        ([line(10, 0.4, None, 0.0)], "There was no judge"),
        ([line(10, 0.4)], "over-optimisation would not show"),
        ([line(10, 0.1, 0.0)], "has not risen by more than 3 standard errors"),
        # both fall: the model got worse, at no gain
        ([line(10, -0.4, -0.5)], "yet judge clarity (\N{MINUS SIGN}0.5 ± 0.05) fell"),
        # the judge falls from its best while the reward falls too
        ([line(10, 0.9, 0.8), line(20, 0.4, 0.2)], "No over-optimisation is seen"),
        # it was there, and is not any more
        ([line(10, 0.4, -0.5), line(20, 0.8, 0.5)], "No over-optimisation is seen"),
    ],
)
def test_nothing_is_said_to_fall_that_did_not(lines, words):
    said = verdict(lines)
    assert not said.over_optimised
    assert said.since is None
    assert words in said.sentence


def test_unknown_errors_prove_nothing():
    said = verdict(
        [
            line(10, 0.4, -0.5)
            | {"judge_gain.clarity": {"mean": -9.0, "standard_error": None, "n": 1}}
        ]
    )
    assert not said.over_optimised


def test_no_panel_no_verdict():
    assert verdict([]) is None
