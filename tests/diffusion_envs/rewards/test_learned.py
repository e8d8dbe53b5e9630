"""The contract of the rewards that are networks, the same for every one of them."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

from diffusion_envs import rewards
from diffusion_envs.rewards.contract import Counting, Embedder
from diffusion_envs.rewards.declaration import Declaration, Declaring
from diffusion_envs.rewards.preprocessing import Preprocessing
from diffusion_envs.runs.settings import describe, rebuild
from tests.diffusion_envs.rewards.learned import CASES, Case

ERROR = 1e-5  # in units of the score: what float32 and the plain float64 formulas may differ by
SIZES = [(41, 58), (58, 41), (28, 28), (28, 21), (20, 9)]  # 28 is the networks' own


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def tensors(case):
    return case.state(torch.Generator().manual_seed(16))


@pytest.fixture(scope="module")
def folder(case, tensors, tmp_path_factory):
    return case.write(tmp_path_factory.mktemp("reward"), tensors)


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 41, 58, generator=generator)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


# -- the score -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_scores_are_those_of_the_published_formula(case, tensors, folder, generator, height, width):
    images = torch.rand(4, 3, height, width, generator=generator)
    scores = case.make(folder)(images, list(case.prompts))
    expected = case.scores(tensors, images, case.rows)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=ERROR * case.unit)
    assert expected.std() > 1e3 * ERROR * case.unit, "scores that do not differ test nothing"


def test_scores_depend_on_picture_and_prompt_alone(case, folder, images):
    prompts = list(case.prompts)
    reward = case.make(folder)
    together = reward(images, prompts)
    # each is within ERROR of the exact score
    close = {"rtol": 0, "atol": 2 * ERROR * case.unit}
    alone = [reward(images[k : k + 1], [prompts[k]]) for k in range(4)]
    torch.testing.assert_close(torch.cat(alone), together, **close)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        reward(images[order], [prompts[k] for k in order]), together[order], **close
    )
    for batch in (1, 3):
        torch.testing.assert_close(
            case.make(folder, batch=batch)(images, prompts), together, **close
        )
    same = reward(images[:1].expand(3, -1, -1, -1), [prompts[0]] * 3)
    torch.testing.assert_close(same, together[:1].expand(3), **close)


def test_keyword_arguments_are_the_same(case, folder, images):
    reward, prompts = case.make(folder), list(case.prompts)
    assert torch.equal(reward(prompts=prompts, images=images), reward(images, prompts))
    assert torch.equal(rewards.score(reward, images, prompts), reward(images, prompts))


def test_gradients_are_those_of_finite_differences(case, folder, generator):
    # grey pictures of their own size or larger, so that nothing saturates; the first prompt's score
    images = 0.3 + 0.4 * torch.rand(2, 3, 41, 58, generator=generator)
    reward = case.make(folder, batch=1)
    prompts = [case.prompts[0]] * 2
    leaf = images.clone().requires_grad_()
    value = rewards.differentiable_score(reward, leaf, prompts)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    steepness = slope.flatten(1).norm(dim=1)
    if "percent" in case.name:  # cut at 0
        assert ((steepness > 0) == (value > 0)).all()
    for k in range(2):
        if not steepness[k] > 0:
            continue
        direction = slope[k] / steepness[k]

        def difference(step, k=k, direction=direction):
            ends = [reward(images[k : k + 1] + s * direction, prompts[:1]) for s in (step, -step)]
            return ((ends[0] - ends[1]) / (2 * step)).item()

        step = 0.2
        # the error of differences is quadratic in the step, so a third of this is that of the
        # smaller one; what float32 leaves is below ERROR
        tolerance = abs(difference(2 * step) - difference(step)) + ERROR * case.unit / step
        assert tolerance < 0.2 * steepness[k], "blind"
        assert difference(step) == pytest.approx(steepness[k].item(), abs=tolerance)


def test_scores_without_a_gradient_ask_for_none(case, folder, images):
    reward = case.make(folder)
    assert reward.differentiable is True
    assert not reward(images, list(case.prompts)).requires_grad
    assert reward(images.clone().requires_grad_(), list(case.prompts)).requires_grad


def test_embeddings_are_one_vector_for_each_picture(case, folder, images):
    reward = case.make(folder, batch=3)
    assert isinstance(reward, Embedder)
    vectors = rewards.embed(reward, images)
    assert vectors.shape[0] == 4
    alone = torch.cat([reward.embedding(image[None]) for image in images])
    torch.testing.assert_close(alone, vectors, rtol=1e-4, atol=1e-5 * float(vectors.abs().max()))
    assert (vectors[0] - vectors[1]).norm() > 1e-3 * vectors.norm()


def test_scoring_draws_no_random_numbers(case, folder, images):
    before = torch.get_rng_state()
    case.make(folder)(images, list(case.prompts))
    assert torch.equal(torch.get_rng_state(), before)


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_over_the_limit_are_cut_and_counted(case, folder, images):
    reward = case.make(folder)
    assert isinstance(reward, Counting)
    if case.limit is None:
        reward(images, list(case.prompts))
        assert not any(reward.counts.values())
        assert torch.equal(reward(images, [""] * 4), reward(images, list(case.prompts)))
        return
    words = [" ".join(["cat"] * n) for n in (case.limit, case.limit + 1, case.limit + 40)]
    image = images[:1].expand(3, -1, -1, -1)
    scores = reward(image, words)
    close = {"rtol": 0, "atol": 2 * ERROR * case.unit}
    torch.testing.assert_close(scores, scores[:1].expand(3), **close)
    assert reward.counts == {"prompts_cut": 2}
    reward(image, [words[2]] * 3)
    assert reward.counts == {"prompts_cut": 5}
    assert case.make(folder).counts == {"prompts_cut": 0}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.1, -0.1])
def test_pictures_that_are_none_are_refused(case, folder, images, value):
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images must have values in \[0, 1\]"):
        case.make(folder)(images, list(case.prompts))


def test_swapped_arguments_are_refused(monkeypatch, case, folder, images):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(TypeError, match=r"are they swapped\?"):
        case.make(folder)(list(case.prompts), images)
    with pytest.raises(ValueError, match="one prompt for each image, got 4 images and 3 prompts"):
        case.make(folder)(images, list(case.prompts)[:3])


@pytest.mark.parametrize("batch", [0, -1, True])
def test_a_batch_that_is_no_number_is_refused(case, folder, batch):
    with pytest.raises(
        ValueError, match=f"batch must be a whole number of at least 1, got {batch}"
    ):
        case.make(folder, batch=batch)


def test_missing_files_are_listed_when_it_is_made(case, folder, tmp_path):
    whole = copied(folder, tmp_path)
    for role in case.weights.files:
        names = case.weights.names(role)
        for path in [whole / name for name in names if (whole / name).is_file()]:
            kept = path.read_bytes()
            path.unlink()
            with pytest.raises(FileNotFoundError) as caught:
                case.make(whole)
            assert re.search(rf"lacks .*{re.escape(path.name)}", str(caught.value))
            assert f"-m diffusion_envs.rewards fetch {case.weights.reward}" in str(caught.value)
            path.write_bytes(kept)
    assert case.make(whole)


@pytest.mark.parametrize("source", ["nowhere/to/be", "./here", "weights.pt"])
def test_a_source_that_is_not_there_is_refused_when_it_is_made(case, source):
    with pytest.raises(FileNotFoundError, match=f"fetch {case.weights.reward}"):
        case.make(source)
    with pytest.raises(ValueError, match="got an empty name"):
        case.make("")


class _Called:
    def __reduce__(self):
        return print, ("a pickle was executed",)


def test_a_file_that_is_a_program_is_not_run(case, folder, tmp_path, images, capsys):
    program = copied(folder, tmp_path)
    names = case.weights.names("weights")
    for name in names:
        (program / name).unlink(missing_ok=True)
    torch.save({"state_dict": _Called()}, program / names[-1])
    with pytest.raises(ValueError, match="is refused: it names"):
        case.make(program)(images, list(case.prompts))
    assert capsys.readouterr().out == ""


def test_weights_that_are_no_numbers_are_refused(case, tensors, tmp_path, images):
    name = next(k for k, v in tensors.items() if v.is_floating_point() and v.ndim > 1)
    broken = {k: v.clone() for k, v in tensors.items()}
    broken[name].view(-1)[5] = torch.nan
    folder = case.write(tmp_path, broken)
    with pytest.raises(ValueError, match=r"must hold finite numbers, but .* does not"):
        case.make(folder)(images, list(case.prompts))


def test_weights_of_another_network_are_refused(case, tensors, tmp_path, images):
    name = next(k for k in reversed(tensors) if k.endswith(("ln_1.bias", "norm1.bias")))
    folder = case.write(tmp_path, tensors | {name: tensors[name][:-1]})
    with pytest.raises(ValueError, match=r"does not hold the weights of .* in another shape"):
        case.make(folder)(images, list(case.prompts))


# -- what it says of itself ------------------------------------------------------------------------


def test_it_declares_scale_licence_version_source_and_preprocessing(case, folder):
    reward = case.make(folder)
    assert isinstance(reward, Declaring)
    declared = reward.declaration
    assert isinstance(declared, Declaration)
    for field in dataclasses.fields(declared):
        assert getattr(declared, field.name), field.name
    assert isinstance(declared.preprocessing, Preprocessing)
    assert declared.preprocessing.size == 224


def test_it_is_the_same_again_from_its_settings(case, folder, images, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    reward = case.make(folder.name, batch=3)
    assert Path(str(reward.model)).is_absolute()
    monkeypatch.chdir(tmp_path)
    again = rebuild(describe(reward))
    assert again == reward
    assert again is not reward
    prompts = list(case.prompts)
    assert torch.equal(again(images, prompts), reward(images, prompts))
    assert again == reward, "counts are no setting"
    assert hash(again) == hash(reward)
