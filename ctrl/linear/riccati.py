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
         [CFT13] Costa, Fragoso & Todorov 2013, Continuous-Time Markov Jump Linear Systems.
         [R80] Roberts 1980, linear model reduction and solution of the algebraic Riccati equation
         by use of the sign function, Int. J. Control 32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.collocation import (
    INTEGRATION,
    POINTS,
    FiniteEscapeError,
    Trajectory,
    follow,
    integrate,
)
from ctrl.linear.hamiltonian import HamiltonianFlow
from ctrl.linear.lq import (
    Law,
    LinearGaussian,
    LinearQuadratic,
    Quadratic,
    TimeVarying,
    greedy,
    improve_lq,
    problem_at,
    require_concave,
    require_one,
    require_symmetric,
    times,
    value_rate,
)
from ctrl.linear.lyapunov import growth, lyapunov
from ctrl.linear.margin import cholesky, solve
from ctrl.linear.reading import largest
from ctrl.paths import TimeGrid
from ctrl.policy import DeterministicPolicy, MultivariateGaussianPolicy

NEWTON_STEPS = 60  # quadratic convergence takes under ten once it has set in
SIGN_STEPS = 40  # likewise


@dataclass(frozen=True, eq=False)
class FiniteHorizon:
    """A quadratic value over time, with the Gibbs policy that it leads to.

    Of ``solve_lq`` these are the optimal value and policy, of ``evaluate_lq`` the value of the
    policy given and its improvement.

    Attributes:
        lq: the problem, or one whose coefficients change with time.
        times: nodes that were asked for; the last is the horizon.
        to_go: S, e and c in a row, by time to go.
    """

    lq: LinearQuadratic | TimeVarying
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
        """The value at any times between the first and the last, in ``torch.func.vmap`` too.

        Raises:
            ValueError: one is before the first or after the last, or NaN.
        """
        at = t.to(self.times) if isinstance(t, Tensor) else self.times.new_tensor(t)
        to_go = self.times[-1] - at
        if largest(~self.to_go.covers(to_go)):
            first, last = (each.item() for each in self.times[[0, -1]])
            raise ValueError(
                f"t must be from {first:g} to {last:g}, the times that were solved for, got "
                f"{_listed_range(at)}; solve over times that contain these"
            )
        return _unflat(self.to_go(to_go))

    @property
    def _last(self) -> LinearQuadratic:
        return problem_at(self.lq, self.times[-1])

    def law_at(self, t: Float[Tensor, "*times"]) -> LinearGaussian:
        """The Gibbs policy at any times between the first and the last.

        Raises:
            ValueError: as ``value_at``; or the value has no best action, as that of a bad policy
                may not.
        """
        value = self.value_at(t)
        try:
            lq = problem_at(self.lq, t)
            require_concave(lq, value)
        except ValueError as error:
            raise ValueError(f"{error} at t = {_listed_range(t)}") from None
        return greedy(lq, value)

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

        if not bool(self._last.rates[1].any()):
            return DeterministicPolicy(mean)
        require_one(self._last.N)

        def scale(t: Tensor) -> Tensor:
            return cholesky(self.law_at(t).covariance)

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


def solve_lq(lq: LinearQuadratic | TimeVarying, times: Float[Tensor, " nodes"]) -> FiniteHorizon:
    """Optimal value and policy over a finite horizon ([YZ99] 6.2; entropy: [WZZ20]).

    Args:
        lq: the problem; its coefficients may be functions of time.
        times: increasing; the last is the horizon, where the terminal reward is paid.

    Returns:
        The solution at the nodes and anywhere between, to about 1e-13 of its largest entry.

    Raises:
        ValueError: N - sum_j D_j'S D_j does not stay positive definite, or the value explodes.
    """
    grid = _nodes(times)
    last = problem_at(lq, grid[-1])
    require_concave(last, last.terminal, " at the horizon")

    def rate(t: Tensor, y: Tensor) -> Tensor:
        now, value = problem_at(lq, grid[-1] - t), _unflat(y)
        return _flat(value_rate(now, value, greedy(now, value)))

    if isinstance(lq, TimeVarying) or lq.scaled_noise[1].shape[-3]:
        solution = _solution(lq, times, lambda start, horizon: integrate(rate, start, horizon))
    else:
        half = torch.linalg.solve_triangular(cholesky(lq.N), lq.B.mT, upper=False)
        free = greedy(lq, _zero(lq))  # the best of an instant, from which deviations cost N alone
        solution = _solution(lq, times, _flow(lq, free, half.mT @ half))
    at = times[-1] - solution.to_go.breaks
    require_concave(problem_at(lq, at), solution.value_at(at), " before the horizon")
    return solution


def _nodes(times: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    """``times``, refused where they are no nodes of a grid."""
    if isinstance(times, TimeGrid):
        raise TypeError("times must be a tensor, got TimeGrid; its times are grid.nodes")
    return TimeGrid(times).nodes


def solve_lq_switching(
    lq: LinearQuadratic, rates: Float[Tensor, "regimes regimes"], times: Float[Tensor, " nodes"]
) -> FiniteHorizon:
    """Optimal values and policies of a problem that switches between regimes (``ctrl.regimes``).

    The values V_i = x'S_i x/2 + e_i'x + c_i are coupled: the rate of each gains sum_j rates_ij (V_j
    - V_i), so that S_i solve coupled Riccati equations ([CFT13] chapter 4).

    Args:
        lq: the regimes' problems, a batch [regimes].
        rates: of switching from i to j, 1/time, at least 0; what is on the diagonal is not used.
        times: as for ``solve_lq``.

    Returns:
        The solution, [regimes] for each time.

    Raises:
        ValueError: the rates are not [regimes, regimes], finite and at least 0, or as ``solve_lq``.
    """
    moves = require_rates(rates, lq.A.shape[:-2])
    require_concave(lq, lq.terminal, " at the horizon")

    def rate(t: Tensor, y: Tensor) -> Tensor:
        value = _unflat(y)
        within = _flat(value_rate(lq, value, greedy(lq, value)))
        return within + moves @ y - moves.sum(1, keepdim=True) * y

    solution = _solution(lq, times, lambda start, horizon: integrate(rate, start, horizon))
    value = solution.value_at(times[-1] - solution.to_go.breaks)
    require_concave(lq, value, " before the horizon")
    return solution


def require_rates(
    rates: Float[Tensor, "regimes regimes"], regimes: tuple[int, ...]
) -> Float[Tensor, "regimes regimes"]:
    """Rates of switching with a diagonal of 0.

    Raises:
        ValueError: they are not [regimes, regimes], finite and at least 0.
    """
    if tuple(rates.shape) != (*regimes, *regimes) or len(regimes) != 1:
        raise ValueError(
            f"rates must be [regimes, regimes] for a batch of problems [regimes], got "
            f"{list(rates.shape)} for {list(regimes)}"
        )
    moves = rates - torch.diag(rates.diagonal())
    if not bool(((moves >= 0) & torch.isfinite(moves)).all()):
        raise ValueError(f"rates must be at least 0 and finite, got {rates.tolist()}")
    return moves


def evaluate_lq(
    lq: LinearQuadratic | TimeVarying, law: Law, times: Float[Tensor, " nodes"]
) -> FiniteHorizon:
    """The value of any linear-Gaussian policy over a finite horizon.

    Args:
        lq: the problem; its coefficients may be functions of time.
        law: the policy; as a function it gives a batch of laws at times [nodes], as ``law_at`` of
            another solution does, and is smooth.
        times: as for ``solve_lq``.

    Raises:
        ValueError: the value explodes, or the policy has not the problem's shapes, or no entropy
            where the temperature pays for it.
    """
    grid = _nodes(times)

    last = problem_at(lq, grid[-1])

    def rate(t: Tensor, y: Tensor) -> Tensor:
        now = law if isinstance(law, LinearGaussian) else law(grid[-1] - t)
        return _flat(value_rate(problem_at(lq, grid[-1] - t), _unflat(y), now))

    check_law(
        last, law if isinstance(law, LinearGaussian) else law(grid), time_dependent=callable(law)
    )
    if isinstance(lq, TimeVarying):
        return _solution(lq, grid, lambda start, horizon: integrate(rate, start, horizon))
    if isinstance(law, LinearGaussian) and not lq.scaled_noise[0].shape[-3]:
        return _solution(lq, grid, _flow(lq, law, torch.zeros_like(lq.A)))
    return _solution(lq, grid, lambda start, horizon: integrate(rate, start, horizon))


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
    """Cost of drawing the optimal actions: temperature * action dim / 2 * int e^{-discount t}.

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
    covariance = law.covariance.detach()
    least = torch.linalg.eigvalsh(covariance)[..., 0]
    if bool((least < -1e-12 * covariance.abs().amax((-2, -1))).any()):
        raise ValueError(f"covariance must not be negative; it has the eigenvalue {least.min():g}")
    flat = torch.isnan(cholesky(covariance)).any(-1).any(-1)
    if bool(((lq.rates[1] > 0) & flat).any()):
        raise ValueError(
            "covariance must be positive definite where the temperature is positive: the entropy "
            f"of a deterministic policy is minus infinity; its least eigenvalue is {least.min():g}"
        )


def _listed_range(t: Tensor) -> str:
    least, most = -largest(-t), largest(t)
    return f"times from {least:g} to {most:g}" if least < most else f"{most:g}"


def _flat(value: Quadratic) -> Float[Tensor, "*batch dim"]:
    return torch.cat([value.hessian.flatten(-2), value.slope, value.constant.unsqueeze(-1)], dim=-1)


def _unflat(y: Float[Tensor, "*batch dim"]) -> Quadratic:
    n = (math.isqrt(4 * y.shape[-1] - 3) - 1) // 2  # of n^2 + n + 1 numbers
    hessian, slope, constant = y.split([n * n, n, 1], dim=-1)
    return Quadratic(hessian.unflatten(-1, (n, n)), slope, constant.squeeze(-1))


def _solution(
    lq: LinearQuadratic | TimeVarying, times: Tensor, along: Callable[[Tensor, float], Trajectory]
) -> FiniteHorizon:
    nodes = _nodes(times)
    if nodes.dtype != torch.float64:
        raise TypeError(f"times must be float64, got {nodes.dtype}")
    try:
        terminal = problem_at(lq, nodes[-1]).terminal
        to_go = along(_flat(terminal), float((nodes[-1] - nodes[0]).detach()))
    except FiniteEscapeError as escape:
        raise ValueError(
            f"the value must be finite back to t = {nodes[0].item():g}, and N - sum_j D_j'S D_j "
            f"positive definite before the horizon, but near t = "
            f"{nodes[-1].item() - escape.time:.6g} one is not (or the problem is too stiff): "
            "shorten the horizon, or make the cost of the action larger or that of the state "
            "smaller"
        ) from escape
    return FiniteHorizon(lq, nodes, to_go)


def _flow(
    lq: LinearQuadratic, law: LinearGaussian, G: Tensor
) -> Callable[[Tensor, float], Trajectory]:
    """The value where nothing scales the noise, in closed form at the points of every panel.

    Minus the Hessian in (x, 1) solves a Riccati equation, of the drift and the cost under ``law``
    and with deviations from it paid as G says (not at all: G = 0). What the noise and the entropy
    add to the constant is an integral over the panel.
    """
    gone = value_rate(lq, _zero(lq), law)
    discount, covariance = lq.rates[0], lq.sigma @ lq.sigma.mT
    lift = torch.nn.functional.pad  # from x to (x, 1)
    drift = [lq.A + lq.B @ law.gain, (lq.f + times(lq.B, law.offset)).unsqueeze(-1)]
    kept = lift(torch.cat(drift, dim=-1), (0, 0, 0, 1))
    A = kept - 0.5 * discount[..., None, None] * torch.eye(kept.shape[-1]).to(kept)
    Q = -_in_one(Quadratic(gone.hessian, gone.slope, torch.zeros_like(gone.constant)))

    def along(start: Tensor, horizon: float) -> Trajectory:
        points, integration = (start.new_tensor(each) for each in (POINTS, INTEGRATION))
        flow = HamiltonianFlow(A, lift(G, (0, 1, 0, 1)), Q, 0.5 * horizon * (points + 1))

        def panel(begin: float, halvings: int, y: Tensor) -> Tensor | None:
            P = flow.after(-_in_one(_unflat(y)), halvings)
            if not bool(torch.isfinite(P).all()):
                return None
            n, half = P.shape[-1] - 1, 0.5 * horizon / 2**halvings
            S, e, c = -P[..., :n, :n], -P[..., :n, n], -0.5 * P[..., n, n]
            added = gone.constant + 0.5 * (S * covariance).sum((-2, -1))
            aged = torch.exp(-half * discount * (points + 1).reshape(-1, *[1] * discount.ndim))
            added = aged * torch.tensordot(half * integration, added / aged, 1)
            return _flat(Quadratic(S, e, c + added))

        return follow(panel, start, horizon)

    return along


def _in_one(value: Quadratic) -> Float[Tensor, "*batch more more"]:
    """The symmetric matrix of x'Sx/2 + e'x + c in (x, 1), twice."""
    slope, constant = value.slope.unsqueeze(-1), 2 * value.constant[..., None, None]
    upper = torch.cat([value.hessian, slope], dim=-1)
    return torch.cat([upper, torch.cat([slope.mT, constant], dim=-1)], dim=-2)


def _zero(lq: LinearQuadratic) -> Quadratic:
    """The value 0."""
    return Quadratic(torch.zeros_like(lq.M), torch.zeros_like(lq.p), torch.zeros_like(lq.p[..., 0]))


def _closed_loop(lq: LinearQuadratic, law: LinearGaussian) -> tuple[Tensor, Tensor]:
    """A - discount/2 and C under a policy: of exp(-discount t / 2) X."""
    C, D = lq.scaled_noise
    kept = lq.A - 0.5 * lq.rates[0][..., None, None] * torch.eye(lq.A.shape[-1]).to(lq.A)
    return kept + lq.B @ law.gain, C + D @ law.gain.unsqueeze(-3)


def _decays(lq: LinearQuadratic, law: LinearGaussian) -> tuple[Tensor, Tensor]:
    """Whether exp(-discount t) E|X_t|^2 decays beyond round-off in each problem; and its rate."""
    rate, margin = growth(*_closed_loop(lq, law))
    return rate < -margin, rate


def _stationary(lq: LinearQuadratic, law: LinearGaussian) -> tuple[Quadratic, Tensor]:
    """The value of a policy but for its constant, and the rate that is left, reward/time."""
    kept, C = _closed_loop(lq, law)
    zero = _zero(lq)
    S = lyapunov(kept, C, -value_rate(lq, zero, law).hessian)
    left = value_rate(lq, Quadratic(S, zero.slope, zero.constant), law).slope
    kept = kept - 0.5 * lq.rates[0][..., None, None] * torch.eye(kept.shape[-1]).to(kept)
    slope = -solve(kept.mT, left.unsqueeze(-1), "E X_t must decay").squeeze(-1)
    value = Quadratic(S, slope, torch.zeros_like(slope[..., 0]))
    return value, value_rate(lq, value, law).constant


def _optimal_law(lq: LinearQuadratic) -> LinearGaussian:
    """Newton's iteration to its end; its last two steps are differentiable, and enough so.

    A policy's error moves its value, and so the next policy, in second order: after one step from
    the optimum the first derivatives of the policy are right, after two the first three.
    """
    with torch.no_grad():
        law, relative = _by_sign(lq) or _stabilising(lq), math.inf
        for _ in range(NEWTON_STEPS):
            after = _improved(lq, law)
            change = (after.gain - law.gain).abs().amax() + (after.offset - law.offset).abs().amax()
            size = after.gain.abs().amax() + after.offset.abs().amax() + 1e-300
            before, relative, law = relative, float((change / size).detach()), after
            if relative < 1e-15 or (relative < 1e-6 and relative >= before):
                break
        else:
            raise ValueError(
                "the costs must have an optimal policy, but policy iteration does not converge: "
                "make the cost of the state or of the action larger, or the discount"
            )
        _require_decay(lq, law, "the costs must have an optimal policy that keeps")
    return _improved(lq, _improved(lq, law))


def _improved(lq: LinearQuadratic, law: LinearGaussian) -> LinearGaussian:
    try:
        value = _stationary(lq, law)[0]
    except ValueError as error:
        raise ValueError(
            "the costs must have an optimal policy that keeps exp(-discount t) E|X_t|^2 from "
            "growing, but policy iteration leads to one that does not: make the cost of the state "
            "or of the action larger, or the discount"
        ) from error
    return improve_lq(lq, value)


def _require_decay(lq: LinearQuadratic, law: LinearGaussian, demand: str) -> None:
    decays, rate = _decays(lq, law)
    if not bool(decays.all()):
        raise ValueError(
            f"{demand} exp(-discount t) E|X_t|^2 from growing, or the value is not finite; it "
            f"grows like exp({rate.max().item():.3g} t), up to round-off"
        )


def _by_sign(lq: LinearQuadratic) -> LinearGaussian | None:
    """The optimal policy to some digits where neither state nor action scales the noise ([R80]).

    Minus the Hessian P solves A'P + P A - P G P + Q = 0, and (1, P) spans the kernel of Z + 1, Z
    the sign of the Hamiltonian matrix (A, -G; -Q, -A'): the limit of Z -> (c Z + 1 / (c Z)) / 2.
    None where the noise is scaled, or the sign does not come out.
    """
    if lq.scaled_noise[0].shape[-3]:
        return None
    zero = _zero(lq)
    require_concave(lq, zero)
    free = greedy(lq, zero).gain  # takes care of the costs of state and action together
    A = _closed_loop(lq, LinearGaussian(free, lq.l, lq.N))[0]
    G = lq.B @ torch.linalg.solve_ex(lq.N, lq.B.mT).result
    Q = lq.M + lq.R.mT @ free
    sign = torch.cat([torch.cat([A, -G], dim=-1), torch.cat([-Q, -A.mT], dim=-1)], dim=-2)
    for _ in range(SIGN_STEPS):
        inverse = torch.linalg.inv_ex(sign).inverse
        norms = [each.square().sum((-2, -1)).sqrt()[..., None, None] for each in (sign, inverse)]
        scale = (norms[1] / norms[0]).sqrt()
        after = 0.5 * (scale * sign + inverse / scale)
        relative = ((after - sign).square().sum((-2, -1)).sqrt()[..., None, None] / norms[0]).max()
        sign = after
        if not bool(relative > 1e-9):
            break
    if not bool(torch.isfinite(sign).all()):
        return None
    left, right = (torch.eye(sign.shape[-1]).to(sign) + sign).chunk(2, dim=-1)
    basis, triangle = torch.linalg.qr(right)
    P = torch.linalg.solve_triangular(triangle, -basis.mT @ left, upper=True)
    law = greedy(lq, Quadratic(-0.5 * (P + P.mT), zero.slope, zero.constant))
    finite = bool(torch.isfinite(law.gain).all())
    return law if finite and bool(_decays(lq, law)[0].all()) else None


def _stabilising(lq: LinearQuadratic) -> LinearGaussian:
    """Some policy under which exp(-discount t) E|X_t|^2 decays.

    It is computed for |x|^2 + |a|^2 as the cost, and for a discount so large that no action is
    needed; the discount is lowered as far as the policy allows, and the policy improved, in turn.
    """
    eyes = [torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix) for matrix in (lq.M, lq.N)]
    law = LinearGaussian(0 * lq.R, 0 * lq.l, 0 * lq.N)
    decays, rate = _decays(lq, law)
    kept, C = _closed_loop(lq, law)
    size = 2 * kept.abs().sum((-2, -1)) + C.square().sum((-3, -2, -1))
    size = torch.where(size > 0, size, 1)
    extra, closest = rate + size, 1e-6 * size  # any closer, and the policies explode
    while not bool(decays.all()):
        if bool((~decays & (extra - rate < closest)).any()):
            raise ValueError(
                "the problem must have a linear policy that keeps exp(-discount t) E|X_t|^2 from "
                f"growing, but under the best it grows like exp({rate.max().item():.3g} t): (A, "
                "B) is not stabilisable, or the noise C is too large; a larger discount helps"
            )
        extra = torch.where(decays, 0, rate + 0.1 * (extra - rate))
        easier = LinearQuadratic(
            lq.A, lq.B, 0 * lq.sigma, *eyes, C=lq.C, D=lq.D, discount=lq.rates[0] + extra
        )
        law = greedy(easier, _stationary(easier, law)[0])
        decays, rate = _decays(lq, law)
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
