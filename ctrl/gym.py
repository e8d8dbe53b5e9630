"""Control problems as gymnasium environments, and gymnasium environments as black boxes.

``ControlEnv`` gives a ``ControlProblem`` to any library that learns from gymnasium; ``sample``
gives any gymnasium environment with continuous actions to the losses of this one. Needs the extra
``gym``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Generator, Tensor

from ctrl.devices import require_generator
from ctrl.jumps import add_jumps
from ctrl.paths import Paths, TimeGrid, ends_at_horizon
from ctrl.policy import Policy
from ctrl.problem import UNKNOWN, ControlProblem
from ctrl.returns import terminal_rewards
from ctrl.solvers import BlackBox, EulerMaruyama, Solver
from ctrl.stopping import Step, Stopping, require_inside, stopping_rule
from ctrl.user_functions import all_finite, one_a_path

Start = Callable[[np.random.Generator], np.ndarray]
"""Draws one initial state, [*event]."""


class ControlEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One path of a controlled SDE, one grid step a time.

    The reward of a step is the running reward integrated over it (left end), undiscounted, and at
    the horizon the terminal reward too. Discounting is the learner's: ``info["discount"]`` is
    exp(-discount h), what the next state's value is worth now. Episodes terminate at the horizon,
    and where the state leaves the problem's domain, which pays the exit's reward; where the grid
    ends before (endless problems) they are truncated. The temperature is not paid: entropy belongs
    to the learner's policy.

    All randomness is gymnasium's: ``reset(seed=...)``.

    Attributes:
        problem: to act on; states are [dim] vectors.
        grid: the nodes of an episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # gymnasium's own

    def __init__(
        self,
        problem: ControlProblem,
        grid: TimeGrid,
        start: np.ndarray | Start,
        action_dim: int,
        *,
        action_bound: float = math.inf,
        solver: Solver | None = None,
        observe_time: bool = True,
        stopping: Stopping | None = None,
    ) -> None:
        """An environment.

        Args:
            problem: to act on.
            grid: the nodes of an episode, within the problem's horizon.
            start: the initial state [dim], or a function that draws it.
            action_dim: coordinates of the action.
            action_bound: actions are clipped to [-bound, bound]; learners that scale actions need
                it finite.
            solver: one-step map; ``EulerMaruyama()`` if not given.
            observe_time: append t to the state: optimal policies of finite horizon need it.
            stopping: how exits are seen, as in ``simulate``.

        Raises:
            ValueError: the grid ends after the horizon, or a number is out of its range.
        """
        if not isinstance(problem, ControlProblem):
            raise TypeError(f"problem must be a ControlProblem, got {type(problem).__name__}")
        if float(grid.nodes[-1]) > problem.horizon * (1 + 1e-6):
            raise ValueError(
                f"grid must end by the horizon {problem.horizon:g}, got {float(grid.nodes[-1]):g}"
            )
        if action_dim < 1:
            raise ValueError(f"action_dim must be at least 1, got {action_dim}")
        if not action_bound > 0:
            raise ValueError(f"action_bound must be positive, got {action_bound}")
        self.problem, self.grid, self._solver = problem, grid, solver or EulerMaruyama()
        self._sde = UNKNOWN if isinstance(solver, BlackBox) else problem.dynamics
        self._nodes = grid.nodes.cpu()  # states are numpy's
        self._start, self._observe_time = start, observe_time
        first = start(np.random.default_rng(0)) if callable(start) else start
        if np.ndim(first) != 1 or not np.isfinite(first).all():
            raise ValueError(f"start must be a finite vector [dim], got {first!r}")
        width = len(first) + int(observe_time)
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float64)
        bound = float(action_bound)
        self.action_space = spaces.Box(-bound, bound, (action_dim,), np.float64)
        self._state, self._step = torch.as_tensor(np.array(first, dtype=np.float64)), 0
        self._over = False
        black_box = isinstance(self._solver, BlackBox)
        self._rule = stopping_rule(problem.domain, stopping, black_box=black_box)
        self._require_inside()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a new path.

        Args:
            seed: of gymnasium's generator.
            options: none are known.

        Raises:
            ValueError: the start that was drawn is outside of the problem's domain.
        """
        super().reset(seed=seed)
        first = self._start(self.np_random) if callable(self._start) else self._start
        self._state, self._step = torch.as_tensor(np.array(first, dtype=np.float64)), 0
        self._over = False
        self._require_inside()
        return self._observation(), {"time": float(self._nodes[0])}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold the action over one step of the grid.

        Args:
            action: [action_dim].

        Raises:
            ValueError: the action has another shape or is not finite; the state became infinite or
                NaN; or the episode is over.
        """
        k, nodes = self._step, self._nodes
        if self._over or k >= len(nodes) - 1:
            raise ValueError("the episode is over: call reset()")
        wanted = self.action_space.shape
        requested = np.asarray(action, dtype=np.float64)
        if requested.shape != wanted or not np.isfinite(requested).all():
            raise ValueError(f"action must be finite, of shape {wanted}, got {action!r}")
        box = self.action_space
        assert isinstance(box, spaces.Box)  # made in __init__
        a = torch.as_tensor(np.clip(requested, box.low, box.high))
        t0, t1 = nodes[k].double(), nodes[k + 1].double()
        x, a = self._state.unsqueeze(0), a.unsqueeze(0)
        reward, h = 0.0, float(t1 - t0)
        if self.problem.running_reward is not None:
            paid = one_a_path("running_reward", self.problem.running_reward(t0, x, a), 1)
            reward += h * float(paid.detach())
        with torch.no_grad():
            after = self._solver.step(self._sde, t0, t1, x, a, self._increment(h))
            if (kinds := self._sde.jump_kinds) and not isinstance(self._solver, BlackBox):
                after, _ = add_jumps(kinds, _Drawn(self.np_random), k, t0, h, x, after, a)
        if not bool(torch.isfinite(after).all()):
            raise ValueError(
                f"the state is not finite at t = {float(t1):g}: bound the actions (action_bound) "
                "or refine the grid"
            )
        left = False
        if self._rule is not None and self.problem.domain is not None:
            uniform = torch.as_tensor(self.np_random.random(1)) if self._rule.draws else None
            step = Step(self._sde, t0, t1, x, after, a, uniform)
            leaves, exits = self._rule.exits(self.problem.domain, step)
            left = bool(leaves)
            after = exits if left else after
        self._state, self._step, self._over = after[0], k + 1, left
        last = self._step == len(nodes) - 1
        terminated = left or (last and ends_at_horizon(self.problem, self.grid))
        if left and self.problem.exit_reward is not None:
            paid = self.problem.exit_reward(t1.view(1), after)
            reward += float(all_finite("exit_reward", one_a_path("exit_reward", paid, 1)).detach())
        elif terminated:
            reward += float(terminal_rewards(self.problem, after).detach())
        info = {
            "time": float(t1),
            "discount": math.exp(-h * float(self.problem.discount_at(t0, x))),
        }
        return self._observation(), reward, terminated, last and not terminated, info

    def _require_inside(self) -> None:
        if self.problem.domain is not None:
            require_inside(self.problem.domain, self._nodes[0], self._state.unsqueeze(0))

    def _increment(self, h: float) -> Tensor:
        if isinstance(self._solver, BlackBox):
            return torch.empty(0)
        shape = (1, *self._sde.noise_shape(tuple(self._state.shape)))
        return math.sqrt(h) * torch.as_tensor(self.np_random.standard_normal(shape))

    def _observation(self) -> np.ndarray:
        state = self._state.numpy().astype(np.float64)
        if not self._observe_time:
            return state
        return np.append(state, float(self._nodes[self._step]))


@dataclass(frozen=True)
class _Drawn:
    """Normals of jumps from gymnasium's generator."""

    generator: np.random.Generator

    def for_jumps(self, k: int, kinds: int, like: Tensor) -> Tensor:
        return torch.as_tensor(self.generator.standard_normal((1, kinds)))

    def for_marks(self, k: int, kind: int, j: int, begin: int, dim: int, like: Tensor) -> Tensor:
        return torch.as_tensor(self.generator.standard_normal((1, dim)))


def sample(
    env: gymnasium.Env[Any, Any],
    policy: Policy,
    grid: TimeGrid,
    paths: int,
    *,
    seed: int,
    generator: Generator,
) -> Paths:
    """Paths of any environment with vector observations and continuous actions.

    Its rewards are kept (``Paths.rewards``), so the losses of ``martingale`` and ``q_learning``
    learn from them, with a ``ControlProblem`` that has no rewards of its own. Observations are the
    states; a reward at the end is a running reward of the last step. An episode that ends before
    the grid does is a shorter path: over if the environment terminated it, broken off if it was
    truncated.

    Args:
        env: a gymnasium environment.
        policy: acts on observations [1, dim] on the CPU; actions, of any device, are given to the
            environment as they are.
        grid: one node an observation: says how long a step of the environment is, time.
        paths: how many episodes.
        seed: of the first episode; the others follow.
        generator: of the noise that the policy draws its actions with, on their device.

    Returns:
        The paths, double precision; they show no increments.

    Raises:
        ValueError: a number is not finite.
        TypeError: the environment's actions are not continuous vectors.
    """
    if not isinstance(env.action_space, spaces.Box) or len(env.action_space.shape) != 1:
        raise TypeError(f"env must have continuous vector actions, got {env.action_space}")
    if paths < 1:
        raise ValueError(f"paths must be at least 1, got {paths}")
    states, actions, rewards = list[Tensor](), list[Tensor](), list[list[float]]()
    ends, over, steps = list[int](), list[bool](), len(grid.nodes) - 1
    for episode in range(paths):
        observed, _ = env.reset(seed=seed + episode)
        along, taken, paid = [_vector(observed)], list[Tensor](), list[float]()
        terminated = False
        for t in grid.nodes[:-1].cpu().double():
            with torch.no_grad():
                mean = policy.mean(t, along[-1].unsqueeze(0))
                noise = None
                if policy.is_random:
                    require_generator(generator, mean.device, "the action")
                    noise = torch.empty_like(mean).normal_(generator=generator)
                action = policy.act(mean, t, noise, along[-1].unsqueeze(0))[0].cpu()
            observed, reward, terminated, truncated, _ = env.step(action.numpy())
            along.append(_vector(observed))
            taken.append(action)
            paid.append(float(reward))
            if terminated or truncated:
                break
        ends.append(len(taken))
        over.append(bool(terminated))
        rest = steps - len(taken)  # of an episode that ended before the grid
        states.append(torch.stack(along + rest * along[-1:]))
        actions.append(torch.stack(taken + rest * [torch.zeros_like(taken[-1])]))
        rewards.append(paid + rest * [0.0])
    observed_rewards = torch.tensor(rewards, dtype=torch.float64)
    if not bool(torch.isfinite(observed_rewards).all()):
        raise ValueError("rewards of env must be finite")
    unequal = min(ends) < steps or any(over)
    return Paths(
        torch.stack(states),
        torch.stack(actions),
        None,
        grid,
        None,
        observed_rewards,
        black_box=True,
        ends=torch.tensor(ends) if unequal else None,
        terminated=torch.tensor(over) if unequal else None,
    )


def _vector(observed: Any) -> Tensor:
    vector = torch.as_tensor(np.asarray(observed, dtype=np.float64))
    if vector.ndim != 1 or not bool(torch.isfinite(vector).all()):
        raise ValueError(f"observations must be finite vectors, got {observed!r}")
    return vector
