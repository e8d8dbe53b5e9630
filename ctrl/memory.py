"""Policies with memory: what they do at (t, x) depends on the path so far.

    m_0 = start(X_0),    a_k ~ pi(. | t_k, X_k, m_k),    m_{k+1} = remember(t_k, X_k, a_k, m_k)

The memory is a function of the past of states and actions, so along stored paths it can be computed
again, in order, and the density of every action is that of an ordinary policy with the memory it
had. (X, m) is Markov and X alone is not: whatever rests on a value function of (t, x) for which the
policy is one of (t, x) (q-rates, hjb, the exploratory SDE) refuses such a policy; make the memory
part of the state there. Roll-outs, likelihood ratios and KL of paths, returns with entropy, and
likelihood-ratio gradients take it.

Sources  filtering as a state of its own: Bensoussan 1992, stochastic control of partially
         observable systems; the formulas here are the chain rule of densities.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.policy import Policy
from ctrl.user_functions import call


@dataclass(frozen=True, eq=False)
class PolicyWithMemory:
    """a ~ pi(. | t, x, m), with m_{k+1} = remember(t_k, x_k, a_k, m_k).

    Attributes:
        start: states at the first node [paths, *event] -> m_0 [paths, *memory].
        remember: (t [], states, actions, memory) -> the memory of the next step.
        at: memory -> the ordinary policy of (t, x) that acts with it.
    """

    start: Callable[[Tensor], Tensor]
    remember: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    at: Callable[[Tensor], Policy]

    def __post_init__(self) -> None:
        for name in ("start", "remember", "at"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}")


AnyPolicy = Policy | PolicyWithMemory


def first_memory(
    policy: PolicyWithMemory, states: Float[Tensor, " paths *event"]
) -> Float[Tensor, " paths *memory"]:
    """m_0.

    Raises:
        ValueError: there is not one memory for each path.
    """
    return _one_for_each_path("start", call("policy.start", policy.start, states), states)


def next_memory(
    policy: PolicyWithMemory, t: Tensor, states: Tensor, actions: Tensor, memory: Tensor
) -> Float[Tensor, " paths *memory"]:
    """m_{k+1} of what was seen and done at step k.

    Raises:
        ValueError: it has not the shape of the memory before.
    """
    after = call("policy.remember", policy.remember, t, states, actions, memory)
    if not isinstance(after, Tensor) or after.shape != memory.shape:
        shape = list(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise ValueError(f"policy.remember must return {list(memory.shape)}, got {shape}")
    return after


def with_memory(policy: PolicyWithMemory, memory: Float[Tensor, " paths *memory"]) -> Policy:
    """The ordinary policy that acts with this memory.

    Raises:
        TypeError: ``at`` returns something else.
    """
    now = policy.at(memory)
    if not isinstance(now, Policy):
        raise TypeError(f"policy.at must return a Policy, got {type(now).__name__}")
    return now


def memories(
    policy: PolicyWithMemory,
    times: Float[Tensor, " steps"],
    states: Float[Tensor, "paths steps *event"],
    actions: Float[Tensor, "paths steps *action"],
) -> Float[Tensor, "paths steps *memory"]:
    """The memory at the left end of every step, computed in order from what was seen and done."""
    memory = first_memory(policy, states[:, 0])
    each = [memory]
    for k in range(len(times) - 1):
        memory = next_memory(policy, times[k], states[:, k], actions[:, k], memory)
        each.append(memory)
    return torch.stack(each, dim=1)


class _InOrder:
    """A policy with memory during one roll-out: asked once at every node, in order."""

    def __init__(self, policy: PolicyWithMemory, start: Float[Tensor, " paths *event"]) -> None:
        self._policy = policy
        self._memory = first_memory(policy, start)
        self._now = with_memory(policy, self._memory)

    @property
    def is_random(self) -> bool:
        """Whether the policy of this step draws its action."""
        return self._now.is_random

    def mean(self, t: Tensor, states: Tensor) -> Tensor:
        """The mean action with what is remembered now."""
        return self._now.mean(t, states)

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The action; what was seen and done is then remembered."""
        assert states is not None  # the roll-out gives them
        action = self._now.act(mean, t, noise, states)
        self._memory = next_memory(self._policy, t, states, action, self._memory)
        self._now = with_memory(self._policy, self._memory)
        return action


def for_roll_out(policy: AnyPolicy, start: Float[Tensor, " paths *event"]) -> Policy:
    """The policy as a roll-out asks it; one with memory begins anew."""
    return _InOrder(policy, start) if isinstance(policy, PolicyWithMemory) else policy


def _one_for_each_path(name: str, memory: Tensor, states: Tensor) -> Tensor:
    if not isinstance(memory, Tensor) or memory.ndim < 1 or len(memory) != len(states):
        shape = list(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
        raise ValueError(
            f"policy.{name} must return [{len(states)}, *memory], one for each path, got {shape}"
        )
    return memory
