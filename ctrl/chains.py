"""Controlled Markov chains of finitely many states in continuous time: jump rates as the control.

    P(X_{t+h} = y | X_t = x) = Q_t[x, y] h + o(h),  y != x;   Q_t[x, x] = -sum_y Q_t[x, y]

Girsanov     log dP/dP0 = sum over jumps log Q[x, y] / Q0[x, y]  -  int (lambda(X) - lambda0(X)) dt,
             lambda(x) = -Q[x, x] the rate of leaving x ([B81]); its mean is
             KL(P || P0) = E int sum_{y != x} Q log(Q / Q0) - Q + Q0 dt
Tilt         max over laws of  E[ int r(X) dt + g(X_T) ] - b KL(P || P0)  is  b log h(0, x),
             h(t, .) = e^{(Q0 + r/b) (T - t)} e^{g/b}, and is attained by Doob's transform
             Q*_t[x, y] = Q0[x, y] h(t, y) / h(t, x)
These are path_kl and tilt of a diffusion with log-ratios of rates in the place of u: what
fine-tuning a discrete diffusion model by its rates is about. Exact, for state spaces that fit in a
matrix; ``log_ratio`` of sampled paths and ``kl_rate`` are what a network would estimate.

Tensors are float64 where answers are exact. Rates are held over the steps of a grid.

Sources  [B81] Bremaud 1981, Point Processes and Queues, VI.2.
         [FS06] Fleming & Soner 2006, Controlled Markov Processes and Viscosity Solutions, VI (the
         logarithmic transform).
         [J53] Jensen 1953, uniformisation, Skandinavisk Aktuarietidskrift 36.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctrl.estimate import require_probabilities
from ctrl.linear.exponential import exponential
from ctrl.paths import TimeGrid


@dataclass(frozen=True, eq=False)
class JumpRates:
    """Rates of a chain, held over every step of a grid.

    Attributes:
        grid: from 0 to the horizon, say.
        matrices: Q over every step, 1/time: off the diagonal at least 0, rows summing to 0.
    """

    grid: TimeGrid
    matrices: Float[Tensor, "steps states states"]

    def __post_init__(self) -> None:
        Q, steps = self.matrices, len(self.grid.steps)
        if Q.ndim != 3 or Q.shape[0] != steps or Q.shape[1] != Q.shape[2] or not Q.shape[1]:
            raise ValueError(
                f"matrices must be [{steps}, states, states], one for each step of the grid, got "
                f"{list(Q.shape)}"
            )
        if not bool(torch.isfinite(Q).all()):
            raise ValueError("matrices must be finite")
        off = Q - torch.diag_embed(Q.diagonal(dim1=1, dim2=2))
        if bool((off < 0).any()):
            k, x, y = (int(i) for i in (off < 0).nonzero()[0])
            raise ValueError(
                f"rates must be at least 0 off the diagonal, but matrices[{k}, {x}, {y}] = "
                f"{float(Q[k, x, y]):g}"
            )
        missed = Q.sum(2).abs().max()
        if bool(missed > 1e3 * torch.finfo(Q.dtype).eps * (1 + Q.abs().max())):
            raise ValueError(
                f"rows of rates must sum to 0, but one sums to {float(missed):g}: the diagonal is "
                "minus the rate of leaving (chains.with_diagonal)"
            )

    @property
    def leaving(self) -> Float[Tensor, "steps states"]:
        """lambda(x), the rate of leaving a state, 1/time."""
        return -self.matrices.diagonal(dim1=1, dim2=2)

    def transitions(self) -> Float[Tensor, "steps states states"]:
        """P(X_{k+1} = y | X_k = x) over every step: e^{Q h}."""
        return exponential(self.matrices * self.grid.steps.to(self.matrices)[:, None, None])

    def marginals(self, start: Float[Tensor, " states"]) -> Float[Tensor, "nodes states"]:
        """Probabilities of the states at every node.

        Args:
            start: those at the first node.

        Raises:
            ValueError: ``start`` is no law of these states.
        """
        laws = [_law(start, self)]
        for P in self.transitions():
            laws.append(laws[-1] @ P)
        return torch.stack(laws)

    def occupations(self, start: Float[Tensor, " states"]) -> Float[Tensor, "steps states"]:
        """Expected time spent in every state during every step: time.

        Args:
            start: probabilities at the first node.
        """
        n, h = self.matrices.shape[1], self.grid.steps.to(self.matrices)[:, None, None]
        eye = torch.eye(n).to(self.matrices).expand_as(self.matrices)
        upper = torch.cat([self.matrices * h, eye], dim=2)  # the answer is linear in the second
        whole = exponential(torch.nn.functional.pad(upper, (0, 0, 0, n)))
        spent = h * whole[:, :n, n:]  # int_0^h e^{Q s} ds
        return torch.einsum("kx,kxy->ky", self.marginals(start)[:-1], spent)


def with_diagonal(rates: Float[Tensor, "*steps states states"]) -> Float[Tensor, "..."]:
    """Rates with the diagonal that makes rows sum to 0; what stood there does not count."""
    off = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
    return off - torch.diag_embed(off.sum(-1))


def held(matrix: Float[Tensor, "states states"], grid: TimeGrid) -> JumpRates:
    """The same rates over the whole grid."""
    return JumpRates(grid, matrix.expand(len(grid.steps), *matrix.shape))


@dataclass(frozen=True, eq=False)
class JumpPaths:
    """Sampled paths: at times[i] a path goes to states[i + 1], where it may have been before.

    Attributes:
        times: within the grid and increasing; the grid's end where a path has no more jumps.
        states: indices; the first is the start.
        grid: on which they were sampled.
    """

    times: Float[Tensor, "paths jumps"]
    states: Int[Tensor, "paths more"]
    grid: TimeGrid

    def __post_init__(self) -> None:
        if self.times.ndim != 2 or not self.times.is_floating_point():
            raise ValueError(
                f"times must be [paths, jumps], floating point, got {self.times.dtype} "
                f"{list(self.times.shape)}"
            )
        if self.states.shape != (self.times.shape[0], self.times.shape[1] + 1):
            raise ValueError(
                f"states must be {[self.times.shape[0], self.times.shape[1] + 1]}, one more than "
                f"times, got {list(self.states.shape)}"
            )
        begin, end = (self.grid.nodes[i].to(self.times) for i in (0, -1))
        inside = (self.times >= begin) & (self.times <= end)
        if not bool(inside.all()) or bool((self.times.diff(dim=1) < 0).any()):
            raise ValueError("times must increase and lie within the grid")

    def at(self, t: float) -> Int[Tensor, " paths"]:
        """The state of every path at a time."""
        count = (self.times <= t).sum(1, keepdim=True)
        return self.states.gather(1, count).squeeze(1)


def simulate(
    rates: JumpRates, start: Int[Tensor, " paths"], generator: torch.Generator
) -> JumpPaths:
    """Paths of the chain, exactly, by uniformisation ([J53]).

    Candidate times come at the largest rate of leaving any state, and at each the path goes on by
    1 + Q / (that rate): mostly to where it is.

    Args:
        rates: of the chain.
        start: the state of every path at the first node.
        generator: of the numbers.

    Raises:
        ValueError: a start is no state.
    """
    states = rates.matrices.shape[1]
    if bool(((start < 0) | (start >= states)).any()):
        raise ValueError(f"start must be states from 0 to {states - 1}, got {start.tolist()}")
    begin, end = (float(rates.grid.nodes[i]) for i in (0, -1))
    fastest = float(rates.leaving.max())
    mean = rates.matrices.new_full((len(start),), fastest * (end - begin))
    counts = torch.poisson(mean, generator=generator)
    most = int(counts.max())
    shape = (len(start), 2, most)
    uniform = torch.rand(shape, dtype=mean.dtype, device=mean.device, generator=generator)
    index = torch.arange(most).to(counts)
    late = index >= counts[:, None]
    times = (begin + (end - begin) * uniform[:, 0]).masked_fill(late, end).sort(dim=1).values
    steps = torch.searchsorted(
        rates.grid.nodes.to(times)[1:-1].contiguous(), times, right=True
    )  # the step that each time is in
    each = [start]
    for i in range(most):
        rows = rates.matrices[steps[:, i], each[-1]] / fastest
        rows = rows + torch.nn.functional.one_hot(each[-1], states).to(rows)
        chosen = (rows.cumsum(1) < uniform[:, 1, i, None]).sum(1).clamp(max=states - 1)
        each.append(torch.where(late[:, i], each[-1], chosen))
    return JumpPaths(times, torch.stack(each, dim=1), rates.grid)


def log_ratio(rates: JumpRates, reference: JumpRates, paths: JumpPaths) -> Float[Tensor, " paths"]:
    """log dP/dP0 of every path, nats ([B81]).

    Differentiable in both rates. Minus infinity where a path makes a jump that ``rates`` does not
    make, infinity where the reference does not.

    Args:
        rates: of P.
        reference: of P0, on the same grid.
        paths: of either.

    Raises:
        ValueError: the grids or the numbers of states differ.
    """
    _require_one_grid(rates, reference)
    nodes = rates.grid.nodes.to(paths.times)
    before, after = paths.states[:, :-1], paths.states[:, 1:]
    step = torch.searchsorted(nodes[1:-1].contiguous(), paths.times.contiguous(), right=True)
    jumps = before != after
    one = torch.ones_like(paths.times)
    each = [
        torch.where(jumps, chain.matrices[step, before, after], one).log()
        for chain in (rates, reference)
    ]
    gained = torch.where(jumps, each[0] - each[1], 0).sum(1)
    # int (lambda - lambda0) dt to a time t while in x, for every x: linear between nodes
    excess = rates.leaving - reference.leaving
    at_nodes = torch.cat([torch.zeros_like(excess[:1]), (excess * nodes.diff()[:, None]).cumsum(0)])
    ends = torch.cat([paths.times, nodes[-1].expand(len(paths.times), 1)], dim=1)
    begins = torch.cat([nodes[0].expand(len(paths.times), 1), paths.times], dim=1)

    def until(t: Tensor) -> Tensor:
        k = torch.searchsorted(nodes[1:-1].contiguous(), t.contiguous(), right=True)
        return at_nodes[k, paths.states] + excess[k, paths.states] * (t - nodes[k])

    return gained - (until(ends) - until(begins)).sum(1)


def kl_rate(rates: JumpRates, reference: JumpRates) -> Float[Tensor, "steps states"]:
    """sum_{y != x} Q log(Q / Q0) - Q + Q0: nats per unit of time spent in x.

    Infinite where ``rates`` makes a jump that the reference does not make.
    """
    _require_one_grid(rates, reference)
    diagonal = torch.eye(rates.matrices.shape[1], dtype=torch.bool, device=rates.matrices.device)
    Q, Q0 = (chain.matrices.masked_fill(diagonal, 0) for chain in (rates, reference))
    return (torch.xlogy(Q, Q) - torch.xlogy(Q, Q0) - Q + Q0).sum(2)


def path_kl(
    rates: JumpRates, reference: JumpRates, start: Float[Tensor, " states"]
) -> Float[Tensor, ""]:
    """KL(P || P0) over the grid, nats: time spent in every state, times ``kl_rate``. Exact.

    Args:
        rates: of P.
        reference: of P0, on the same grid.
        start: probabilities of the states at the first node, under both.

    Raises:
        ValueError: as ``log_ratio``; or ``start`` is no law.
    """
    spent, rate = rates.occupations(start), kl_rate(rates, reference)
    return torch.where(spent > 0, spent * rate, 0).sum()


@dataclass(frozen=True, eq=False)
class Tilted:
    """The law that maximises E[int r dt + g(X_T)] - b KL(. || P0), b the KL's weight.

    Attributes:
        reference: P0.
        kl_weight: b, reward per nat.
        running_reward: r over every step, reward/time.
        log_h: log h at every node.
    """

    reference: JumpRates
    kl_weight: float
    running_reward: Float[Tensor, "steps states"]
    log_h: Float[Tensor, "nodes states"]

    @property
    def values(self) -> Float[Tensor, "nodes states"]:
        """V = b log h at every node, reward."""
        return self.kl_weight * self.log_h

    def rates_at(self, t: float) -> Float[Tensor, "states states"]:
        """Q*_t[x, y] = Q0[x, y] h(t, y) / h(t, x), 1/time.

        Raises:
            ValueError: ``t`` is not within the grid.
        """
        nodes = self.reference.grid.nodes.to(self.log_h)
        if not float(nodes[0]) <= t <= float(nodes[-1]):
            raise ValueError(f"t must be from {nodes[0]:g} to {nodes[-1]:g}, got {t}")
        k = int(torch.searchsorted(nodes[1:-1].contiguous(), nodes.new_tensor(t), right=True))
        log_h = self._earlier(k, float(nodes[k + 1]) - t)
        return with_diagonal(self.reference.matrices[k] * (log_h - log_h[:, None]).exp())

    def held(self) -> JumpRates:
        """The best rates at the middle of every step, held over it: optimal up to O(step^2)."""
        nodes = self.reference.grid.nodes
        middles = (0.5 * (nodes[1:] + nodes[:-1])).tolist()
        return JumpRates(self.reference.grid, torch.stack([self.rates_at(t) for t in middles]))

    def transitions(self) -> Float[Tensor, "steps states states"]:
        """P*(X_{k+1} = y | X_k = x) over every step, exactly, whatever its length."""
        each = []
        for k, h in enumerate(self.reference.grid.steps.tolist()):
            weights, _ = self._weighted(k, h)
            each.append((weights.log() + self.log_h[k + 1]).softmax(1))
        return torch.stack(each)

    def _earlier(self, k: int, duration: float) -> Float[Tensor, " states"]:
        """log h, a while before the end of step k."""
        return _earlier(*self._weighted(k, duration), self.log_h[k + 1])

    def _weighted(self, k: int, duration: float) -> tuple[Tensor, float]:
        Q, r = self.reference.matrices[k], self.running_reward[k]
        return _weighted(Q, r, self.kl_weight, duration)


def tilt(
    reference: JumpRates,
    kl_weight: float,
    terminal_reward: Float[Tensor, " states"],
    running_reward: Float[Tensor, " states"] | Float[Tensor, "steps states"] | None = None,
) -> Tilted:
    """The KL-regularised optimum by matrix exponentials, backwards over the steps ([FS06]). Exact.

    Args:
        reference: P0, its rates held over the steps.
        kl_weight: b, positive, reward per nat.
        terminal_reward: g.
        running_reward: r, reward/time, of every state or held over the steps; none if not given.

    Raises:
        ValueError: ``kl_weight`` is not positive, or a reward has not one number for each state.
    """
    if not 0 < kl_weight < math.inf:
        raise ValueError(f"kl_weight must be positive and finite, got {kl_weight}")
    steps, states, _ = reference.matrices.shape
    if running_reward is None:
        running_reward = torch.zeros_like(terminal_reward)
    if terminal_reward.shape != (states,) or running_reward.shape not in (
        (states,),
        (steps, states),
    ):
        raise ValueError(
            f"terminal_reward must be [{states}] and running_reward [{states}] or "
            f"[{steps}, {states}], got {list(terminal_reward.shape)} and "
            f"{list(running_reward.shape)}"
        )
    for name, reward in (("terminal", terminal_reward), ("running", running_reward)):
        if reward.dtype != reference.matrices.dtype or not bool(torch.isfinite(reward).all()):
            raise ValueError(
                f"{name}_reward must be finite and {reference.matrices.dtype}, as rates are, got "
                f"{reward}"
            )
    r = running_reward.expand(steps, states)
    log_h = [terminal_reward / kl_weight]
    for k, h in reversed(list(enumerate(reference.grid.steps.tolist()))):
        log_h.append(_earlier(*_weighted(reference.matrices[k], r[k], kl_weight, h), log_h[-1]))
    return Tilted(reference, kl_weight, r, torch.stack(log_h[::-1]))


def _weighted(Q: Tensor, r: Tensor, kl_weight: float, duration: float) -> tuple[Tensor, float]:
    """e^{(Q + r/b) duration}, transitions weighted by exp of the reward on the way over b.

    Without a factor that might overflow, the largest reward's, whose logarithm comes second.
    """
    rates = r / kl_weight
    most = float(rates.detach().max())
    return exponential((Q + torch.diag(rates - most)) * duration), most * duration


def _earlier(weights: Tensor, log_factor: float, log_h: Tensor) -> Float[Tensor, " states"]:
    """log of e^log_factor weights h."""
    top = log_h.max()
    return (weights @ (log_h - top).exp()).log() + top + log_factor


def _require_one_grid(rates: JumpRates, reference: JumpRates) -> None:
    if rates.matrices.shape != reference.matrices.shape or not torch.equal(
        rates.grid.nodes, reference.grid.nodes
    ):
        raise ValueError("rates must be of the same states and on the same grid as the reference")


def _law(start: Tensor, rates: JumpRates) -> Tensor:
    states = rates.matrices.shape[1]
    if start.shape != (states,):
        raise ValueError(f"start must be [{states}], one a state, got {list(start.shape)}")
    require_probabilities("start", start)
    return start
