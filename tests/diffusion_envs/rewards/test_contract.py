import functools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import _get_current_function_mode_stack

from diffusion_envs import rewards
from diffusion_envs.rewards import RewardError, score

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 5).view(3, 3, 4, 5)
PROMPTS = ["a cat", "a ship", "a frog"]
NUMBERS = [0.5, -2.0, 7.0]


def giving(value):
    def my_reward(images, prompts):
        return value

    return my_reward


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS, dtype=torch.float64),
        torch.tensor(NUMBERS, dtype=torch.bfloat16),
        torch.tensor([[0.5], [-2.0], [7.0]])[:, 0],
        torch.nn.Parameter(torch.tensor(NUMBERS)).detach(),
        np.array(NUMBERS),
        np.array(NUMBERS, dtype=np.float16),
        np.array([*NUMBERS[::-1]])[::-1],
        NUMBERS,
        tuple(NUMBERS),
        [torch.tensor(x) for x in NUMBERS],
        [np.float32(x) for x in NUMBERS],
    ],
)
def test_every_form_of_real_numbers_becomes_float32_on_the_cpu(returned):
    found = score(giving(returned), IMAGES, PROMPTS)
    assert found.dtype is torch.float32
    assert found.device.type == "cpu"
    assert found.tolist() == NUMBERS


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([3, -1, 0]),
        torch.tensor([3, -1, 0], dtype=torch.int8),
        np.array([3, -1, 0]),
        [3, -1, 0],
    ],
)
def test_integers_become_float32(returned):
    found = score(giving(returned), IMAGES, PROMPTS)
    assert found.dtype is torch.float32
    assert found.tolist() == [3, -1, 0]


BAD = {
    "none": (None, "got NoneType None"),
    "string": ("good", "got str 'good'"),
    "one number": (3.0, "got float 3.0"),
    "dictionary": ({"reward": NUMBERS}, "got dict"),
    "generator": ((x for x in NUMBERS), "got generator"),
    "list of words": (["1", "2", "3"], "sample 0 got str '1'"),
    "a hole": ([0.5, None, 7.0], "sample 1 got NoneType None"),
    "nested": ([[0.5], [1.0], [2.0]], r"sample 0 got list \[0.5\]"),
    "complex list": ([0.5, 1j, 7.0], "sample 1 got complex 1j"),
    "complex": (torch.tensor([1j, 2j, 3j]), "got complex numbers"),
    "complex array": (np.array([1j, 2j, 3j]), "got a numpy array of complex128"),
    "array of words": (np.array(["1", "2", "3"]), "got a numpy array of <U1"),
    "objects": (np.array([1, None, 2], dtype=object), "got a numpy array of object"),
    "vast": ([1, 10**400, 2], "integer too large"),
    "column": (torch.ones(3, 1), r"got shape \[3, 1\]"),
    "row": (torch.ones(1, 3), r"got shape \[1, 3\]"),
    "scalar": (torch.tensor(1.0), r"got shape \[\]"),
    "short": (torch.ones(2), r"got shape \[2\]"),
    "one for all": (torch.ones(1), r"got shape \[1\]"),
    "long list": ([1.0] * 4, r"got shape \[4\]"),
    "empty": ([], r"got shape \[0\]"),
    "column array": (np.ones((3, 1)), r"got shape \[3, 1\]"),
}


@pytest.mark.parametrize(("returned", "message"), BAD.values(), ids=BAD)
def test_what_is_not_one_number_for_each_image_is_refused_by_name(returned, message):
    rule = r"reward my_reward must return one real number for each image, \[3\]"
    with pytest.raises(RewardError, match=rf"{rule}; .*{message}"):
        score(giving(returned), IMAGES, PROMPTS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39, -1e300, 1e38, -2e15])
@pytest.mark.parametrize("form", [lambda x: torch.tensor(x, dtype=torch.float64), np.array, list])
def test_a_value_whose_square_is_no_number_in_float32_is_refused_with_its_sample(bad, form):
    with pytest.raises(
        RewardError, match=r"my_reward must be finite .* sample 1 \('a ship'\)"
    ) as e:
        score(giving(form([1.0, bad, 2.0])), IMAGES, PROMPTS)
    assert f"got {bad}" in str(e.value)
    assert "1 of 3 samples" in str(e.value)


@given(values=st.lists(st.floats(), min_size=3, max_size=3))
def test_what_passes_is_finite_and_rounded_to_float32(values):
    expected = torch.tensor(values, dtype=torch.float64).float()
    if (expected.abs() <= rewards.contract.LARGEST).all():
        assert torch.equal(score(giving(values), IMAGES, PROMPTS), expected)
    else:
        with pytest.raises(RewardError, match="must be finite"):
            score(giving(values), IMAGES, PROMPTS)


def test_an_exception_is_named_and_chained():
    def my_reward(images, prompts):
        raise KeyError("no such word")

    with pytest.raises(RewardError, match="reward my_reward raised KeyError on images") as caught:
        score(my_reward, IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_is_not_taken_for_a_failure_of_the_reward():
    def my_reward(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(my_reward, IMAGES, PROMPTS)


@pytest.mark.parametrize("wrap", [lambda x: x, list])
def test_a_tensor_that_needs_a_gradient_is_refused_with_the_remedy(wrap):
    weight = torch.ones(3, requires_grad=True)

    def my_reward(images, prompts):
        with torch.enable_grad():
            return wrap(2 * weight)

    with pytest.raises(RewardError, match=r"my_reward .* needs a gradient; detach it"):
        score(my_reward, IMAGES, PROMPTS)


def test_rewards_run_without_gradients():
    weight = torch.ones(3, requires_grad=True)
    assert score(lambda images, prompts: 2 * weight, IMAGES, PROMPTS).tolist() == [2, 2, 2]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_images_outside_zero_to_one_are_refused(value):
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images must have values in \[0, 1\]"):
        score(giving(NUMBERS), images, PROMPTS)


@pytest.mark.parametrize(("images", "prompts"), [(IMAGES, PROMPTS[:2]), (IMAGES[:0], [])])
def test_there_must_be_one_prompt_for_each_image(images, prompts):
    with pytest.raises(ValueError, match="with one prompt for each"):
        score(giving(NUMBERS), images, prompts)


def test_names_are_those_of_the_function_or_class():
    assert rewards.reward_name(giving(1)) == "my_reward"
    assert rewards.reward_name(rewards.Colour("red")) == "Colour"
    assert rewards.reward_name(functools.partial(giving(1), prompts=[])) == "my_reward"


# -- a user's own ----------------------------------------------------------------------------------

MODULE = """
def brightness(images, prompts):
    return images.mean((1, 2, 3))

class Contrast:
    def __call__(self, images, prompts):
        return images.std((1, 2, 3))

class Needs:
    def __init__(self, scale):
        pass

number = 3
nothing = None
"""


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_here.py").write_text(MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0")
    (tmp_path / "my_importing_rewards.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_rewards_here", "my_broken_rewards", "my_importing_rewards"):
        sys.modules.pop(name, None)


def test_a_function_and_a_class_are_loaded_by_name(my_rewards):
    for name, expected in (
        ("brightness", IMAGES.mean((1, 2, 3))),
        ("Contrast", IMAGES.std((1, 2, 3))),
    ):
        assert torch.equal(
            score(rewards.load(f"my_rewards_here:{name}"), IMAGES, PROMPTS), expected
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brightness", "must be given as my_module:my_function or .* got 'brightness'"),
        (":brightness", "must be given as my_module:my_function"),
        ("my_rewards_here:", "must be given as my_module:my_function"),
        ("my_reward_here:brightness", "cannot import.*did you mean 'my_rewards_here'"),
        ("my_rewards_here:brightnes", "has no 'brightnes'; did you mean 'brightness'"),
        ("my_rewards_here:number", "must be callable, got 3"),
        ("my_rewards_here:nothing", "must be callable, got None"),
        (
            "my_rewards_here:Needs",
            r"must be made without arguments, but Needs\(\) raised TypeError",
        ),
        ("my_broken_rewards:any", "cannot import my_broken_rewards: ZeroDivisionError"),
        ("my_importing_rewards:any", "No module named 'nowhere_to_be_found'"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(my_rewards, spec, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(spec)


def test_a_function_in_a_file_is_loaded_by_its_path_whatever_the_file_is_called(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("SCALE = 3.0")
    own = tmp_path / "random.py"  # as a module of Python
    own.write_text(
        "from helper_of_mine import SCALE\n"
        "def scaled(images, prompts):\n    return SCALE * images.mean((1, 2, 3))\n"
    )
    loaded = rewards.load(f"{own}:scaled")
    torch.testing.assert_close(score(loaded, IMAGES, PROMPTS), 3.0 * IMAGES.mean((1, 2, 3)))
    assert rewards.load(f"{own}:scaled") is loaded
    own.write_text("def scaled(images, prompts):\n    return images.mean((1, 2, 3))\n")
    again = score(rewards.load(f"{own}:scaled"), IMAGES, PROMPTS)
    torch.testing.assert_close(again, IMAGES.mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"FileNotFoundError: there is no file .*/nowhere\.py"):
        rewards.load(f"{tmp_path}/nowhere.py:scaled")
    with pytest.raises(ValueError, match="has no 'scale'; did you mean 'scaled'"):
        rewards.load(f"{own}:scale")


def test_importing_rewards_loads_no_heavy_library():
    heavy = "('diffusers', 'transformers', 'matplotlib', 'pyarrow', 'pandas')"
    code = f"import sys, diffusion_envs.rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reward_may_change_its_images_in_place_and_no_one_else_sees_it():
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    kept = images.clone()

    def darkens(pictures, prompts):
        pictures.mul_(-5.0)
        return pictures.mean((1, 2, 3))

    told = rewards.score(darkens, images, ["a", "b", "c"])
    torch.testing.assert_close(told, -5 * kept.mean((1, 2, 3)))
    assert torch.equal(images, kept)
    leaf = images.clone().requires_grad_()
    rewards.differentiable_score(darkens, leaf, ["a", "b", "c"]).sum().backward()
    assert torch.equal(leaf, kept)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.full_like(kept, -5 / 48))


def test_pictures_with_their_prompts_are_let_through_and_so_is_an_overshoot_of_a_decoder():
    rewards.require_inputs(IMAGES, PROMPTS)
    rewards.require_inputs(IMAGES.double(), tuple(PROMPTS))
    rewards.require_inputs((IMAGES * 1.0018 - 0.0009).requires_grad_(), ["", "", ""])


@pytest.mark.parametrize(
    ("images", "prompts", "error", "words"),
    [
        (PROMPTS, IMAGES, TypeError, "got list; images come first, then prompts: are they swapped"),
        (IMAGES.numpy(), PROMPTS, TypeError, "images must be a tensor, got ndarray$"),
        (IMAGES, IMAGES, TypeError, "sequence of strings, got Tensor$"),
        (IMAGES, [*PROMPTS[:2], None], TypeError, "sequence of strings, got list of NoneType$"),
        (IMAGES, "abc", TypeError, "got str; one string for each image in a list"),
        ((IMAGES * 255).byte(), PROMPTS, TypeError, "torch.uint8: divide 8-bit ones by 255"),
        (IMAGES[0], PROMPTS, ValueError, r"got \[3, 4, 5\]"),
        (IMAGES[:, :1], PROMPTS, ValueError, r"got \[3, 1, 4, 5\]"),
        (IMAGES[:0], [], ValueError, r"got \[0, 3, 4, 5\]"),
        (IMAGES, PROMPTS[:2], ValueError, "got 3 images and 2 prompts"),
        (IMAGES * 1.0011, PROMPTS, ValueError, "got 0 to 1.0011"),
        (IMAGES - 0.0011, PROMPTS, ValueError, "got -0.0011 to 0.9989"),
        (IMAGES.where(IMAGES < 1, math.nan), PROMPTS, ValueError, "nan"),
    ],
)
def test_what_a_reward_cannot_score_is_refused_by_name(images, prompts, error, words):
    with pytest.raises(error, match=words):
        rewards.require_inputs(images, prompts)


def test_a_reward_that_counts_is_told_from_one_that_does_not():
    class Cutting:
        counts = {"prompts_cut": 3}  # noqa: RUF012  # read only

    assert isinstance(Cutting(), rewards.Counting)
    assert not isinstance(rewards.Colour(), rewards.Counting)


# -- what a reward does besides --------------------------------------------------------------------


def test_torchs_settings_are_afterwards_what_they_were():
    def settings():
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            len(_get_current_function_mode_stack()),  # each call of torch goes through it
        )

    def my_reward(pictures, prompts):
        torch.set_grad_enabled(not torch.is_grad_enabled())
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        prompts.clear()
        return pictures.mean((1, 2, 3))

    before, prompts = settings(), [*PROMPTS]
    torch.testing.assert_close(score(my_reward, IMAGES, prompts), IMAGES.mean((1, 2, 3)))
    assert settings() == before
    with pytest.raises(RewardError):
        rewards.differentiable_score(my_reward, IMAGES.clone().requires_grad_(), prompts)
    assert settings() == before
    assert prompts == PROMPTS


def test_a_reward_that_leaves_the_program_is_an_error_of_the_reward():
    def my_reward(pictures, prompts):
        sys.exit(0)

    for ask in (score, rewards.differentiable_score):
        with pytest.raises(RewardError, match="reward my_reward raised SystemExit"):
            ask(my_reward, IMAGES, PROMPTS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("20 GiB"), MemoryError("no room")])
def test_memory_that_runs_out_in_a_reward_is_no_error_of_the_reward(error):
    def my_reward(pictures, prompts):
        raise error

    for ask in (score, rewards.differentiable_score):
        with pytest.raises(type(error), match=str(error)):
            ask(my_reward, IMAGES, PROMPTS)


class Breaking(float):
    def __float__(self):
        raise ArithmeticError("no float")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.tensor(NUMBERS).to_sparse(), "got a tensor that is not dense"),
        (torch.tensor(NUMBERS).to("meta"), "got Tensor, which cannot be read"),
        ([Breaking(1.0)] * 3, "got list, which cannot be read: no float"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(returned, words):
    with pytest.raises(RewardError, match=f"reward my_reward must return one .*; {words}"):
        score(giving(returned), IMAGES, PROMPTS)


def test_a_differentiable_reward_that_is_too_large_is_refused_with_its_sample():
    def my_reward(pictures, prompts):
        return pictures.mean((1, 2, 3)) * torch.tensor([1.0, 1.0, 1e17])

    with pytest.raises(RewardError, match=r"my_reward must be finite .* sample 2 \('a frog'\) got"):
        rewards.differentiable_score(my_reward, IMAGES.clone().requires_grad_(), PROMPTS)


@pytest.mark.parametrize("reward", [lambda images: images.mean((1, 2, 3)), lambda i, p, m: i])
def test_a_reward_of_other_arguments_is_told_which_there_are(reward):
    with pytest.raises(rewards.RewardError, match="it must take two arguments, the images and"):
        rewards.score(reward, torch.rand(3, 3, 4, 5), ["a cat"] * 3)


def test_a_reward_that_raises_is_told_how_to_try_it_alone():
    def broken(images, prompts):
        raise TypeError("of its own")

    with pytest.raises(rewards.RewardError, match=r"alone: reward\(torch\.rand\(3, 3, 4, 5\), pro"):
        rewards.score(broken, torch.rand(3, 3, 4, 5), ["a cat"] * 3)
