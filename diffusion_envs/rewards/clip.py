"""CLIP: embeddings of unit length of pictures and of prompts, from the files that were published.

Formula  e(image) = P_v LN(v) / |P_v LN(v)|, v the first token of the vision transformer's output;
         e(prompt) = P_t LN(w) / |P_t LN(w)|, w the output at the first end token of the text
         transformer, which is causal: what is padded after it changes nothing.
Text     Byte-pair tokens of the lower-case prompt, between a start and an end token; cut to the
         77 places that the network has, so that the end token stays, and padded. open_clip also
         repairs HTML entities and broken Unicode first (ftfy); transformers does not, nor do we.
Network  transformers' CLIPModel. Two layouts are read: a Hugging Face folder (config.json and
         model.safetensors), and a state dict of open_clip (``visual.*``,
         ``transformer.resblocks.*``), whose sizes are those of its tensors. How many attention
         heads there are is in no tensor: ``vision_heads`` and ``text_heads`` know the published
         sizes.

Sources  Radford et al. 2021, arXiv 2103.00020. https://github.com/mlfoundations/open_clip
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ctrl.devices import sent
from diffusion_envs.rewards.preprocessing import Preprocessing
from diffusion_envs.rewards.weights import read_state, require_keys

_WIDE_HEADS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, ViT-g, ViT-bigG; all others have 64
_NO_WEIGHTS = re.compile(  # buffers that older versions stored
    r"(text_model|vision_model)\.embeddings\.position_ids|attn_mask|input_resolution"
    r"|context_length|vocab_size"
)
_OPEN_CLIP = {  # open_clip's name -> transformers'; both towers have the same blocks
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")  # multiplied from the right


class Clip(nn.Module):
    """Embeddings of pictures, and of prompts where there is a tokenizer."""

    def __init__(self, network: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        self.network: Any = network
        self.tokenizer = tokenizer
        config: Any = network.config
        self.image_size: int = config.vision_config.image_size
        self.width: int = config.projection_dim
        self.places: int = config.text_config.max_position_embeddings  # tokens of a prompt

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by for logits: exp(logit_scale), 100 in most."""
        return self.network.logit_scale.exp()

    def image_embeddings(
        self, images: Float[Tensor, "n 3 h w"], prepare: Preprocessing, batch: int
    ) -> Float[Tensor, "n width"]:
        """Unit vectors of pictures.

        Args:
            images: pictures with values in [0, 1].
            prepare: for this network's size.
            batch: pictures that the network gets at once.
        """
        embeddings = []
        for chunk in images.split(batch):
            prepared = prepare(chunk).float()
            pooled = self.network.vision_model(pixel_values=prepared).pooler_output
            embeddings.append(_unit(self.network.visual_projection(pooled)))
        return torch.cat(embeddings)

    def tokens(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "n places"], list[bool]]:
        """Tokens of prompts, cut and padded to the network's places, and which were cut."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        words = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        rows = [[start, *ids[: self.places - 2], end] for ids in words]
        padded = [row + [end] * (self.places - len(row)) for row in rows]
        return torch.tensor(padded), [len(ids) > self.places - 2 for ids in words]

    def text_embeddings(
        self, prompts: Sequence[str], batch: int
    ) -> tuple[Float[Tensor, "n width"], int]:
        """Unit vectors of prompts, and how many of them were cut.

        A prompt that is there several times is embedded once.

        Args:
            prompts: texts.
            batch: prompts that the network gets at once.
        """
        unique = list(dict.fromkeys(prompts))
        tokens, cut = self.tokens(unique)
        device = self.network.logit_scale.device
        embeddings = []
        for chunk in tokens.split(batch):
            ends = (chunk == self.tokenizer.eos_token_id).int().argmax(1)  # the first one
            output = self.network.text_model(input_ids=sent(chunk, device)).last_hidden_state
            ends = sent(ends, device)[:, None, None].expand(-1, 1, output.shape[-1])
            pooled = output.gather(1, ends)[:, 0]
            embeddings.append(_unit(self.network.text_projection(pooled)))
        place = {prompt: k for k, prompt in enumerate(unique)}
        places = [place[prompt] for prompt in prompts]
        shared = sent(torch.tensor(places), device)
        return torch.cat(embeddings)[shared], sum(cut[k] for k in places)

    def cosines(
        self,
        images: Float[Tensor, "n 3 h w"],
        prompts: Sequence[str],
        prepare: Preprocessing,
        batch: int,
    ) -> tuple[Float[Tensor, " n"], int]:
        """Cosine of each picture's embedding with its prompt's, and how many prompts were cut."""
        with torch.no_grad():  # prompts have no gradient, and neither has the network
            texts, cut = self.text_embeddings(prompts, batch)
        return (self.image_embeddings(images, prepare, batch) * texts).sum(-1), cut


def _unit(vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def require_batch(batch: int) -> None:
    """Refuse what is no number of pictures.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")


# -- from files ------------------------------------------------------------------------------------


def from_hugging_face(paths: Mapping[str, Path]) -> Clip:
    """CLIP from a Hugging Face folder; frozen, in float32. One network for each file.

    Args:
        paths: of "weights" and "config"; and of "vocabulary" and "merges" where prompts are read.

    Raises:
        ValueError: the files are those of another network, or do not fit together.
    """
    return _with_tokenizer(_hugging_face(paths["weights"], paths["config"]), paths)


def from_open_clip(paths: Mapping[str, Path], heads: tuple[int, int] | None = None) -> Clip:
    """CLIP from a state dict of open_clip; frozen, in float32. One network for each file.

    Args:
        paths: of "weights", "vocabulary" and "merges".
        heads: of attention in the vision and in the text transformer; those of the published
            networks by default.

    Raises:
        ValueError: the files are those of another network, or do not fit together.
    """
    return _with_tokenizer(_open_clip(paths["weights"], heads), paths)


def _with_tokenizer(network: nn.Module, paths: Mapping[str, Path]) -> Clip:
    if "vocabulary" not in paths:
        return Clip(network)
    tokenizer = _tokenizer(paths["vocabulary"], paths["merges"])
    config: Any = network.config
    if len(tokenizer) != (tokens := config.text_config.vocab_size):
        raise ValueError(
            f"{paths['vocabulary']} has {len(tokenizer)} tokens, but the network of "
            f"{paths['weights']} has {tokens}: take vocab.json and merges.txt of the repository "
            "that it was made from"
        )
    return Clip(network, tokenizer)


@cache
def _tokenizer(vocabulary: Path, merges: Path) -> Any:
    from transformers import CLIPTokenizer  # here: half a second

    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    try:
        return CLIPTokenizer(json.loads(vocabulary.read_text(encoding="utf-8")), pairs)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{vocabulary} and {merges} are no byte-pair vocabulary ({error}): get both again, "
            "from one repository"
        ) from error


@cache
def _hugging_face(weights: Path, config: Path) -> nn.Module:
    from transformers import CLIPConfig  # here: half a second

    try:
        stored = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is no JSON ({error}): get it again") from error
    if (kind := stored.get("model_type")) != "clip":
        raise ValueError(
            f"{config} describes a model of type {kind!r}, but it must be 'clip', with both "
            "transformers: take openai/clip-vit-large-patch14, say"
        )
    state = {k: v for k, v in read_state(weights).items() if not _NO_WEIGHTS.fullmatch(k)}
    return _filled(CLIPConfig.from_dict(stored), state, weights)


@cache
def _open_clip(weights: Path, heads: tuple[int, int] | None) -> nn.Module:
    from transformers import CLIPConfig  # here: half a second

    state = {k: v for k, v in read_state(weights).items() if not _NO_WEIGHTS.fullmatch(k)}
    vision, text, width = _sizes(state, weights)
    vision["num_attention_heads"], text["num_attention_heads"] = heads or (
        vision_heads(vision["hidden_size"]),
        text_heads(text["hidden_size"]),
    )
    for name, tower in (("vision", vision), ("text", text)):
        if tower["hidden_size"] % tower["num_attention_heads"]:
            raise ValueError(
                f"{weights} has a {name} transformer of width {tower['hidden_size']}, which is no "
                f"multiple of {tower['num_attention_heads']} heads: pass heads=(vision, text)"
            )
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
    return _filled(config, _as_hugging_face(state), weights)


def vision_heads(width: int) -> int:
    """Attention heads of the published vision transformers, by width."""
    return max(1, width // _WIDE_HEADS.get(width, 64))


def text_heads(width: int) -> int:
    """Attention heads of the published text transformers, by width."""
    return max(1, width // 64)


def _filled(config: Any, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A network with these weights, which are not copied."""
    from transformers import CLIPModel  # here: half a second

    with torch.device("meta"):
        network = CLIPModel(config)
    require_keys(state, network, path)
    network.load_state_dict(state, assign=True)
    for tower in (network.text_model, network.vision_model):
        own: Any = tower.embeddings
        own.position_ids = torch.arange(own.position_ids.shape[1])[None]  # of no file
    return network.eval().requires_grad_(False)


def _sizes(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Configurations of the vision and of the text transformer, and the embeddings' width."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"{path} does not hold a CLIP in open_clip's layout: it lacks {name}")
        return state[name].shape

    def tower(prefix: str, width: int) -> dict[str, Any]:
        pattern = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
        layers = {match[1] for name in state if (match := pattern.match(name))}
        return {
            "hidden_size": width,
            "intermediate_size": shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": len(layers),
            "hidden_act": "gelu",  # OpenAI's own weights have quick_gelu; they have a folder
        }

    width, _, _, patch = shape("visual.conv1.weight")
    vision = tower("visual.", width) | {
        "patch_size": patch,
        "image_size": patch * math.isqrt(shape("visual.positional_embedding")[0] - 1),
    }
    vocabulary, width = shape("token_embedding.weight")
    text = tower("", width) | {
        "vocab_size": vocabulary,
        "max_position_embeddings": shape("positional_embedding")[0],
        "bos_token_id": vocabulary - 2,  # the last two, as in every published vocabulary
        "eos_token_id": vocabulary - 1,
        "pad_token_id": None,
    }
    return vision, text, shape("text_projection")[1]


def _as_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of open_clip by transformers' names; what has none keeps its own."""
    renamed = {}
    for name, value in state.items():
        known = max((k for k in _OPEN_CLIP if name.startswith(k)), key=len, default="")
        new = _OPEN_CLIP.get(known, "") + name.removeprefix(known)
        for theirs, ours in _BLOCK.items():
            new = new.replace(theirs, ours)
        if ".attn.in_proj_" in new:  # queries, keys, values below one another
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[new.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
        else:
            renamed[new] = value.t().contiguous() if name in _TRANSPOSED else value
    return renamed
