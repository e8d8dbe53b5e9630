"""The contract of a reward, and the one place where rewards are called.

A reward is any callable (images [n, 3, h, w] in [0, 1], prompts) -> [n], larger is better. It may declare
``differentiable = True``. Whatever else it does is caught here, so nothing unusable reaches the weights.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Reward = Callable[[Tensor, Sequence[str]], Any]


class RewardError(ValueError):
    """A reward raised, or returned something unusable."""


def reward_name(reward: Reward) -> str:
    """For messages: the function's or the class's name."""
    return getattr(reward, "__name__", type(reward).__name__)


@torch.no_grad()
def score(
    reward: Reward, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
) -> Float[Tensor, " n"]:
    """Rewards of images, float32 on the CPU, checked.

    Tensors, numpy arrays and lists of numbers are accepted, in any real dtype.

    Raises:
        RewardError: the reward raised; or did not return one finite real number for each image; or
            returned a tensor that needs a gradient.
        ValueError: there is not one prompt for each image.
    """
    name, n = reward_name(reward), len(images)
    if len(prompts) != n:
        raise ValueError(f"prompts must be one for each of {n} images, got {len(prompts)}")
    try:
        returned = reward(images, list(prompts))
    except Exception as error:  # whatever a user's function raises
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
    rule = f"reward {name} must return one number for each image, [{n}]"
    if isinstance(returned, Tensor):
        if returned.requires_grad:
            raise RewardError(
                f"reward {name} returned a tensor that needs a gradient; detach it, or freeze the reward's "
                "network with requires_grad_(False)"
            )
        values = returned.detach().cpu()
    elif isinstance(returned, np.ndarray | list | tuple):
        try:
            values = torch.as_tensor(np.asarray(returned, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise RewardError(f"{rule}; got {returned!r:.80}") from error
    else:
        raise RewardError(f"{rule}; got {type(returned).__name__} {returned!r:.80}")
    if values.shape != (n,):
        raise RewardError(f"{rule}; got shape {list(values.shape)}")
    if values.is_complex():
        raise RewardError(f"{rule}; got complex numbers")
    small = values.float()
    if bad := (~torch.isfinite(small)).nonzero().flatten().tolist():
        k = bad[0]
        raise RewardError(
            f"reward {name} must be finite in float32; sample {k} ({prompts[k]!r}) got {values[k].item()}, "
            f"{len(bad)} of {n} samples are affected"
        )
    return small


def load(spec: str) -> Reward:
    """A user's own reward by name.

    Args:
        spec: "my_module:my_function"; a class is made without arguments.

    Raises:
        ValueError: ``spec`` has another form, or names nothing that can be called.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"reward must be given as my_module:my_function, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {spec!r}: cannot import {module_name}: {error}") from error
    found = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward {spec!r}: {module_name} has no {attribute!r}{hint}")
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise ValueError(f"reward {spec!r} must be callable, got {made!r}")
    return made
