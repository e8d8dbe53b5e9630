"""Control problems: an SDE with its running and terminal rewards."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from ctrl.sde import ControlledSDE
from ctrl.stopping import Domain

RunningReward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths], reward/time."""
TerminalReward = Callable[[Tensor], Tensor]
"""states [paths, *event] -> [paths], reward."""
ExitReward = Callable[[Tensor, Tensor], Tensor]
"""(exit times [paths], states at exit [paths, *event]) -> [paths], reward."""


@dataclass(frozen=True)
class ControlProblem:
    """Maximise E[ int_0^T e^{-d t} (r(t, X, a) + temperature entropy) dt + e^{-d T} r(X_T) ].

    With a domain T is the first exit from it, if that is before the horizon.

    Attributes:
        sde: the dynamics.
        horizon: T, time; may be infinite.
        running_reward: per unit of time; none if not given.
        terminal_reward: paid once, at T; none if not given.
        discount: a rate, 1/time.
        temperature: reward per nat of the policy's entropy and unit of time.
        domain: at whose boundary a path ends (``ctrl.stopping``); everything if not given.
        exit_reward: paid there in place of the terminal reward, a function of the time too; the
            terminal reward is paid there if not given.
    """

    sde: ControlledSDE
    horizon: float
    running_reward: RunningReward | None = None
    terminal_reward: TerminalReward | None = None
    discount: float = 0.0
    temperature: float = 0.0
    domain: Domain | None = None
    exit_reward: ExitReward | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sde, ControlledSDE):
            raise TypeError(f"sde must be a ControlledSDE, got {type(self.sde).__name__}")
        for name in ("running_reward", "terminal_reward", "exit_reward"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function (or None), got {value!r}")
        for name in ("horizon", "discount", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
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
        for name in ("discount", "temperature"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
