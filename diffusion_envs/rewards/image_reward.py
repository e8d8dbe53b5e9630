"""ImageReward: what people prefer, by BLIP and a head, from a prompt and a picture; differentiable.

Formula     (w(t) - 0.16717362830052426) / 1.0333394966054072, where t is the first token of BERT's
            output on "[CLS] prompt [SEP]", whose every layer attends to all patches of the picture
            (BLIP's cross-attention), and w is five linear layers with nothing between them. The
            two numbers are mean and standard deviation of the published scores.
Text        bert-base-uncased's vocabulary and "[DEC]", "[ENC]"; padded and cut to 35 tokens.
Network     transformers' BLIP on the tensors of ``ImageReward.pt`` under their published names.
            Sizes are those of the tensors; heads are 64 wide, as in every published BLIP.

Sources     Xu et al. 2023, "ImageReward", arXiv 2304.05977. Li et al. 2022, "BLIP", arXiv
            2201.12086.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ctrl.devices import sent
from diffusion_envs.rewards.clip import require_batch
from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from diffusion_envs.rewards.weights import (
    Weights,
    from_anywhere,
    locate,
    read_state,
    require_keys,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published head's output
TOKENS = 35  # of a prompt, with [CLS] and [SEP]
HEAD_WIDTH = 64  # of attention
PREPROCESSING = Preprocessing(224, "crop", CLIP_MEAN, CLIP_STD, rounding="torchvision")
WEIGHTS = Weights(
    "image-reward",
    files={"weights": ("model.safetensors", "ImageReward.pt"), "vocabulary": "vocab.txt"},
    repositories={
        "THUDM/ImageReward": ("ImageReward.pt",),
        "google-bert/bert-base-uncased": ("vocab.txt",),
    },
)

_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|.*\.position_ids")  # by this reward
_VISION = {  # published name -> transformers'
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


@dataclass(frozen=True)
class ImageReward:
    """ImageReward 1.0, a score of about 0 +- 1 over pictures of current models; differentiable.

    Attributes:
        model: a folder with ``ImageReward.pt`` (or ``model.safetensors``) and ``vocab.txt``, the
            former file, or a repository on the Hugging Face hub; read when it is first called.
        batch: pictures that the network gets at once.
        quantise: round pictures to 8 bits, as if they had been stored; straight-through gradient.
    """

    model: str | Path
    batch: int = field(default=16, kw_only=True)
    quantise: bool = field(default=False, kw_only=True)
    differentiable: ClassVar[bool] = True
    _counts: Counter[str] = field(
        default_factory=lambda: Counter(prompts_cut=0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        require_batch(self.batch)
        object.__setattr__(self, "model", from_anywhere(WEIGHTS, self.model))

    @property
    def declaration(self) -> Declaration:
        """What the score is, and of whom."""
        return Declaration(
            scale="standard deviations of the published scores; about -2 to 2 over pictures of "
            "one model",
            licence="Apache-2.0",
            version="ImageReward-v1.0",
            source="arXiv 2304.05977, https://github.com/THUDM/ImageReward",
            preprocessing=dataclasses.replace(PREPROCESSING, quantise=self.quantise),
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Prompts that were cut to 35 tokens, each time they were scored."""
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
        network = _loaded(str(self.model)).to(images.device)
        tokens, lengths = network.tokens(prompts)
        self._counts["prompts_cut"] += sum(length > TOKENS for length in lengths)
        tokens = sent(tokens, images.device)
        return torch.cat(
            [
                network(chunk, words, self.quantise)
                for chunk, words in zip(
                    images.split(self.batch), tokens.split(self.batch), strict=True
                )
            ]
        )

    def embedding(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """The picture's first token after BLIP's vision network, whatever the prompt."""
        network = _loaded(str(self.model)).to(images.device)
        chunks = images.split(self.batch)
        return torch.cat([network.patches(chunk, self.quantise)[:, 0] for chunk in chunks])


# -- the network -----------------------------------------------------------------------------------


class BlipReward(nn.Module):
    """BLIP's vision and text networks and the head, of any size."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer = tokenizer

    def patches(
        self, images: Float[Tensor, "n 3 h w"], quantise: bool
    ) -> Float[Tensor, "n patches width"]:
        """Embeddings of the picture, then of its patches."""
        config: Any = self.vision.config
        prepare = dataclasses.replace(PREPROCESSING, size=config.image_size, quantise=quantise)
        return self.vision(prepare(images.float())).last_hidden_state

    def tokens(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "n tokens"], list[int]]:
        """Tokens of prompts, cut and padded, and how many each prompt has before it is cut."""
        own = self.tokenizer
        words = own(list(prompts), add_special_tokens=False)["input_ids"]
        rows = [[own.cls_token_id, *ids[: TOKENS - 2], own.sep_token_id] for ids in words]
        padded = [row + [own.pad_token_id] * (TOKENS - len(row)) for row in rows]
        return torch.tensor(padded), [len(ids) + 2 for ids in words]

    def forward(
        self, images: Float[Tensor, "n 3 h w"], tokens: Int[Tensor, "n tokens"], quantise: bool
    ) -> Float[Tensor, " n"]:
        """The scores."""
        patches = self.patches(images, quantise)
        padding = (tokens == self.tokenizer.pad_token_id)[:, None, None]
        lowest = torch.finfo(patches.dtype).min
        output = self.text(
            input_ids=tokens,
            # what is added to the logits: a mask of zeros and ones would wait for the device
            attention_mask=patches.new_zeros(()).masked_fill(padding, lowest),
            encoder_hidden_states=patches,
            is_decoder=False,  # words attend to all words, not to earlier ones only
        )
        return (self.head(output.last_hidden_state[:, 0])[:, 0] - MEAN) / STD


def load(source: str | Path) -> BlipReward:
    """The network on published weights; frozen, in float32 on the CPU.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the file holds other tensors, or the vocabulary does not fit them.
    """
    paths = locate(WEIGHTS, source)
    path = paths["weights"]
    state = {k: v for k, v in read_state(path).items() if not _UNUSED.fullmatch(k)}
    network = _network(state, _vocabulary(paths["vocabulary"]), path)
    renamed = {_renamed(name): value for name, value in state.items()}
    require_keys(renamed, network, path)
    network.load_state_dict(renamed, assign=True)
    embeddings: Any = network.text.embeddings
    places = torch.arange(embeddings.position_ids.shape[1])[None]
    embeddings.position_ids = places  # which no file holds
    return network.eval().requires_grad_(False)


_loaded = cache(load)


def _renamed(name: str) -> str:
    """A tensor's name in ``BlipReward``, of its published one."""
    if name.startswith("mlp.layers."):
        return name.replace("mlp.layers.", "head.")
    if name.startswith("blip.text_encoder."):
        return name.replace("blip.text_encoder.", "text.")
    if not name.startswith("blip.visual_encoder."):
        return name
    name = name.removeprefix("blip.visual_encoder.")
    if name.startswith("norm."):
        return f"vision.post_layernorm.{name.removeprefix('norm.')}"
    for published, ours in _VISION.items():
        name = name.replace(published, ours)
    return f"vision.{name}"


def _network(state: Mapping[str, Tensor], vocabulary: dict[str, int], path: Path) -> BlipReward:
    """A network of the sizes that the tensors have, without values.

    Raises:
        ValueError: tensors that say the sizes are missing, or the vocabulary is another.
    """
    from transformers import (  # here: seconds
        BertTokenizer,
        BlipTextConfig,
        BlipTextModel,
        BlipVisionConfig,
        BlipVisionModel,
    )

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"{path} does not hold ImageReward's weights: it lacks {name}")
        return state[name].shape

    eyes, words = "blip.visual_encoder.", "blip.text_encoder."
    width, _, _, patch = shape(f"{eyes}patch_embed.proj.weight")
    side = math.isqrt(shape(f"{eyes}pos_embed")[1] - 1)
    tokens, text_width = shape(f"{words}embeddings.word_embeddings.weight")
    if tokens != len(vocabulary) + 2:
        raise ValueError(
            f"{path} has {tokens} tokens, which are bert-base-uncased's and two more, but its "
            f"vocabulary has {len(vocabulary)}: take vocab.txt of google-bert/bert-base-uncased"
        )
    with torch.device("meta"):
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=shape(f"{eyes}blocks.0.mlp.fc1.weight")[0],
                num_hidden_layers=_count(state, rf"{re.escape(eyes)}blocks\.(\d+)\."),
                num_attention_heads=max(1, width // HEAD_WIDTH),
                image_size=side * patch,
                patch_size=patch,
                layer_norm_eps=1e-6,  # transformers' default is another
            )
        )
        text = BlipTextModel(
            BlipTextConfig(
                vocab_size=tokens,
                hidden_size=text_width,
                encoder_hidden_size=width,
                intermediate_size=shape(f"{words}encoder.layer.0.intermediate.dense.weight")[0],
                num_hidden_layers=_count(state, rf"{re.escape(words)}encoder\.layer\.(\d+)\."),
                num_attention_heads=max(1, text_width // HEAD_WIDTH),
                max_position_embeddings=shape(f"{words}embeddings.position_embeddings.weight")[0],
                is_decoder=True,  # without it there is no attention to the picture
                bos_token_id=None,  # tokens are the tokenizer's affair
                sep_token_id=None,
            ),
            add_pooling_layer=False,
        )
        head = nn.Sequential()
        layers = (re.fullmatch(r"mlp\.layers\.(\d+)\.weight", name) for name in state)
        for place in sorted(int(layer[1]) for layer in layers if layer):
            after, before = shape(f"mlp.layers.{place}.weight")
            head.add_module(str(place), nn.Linear(before, after))
    tokenizer = BertTokenizer(vocab=vocabulary, bos_token="[DEC]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return BlipReward(vision, text, head, tokenizer)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _vocabulary(path: Path) -> dict[str, int]:
    with path.open(encoding="utf-8") as lines:
        return {line.rstrip("\n"): k for k, line in enumerate(lines)}
