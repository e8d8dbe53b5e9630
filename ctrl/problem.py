"""Control problems: an SDE, or nothing but recorded paths, with running and terminal rewards."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from jaxtyping import Float
from torch import Tensor

from ctrl.devices import require
from ctrl.sde import ControlledSDE
from ctrl.stopping import Domain
from ctrl.user_functions import call, one_a_path, require_order, takes

RunningReward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths], reward/time."""
TerminalReward = Callable[[Tensor], Tensor]
"""states [paths, *event] -> [paths], reward."""
DiscountRate = Callable[[Tensor, Tensor], Tensor]
"""(time [], states [paths, *event]) -> [paths], at least 0, 1/time."""
ExitReward = Callable[[Tensor, Tensor], Tensor]
"""(exit times [paths], states at exit [paths, *event]) -> [paths], reward."""

_ARGUMENTS = {
    "running_reward": ("t", "states", "actions"),
    "terminal_reward": ("states",),
    "exit_reward": ("times", "states"),
}


@dataclass(frozen=True)
class ControlProblem:
    """Maximise E[ int_0^T D_t (r(t, X, a) + temperature entropy) dt + D_T r(X_T) ].

    D_t = e^{-d t}, or exp(-int_0^t d(s, X_s) ds): the process is killed at the rate d, and what is
    left of it is paid (Feynman & Kac; [KS91] 5.7.6). Along paths the integral is a sum over left
    ends, as that of the running reward is (error O(step)).

    With a domain T is the first exit from it, if that is before the horizon.

    Attributes:
        sde: the dynamics; None where they are not known, in recorded data or a black box. What
            learns from paths alone takes such a problem, what needs dynamics refuses it.
        horizon: T, time; may be infinite.
        running_reward: per unit of time; none if not given.
        terminal_reward: paid once, at T; none if not given.
        discount: a rate, 1/time; a function of time and state, or a number.
        temperature: reward per nat of the policy's entropy and unit of time.
        domain: at whose boundary a path ends (``ctrl.stopping``); everything if not given.
        exit_reward: paid there in place of the terminal reward, a function of the time too; the
            terminal reward is paid there if not given.

    Sources  [KS91] Karatzas & Shreve, Brownian Motion and Stochastic Calculus, 2nd ed.
    """

    sde: ControlledSDE | None
    horizon: float
    running_reward: RunningReward | None = None
    terminal_reward: TerminalReward | None = None
    discount: float | DiscountRate = 0.0
    temperature: float = 0.0
    domain: Domain | None = None
    exit_reward: ExitReward | None = None

    def __post_init__(self) -> None:
        if self.sde is not None and not isinstance(self.sde, ControlledSDE):
            raise TypeError(
                f"sde must be a ControlledSDE (None: not known), got {type(self.sde).__name__}"
            )
        for name, arguments in _ARGUMENTS.items():
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function (or None), got {value!r}")
            if value is not None and not takes(value, len(arguments)):
                raise TypeError(f"{name} must be a function of ({', '.join(arguments)})")
            if value is not None:
                require_order(name, value, f"({', '.join(arguments)})")
        if callable(self.discount):
            if not takes(self.discount, 2):
                raise TypeError("discount must be a number or a function of (t, states)")
            require_order("discount", self.discount, "(t, states)")
        numbers = ("horizon", "temperature", *(() if callable(self.discount) else ("discount",)))
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                remedy = f"; float({name}) makes one" if isinstance(value, Tensor) else ""
                raise TypeError(f"{name} must be a number, got {value!r}{remedy}")
        if not self.horizon > 0:
            raise ValueError(f"horizon must be positive, got {self.horizon}")
        if self.domain is not None and not isinstance(self.domain, Domain):
            raise TypeError(
                f"domain must have a signed_distance, got {self.domain!r}; ctrl.stopping.Inside "
                "makes a domain of a function"
            )
        if self.domain is None and self.exit_reward is not None:
            raise ValueError("exit_reward must be None where there is no domain to leave")
        if self.terminal_reward is not None and math.isinf(self.horizon) and self.domain is None:
            raise ValueError(
                "horizon must be finite where a terminal reward is paid (or give a domain, at "
                "whose boundary it is paid), got inf"
            )
        for name in numbers[1:]:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")

    @property
    def dynamics(self) -> ControlledSDE:
        """The SDE, for what cannot do without.

        Raises:
            ValueError: it is not known.
        """
        if self.sde is None:
            raise ValueError(NO_DYNAMICS)
        return self.sde

    def discount_at(
        self, t: Tensor, states: Float[Tensor, " paths *event"]
    ) -> float | Float[Tensor, " paths"]:
        """The rate of discounting at (t, x), 1/time: a number where it is the same for all.

        Raises:
            ValueError: it is negative, not finite, or not one number a path.
        """
        if not callable(self.discount):
            return self.discount
        rate = one_a_path("discount", call("discount", self.discount, t, states), len(states))
        kept = rate.detach()
        require(
            ((kept >= 0) & (kept < math.inf)).all(),
            lambda: ValueError(
                f"discount must be at least 0 and finite, but at t = {float(t):g} it is "
                f"{float(kept[~((kept >= 0) & (kept < math.inf))][0]):g}"
            ),
        )
        return rate


NO_DYNAMICS = (
    "problem.sde must be given: the dynamics are needed here, and this problem has none (recorded "
    "data, a black box); use what learns from paths alone: ctrl.martingale, the losses of "
    "ctrl.q_learning, policy_gradient.return_gradient or temporal_difference_gradient"
)


def _unknown(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
    raise ValueError(NO_DYNAMICS)


UNKNOWN = ControlledSDE(_unknown, _unknown, controls_diffusion=True)
"""Stands where a solver is handed the equation and must not look at it, as a ``BlackBox``."""
