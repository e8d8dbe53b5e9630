"""Exact solutions of the exploratory linear-quadratic problem (``lq``).

The value V = x'Sx/2 + e'x + c of a policy solves d_t V + value_rate(V, policy) = 0, and the optimal
one the same along its own Gibbs policy (the Riccati equation, [YZ99] 6.2). Over a finite horizon it
is integrated by collocation, to round-off and for any t; over an infinite one the value of a policy
is a linear (Lyapunov) equation, and the optimum the limit of policy iteration, which is Newton's
method ([K68]) and converges quadratically.

Sources  [K68] Kleinman 1968, on an iterative technique for Riccati equation computations, IEEE TAC.
         [WZZ20] Wang, Zariphopoulou & Zhou 2020, JMLR 21, section 4.
         [JZ22b] Jia & Zhou 2022, policy gradient and actor-critic, JMLR 23, section 6 (ergodic).
         [YZ99] Yong & Zhou, Stochastic Controls, chapter 6.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.collocation import FiniteEscapeError, Rate, Trajectory, integrate
from ctrl.linear.lq import (
    Law,
    LinearGaussian,
    LinearQuadratic,
    Quadratic,
    greedy,
    improve_lq,
    kron,
    require_concave,
    require_one,
    require_symmetric,
    value_rate,
)
from ctrl.paths import TimeGrid
from ctrl.policy import DeterministicPolicy, MultivariateGaussianPolicy

NEWTON_STEPS = 60  # quadratic convergence takes under ten once it has set in


@dataclass(frozen=True, eq=False)
class FiniteHorizon:
    """A quadratic value over time, with the Gibbs policy that it leads to.

    Of ``solve_lq`` these are the optimal value and policy, of ``evaluate_lq`` the value of the
    policy given and its improvement.

    Attributes:
        lq: the problem.
        times: nodes that were asked for; the last is the horizon.
        to_go: S, e and c in a row, by time to go.
    """

    lq: LinearQuadratic
    times: Float[Tensor, " nodes"]
    to_go: Trajectory

    @property
    def values(self) -> Quadratic:
        """The value at the nodes, [nodes, *batch]."""
        return self.value_at(self.times)

    @property
    def laws(self) -> LinearGaussian:
        """The Gibbs policy at the nodes, [nodes, *batch]."""
        return self.law_at(self.times)

    def value_at(self, t: Float[Tensor, "*times"]) -> Quadratic:
        """The value at any times between the nodes; NaN before the first and after the last."""
        return _unflat(self.to_go(self.times[-1] - t.to(self.times)), self.lq)

    def law_at(self, t: Float[Tensor, "*times"]) -> LinearGaussian:
        """The Gibbs policy at any times between the nodes."""
        return greedy(self.lq, self.value_at(t))

    def value(self, t: Float[Tensor, ""], x: Float[Tensor, "paths state"]) -> Tensor:
        """V(t, x), [paths], reward; differentiable in t and x."""
        return self.value_at(t)(x)

    def policy(self) -> DeterministicPolicy | MultivariateGaussianPolicy:
        """The Gibbs policy for ``simulate``; deterministic without temperature.

        Raises:
            ValueError: this is a batch of problems, and their policies draw their actions.
        """

        def mean(t: Tensor, x: Tensor) -> Tensor:
            return self.law_at(t).mean(x)

        if not bool(self.lq.rates[1].any()):
            return DeterministicPolicy(mean)
        require_one(self.lq.N)

        def scale(t: Tensor) -> Tensor:
            return torch.linalg.cholesky(self.law_at(t).covariance)

        return MultivariateGaussianPolicy(mean, scale)


@dataclass(frozen=True, eq=False)
class Stationary:
    """A quadratic value without horizon, and the policy that it belongs to.

    Attributes:
        lq: the problem.
        quadratic: the value; of an ergodic problem it is up to a constant, which is 0 here.
        law: the optimal policy, or the one that was evaluated.
        average_reward: per unit of time, of an ergodic problem.
    """

    lq: LinearQuadratic
    quadratic: Quadratic
    law: LinearGaussian
    average_reward: Float[Tensor, " *batch"] | None = None

    def value(self, t: Float[Tensor, ""], x: Float[Tensor, "paths state"]) -> Tensor:
        """V(x), [paths], reward."""
        return self.quadratic(x)

    def policy(self) -> DeterministicPolicy | MultivariateGaussianPolicy:
        """The policy for ``simulate``."""
        return self.law.policy()


def solve_lq(lq: LinearQuadratic, times: Float[Tensor, " nodes"]) -> FiniteHorizon:
    """Optimal value and policy over a finite horizon ([YZ99] 6.2; entropy: [WZZ20]).

    Args:
        lq: the problem.
        times: increasing; the last is the horizon, where the terminal reward is paid.

    Returns:
        The solution at the nodes and anywhere between, to about 1e-13 of its largest entry.

    Raises:
        ValueError: N - sum_j D_j'S D_j does not stay positive definite, or the value explodes.
    """
    require_concave(lq, lq.terminal, " at the horizon")

    def rate(t: Tensor, y: Tensor) -> Tensor:
        value = _unflat(y, lq)
        return _flat(value_rate(lq, value, greedy(lq, value)))

    solution = _solution(lq, times, rate)
    value = solution.value_at(times[-1] - solution.to_go.breaks)
    require_concave(lq, value, " before the horizon")
    return solution


def evaluate_lq(lq: LinearQuadratic, law: Law, times: Float[Tensor, " nodes"]) -> FiniteHorizon:
    """The value of any linear-Gaussian policy over a finite horizon.

    Args:
        lq: the problem.
        law: the policy; as a function it gives a batch of laws at times [nodes], as ``law_at`` of
            another solution does, and is smooth.
        times: as for ``solve_lq``.

    Raises:
        ValueError: the value explodes, or the policy has not the problem's shapes, or no entropy
            where the temperature pays for it.
    """
    grid = TimeGrid(times).nodes

    def rate(t: Tensor, y: Tensor) -> Tensor:
        now = law if isinstance(law, LinearGaussian) else law(grid[-1] - t)
        return _flat(value_rate(lq, _unflat(y, lq), now))

    check_law(
        lq, law if isinstance(law, LinearGaussian) else law(grid), time_dependent=callable(law)
    )
    return _solution(lq, grid, rate)


def solve_lq_discounted(lq: LinearQuadratic) -> Stationary:
    """Optimal value and policy of an endless discounted problem ([WZZ20] Theorem 4).

    Args:
        lq: the problem, with a positive discount; its terminal cost plays no part.

    Returns:
        The solution whose policy keeps exp(-discount t) E|X_t|^2 from growing.

    Raises:
        ValueError: no linear policy does that, or N - sum_j D_j'S D_j is not positive definite.
    """
    _require_discounted(lq)
    return evaluate_lq_discounted(lq, _optimal_law(lq))


def solve_lq_ergodic(lq: LinearQuadratic) -> Stationary:
    """Optimal value (up to a constant), policy and average reward ([JZ22b] section 6).

    Args:
        lq: the problem, without discount; its terminal cost plays no part.

    Returns:
        The solution whose policy keeps E|X_t|^2 bounded. The average reward counts the entropy.

    Raises:
        ValueError: no linear policy does that, or N - sum_j D_j'S D_j is not positive definite.
    """
    _require_undiscounted(lq)
    return evaluate_lq_ergodic(lq, _optimal_law(lq))


def evaluate_lq_discounted(lq: LinearQuadratic, law: LinearGaussian) -> Stationary:
    """The value of a linear-Gaussian policy in an endless discounted problem.

    Raises:
        ValueError: exp(-discount t) E|X_t|^2 does not decay under the policy.
    """
    _require_discounted(lq)
    check_law(lq, law)
    _require_decay(lq, law, "gain must keep")
    value, rate = _stationary(lq, law)
    constant = rate / lq.rates[0]
    return Stationary(lq, Quadratic(value.hessian, value.slope, constant), law)


def evaluate_lq_ergodic(lq: LinearQuadratic, law: LinearGaussian) -> Stationary:
    """The value (up to a constant) and average reward of a linear-Gaussian policy.

    Raises:
        ValueError: E|X_t|^2 does not stay bounded under the policy.
    """
    _require_undiscounted(lq)
    check_law(lq, law)
    _require_decay(lq, law, "gain must keep")
    value, average = _stationary(lq, law)
    return Stationary(lq, value, law, average)


def cost_of_exploration(lq: LinearQuadratic, horizon: float = math.inf) -> Float[Tensor, " *batch"]:
    """What drawing the optimal actions costs: temperature * action dim / 2 * int e^{-discount t}.

    The optimal value without temperature, less the plain reward (without its entropy) of the
    optimal exploratory policy: ``temperature dim / (2 discount)`` without horizon ([WZZ20]
    Theorem 8), whatever the state, the dynamics and the rewards. An ergodic problem loses
    ``temperature dim / 2`` per unit of time.

    Raises:
        ValueError: neither horizon nor discount bounds it.
    """
    discount, temperature = lq.rates
    if horizon == math.inf and bool((discount == 0).any()):
        raise ValueError("horizon must be finite, or the discount positive: the cost is infinite")
    flat = discount == 0
    safe = torch.where(flat, torch.ones_like(discount), discount)
    duration = -torch.expm1(-safe * horizon) / safe
    duration = torch.where(flat, torch.full_like(discount, horizon), duration)
    return 0.5 * temperature * lq.B.shape[-1] * duration


def check_law(lq: LinearQuadratic, law: LinearGaussian, time_dependent: bool = False) -> None:
    """Refuse a policy that is none for the problem.

    Raises:
        ValueError: shapes, symmetry, or an entropy of minus infinity that is paid for.
    """
    n, k = lq.B.shape[-2:]
    events = {"gain": (k, n), "offset": (k,), "covariance": (k, k)}
    for name, event in events.items():
        tensor: Tensor = getattr(law, name)
        batch = tensor.shape[: tensor.ndim - len(event)][1 if time_dependent else 0 :]
        if tuple(tensor.shape[tensor.ndim - len(event) :]) != event or len(batch) > lq.N.ndim - 2:
            wanted = ["nodes"] * time_dependent + [*lq.N.shape[:-2], *event]
            raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)}")
        if tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite and float64, got {tensor}")
    require_symmetric("covariance", law.covariance)
    least = torch.linalg.eigvalsh(law.covariance.detach())[..., 0]
    if bool((least < -1e-12 * law.covariance.abs().amax((-2, -1))).any()):
        raise ValueError(f"covariance must not be negative; it has the eigenvalue {least.min():g}")
    if bool(((lq.rates[1] > 0) & (least <= 0)).any()):
        raise ValueError(
            "covariance must be positive definite where the temperature is positive: the entropy "
            f"of a policy without spread is minus infinity; its least eigenvalue is {least.min():g}"
        )


def _flat(value: Quadratic) -> Float[Tensor, "*batch dim"]:
    return torch.cat([value.hessian.flatten(-2), value.slope, value.constant.unsqueeze(-1)], dim=-1)


def _unflat(y: Float[Tensor, "*batch dim"], lq: LinearQuadratic) -> Quadratic:
    n = lq.A.shape[-1]
    hessian, slope, constant = y.split([n * n, n, 1], dim=-1)
    return Quadratic(hessian.unflatten(-1, (n, n)), slope, constant.squeeze(-1))


def _solution(lq: LinearQuadratic, times: Tensor, rate: Rate) -> FiniteHorizon:
    nodes = TimeGrid(times).nodes
    if nodes.dtype != torch.float64:
        raise TypeError(f"times must be float64, got {nodes.dtype}")
    try:
        to_go = integrate(rate, _flat(lq.terminal), float((nodes[-1] - nodes[0]).detach()))
    except FiniteEscapeError as escape:
        raise ValueError(
            f"the value must be finite back to t = {nodes[0].item():g}, but it explodes near t = "
            f"{nodes[-1].item() - escape.time:.6g} (or the problem is too stiff): shorten the "
            "horizon, or make the cost of the action larger or that of the state smaller"
        ) from escape
    return FiniteHorizon(lq, nodes, to_go)


def _second_moments(lq: LinearQuadratic, law: LinearGaussian) -> tuple[Tensor, Tensor]:
    """S -> A'S + S A + sum_j C_j'S C_j - discount S of the closed loop, as a matrix; and A."""
    A, C = lq.A + lq.B @ law.gain, lq.C + lq.D @ law.gain.unsqueeze(-3)
    eye = torch.eye(A.shape[-1]).to(A).expand_as(A)
    kept = A - 0.5 * lq.rates[0][..., None, None] * eye
    return kron(kept.mT, eye) + kron(eye, kept.mT) + kron(C.mT, C.mT).sum(-3), A


def _growth(lq: LinearQuadratic, law: LinearGaussian) -> Tensor:
    """Exponential rate of exp(-discount t) E|X_t|^2, of every problem of the batch."""
    return torch.linalg.eigvals(_second_moments(lq, law)[0].detach()).real.amax(-1)


def _stationary(lq: LinearQuadratic, law: LinearGaussian) -> tuple[Quadratic, Tensor]:
    """The value of a policy but for its constant, and the rate that is left, reward/time."""
    operator, A = _second_moments(lq, law)
    n = A.shape[-1]
    zero = Quadratic(torch.zeros_like(A), torch.zeros_like(A[..., 0]), A.new_zeros(A.shape[:-2]))
    left = value_rate(lq, zero, law).hessian.flatten(-2)
    found = -torch.linalg.solve(operator, left).unflatten(-1, (n, n))
    S = 0.5 * (found + found.mT)
    left = value_rate(lq, Quadratic(S, zero.slope, zero.constant), law).slope
    kept = A - lq.rates[0][..., None, None] * torch.eye(n).to(A)
    value = Quadratic(S, -torch.linalg.solve(kept.mT, left), zero.constant)
    return value, value_rate(lq, value, law).constant


def _optimal_law(lq: LinearQuadratic) -> LinearGaussian:
    """Newton's iteration to its end; its last two steps are differentiable, and enough so.

    A policy's error moves its value, and so the next policy, in second order: after one step from
    the optimum the first derivatives of the policy are right, after two the first three.
    """
    with torch.no_grad():
        law, moved = _stabilising(lq), math.inf
        for _ in range(NEWTON_STEPS):
            after = _improved(lq, law)
            change = (after.gain - law.gain).abs().amax() + (after.offset - law.offset).abs().amax()
            size = after.gain.abs().amax() + after.offset.abs().amax() + 1e-300
            before, moved, law = moved, float((change / size).detach()), after
            if moved < 1e-15 or (moved < 1e-6 and moved >= before):
                break
        else:
            raise ValueError(
                "the costs must have an optimal policy, but policy iteration does not converge: "
                "make the cost of the state or of the action larger, or the discount"
            )
    return _improved(lq, _improved(lq, law))


def _improved(lq: LinearQuadratic, law: LinearGaussian) -> LinearGaussian:
    after = improve_lq(lq, _stationary(lq, law)[0])
    _require_decay(lq, after, "the costs must have an optimal policy that keeps")
    return after


def _require_decay(lq: LinearQuadratic, law: LinearGaussian, demand: str) -> None:
    growth = _growth(lq, law)
    if not bool((growth < 0).all()):
        raise ValueError(
            f"{demand} exp(-discount t) E|X_t|^2 from growing, or the value is not finite; it "
            f"grows like exp({growth.max().item():.3g} t)"
        )


def _stabilising(lq: LinearQuadratic) -> LinearGaussian:
    """Some policy under which exp(-discount t) E|X_t|^2 decays.

    Found for |x|^2 + |a|^2 as the cost, and for a discount so large that no action is needed; the
    discount is lowered as far as the policy allows, and the policy improved, in turn.
    """
    eyes = [torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix) for matrix in (lq.M, lq.N)]
    law = LinearGaussian(0 * lq.R, 0 * lq.l, 0 * lq.N)
    growth = _growth(lq, law)
    size = _second_moments(lq, law)[0].abs().sum(-1).amax(-1)
    size = torch.where(size > 0, size, 1)
    extra, closest = growth + size, 1e-6 * size  # any closer, and the policies explode
    while not bool((growth < 0).all()):
        if bool(((growth >= 0) & (extra - growth < closest)).any()):
            raise ValueError(
                "the problem must have a linear policy that keeps exp(-discount t) E|X_t|^2 from "
                f"growing, but under the best it grows like exp({growth.max().item():.3g} t): (A, "
                "B) is not stabilisable, or the noise C is too large; a larger discount helps"
            )
        extra = torch.where(growth < 0, 0, growth + 0.1 * (extra - growth))
        easier = LinearQuadratic(
            lq.A, lq.B, 0 * lq.sigma, *eyes, C=lq.C, D=lq.D, discount=lq.rates[0] + extra
        )
        law = greedy(easier, _stationary(easier, law)[0])
        growth = _growth(lq, law)
    return law


def _require_discounted(lq: LinearQuadratic) -> None:
    if not bool((lq.rates[0] > 0).all()):
        raise ValueError(
            f"discount must be positive without a horizon, got {lq.rates[0].tolist()}; without "
            "discount, maximise the average reward: solve_lq_ergodic"
        )


def _require_undiscounted(lq: LinearQuadratic) -> None:
    if bool((lq.rates[0] > 0).any()):
        raise ValueError(
            f"discount must be 0 where the average reward counts, got {lq.rates[0].tolist()}; with "
            "a discount: solve_lq_discounted"
        )
