"""LAION's aesthetic predictors, v1 and v2: how beautiful people rate a picture; differentiable.

Formula  a . e + b, e the embedding of CLIP ViT-L/14 of unit length. v1 is published as a and b.
         v2 is five linear layers with nothing between them but dropout, which is one affine map,
         so they are multiplied out, in float64, when they are read. Without the unit length v2
         comes out at 20 to 30. The prompt is ignored.

Sources  v1: https://github.com/LAION-AI/aesthetic-predictor
         v2: https://github.com/christophschuhmann/improved-aesthetic-predictor; in DDPO, Black et
         al. 2023, arXiv 2305.13301
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_envs.rewards.clip import Clip, from_hugging_face, require_batch
from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from diffusion_envs.rewards.weights import Weights, from_anywhere, locate, read_state

Version = Literal["v2", "v1"]
PREPROCESSING = Preprocessing(224, "crop", CLIP_MEAN, CLIP_STD, rounding="torchvision")
_CLIP = "openai/clip-vit-large-patch14"
_PAGES = {
    "v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    "v1": "https://github.com/LAION-AI/aesthetic-predictor",
}
_HEADS = {  # published names: the second of v2 is TRL's copy of the same file
    "v2": ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"),
    "v1": ("sa_0_4_vit_l_14_linear.pth",),
}
_LAYERS = {"v2": [f"layers.{place}." for place in (0, 2, 4, 6, 7)], "v1": [""]}
_NETWORK = {"weights": ("model.safetensors", "pytorch_model.bin"), "config": "config.json"}

WEIGHTS = Weights(
    "aesthetic",
    files={**_NETWORK, "head": ("head.safetensors", *_HEADS["v2"])},
    repositories={
        _CLIP: ("model.safetensors", "config.json"),
        "trl-lib/ddpo-aesthetic-predictor": ("aesthetic-model.pth",),
    },
)
WEIGHTS_V1 = Weights(  # its head is on no hub
    "aesthetic-v1",
    files={**_NETWORK, "head": ("head.safetensors", *_HEADS["v1"])},
    repositories={_CLIP: ("model.safetensors", "config.json")},
)
_WEIGHTS = {"v2": WEIGHTS, "v1": WEIGHTS_V1}


def _weights(version: str, with_head: bool) -> Weights:
    weights = _WEIGHTS[version]
    if with_head:
        return weights
    return dataclasses.replace(
        weights, files=_NETWORK, repositories={_CLIP: weights.repositories[_CLIP]}
    )


@dataclass(frozen=True)
class Aesthetic:
    """LAION's aesthetic score, a rating of about 1 to 10, whatever the prompt; differentiable.

    Attributes:
        model: a Hugging Face folder of CLIP ViT-L/14 (``model.safetensors``, ``config.json``), or
            such a repository on the hub; read when it is first called.
        head: file of the published head; by default it is looked for in ``model`` under its
            published name.
        version: "v2" (five layers) or "v1" (one).
        batch: pictures that the network gets at once.
        quantise: round pictures to 8 bits, as if they had been stored; straight-through gradient.
    """

    model: str | Path
    head: str | Path | None = field(default=None, kw_only=True)
    version: Version = field(default="v2", kw_only=True)
    batch: int = field(default=16, kw_only=True)
    quantise: bool = field(default=False, kw_only=True)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.version not in _WEIGHTS:
            raise ValueError(f"version must be one of {tuple(_WEIGHTS)}, got {self.version!r}")
        require_batch(self.batch)
        if self.head is not None:
            path = Path(self.head).expanduser()
            if not path.is_file():
                raise FileNotFoundError(
                    f"head must be a file, but {self.head} is none: take "
                    f"{_HEADS[self.version][0]} of {_PAGES[self.version]}"
                )
            object.__setattr__(self, "head", str(path.absolute()))
        weights = _weights(self.version, with_head=self.head is None)
        try:
            object.__setattr__(self, "model", from_anywhere(weights, self.model))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. The head is {_HEADS[self.version][0]} of {_PAGES[self.version]}"
            ) from error

    @property
    def declaration(self) -> Declaration:
        """What the score is, and of whom."""
        return Declaration(
            scale="ratings of 1 to 10; about 4 to 7 over pictures of current models, and beyond "
            "10 where it is exploited",
            licence="Apache-2.0 (head), MIT (CLIP)" if self.version == "v2" else "MIT",
            version=f"LAION aesthetic predictor {self.version}",
            source=_PAGES[self.version],
            preprocessing=dataclasses.replace(PREPROCESSING, quantise=self.quantise),
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing: no prompt is read."""
        return {}

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """One score for each picture, whatever its prompt.

        Raises:
            TypeError: images are no tensor, or prompts no strings.
            ValueError: they do not fit each other, or a value is outside [0, 1].
        """
        require_inputs(images, prompts)
        head = self._loaded()[1].to(images.device)
        return head(self.embedding(images))[:, 0]

    def embedding(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """CLIP's embedding of the picture, of unit length."""
        clip = self._loaded()[0].to(images.device)
        prepare = dataclasses.replace(PREPROCESSING, size=clip.image_size, quantise=self.quantise)
        return clip.image_embeddings(images, prepare, self.batch)

    def _loaded(self) -> tuple[Clip, nn.Linear]:
        return _loaded(str(self.model), self.version, None if self.head is None else str(self.head))


@cache
def _loaded(model: str, version: str, head: str | None) -> tuple[Clip, nn.Linear]:
    paths = locate(_weights(version, with_head=head is None), model)
    clip = from_hugging_face(paths)
    path = paths["head"] if head is None else Path(head)
    affine = read_head(path, version)
    if affine.in_features != clip.width:
        raise ValueError(
            f"{path} is for embeddings of width {affine.in_features}, but the CLIP of {model} has "
            f"{clip.width}: take {_CLIP}"
        )
    return clip, affine


def read_head(path: Path, version: str) -> nn.Linear:
    """The affine map of a published head, multiplied out; frozen, in float32.

    Raises:
        ValueError: the file holds other tensors than those of this version.
    """
    state = read_state(path)
    layers = _LAYERS[version]
    expected = {f"{layer}{name}" for layer in layers for name in ("weight", "bias")}
    if set(state) != expected:
        other = next((v for v, prefixes in _LAYERS.items() if f"{prefixes[0]}weight" in state), "")
        hint = f": it is {other}'s, pass version={other!r}" if other not in ("", version) else ""
        raise ValueError(
            f"{path} must hold the head {version}, which is {', '.join(sorted(expected)[:4])}, "
            f"..., got {', '.join(sorted(state)[:4])}{hint}"
        )
    weight = torch.eye(state[f"{layers[0]}weight"].shape[-1], dtype=torch.float64)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    for layer in layers:
        matrix, shift = (state[f"{layer}{name}"].double() for name in ("weight", "bias"))
        if matrix.ndim != 2 or matrix.shape[1] != len(weight) or shift.shape != matrix.shape[:1]:
            raise ValueError(
                f"{path} must hold layers that fit one another, but {layer}weight is "
                f"{list(matrix.shape)} after a layer of width {len(weight)}: get it again"
            )
        weight, bias = matrix @ weight, matrix @ bias + shift
    if len(weight) != 1:
        raise ValueError(f"{path} must give one number, but gives {len(weight)}: get it again")
    affine = nn.Linear(weight.shape[1], 1)
    affine.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return affine.requires_grad_(False)
