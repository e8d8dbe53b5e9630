"""HPS v2 and v2.1: what people prefer, by a fine-tuned CLIP ViT-H/14; differentiable.

Formula  The cosine of the two embeddings, without a scale. 2.0 and 2.1 have different scales, and
         scores of different prompts are not comparable either.
Pictures The longest side becomes 224, black fills the rest. The published code resizes floats and
         does not cut what overshoots; it does not pad a picture whose longest side is 224 already,
         and fails on it. It computes under autocast, in half precision; we do in float32.

Source   Wu et al. 2023, "Human Preference Score v2", arXiv 2306.09341.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from diffusion_envs.rewards.clip import Clip, from_open_clip, require_batch
from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from diffusion_envs.rewards.weights import Weights, from_anywhere, locate

Version = Literal["2.1", "2.0"]
PREPROCESSING = Preprocessing(224, "pad", CLIP_MEAN, CLIP_STD, rounding="open_clip", saturate=False)
_FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}


def _weights(reward: str, file: str) -> Weights:
    return Weights(
        reward,
        files={
            "weights": ("model.safetensors", file),
            "vocabulary": "vocab.json",
            "merges": "merges.txt",
        },
        repositories={
            "xswu/HPSv2": (file,),
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("vocab.json", "merges.txt"),
        },
    )


WEIGHTS = _weights("hps", _FILES["2.1"])
WEIGHTS_2_0 = _weights("hps-2.0", _FILES["2.0"])
_WEIGHTS = {"2.1": WEIGHTS, "2.0": WEIGHTS_2_0}


@dataclass(frozen=True)
class HPS:
    """Human Preference Score v2.1 or v2.0, a cosine; differentiable.

    Attributes:
        model: a folder with ``HPS_v2.1_compressed.pt`` (2.0: ``HPS_v2_compressed.pt``) or its
            ``model.safetensors``, and ``vocab.json`` and ``merges.txt``; the former file; or a
            repository on the hub; read when it is first called.
        version: "2.1" or "2.0": which weights these are; nothing in the file says so.
        batch: pictures that the network gets at once.
        quantise: round pictures to 8 bits, as if they had been stored; straight-through gradient.
        heads: of attention in the vision and in the text transformer, where the network has no
            published size.
    """

    model: str | Path
    version: Version = field(default="2.1", kw_only=True)
    batch: int = field(default=16, kw_only=True)
    quantise: bool = field(default=False, kw_only=True)
    heads: tuple[int, int] | None = field(default=None, kw_only=True)
    differentiable: ClassVar[bool] = True
    _counts: Counter[str] = field(
        default_factory=lambda: Counter(prompts_cut=0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.version not in _WEIGHTS:
            raise ValueError(f"version must be one of {tuple(_WEIGHTS)}, got {self.version!r}")
        require_batch(self.batch)
        self._require_version()
        object.__setattr__(self, "model", from_anywhere(_WEIGHTS[self.version], self.model))

    def _require_version(self) -> None:
        for version, file in _FILES.items():
            if version == self.version:
                continue
            path, own = Path(self.model).expanduser(), _FILES[self.version]
            in_folder = path.is_dir() and (path / file).is_file()
            own_in_folder = any((path / name).is_file() for name in (own, "model.safetensors"))
            if path.name == file or (in_folder and not own_in_folder):
                raise ValueError(
                    f"model {self.model} has the weights of HPS v{version} ({file}), but version "
                    f"is {self.version!r}: pass version={version!r}, or get {own} with: python -m "
                    f"diffusion_envs.rewards fetch {_WEIGHTS[self.version].reward}"
                )

    @property
    def declaration(self) -> Declaration:
        """What the score is, and of whom."""
        return Declaration(
            scale="the cosine of picture and prompt; about 0.2 to 0.35, another range in 2.0 than "
            "in 2.1, and for another prompt",
            licence="Apache-2.0",
            version=f"HPSv{self.version}",
            source="arXiv 2306.09341, https://github.com/tgxs002/HPSv2",
            preprocessing=dataclasses.replace(PREPROCESSING, quantise=self.quantise),
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Prompts that were cut to 77 tokens, each time they were scored."""
        return dict(self._counts)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """One score for each picture with its prompt.

        Raises:
            TypeError: images are no tensor, or prompts no strings.
            ValueError: they do not fit each other, or a value is outside [0, 1].
        """
        require_inputs(images, prompts)
        clip = _loaded(str(self.model), self.version, self.heads).to(images.device)
        cosines, cut = clip.cosines(images, prompts, self._prepare(clip), self.batch)
        self._counts["prompts_cut"] += cut
        return cosines

    def embedding(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """The fine-tuned CLIP's embedding of the picture, of unit length."""
        clip = _loaded(str(self.model), self.version, self.heads).to(images.device)
        return clip.image_embeddings(images, self._prepare(clip), self.batch)

    def _prepare(self, clip: Clip) -> Preprocessing:
        return dataclasses.replace(PREPROCESSING, size=clip.image_size, quantise=self.quantise)


@cache
def _loaded(model: str, version: str, heads: tuple[int, int] | None) -> Clip:
    return from_open_clip(locate(_WEIGHTS[version], model), heads)
