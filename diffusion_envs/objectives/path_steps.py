"""Objectives that learn from single steps of the sampled paths, their rows and their losses."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from ctrl.devices import as_like, read, sent
from diffusion_envs.objectives.preflight import Experiments, why_path_kl, why_ratio
from diffusion_envs.objectives.protocol import Objective, PreflightError, Update, Values
from diffusion_envs.rollout import Rollout
from diffusion_envs.samplers import GaussianSteps


@dataclass(frozen=True, eq=False)
class Rows:
    """Single steps of paths with the current policy's action; only ``mean`` carries a gradient.

    The action is the score, or the expected data (``samplers.gaussian_steps``).

    The members of a group stand side by side, at the same step: ``view(-1, group, ...)``; if the
    objective joins steps, ``view(-1, steps, group, ...)``. What one method alone reads is in a
    class of its own, which it makes of these (``PathObjective.rows``).
    """

    mean: Float[Tensor, " rows *event"]  # current policy
    old_mean: Float[Tensor, " rows *event"]  # the policy that sampled
    reference_score: Float[Tensor, " rows *event"] | None  # pretrained, where it is compared
    noise: Float[Tensor, " rows *event"]  # standard normal that led to the next state
    advantage: Float[Tensor, " rows"]
    step_size: Float[Tensor, " rows"]  # of the sampler's clock; DDIM's is int g^2 dt
    horizon: Float[Tensor, ""]  # sum of all step sizes of a path
    score_gain: Float[Tensor, " rows"]  # d(mean of the next state) / d(action)
    std: Float[Tensor, " rows"]  # of the transition
    # path KL for half a square of the action's change, over the step size: DDIM's is the same at
    # every step, ((1 + eta^2) / (2 eta))^2
    kl_factor: float | Float[Tensor, " rows"]


@dataclass(frozen=True, eq=False)
class Steps:
    """Where rows come from, for the methods that need more of them than ``Rows`` holds.

    Attributes:
        rollout: of this process.
        sampler: that made it.
        path: of each row, on the device.
        step: of each row, on the device.
        joined: steps of a group that come together.
        targets: by ``PathObjective.targets``, of these rows.
        values: the value network.
        usual_moves: mean squared move of a coordinate in each step; None if not followed.
    """

    rollout: Rollout
    sampler: GaussianSteps
    path: Int64[Tensor, " rows"]
    step: Int64[Tensor, " rows"]
    joined: int
    targets: Float[Tensor, " rows *event"] | None
    values: Values | None
    usual_moves: Float[Tensor, " steps"] | None = None

    def at_step(self, table: Float[Tensor, " steps"]) -> Float[Tensor, " rows"]:
        """A table of the sampler at each row's step."""
        return as_like(table, self.rollout.costs)[self.step]


@dataclass(frozen=True)
class PathObjective(Objective):
    """Learns from the steps of sampled paths."""

    needs_density: ClassVar[bool] = True
    needs_noisy_steps: ClassVar[bool] = True
    chooses_steps: ClassVar[bool] = True
    reads_by_row: ClassVar[bool] = True
    joins_steps: ClassVar[bool] = False  # a loss is of whole paths: their used steps come together

    @property
    def compares_paths(self) -> bool:
        """Where pretrained scores enter the loss, they are those along the paths."""
        return self.needs_reference

    def action_std(self, sigma: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Standard deviation of the drawn score at a noise level; 0 if it is not drawn."""
        return torch.zeros_like(sigma)

    def targets(self, rollout: Rollout, model: Any, generator: Generator) -> Tensor | None:
        """What the scores of each step are matched with, of some paths; None if with nothing.

        Args:
            rollout: these paths.
            model: the environment.
            generator: of what is drawn for them, on the CPU.
        """
        return None

    def step_probabilities(self, steps: int) -> Float[Tensor, " steps"] | None:
        """With which steps are drawn, with replacement; None for equal ones, without."""
        return None

    def rows(self, common: Rows, steps: Steps) -> Rows:
        """The rows that the loss reads: the common ones, or more."""
        return common

    def log_ratio(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Log density of each row's decision, current over sampling policy, nats.

        Before the weights change it is 0 up to round-off: bit for bit on one machine with one
        number of threads, where roll-out and update ask the network for the same rows at once;
        otherwise up to ``log_ratio_rounding``.
        """
        return transition_log_ratio(rows)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Trusted size of the log-ratio of each row, nats."""
        return torch.full_like(rows.step_size, math.inf)

    def clipped(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Share of each row that a clip touches, to log."""
        outside = self.log_ratio(rows).abs() > self.half_width(rows)
        return outside.to(rows.step_size)

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """What each decision of the roll-out was worth, in reward."""

    def numbers(self, advantages: Float[Tensor, "paths steps"]) -> dict[str, float]:
        """What to log of the advantages."""
        return {}

    @abstractmethod
    def loss(self, rows: Any) -> Float[Tensor, " rows"]:
        """Negative surrogate objective of each row; mean times steps estimates a path's.

        A loss of a whole group is the same for each of its members, and one that joins steps for
        each of its rows: the mean is then the path's.
        """

    def losses_of(self, update: Update) -> "PathLosses":
        """Losses of single steps, after advantages and targets are computed."""
        return PathLosses(self, update)


class PathLosses:
    """Losses of single steps of the sampled paths.

    Args:
        objective: that learns.
        update: what it learns from.
    """

    def __init__(self, objective: PathObjective, update: Update) -> None:
        self.objective, self.environment, self.rollout = (
            objective,
            update.environment,
            update.rollout,
        )
        self.values, self.train_steps, self.batch = update.values, update.train_steps, update.batch
        self.sampler = update.environment.steps
        self.usual_moves = update.usual_moves
        self.targets = self._targets(update.own_stream("targets"))
        everyones = update.advantages(objective.advantages)
        self.advantages = self.rollout.place.own(everyones)
        self._numbers = objective.numbers(everyones)
        # sent once, not for every row
        self._sent = None if self.sampler.parameters else self._tables()
        factor = self.sampler.kl_factor
        self._kl_factor = (
            as_like(factor, self.rollout.costs) if isinstance(factor, Tensor) else factor
        )
        self._log_ratios: list[Tensor] = []
        self._clipped: list[Tensor] = []

    def _tables(self) -> Float[Tensor, "2 steps"]:
        """Gain and standard deviation of each step; with their gradient, where they learn."""
        tables = torch.stack([self.sampler.gain, self.sampler.std])
        return as_like(tables, self.rollout.costs)

    def _targets(self, generator: Generator) -> Float[Tensor, "paths steps *event"] | None:
        """The objective's, for as many paths at once as fit into memory."""
        paths = torch.arange(len(self.rollout.rewards))
        none = False

        @torch.no_grad()
        def targets(piece: slice) -> Tensor | None:
            nonlocal none
            if none:
                return None
            drawn = generator.get_state()
            try:
                chosen = self.rollout.chosen(paths[piece])
                part = self.objective.targets(chosen, self.environment, generator)
            except Exception:
                generator.set_state(drawn)
                raise
            none = part is None
            return part

        parts = self.environment.in_pieces(targets, self, "the targets", rows=len(paths))
        return None if none else torch.cat([part for part in parts if part is not None])

    def rows_of(self, groups: Int64[Tensor, " groups"]) -> tuple[int, int]:
        """The used steps of these groups' paths, and those that a loss joins."""
        size, used = self.rollout.group, self._used
        here = int(self.rollout.place.has(groups * size).sum())
        return here * size * used, size * (used if self.objective.joins_steps else 1)

    @property
    def _used(self) -> int:
        """Steps of each path that carry a gradient."""
        steps = self.rollout.costs.shape[1]
        return min(self.train_steps or steps, steps)

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Mean over the rows that are used, times the steps of a path if rows are single steps."""
        size, steps = self.rollout.group, self.rollout.costs.shape[1]
        used = self._used
        joined = used if self.objective.joins_steps else 1
        chosen = self._steps(len(groups), used, generator)  # [groups, used]: shared by a group
        path = groups[:, None, None] * size + torch.arange(size)
        shape = (len(groups), used, size)
        which = torch.stack(
            [path.expand(shape).flatten(), chosen[:, :, None].expand(shape).flatten()], dim=1
        )  # [rows, (path, step)]
        if self.objective.joins_steps:
            steps = 1
        together = size * joined
        place = self.rollout.place
        mine = which[place.has(which[:, 0])] - torch.tensor([place.paths.start, 0])
        if not len(mine):
            return
        log_ratios, clipped = list[Tensor](), list[Tensor]()
        for piece in mine.split(max(1, self.batch // together) * together):
            rows = self.rows(piece, joined)
            # rows are a uniform draw from paths x steps: mean x steps estimates the path's sum
            yield self.objective.loss(rows).sum() * steps / len(which)
            with torch.no_grad():
                log_ratios.append(self.objective.log_ratio(rows).detach())
                clipped.append(self.objective.clipped(rows).detach())
        self._log_ratios += log_ratios
        self._clipped += clipped

    def _steps(self, groups: int, used: int, generator: Generator) -> Int64[Tensor, "groups used"]:
        """Steps of each group, without replacement if all are equally probable."""
        steps = self.rollout.costs.shape[1]
        weights = self.objective.step_probabilities(steps)
        if weights is None:
            return torch.rand(groups, steps, generator=generator).argsort(1)[:, :used]
        return torch.multinomial(
            weights.expand(groups, -1), used, replacement=True, generator=generator
        )

    def rows(self, which: Int64[Tensor, "rows 2"], joined: int = 1) -> Any:
        """(path, step) pairs as the objective's rows, with the current policy's action."""
        rollout, environment = self.rollout, self.environment
        path, step = sent(which, environment.device).unbind(1)
        pairs = (path, step) if rollout.states.device == path.device else which.unbind(1)

        def stored(name: str) -> Tensor:
            return rollout.at(name, *pairs)

        mean = environment.action(stored("states"), step, rollout.condition[which[:, 0]])
        tables = self._tables() if self._sent is None else self._sent
        score_gain, std = tables[:, step]
        factor = self._kl_factor
        common = Rows(
            mean=mean,
            old_mean=stored("means"),
            reference_score=self._reference(which),
            noise=stored("noises"),
            advantage=self.advantages[path, step].to(mean),
            step_size=rollout.step_sizes[step].to(mean),
            horizon=rollout.step_sizes.sum().to(mean),
            score_gain=score_gain,
            std=std,
            kl_factor=factor[step] if isinstance(factor, Tensor) else factor,
        )
        targets = None if self.targets is None else self.targets[path, step]
        steps = Steps(
            rollout, self.sampler, path, step, joined, targets, self.values, self.usual_moves
        )
        return self.objective.rows(common, steps)

    @torch.no_grad()
    def _reference(self, which: Int64[Tensor, "rows 2"]) -> Tensor | None:
        """Pretrained actions of (path, step) pairs: the roll-out's, or asked for now."""
        rollout, environment = self.rollout, self.environment
        path, step = sent(which, environment.device).unbind(1)
        pairs = (path, step) if rollout.states.device == path.device else which.unbind(1)
        if rollout.reference_scores is not None:
            return rollout.at("reference_scores", *pairs)
        if not self.objective.needs_reference:
            return None
        with environment.pretrained():
            condition = rollout.condition[which[:, 0]]
            return environment.action(rollout.at("states", *pairs), step, condition)

    def numbers(self) -> dict[str, float]:
        """Numbers of the objective, range of the ratios, and the share that the clip touches."""
        ratio = torch.cat(self._log_ratios).exp()
        clipped = torch.cat(self._clipped).mean()
        names = ("ratio_min", "ratio_max", "clipped_fraction")
        ranges = dict(zip(names, read(ratio.min(), ratio.max(), clipped), strict=True))
        return ranges | self._numbers

    def check_fresh(self) -> None:
        """Ratio 1 of new to old policy, KL 0 of a fresh adapter, enough memory to go on.

        Raises:
            PreflightError: the policy of the roll-out and that of the update differ by more than
                round-off, or a fresh adapter is not the pretrained model; the message says why, by
                experiment (``preflight``).
        """
        rollout, objective = self.rollout.here(), self.objective
        paths, steps = rollout.costs.shape
        few = min(paths, max(4, rollout.group))
        rows = torch.cartesian_prod(torch.arange(few), torch.arange(steps))
        precision = self.environment.model.precision
        # The pretrained model too is asked in other batches: its scores may differ as the ratio's.
        gap = score_rounding(precision) * rollout.means
        kl = self.sampler.path_kl(gap, 0 * gap)
        spent = self.environment.model.calls

        def ratio_and_bound(piece: slice) -> tuple[Tensor, Tensor]:
            part = self.rows(rows[piece])
            std = objective.action_std(self.sampler.sigma[rows[piece, 1]])
            ratio = objective.log_ratio(part).abs().max()
            return ratio, log_ratio_rounding(part, precision, std).max()

        with torch.no_grad():
            pieces = self.environment.in_pieces(
                ratio_and_bound, self, "the check before the first update", rows=len(rows)
            )
            ratios, bounds = zip(*pieces, strict=True)
            worst, allowed, nats, kl_allowed = read(
                torch.stack(ratios).max(),
                torch.stack(bounds).max(),
                rollout.costs.sum(1).max(),
                kl.sum(1).max(),
            )
        tried = Experiments(self.environment, rollout, few, score_rounding(precision))
        if not worst <= allowed:
            raise PreflightError(
                f"before the first update the log-ratio of new to old policy must be 0 up to "
                f"{allowed:.2g}, but is {worst:.3g}. The cause is {why_ratio(tried)}"
            )
        if rollout.reference_scores is not None and not 0 <= nats <= max(1e-6, kl_allowed):
            raise PreflightError(
                f"a fresh adapter must equal the pretrained model up to {kl_allowed:.2g} nats of "
                f"round-off, but its path KL is {nats:.3g} nats. The cause is {why_path_kl(tried)}"
            )
        self.environment.uncount(spent)  # no method needs them


# -- pieces of many losses -----------------------------------------------------------------------


def transition_log_ratio(rows: Rows) -> Float[Tensor, " rows"]:
    """log p_th(x_{k+1} | x_k) - log p_old(x_{k+1} | x_k), summed over coordinates, nats."""
    shift = (rows.mean - rows.old_mean).flatten(1) * (rows.score_gain / rows.std)[:, None]
    return (shift * rows.noise.flatten(1) - 0.5 * shift.square()).sum(1)


def score_rounding(precision: torch.dtype) -> float:
    """|difference| / |score| of one policy's scores of one state, asked for in other batches.

    A kernel that gets other rows beside a state adds in another order. In float32 a difference of
    256 units of round-off is allowed for. The embedded network, which has the layers of Stable
    Diffusion's, shows up to 7 without guidance and, where guidance w multiplies the branches'
    roundings by sqrt(w^2 + (1 - w)^2), 16 at w = 3 and 38 at w = 7.5, under any kernel of MKL,
    ATen and oneDNN that could be tried; rounding to bfloat16 alone makes 2^15. In half precision,
    where a sum rounds to another neighbour now and then, 3 % are.
    """
    return 256 * torch.finfo(torch.float32).eps if precision == torch.float32 else 3e-2


def log_ratio_rounding(
    rows: Rows, precision: torch.dtype, action_std: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, " rows"]:
    """|log-ratio| of equal policies that round-off may make, nats; false once in 5e8 rows.

    Both scores are of the same state x_k. They differ by delta, with |delta| <= c |score|
    (``score_rounding``); in units of the decision's standard deviation s that is a shift of length
        r = c |score| / s,    s = std / score_gain of a transition, action_std of a drawn score,
    and the log-ratio is <shift, z> - r^2 / 2. The standard normal z of the decision is drawn after
    x_k and independent of it, so of delta: the log-ratio has the law N(-r^2 / 2, r^2) and is
    within 6 r + r^2 / 2 but for a probability of 2e-9. (|z| r, what Cauchy's inequality allows,
    would be sqrt(d) r in d dimensions.) Other rounding is of order r eps: the noise is kept, not
    computed from states that nearly cancel. The mean over coordinates is smaller yet.
    """
    drawn = torch.zeros_like(rows.std) if action_std is None else as_like(action_std, rows.std)
    std = torch.where(drawn > 0, drawn, rows.std / rows.score_gain).abs()
    shift = score_rounding(precision) * rows.old_mean.flatten(1).norm(dim=1) / std
    return 6 * shift + 0.5 * shift.square()


def reference_log_ratio(rows: Rows) -> Float[Tensor, " rows"]:
    """log p_th(x_{k+1} | x_k) - log p_pre(x_{k+1} | x_k), summed over coordinates, nats."""
    scale = (rows.score_gain / rows.std)[:, None]
    own = (rows.mean - rows.old_mean).flatten(1) * scale
    other = (_reference(rows) - rows.old_mean).flatten(1) * scale
    noise = rows.noise.flatten(1)
    return ((own - other) * noise - 0.5 * (own.square() - other.square())).sum(1)


def transition_kl(rows: Rows) -> Float[Tensor, " rows"]:
    """KL(p_th(. | x_k) || p_pre(. | x_k)) of each row's Gaussian transition, nats."""
    gap = (rows.mean - _reference(rows)).flatten(1) * (rows.score_gain / rows.std)[:, None]
    return 0.5 * gap.square().sum(1)


def path_kl_rate(rows: Rows) -> Float[Tensor, " rows"]:
    """Path KL of each row's step from the pretrained model, nats; carries the gradient."""
    gap = (rows.mean - _reference(rows)).square().flatten(1).sum(1)
    return 0.5 * rows.kl_factor * rows.step_size * gap


def _reference(rows: Rows) -> Float[Tensor, " rows *event"]:
    assert rows.reference_score is not None  # compares_paths
    return rows.reference_score


def coordinates(rows: Rows) -> int:
    """d: by which published code divides log-densities."""
    return rows.mean[0].numel()


def trusted_width(rows: Rows, clip: float, clip_per_pixel: float | None) -> Float[Tensor, " rows"]:
    """``clip`` nats on a whole step, or ``clip_per_pixel`` times the coordinates if given."""
    width = clip if clip_per_pixel is None else clip_per_pixel * coordinates(rows)
    return torch.full_like(rows.step_size, width)
