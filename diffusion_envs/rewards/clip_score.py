"""CLIP score: how well a picture fits its prompt, by CLIP's cosine; differentiable.

Sources  Radford et al. 2021, arXiv 2103.00020; Hessel et al. 2021, "CLIPScore", arXiv 2104.08718.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from diffusion_envs.rewards.clip import Clip, from_hugging_face, require_batch
from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from diffusion_envs.rewards.weights import Weights, from_anywhere, locate

Scale = Literal["logit", "logit/30", "percent", "cosine"]
PREPROCESSING = Preprocessing(224, "crop", CLIP_MEAN, CLIP_STD, rounding="transformers")
WEIGHTS = Weights(
    "clip-score",
    files={
        "weights": ("model.safetensors", "pytorch_model.bin"),
        "config": "config.json",
        "vocabulary": "vocab.json",
        "merges": "merges.txt",
    },
    repositories={
        "openai/clip-vit-large-patch14": (
            *("model.safetensors", "config.json"),
            *("vocab.json", "merges.txt"),
        )
    },
)
_SCALES = {
    "logit": "exp(logit_scale) times the cosine, as CLIPModel's logits: 100 times it in OpenAI's "
    "networks; about 15 to 35",
    "logit/30": "exp(logit_scale) times the cosine, divided by 30; about 0.5 to 1.2",
    "percent": "100 max(cosine, 0), as torchmetrics has it; about 15 to 35",
    "cosine": "the cosine; about 0.15 to 0.35",
}


@dataclass(frozen=True)
class CLIPScore:
    """CLIP's cosine of picture and prompt, in one of the units that are in use; differentiable.

    Attributes:
        model: a Hugging Face folder of a CLIPModel (``model.safetensors``, ``config.json``,
            ``vocab.json``, ``merges.txt``), or such a repository on the hub; read when it is first
            called.
        scale: "logit": exp(logit_scale) * cosine; "logit/30": that divided by 30; "percent":
            100 max(cosine, 0), which has no gradient below 0; "cosine".
        batch: pictures that the network gets at once.
        quantise: round pictures to 8 bits, as if they had been stored; straight-through gradient.
    """

    model: str | Path
    scale: Scale = field(default="logit", kw_only=True)
    batch: int = field(default=16, kw_only=True)
    quantise: bool = field(default=False, kw_only=True)
    differentiable: ClassVar[bool] = True
    _counts: Counter[str] = field(
        default_factory=lambda: Counter(prompts_cut=0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {get_args(Scale)}, got {self.scale!r}")
        require_batch(self.batch)
        object.__setattr__(self, "model", from_anywhere(WEIGHTS, self.model))

    @property
    def declaration(self) -> Declaration:
        """What the score is, and of whom; of OpenAI's ViT-L/14."""
        return Declaration(
            scale=_SCALES[self.scale],
            licence="MIT",
            version=f"CLIP score ({self.scale})",
            source="arXiv 2103.00020, https://huggingface.co/openai/clip-vit-large-patch14",
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
        clip = _loaded(str(self.model)).to(images.device)
        cosines, cut = clip.cosines(images, prompts, self._prepare(clip), self.batch)
        self._counts["prompts_cut"] += cut
        if self.scale == "cosine":
            return cosines
        if self.scale == "percent":
            return 100 * cosines.clamp(min=0)
        return clip.scale * cosines / (30 if self.scale == "logit/30" else 1)

    def embedding(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """CLIP's embedding of the picture, of unit length."""
        clip = _loaded(str(self.model)).to(images.device)
        return clip.image_embeddings(images, self._prepare(clip), self.batch)

    def _prepare(self, clip: Clip) -> Preprocessing:
        return dataclasses.replace(PREPROCESSING, size=clip.image_size, quantise=self.quantise)


@cache
def _loaded(model: str) -> Clip:
    return from_hugging_face(locate(WEIGHTS, model))
