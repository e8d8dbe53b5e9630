"""Problems without a clock: what is endless or stationary must be the same at all times."""

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.policy import Policy, mean_action
from ctrl.problem import ControlProblem

# no two with a common measure, so that a period shows whatever it is
_TIMES = (0.0437, 0.1618, 0.3141, 0.5772, 1.0, 1.4142, 2.7183, 7.3891, 23.141, 161.8)


def require_time_homogeneous(
    problem: ControlProblem,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
    policy: Policy | None = None,
) -> None:
    """Refuse coefficients, or a policy, that change with time.

    They are compared at t = 0 and ten later times, to the last digit, at these states and actions.

    Args:
        problem: whose coefficients are looked at.
        states: x.
        actions: one for each state.
        policy: whose actions must be the same at all times too, if given.

    Raises:
        ValueError: something differs.
    """

    def at(time: float) -> dict[str, Tensor]:
        t = states.new_tensor(time)
        sigma = problem.dynamics.diffusion_at(t, states, actions)
        coefficients = {
            "drift": problem.dynamics.drift_at(t, states, actions),
            "diffusion": torch.as_tensor(sigma, dtype=states.dtype),
        }
        for i, kind in enumerate(problem.dynamics.jump_kinds):
            coefficients[f"intensity of jumps[{i}]"] = kind.intensity_at(t, states, actions)
            mark = kind.marks.rule(states)[1][-1].expand(len(states), -1)
            coefficients[f"sizes of jumps[{i}]"] = kind.sizes_at(t, states, actions, mark)
        if callable(problem.discount):
            coefficients["discount"] = problem.discount(t, states)
        if problem.running_reward is not None:
            coefficients["running_reward"] = problem.running_reward(t, states, actions)
        if problem.domain is not None:
            coefficients["domain"] = problem.domain.signed_distance(t, states)
        if problem.exit_reward is not None:
            coefficients["exit_reward"] = problem.exit_reward(t.expand(len(states)), states)
        if policy is not None:
            mean = mean_action(policy, t, states)
            noise = torch.ones_like(mean) if policy.is_random else None
            coefficients["policy"] = policy.act(mean, t, noise, states)
        return coefficients

    with torch.no_grad():
        first = at(0.0)
        for time in _TIMES:
            for name, now in at(time).items():
                if not torch.allclose(now, first[name], rtol=0, atol=0, equal_nan=True):
                    raise ValueError(
                        f"{name} must be the same at all times where there is no horizon, but it "
                        f"differs between t = 0 and t = {time:g}; make time a coordinate of the "
                        "state, or the horizon finite"
                    )
