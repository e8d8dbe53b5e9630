"""Rewards of a small CIFAR-10 classifier that ships with the library: alignment, confidence.

Two classifiers are shipped, trained on disjoint halves of CIFAR-10's training set: ``"reward"`` is
what fine-tuning may maximise, ``"judge"`` only judges. Nothing is ever judged by the reward that
trained it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctrl.devices import sent
from diffusion_envs.cifar10.data import CLASSES, class_of
from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.weights import read_state, require_keys

WIDTHS = (48, 96, 160)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x + self.branch(x))


def _halve(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(width_out),
        nn.GELU(),
    )


class CifarClassifier(nn.Module):
    """Ten-class convolutional network, 0.81 M parameters.

    Pictures of another size are resized to 32 x 32 (bilinear, antialiased), so it can see the
    output of any pipeline.
    """

    def __init__(self, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        low, middle, high = widths
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, low, 3, padding=1, bias=False),
            nn.BatchNorm2d(low),
            nn.GELU(),
        )
        self.middle = nn.Sequential(_halve(low, middle), _Residual(middle))
        self.high = nn.Sequential(_halve(middle, high), _Residual(high))
        self.head = nn.Linear(high, len(CLASSES))

    def features(self, images: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        """Feature maps at 16, 8 and 4 pixels a side, for perceptual losses."""
        if images.shape[-2:] != (32, 32):
            images = functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
        low = self.stem((images - 0.5) / 0.25)
        middle = self.middle(low)
        return [low, middle, self.high(middle)]

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 10"]:
        """Logits of the ten classes for pictures with values in [0, 1]."""
        return self.head(self.embedding(images))

    def embedding(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """What the classes are told apart by: the largest value of each last feature."""
        return self.features(images)[-1].amax((2, 3))


def load_classifier(source: Literal["reward", "judge"] | Path) -> CifarClassifier:
    """A shipped classifier by name, or one from a safetensors file; frozen, in float32."""
    if isinstance(source, Path):
        path = source
    elif source in ("reward", "judge"):
        shipped = (
            resources.files("diffusion_envs.tiny") / "weights" / f"classifier_{source}.safetensors"
        )
        path = Path(str(shipped))
    else:
        raise ValueError(f"source must be 'reward', 'judge' or a Path, got {source!r}")
    network = CifarClassifier()
    state = read_state(path)
    require_keys(state, network, path)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


_loaded = cache(load_classifier)


def _require_classifier(source: str | Path) -> None:
    """Refuse what names no classifier.

    Raises:
        ValueError: neither a shipped one nor a file.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise ValueError(f"classifier must be a file, but {source} is none")
    elif source not in ("reward", "judge"):
        raise ValueError(f"classifier must be 'reward', 'judge' or a Path, got {source!r}")


@dataclass(frozen=True)
class _ByClassifier:
    """A differentiable reward that a classifier gives.

    Attributes:
        classifier: "reward", "judge", or a safetensors file with the weights of a
            ``CifarClassifier``; read when it is first called.
    """

    classifier: str | Path = "reward"
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_classifier(self.classifier)

    def _declared(self, scale: str) -> Declaration:
        return Declaration(
            scale=scale,
            licence="Apache-2.0",
            version=f"{self.classifier}: ten classes, 0.81 M parameters, half of CIFAR-10",
            source="this library (diffusion_envs.tiny.train_classifier)",
            preprocessing="resized to 32 x 32 pixels (bilinear, antialiased), stretched",
        )

    def log_probabilities(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 10"]:
        """Of the ten classes, nats."""
        network = _loaded(self.classifier).to(images.device)
        return network(images.float()).log_softmax(-1)

    def embedding(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """The classifier's last features, whatever the prompt."""
        return _loaded(self.classifier).to(images.device).embedding(images.float())


@dataclass(frozen=True)
class PromptAlignment(_ByClassifier):
    """Log-probability, by a classifier, of the class that the prompt names; differentiable."""

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return self._declared("log-probability, nats, at most 0; -2.3 is chance")

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Nats, at most 0.

        Raises:
            ValueError: a prompt does not name exactly one CIFAR-10 class.
        """
        require_inputs(images, prompts)
        classes = [class_of(prompt) for prompt in prompts]
        if None in classes:
            prompt = prompts[classes.index(None)]
            raise ValueError(
                f"prompt {prompt!r} must name exactly one of the classes {', '.join(CLASSES)}"
            )
        wanted = sent(torch.tensor(classes), images.device)
        return self.log_probabilities(images).gather(1, wanted[:, None])[:, 0]


@dataclass(frozen=True)
class ClassConfidence(_ByClassifier):
    """Log of the largest class probability, by a classifier; differentiable.

    For pictures that nobody asked for by a prompt: it says how clearly a picture shows one of the
    ten classes, whichever. Its maximum does not ask for variety.
    """

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return self._declared("log-probability, nats, -2.3 to 0")

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Nats, from -log 10 (all classes alike) to 0, whatever the prompts."""
        require_inputs(images, prompts)
        return self.log_probabilities(images).amax(-1)
