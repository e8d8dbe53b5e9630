"""How good a set of generated pictures is, against real ones: distances, coverage and a judge.

Pictures are judged as the 8-bit files that they would be saved as. Numbers in the features of the
shipped classifier are called ``frechet_classifier``: they are no FID and cannot be compared with
one. ``fid_...`` needs the published Inception weights and is in torch-fidelity's convention
(``inception``); ``fid_10k`` and ``fid_50k`` are of exactly so many pictures.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrl import Estimate
from diffusion_envs.rewards.classifier import CifarClassifier, load_classifier
from diffusion_envs.runs import frechet
from diffusion_envs.runs.frechet import Moments, corrected_distance, frechet_distance
from diffusion_envs.runs.inception import WIDTH, load_inception
from diffusion_envs.runs.precision_recall import precision_recall

BATCH = 250  # pictures shown to a network at once
KEPT = 10_000  # real pictures whose features are kept, for precision and recall


@dataclass(frozen=True, eq=False)
class Features:
    """A network whose last features pictures are compared by.

    Attributes:
        name: of the network and its weights; statistics of another are refused.
        width: numbers for a picture.
        of: pictures as bytes ``[n, 3, h, w]`` -> ``[n, width]``.
        is_inception: whether the distance may be called FID.
    """

    name: str
    width: int
    of: Callable[[UInt8[Tensor, "n 3 h w"]], Float[Tensor, "n width"]]
    is_inception: bool = False

    def distance_name(self, n: int) -> str:
        """What the Frechet distance of n pictures is called."""
        if not self.is_inception:
            return "frechet_classifier"
        return f"fid_{n // 1000}k" if n in (10_000, 50_000) else f"fid_{n}"


def classifier_features(device: torch.device | str = "cpu") -> Features:
    """The 160 features of the shipped judge, which no reward is trained on."""
    judge = load_classifier("judge").to(device)
    where = torch.device(device)
    return Features(
        f"classifier judge, {_digest(judge)}",
        judge.head.in_features,
        lambda images: judge.embedding(images.to(where).float() / 255),
    )


def inception_features(weights: Path, device: torch.device | str = "cpu") -> Features:
    """Inception's 2048 features, in torch-fidelity's convention.

    Args:
        weights: the published file (``inception.load_inception``, which raises what it must).
        device: of the network.
    """
    network = load_inception(weights).to(device)
    where = torch.device(device)
    name = f"Inception of 2015-12-05, {_digest(network)}"
    return Features(name, WIDTH, lambda images: network(images.to(where)), is_inception=True)


def _digest(network: torch.nn.Module) -> str:
    """Eight digits that tell two sets of weights apart."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


@dataclass(frozen=True, eq=False)
class RealStatistics:
    """What is known of the real pictures: computed once, then read from a file."""

    features: str  # the network's name
    moments: Moments
    kept: Float[Tensor, "m width"]  # features of the first pictures, for precision and recall

    @classmethod
    def of(cls, images: Tensor, features: Features, kept: int = KEPT) -> "RealStatistics":
        """The statistics of a data set.

        Args:
            images: as bytes, ``[n, 3, h, w]``; a random order, as the first ones are kept.
            features: which network's.
            kept: how many of them.

        Raises:
            ValueError: there are too few pictures for the width of the features.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"real pictures must be bytes (uint8), got {images.dtype}")
        frechet.require_enough(len(images), features.width)
        rows: list[Tensor] = []

        def batches() -> Iterator[Tensor]:
            for part in images.split(BATCH):
                values = _features(features, part)
                if sum(map(len, rows)) < kept:
                    rows.append(values)
                yield values

        moments = Moments.of_batches(batches())
        return cls(features.name, moments, torch.cat(rows)[:kept])

    def save(self, path: Path) -> None:
        """Write a safetensors file, under a temporary name until it is whole."""
        tensors = {
            "n": torch.tensor(self.moments.n),
            "mean": self.moments.mean,
            "scatter": self.moments.scatter,
            "kept": self.kept,
        }
        partial = path.with_suffix(".partial")
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            partial,
            metadata={"features": self.features},
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, features: Features) -> "RealStatistics":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of another network's features.
        """
        if not path.is_file():
            raise FileNotFoundError(f"real statistics must be a file, but {path} is none")
        try:
            with safe_open(path, framework="pt") as file:
                name = (file.metadata() or {})["features"]
                tensors = {key: file.get_tensor(key) for key in ("n", "mean", "scatter", "kept")}
            moments = Moments(int(tensors["n"]), tensors["mean"], tensors["scatter"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold statistics of real pictures ({error}); compute them again"
            ) from error
        if name != features.name or len(moments.mean) != features.width:
            raise ValueError(
                f"{path} is of the features {name!r}, not of {features.name!r}; compute the "
                "statistics again with this network"
            )
        return cls(name, moments, tensors["kept"])


@dataclass(frozen=True)
class SampleQuality:
    """One evaluation of generated pictures."""

    distance_name: str  # "frechet_classifier", "fid_10k", ...
    distance: float  # the plain estimate from all pictures
    extrapolated: Estimate  # without the bias in the number of pictures
    precision: float
    recall: float
    neighbourhood: int  # generated and real pictures that precision and recall are of, each
    confidence: Estimate  # the judge's: mean probability of its likeliest class
    class_entropy: float  # nats, of the judge's mean class probabilities; at most log 10
    n: int

    def as_dict(self) -> dict[str, float]:
        """Named numbers, for a log."""
        name = self.distance_name
        infinite = "fid_extrapolated" if name.startswith("fid_") else f"{name}_extrapolated"
        numbers = asdict(self)
        return {
            name: self.distance,
            infinite: self.extrapolated.mean,
            f"{infinite}_standard_error": self.extrapolated.standard_error,
            "judge_confidence": self.confidence.mean,
            "judge_confidence_standard_error": self.confidence.standard_error,
            "judge_class_entropy": self.class_entropy,
            "samples": self.n,
            **{key: numbers[key] for key in ("precision", "recall", "neighbourhood")},
        }


def sample_quality(
    generated: Tensor,
    real: RealStatistics,
    features: Features,
    judge: CifarClassifier | None = None,
) -> dict[str, float]:
    """Named numbers about generated pictures, for a log; raises what ``measure`` raises."""
    return measure(generated, real, features, judge).as_dict()


def measure(
    generated: Tensor,
    real: RealStatistics,
    features: Features,
    judge: CifarClassifier | None = None,
) -> SampleQuality:
    """Compare generated pictures with real ones, and ask the judge.

    Args:
        generated: ``[n, 3, 32, 32]`` in [0, 1], independent and in random order.
        real: of the data, by the same features.
        features: ``classifier_features()``, or ``inception_features(weights)``.
        judge: of confidence and classes; if left out, the shipped judge.

    Raises:
        ValueError: pictures are not ``[n, 3, 32, 32]``, not finite or not in [0, 1]; there are
            fewer than twice the width of the features; the statistics are of other features.
    """
    if real.features != features.name:
        raise ValueError(
            f"real must be of the features {features.name!r}, got {real.features!r}; compute the "
            "statistics with this network"
        )
    pictures = as_bytes(generated)
    frechet.require_enough(len(pictures), features.width)
    judge = judge or load_classifier("judge")
    where = next(judge.parameters()).device
    rows = torch.cat([_features(features, part) for part in pictures.split(BATCH)])
    with torch.no_grad():
        logits = [judge(part.to(where).float() / 255).cpu() for part in pictures.split(BATCH)]
    classes = torch.cat(logits).double().softmax(1)
    mean_classes = classes.mean(0)
    both = min(len(rows), len(real.kept))
    shares = precision_recall(rows[:both], real.kept[:both])
    return SampleQuality(
        distance_name=features.distance_name(len(rows)),
        distance=frechet_distance(Moments.of(rows), real.moments),
        extrapolated=corrected_distance(rows, real.moments),
        precision=shares.precision,
        recall=shares.recall,
        neighbourhood=both,
        confidence=Estimate.of(classes.amax(1)),
        class_entropy=-torch.special.xlogy(mean_classes, mean_classes).sum().item(),
        n=len(rows),
    )


def as_bytes(images: Tensor) -> UInt8[Tensor, "n 3 32 32"]:
    """Pictures in [0, 1] as the bytes they are saved as (rounded).

    Raises:
        ValueError: the shape is another, or a value is not finite or not in [0, 1].
    """
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not len(images):
        raise ValueError(f"pictures must be [n, 3, 32, 32], got {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"pictures must be real numbers in [0, 1], got {images.dtype}")
    if bad := int((~torch.isfinite(images)).flatten(1).any(1).sum()):
        raise ValueError(f"pictures must be finite, but {bad} of {len(images)} are not")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"pictures must lie in [0, 1], got values from {low:g} to {high:g}; of pictures in "
            "[-1, 1] pass (x / 2 + 0.5).clamp(0, 1)"
        )
    return (images.float() * 255).round().to(torch.uint8)


def _features(features: Features, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
    with torch.no_grad():
        values = features.of(images).float().cpu()
    if values.shape != (len(images), features.width):
        raise ValueError(
            f"features of {features.name} must be [{len(images)}, {features.width}], got "
            f"{list(values.shape)}"
        )
    return values
