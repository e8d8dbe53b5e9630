"""One update rehearsed with small states: what is asked of the networks, and what is held then.

The real loop runs with the real objective and sampler, on a model that answers at once, whose
states have few numbers. What an update holds beside the networks grows linearly with the numbers
of a state: two rehearsals tell it for any. No method is known here by name.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion_envs.environment import Environment
from diffusion_envs.models.counting import Meter
from diffusion_envs.models.protocol import Model
from diffusion_envs.objectives import Objective
from diffusion_envs.rewards import InParts, Reward, Weighted
from diffusion_envs.samplers import Sampler
from diffusion_envs.training import parallel
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

Asked = Literal["network", "pretrained", "decoder", "value network", "reward", "end"]
_BYTES = 2**26  # that a rehearsal may hold, about
_WIDTH = 64  # channels of the value network, which holds more than the paths


@dataclass(frozen=True)
class Moment:
    """When something was asked.

    Attributes:
        what: was asked.
        rows: at once; 0 where a gradient comes back.
        gradient: whether one is kept track of.
        returns: place of the moment to which the gradient comes back; None if none does.
        alive: bytes held then, beside networks and what they keep.
        before: most bytes held since the moment before.
        flops: of all but the networks since the moment before.
    """

    what: Asked
    rows: int
    gradient: bool
    returns: int | None
    alive: float
    before: float
    flops: float


@dataclass(frozen=True)
class Rehearsal:
    """What an update asks and holds: the first, one of those after it, and an evaluation."""

    first: list[Moment]
    update: list[Moment]
    evaluation: list[Moment]


@dataclass
class _Book:
    """Notes moments."""

    meter: Meter | None = None
    moments: list[Moment] = field(default_factory=list)

    def note(
        self, what: Asked, rows: int = 0, *, gradient: bool = False, returns: int | None = None
    ) -> int:
        if self.meter is None:
            return -1
        meter = self.meter
        sizes = float(meter.alive), float(meter.peak), float(meter.flops)
        noted = Moment(what, rows, gradient, returns, *sizes)
        self.moments.append(noted)
        meter.peak, meter.flops = meter.alive, 0
        return len(self.moments) - 1

    def answered(self, what: Asked, rows: int, answer: Tensor) -> Tensor:
        """The answer, whose gradient is noted when it comes."""
        gradient = torch.is_grad_enabled() and answer.requires_grad
        place = self.note(what, rows, gradient=gradient)
        if gradient:

            def back(_: Tensor) -> None:
                self.note(what, returns=place)

            answer.register_hook(back)
        return answer


@dataclass
class StandIn:
    """A model whose answers cost nothing, with the noise levels and guidance of a real one.

    Attributes:
        real: the model that it stands for; never asked for scores or pictures.
        event: shape of a state.
        picture: shape of a picture.
        parameters: one number, that trains.
        calls: rows so far.
    """

    real: Model
    event: tuple[int, ...]
    picture: tuple[int, ...]
    parameters: list[nn.Parameter] = field(default_factory=lambda: [nn.Parameter(torch.zeros(()))])
    calls: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    book: _Book = field(default_factory=_Book)
    _off: bool = False

    @property
    def prediction_type(self) -> str:
        """The real one's."""
        return self.real.prediction_type

    @property
    def table(self) -> Any:
        """The real one's."""
        return self.real.table

    @property
    def precision(self) -> torch.dtype:
        """The real one's."""
        return self.real.precision

    def condition(self, prompts: Sequence[str]) -> Tensor:
        """Nothing."""
        return torch.zeros(len(prompts), 1)

    def features(self, condition: Tensor) -> Tensor:
        """Nothing."""
        return condition

    def __call__(self, states: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """A score: that of a standard normal law, times what trains."""
        self.calls += len(states)
        scale = torch.zeros(()) if self._off else self.parameters[0]
        what: Asked = "pretrained" if self._off else "network"
        return self.book.answered(what, len(states), states * (scale - 1))

    def denoised(self, states: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The same, as expected data."""
        return self(states, timesteps, condition)

    def prediction(self, states: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The same."""
        return self(states, timesteps, condition)

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """Within this context nothing of it trains."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def decode(self, states: Tensor, /) -> Tensor:
        """Grey pictures."""
        brightness = states.flatten(1).mean(1).view(-1, *[1] * len(self.picture))
        pictures = (0.5 + 0 * brightness).expand(-1, *self.picture).clone()
        return self.book.answered("decoder", len(states), pictures)

    def export(self, folder: Path) -> Path:
        """Nothing."""
        return folder


@dataclass
class _Reward:
    """Different numbers for pictures that are all grey, with a gradient."""

    book: _Book
    differentiable: bool = True
    asked: int = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.book.note("reward", len(images))
        place = torch.arange(self.asked, self.asked + len(images), dtype=torch.float32)
        self.asked += len(images)
        return images.flatten(1).mean(1) + (0.7 * place).sin()


def _rewarding(reward: Reward, book: _Book) -> Reward:
    """Parts as the real reward has them."""
    one = _Reward(book)
    if isinstance(reward, InParts):
        return Weighted({name: (one, weight or 1.0) for name, weight in reward.weights.items()})
    return one


@dataclass(frozen=True)
class _Data:
    """Data of any law."""

    event: tuple[int, ...]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *self.event, generator=generator)


@dataclass(frozen=True, eq=False)
class Plan:
    """What would be trained, and how: all that an update's course depends on.

    Attributes:
        model: has noise levels and the shape of a state; it is not asked.
        picture: shape of its pictures.
        objective: the method.
        sampler: how images are made.
        steps: of the sampler.
        size: of one process's share.
        reward: is not asked; its parts count.
        prompts: how many.
        evaluation_samples: held-out samples.
        evaluate: (environment, samples, rows at once), as a run evaluates.
        learns_from_data: whether data stands beside the reward.
        target_kl: moves kl_weight.
        log_path_kl: whether the path KL is asked for in any case.
    """

    model: Model
    picture: tuple[int, ...]
    objective: Objective
    sampler: Sampler
    steps: int
    size: UpdateSize
    reward: Reward
    prompts: int
    evaluation_samples: int
    evaluate: Callable[[Environment, int, int], Any]
    learns_from_data: bool = False
    target_kl: TargetKL | None = None
    log_path_kl: bool = False

    def value_network_bytes(self) -> int:
        """Of the weights of what is trained beside the model, for states of its own size."""
        small, _ = self._small()
        critic = self._trainer(small, _Book()).critic
        if critic is None:
            return 0
        return sum(p.numel() * p.dtype.itemsize for p in critic.network.parameters())

    def rehearse(self) -> Rehearsal:
        """What an update asks, and holds of states of the model's own size."""
        small, twice = self._small()
        if small == self.model.event:
            return self._with(small)
        one, two = self._with(small), self._with(twice)
        place = math.prod(self.model.event) / math.prod(small) - 1  # in steps of the second
        return Rehearsal(
            *(
                [_extended(a, b, place) for a, b in zip(first, second, strict=True)]
                for first, second in zip(
                    (one.first, one.update, one.evaluation),
                    (two.first, two.update, two.evaluation),
                    strict=True,
                )
            )
        )

    def _small(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A shape like that of a state with few numbers, and one with twice as many."""
        event, paths = self.model.event, self.size.samples * (self.steps + 1)
        per_number = 4 * paths * (_WIDTH / event[0] if len(event) == 3 else 1)
        most = max(16, int(_BYTES / per_number))
        if math.prod(event) <= 2 * most:
            return event, event
        if len(event) != 3:
            return (most // 2,), (most // 2 * 2,)
        side = max(2, 2 * int(math.sqrt(most / event[0]) / 2))
        return (event[0], side, side), (event[0], side, 2 * side)

    def _with(self, event: tuple[int, ...]) -> Rehearsal:
        """The same with states of this shape."""
        book = _Book()
        trainer = self._trainer(event, book)
        samples, batch = self.evaluation_samples, self.size.batch

        def evaluating() -> None:
            self.evaluate(trainer.environment, samples, batch)

        noted = [self._noted(book, run) for run in (trainer.step, trainer.step, evaluating)]
        return Rehearsal(*noted)

    def _trainer(self, event: tuple[int, ...], book: _Book) -> Trainer:
        picture = self.picture
        if len(event) == 3 and len(picture) == 3:
            factor = picture[1] // self.model.event[1]
            picture = (picture[0], factor * event[1], factor * event[2])
        elif picture == self.model.event:
            picture = event
        model = StandIn(self.model, event, picture, book=book)
        bound = self.sampler.bind(self.model.table, self.steps, self.model.prediction_type)
        environment = Environment(
            model=model,
            sampler=bound,
            reward=_rewarding(self.reward, book),
            prompts=[f"prompt {k}" for k in range(self.prompts)],
            seed=0,
            batch=self.size.batch,
        )
        return Trainer(
            environment,
            self.objective,
            dataclasses.replace(self.size, warm_up=0, schedule="constant", schedule_updates=None),
            accelerator=parallel.start("cpu"),
            data=_Data(event) if self.learns_from_data else None,
            target_kl=self.target_kl,
            log_path_kl=self.log_path_kl,
        )

    @staticmethod
    def _noted(book: _Book, run: Callable[[], Any]) -> list[Moment]:
        book.moments = []
        with Meter() as meter:
            book.meter = meter
            run()
            book.note("end")
        book.meter = None
        return book.moments


def _extended(small: Moment, twice: Moment, place: float) -> Moment:
    """The same moment where states are larger."""
    assert (small.what, small.rows, small.returns) == (twice.what, twice.rows, twice.returns)

    def extended(name: str) -> float:
        first, second = getattr(small, name), getattr(twice, name)
        return first + place * (second - first)

    sizes = {name: extended(name) for name in ("alive", "before", "flops")}
    return dataclasses.replace(small, **sizes)
