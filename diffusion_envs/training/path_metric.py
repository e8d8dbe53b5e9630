"""The metric of path laws on a policy's parameters: the path KL of a small change, to second order.

Setting      A policy with parameters th acts by a_th(k, x) on a sampler's steps; J = da / dth. The
             path KL of th + v from th is v'Fv / 2 + O(|v|^3),
                 F = E_paths sum_k c_k J_k' J_k,   c_k the sampler's ``path_kl_gain``:
             the Fisher information of the path law, and the Hessian of that KL at th.
Estimate     From rows (path, step) of a roll-out, drawn without replacement; unbiased where the
             roll-out is the policy's own. Of a policy that samples for it and lags behind, states
             are that one's: then F is the metric on its states.
Products     J'u is a gradient. It is linear in u, and the gradient of <J'u, v> in u is J v: two
             gradients make J v for any network, at the price of attention that can be
             differentiated twice ("math"; torch's fused kernels cannot). As many rows as fit into
             one batch are linearised once for all products, more of them anew for every product.
Cost         Each of J v and J'u counts as one network call a row and guidance branch; what
             linearises the network is counted in the first product.
Sources      "Score as Action", arXiv 2502.01819, Theorem 4.4 (the trust region);
             [P94] Pearlmutter 1994, Fast exact multiplication by the Hessian.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctrl.devices import as_like, sent
from diffusion_envs.environment import Environment
from diffusion_envs.rollout import Rollout
from diffusion_envs.samplers import GaussianSteps
from diffusion_envs.training import memory, parallel


class Linearised:
    """The actions of some rows as a linear function of the parameters, at their values now.

    Args:
        environment: whose policy acts.
        parameters: of the policy.
        states: one a row.
        step: of each row.
        condition: index of each row's prompt.
    """

    def __init__(
        self,
        environment: Environment,
        parameters: Sequence[nn.Parameter],
        states: Float[Tensor, " rows *event"],
        step: Int64[Tensor, " rows"],
        condition: Int64[Tensor, " rows"],
    ) -> None:
        self.parameters = parameters
        with torch.enable_grad():
            self.actions = environment.action(states, step, condition)
            self._u = torch.zeros_like(self.actions, requires_grad=True)
            self._gradients = torch.autograd.grad(
                self.actions, parameters, self._u, create_graph=True, materialize_grads=True
            )

    def pushed(self, v: Float[Tensor, " parameters"]) -> Float[Tensor, " rows *event"]:
        """J v: how the actions change as the parameters do ([P94], by two gradients)."""
        parts = unflattened(v, self.parameters)
        outputs = [(g, part) for g, part in zip(self._gradients, parts, strict=True) if g.grad_fn]
        gradients, parts = zip(*outputs, strict=True)
        return torch.autograd.grad(gradients, self._u, parts, retain_graph=True)[0]

    def pulled(self, u: Float[Tensor, " rows *event"]) -> Float[Tensor, " parameters"]:
        """J'u, summed over the rows."""
        gradients = torch.autograd.grad(
            self.actions, self.parameters, u, retain_graph=True, materialize_grads=True
        )
        return flattened(gradients)


@dataclass(eq=False)
class PathMetric:
    """F from some rows of a roll-out; parameters are one flat vector, in their order.

    Attributes:
        environment: whose policy acts.
        parameters: of the policy.
        states: one a row.
        step: of each row.
        condition: index of each row's prompt.
        weight: of each row: c_k times the steps of a path, over the rows of all processes; float64.
        generator: of random vectors, another one on each process.
        batch: rows that go through the network at once; lowered where memory runs out.
        accelerator: the processes, over which products are added.
    """

    environment: Environment
    parameters: Sequence[nn.Parameter]
    states: Float[Tensor, " rows *event"]
    step: Int64[Tensor, " rows"]
    condition: Int64[Tensor, " rows"]
    weight: Float[Tensor, " rows"]
    generator: Generator
    batch: int
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self._kept: Linearised | None = None
        self._free = 0  # calls of the network that are in no product yet

    @classmethod
    def of(
        cls,
        environment: Environment,
        parameters: Sequence[nn.Parameter],
        rollout: Rollout,
        *,
        share: float,
        generator: Generator,
        batch: int,
        accelerator: Accelerator,
        own_generator: Generator | None = None,
    ) -> "PathMetric":
        """From a share of the rows of all processes, at least one, drawn without replacement.

        Args:
            environment: whose policy acts.
            parameters: of the policy.
            rollout: of this process.
            share: of the rows.
            generator: draws them, the same on all processes.
            batch: rows that go through the network at once.
            accelerator: the processes.
            own_generator: of random vectors; the same one if there is one process.
        """
        steps, place = rollout.costs.shape[1], rollout.place
        paths = place.of * place.size
        rows = max(1, round(share * paths * steps))
        drawn = torch.randperm(paths * steps, generator=generator)[:rows]
        drawn = drawn[place.has(drawn // steps)] - place.paths.start * steps
        path, step = drawn // steps, drawn % steps
        return cls(
            environment,
            parameters,
            rollout.at("states", path, step),
            step,
            rollout.condition[sent(path, rollout.condition.device)],
            environment.steps.path_kl_gain[step] * (steps / rows),
            own_generator or generator,
            batch,
            accelerator,
        )

    # -- products ---------------------------------------------------------------------------------

    def product(self, v: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        """F v, over all processes."""

        def attempt() -> Tensor:
            total = torch.zeros_like(v)
            with _differentiable_twice():
                for rows, piece in self._pieces(products=2):
                    total += piece.pulled(self._weighted(rows, piece.pushed(v)))
            return total

        return parallel.total(self._retried(attempt), self.accelerator)

    def path_kl(self, v: Float[Tensor, " parameters"]) -> float:
        """v'Fv / 2: path KL of the policy at th + v from that at th, to second order, nats."""

        def attempt() -> Tensor:
            total = v.new_zeros(())
            with _differentiable_twice():
                for rows, piece in self._pieces(products=1):
                    pushed = piece.pushed(v)
                    total += 0.5 * (pushed * self._weighted(rows, pushed)).sum()
            return total

        return parallel.total(self._retried(attempt), self.accelerator).item()

    def diagonal(self, vectors: int) -> Float[Tensor, " parameters"]:
        """Unbiased estimate of F's diagonal: squares of J'xi, xi ~ N(0, c_k) in every coordinate.

        Each row is drawn for once, so that this is one network call a row. Rows are split into
        ``vectors`` parts, of which each makes one square: the more, the less noise.
        """
        rows = torch.arange(len(self.step))
        drawn = self.generator.get_state()

        def attempt() -> Tensor:
            self.generator.set_state(drawn)
            total = flattened([torch.zeros_like(p) for p in self.parameters])
            for part in rows.chunk(min(vectors, len(rows))) if len(rows) else ():
                noise, pulled = self._noise(part), torch.zeros_like(total)
                for some, xi in zip(part.split(self.batch), noise.split(self.batch), strict=True):
                    with torch.enable_grad():
                        actions = self._actions(some)
                    gradients = torch.autograd.grad(
                        actions, self.parameters, as_like(xi, actions), materialize_grads=True
                    )
                    pulled += flattened(gradients)
                total += pulled.square()
            return total

        return parallel.total(self._retried(attempt), self.accelerator)

    @torch.no_grad()
    def actions(self) -> Float[Tensor, " rows *event"]:
        """What the policy does now in every row."""
        if not len(self.step):
            return self.states
        every = torch.arange(len(self.step))
        return self._retried(
            lambda: torch.cat([self._actions(some) for some in every.split(self.batch)])
        )

    def measured_kl(
        self, before: Float[Tensor, " rows *event"], after: Float[Tensor, " rows *event"]
    ) -> float:
        """Path KL between the policies that did this, on these rows, nats."""
        gap = (after - before).square().flatten(1).sum(1)
        nats = 0.5 * (as_like(self.weight, gap) * gap).sum()
        return parallel.total(nats, self.accelerator).item()

    # -- rows -------------------------------------------------------------------------------------

    def _retried(self, attempt: Callable[[], Tensor]) -> Tensor:
        """What it returns, with fewer rows at once where memory runs out."""
        spent = self.environment.spent

        def again() -> Tensor:
            self.environment.spent = spent
            if len(self.step) > self.batch:
                self._kept = None
            return attempt()

        return memory.retried(again, self, "the metric of the paths", rows=len(self.step))

    def _pieces(self, products: int) -> Iterator[tuple[Tensor, Linearised]]:
        """Rows and their linearised actions; counts so many products of each."""
        every = torch.arange(len(self.step))
        if not len(every):  # of several processes this one has none
            return
        if len(every) <= self.batch:
            if self._kept is None:
                spent = self.environment.model.calls
                self._kept = self._linearised(every)
                self._calls = self.environment.model.calls - spent
                self.environment.model.calls = spent
            self.environment.model.calls += products * self._calls
            yield every, self._kept
            return
        for rows in every.split(self.batch):
            spent = self.environment.model.calls
            piece = self._linearised(rows)
            calls = self.environment.model.calls - spent
            self.environment.model.calls = spent + products * calls
            yield rows, piece

    def _linearised(self, rows: Tensor) -> Linearised:
        return Linearised(
            self.environment,
            self.parameters,
            self.states[sent(rows, self.states.device)],
            self.step[rows],
            self.condition[rows],
        )

    def _actions(self, rows: Tensor) -> Tensor:
        states = self.states[sent(rows, self.states.device)]
        return self.environment.action(states, self.step[rows], self.condition[rows])

    def _weighted(self, rows: Tensor, actions: Tensor) -> Tensor:
        weight = as_like(self.weight[rows], actions)
        return weight.view(-1, *[1] * (actions.ndim - 1)) * actions

    def _noise(self, rows: Tensor) -> Tensor:
        """xi ~ N(0, weight) of every coordinate, on the CPU."""
        drawn = torch.randn(len(rows), *self.states.shape[1:], generator=self.generator)
        root = self.weight[rows].sqrt().view(-1, *[1] * (drawn.ndim - 1))
        return root * drawn


def require_metric(environment: Environment, who: str) -> None:
    """Refuse samplers whose paths have no KL that is second order in the actions.

    Raises:
        ValueError: the sampler is a black box or an ODE, or its standard deviations learn.
    """
    sampler = environment.sampler
    if not isinstance(sampler, GaussianSteps):
        raise ValueError(
            f"{who} measures steps by their path KL, and a black box shows no steps: use DDIM, or "
            "the optimiser AdamW"
        )
    if sampler.deterministic:
        raise ValueError(
            f"{who} measures steps by their path KL, and an ODE's is infinite: use DDIM(eta > 0), "
            "or the optimiser AdamW"
        )
    if sampler.parameters:
        raise ValueError(
            f"{who} measures steps by the path KL of the actions, and the sampler's standard "
            "deviations learn too: use a sampler without learned_std, or the optimiser AdamW"
        )


def flattened(parts: Sequence[Tensor]) -> Float[Tensor, " parameters"]:
    """Tensors as one vector."""
    return torch.cat([part.flatten() for part in parts])


def unflattened(v: Float[Tensor, " parameters"], like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector, in the shapes of these tensors."""
    parts = v.split([part.numel() for part in like])
    return [part.view_as(shape) for part, shape in zip(parts, like, strict=True)]


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Within this context attention has second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
