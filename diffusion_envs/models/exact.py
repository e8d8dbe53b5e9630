"""What is exact of a data law, with a small network added that is trained: a model to fine-tune.

It stands where an image model's network stands in the loop: the exact score (on a flow the exact
expected data) is the pretrained model, the correction the adapter, zero at first. Answers are
float32, as a network's are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffusion_envs.denoising import score_from_x0
from diffusion_envs.digests import write_tensors
from diffusion_envs.noise_schedules import DDPMTable, FlowTable


class AffineCorrection(nn.Module):
    """D(s) x + c(s), both polynomials in the signal alpha(s): what Gaussian problems need.

    Args:
        dim: of the state.
        degree: of the polynomials (Legendre's, on [0, 1]); they begin at 0.
    """

    def __init__(self, dim: int, degree: int = 5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(degree + 1, dim, dim))
        self.shift = nn.Parameter(torch.zeros(degree + 1, dim))

    def forward(
        self, states: Float[Tensor, "n dim"], alpha: Float[Tensor, " n"]
    ) -> Float[Tensor, "n dim"]:
        """The correction at every state."""
        basis = legendre(alpha, len(self.shift))
        gain, shift = self.coefficients(basis)
        return torch.einsum("nij,nj->ni", gain, states) + shift

    def coefficients(self, basis: Float[Tensor, "n terms"]) -> tuple[Tensor, Tensor]:
        """D and c where the basis has these values."""
        gain = torch.einsum("nk,kij->nij", basis, self.gain.to(basis))
        return gain, basis @ self.shift.to(basis)


class NeuralCorrection(nn.Module):
    """A multilayer perceptron of state and signal, divided by the noise level.

    Args:
        dim: of the state.
        width: of the hidden layers.
        generator: draws the first layers' weights; the last begins at 0.
    """

    def __init__(self, dim: int, *, generator: torch.Generator, width: int = 64) -> None:
        super().__init__()
        self.enter, self.hidden = nn.Linear(dim + 5, width), nn.Linear(width, width)
        self.leave = nn.Linear(width, dim)
        for layer in (self.enter, self.hidden, self.leave):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.leave.weight)

    def forward(
        self, states: Float[Tensor, "n dim"], alpha: Float[Tensor, " n"]
    ) -> Float[Tensor, "n dim"]:
        """The correction at every state."""
        seen = torch.cat([states, legendre(alpha, 6)[:, 1:].to(states)], dim=1)
        x = functional.silu(self.enter(seen))
        x = functional.silu(self.hidden(x) + x)
        return self.leave(x) / (1 - alpha.square()).sqrt()[:, None].to(states)


def legendre(alpha: Float[Tensor, " n"], terms: int) -> Float[Tensor, "n terms"]:
    """Legendre polynomials of 2 alpha - 1, by their recursion."""
    z = 2 * alpha - 1
    polynomials = [torch.ones_like(z), z]
    for k in range(1, terms - 1):
        last, earlier = polynomials[-1], polynomials[-2]
        polynomials.append(((2 * k + 1) * z * last - k * earlier) / (k + 1))
    return torch.stack(polynomials[:terms], dim=1)


Table = TypeVar("Table", DDPMTable, FlowTable)


@dataclass
class _Corrected(ABC, Generic[Table]):
    """What an exact law says of noisy states plus a correction: the loop's model.

    Attributes:
        exact: (states, alpha [n], sigma [n]) -> what the noised data law says.
        correction: the adapter, added to that.
        table: noise levels by timestep.
        dim: of a state.
        device: of the correction.
        prediction_type: what ``prediction`` answers.
        precision: of the correction's arithmetic.
        calls: evaluations so far, one a row.
    """

    exact: Callable[[Tensor, Tensor, Tensor], Tensor]
    correction: nn.Module
    table: Table
    dim: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prediction_type: str = "epsilon"
    precision: torch.dtype = torch.float32
    calls: int = 0
    _adapter_off: bool = False

    def __post_init__(self) -> None:
        self.event: tuple[int, ...] = (self.dim,)
        self.parameters = list(self.correction.parameters())

    def condition(self, prompts: Sequence[str]) -> Float[Tensor, "prompts 1"]:
        """Nothing: the law of the data is one."""
        return torch.zeros(len(prompts), 1, device=self.device)

    def features(self, condition: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
        """Zeros, one number a row."""
        return condition

    def decode(self, states: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """The states themselves: rewards are of them."""
        return states

    def export(self, folder: Path) -> Path:
        """Write the correction's tensors."""
        path = folder / "correction.safetensors"
        write_tensors(path, self.correction.state_dict())
        return path

    @abstractmethod
    def _levels(self, timesteps: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of each row."""

    def _corrected(self, states: Tensor, timesteps: Tensor) -> Tensor:
        """The exact answer plus the correction, at a noise level that belongs to each row."""
        self.calls += len(states)
        alpha, sigma = self._levels(timesteps, states)
        answer = self.exact(states, alpha, sigma)
        return answer if self._adapter_off else answer + self.correction(states, alpha)

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """Within this context the answer is the exact one."""
        before, self._adapter_off = self._adapter_off, True
        try:
            yield
        finally:
            self._adapter_off = before


@dataclass
class CorrectedScore(_Corrected[DDPMTable]):
    """Exact score plus correction, as the loop knows a model (``protocol.Model``)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._alphas_cumprod = self.table.alphas_cumprod.to(self.device)

    def __call__(
        self,
        states: Float[Tensor, "n dim"],
        timesteps: Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Scores at a noise level that belongs to each row."""
        return self._corrected(states, timesteps)

    def prediction(
        self, states: Float[Tensor, "n dim"], timesteps: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, "n dim"]:
        """epsilon = -sigma score; timesteps may be fractional."""
        sigma = (1 - self._abar(timesteps)).sqrt().to(states)
        return -sigma[:, None] * self(states, timesteps, condition)

    def _levels(self, timesteps: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        abar = self._abar(timesteps).to(states)
        return abar.sqrt(), (1 - abar).sqrt()

    def _abar(self, timesteps: Tensor) -> Tensor:
        if not timesteps.is_floating_point():
            return self._alphas_cumprod[timesteps]
        return self.table.log_alpha_bar_at(timesteps.double()).exp()


@dataclass
class CorrectedDenoiser(_Corrected[FlowTable]):
    """Exact expected data plus correction, on a rectified flow (``protocol.Denoiser``)."""

    prediction_type: str = "flow_prediction"

    def denoised(
        self,
        states: Float[Tensor, "n dim"],
        timesteps: Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "n dim"]:
        """x0_hat at a noise level that belongs to each row; finite without signal."""
        return self._corrected(states, timesteps)

    def __call__(
        self,
        states: Float[Tensor, "n dim"],
        timesteps: Tensor,
        condition: Tensor | None = None,
    ) -> Float[Tensor, "n dim"]:
        """Scores (alpha x0_hat - x) / sigma^2: without signal -x, whatever the correction."""
        alpha, sigma = (level[:, None] for level in self._levels(timesteps, states))
        return score_from_x0(states, self.denoised(states, timesteps, condition), alpha, sigma)

    def prediction(
        self, states: Float[Tensor, "n dim"], timesteps: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, "n dim"]:
        """The flow's velocity eps - x0 = (x - x0_hat) / s."""
        sigma = self._levels(timesteps, states)[1][:, None]
        return (states - self.denoised(states, timesteps, condition)) / sigma

    def _levels(self, timesteps: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        s = timesteps.to(states) / self.table.num_train_timesteps
        return self.table.alpha(s), self.table.sigma(s)


Corrected: TypeAlias = CorrectedScore | CorrectedDenoiser
