"""What a family of text-to-image pipelines must say of itself, and what all of them share."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from diffusion_envs.models.text_condition import TextCondition

_SHOWN = 60  # characters of a prompt that is too long, in a message
Configs: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Settings of a pipeline's parts by name ("unet", "vae", ...), those of its index as "index"."""


@runtime_checkable
class Family(Protocol):
    """Pipelines of one kind: how their prompts are encoded, and what they must be like."""

    @property
    def title(self) -> str:
        """What people call it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """What ``model_index.json`` may name as the class."""
        ...

    @property
    def without(self) -> Mapping[str, Any]:
        """Settings of the pipeline that leave out what is not needed."""
        ...

    def parts(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the parts that must be there, networks first."""
        ...

    def check(self, model: str, configs: Configs) -> None:
        """Refuse a model whose networks need other inputs, or do not fit each other.

        Raises:
            ValueError: naming what, and what is supported.
        """
        ...

    def decoder_precision(self, vae: Mapping[str, Any], precision: torch.dtype) -> torch.dtype:
        """Dtype of the autoencoder where the networks have this one."""
        ...

    def tokenizers(self, pipe: Any) -> list[Any]:
        """One for each text encoder."""
        ...

    def encode(self, pipe: Any, prompts: Sequence[str], picture: tuple[int, int]) -> TextCondition:
        """What the network is conditioned on for prompts, float32.

        Args:
            pipe: of this family.
            prompts: one for each row.
            picture: height and width in pixels.
        """
        ...

    def unconditional(
        self, pipe: Any, negative_prompt: str | None, picture: tuple[int, int]
    ) -> TextCondition:
        """A row: what guidance leads away from; without a prompt, as the pipeline has it."""
        ...


def check_network(model: str, configs: Configs, supported: str) -> None:
    """Refuse UNets that read something beside noisy latents, a timestep and text.

    Raises:
        ValueError: naming what, and what is supported.
    """
    kind = configs["index"].get("unet", (None, "UNet2DConditionModel"))[1]
    if kind != "UNet2DConditionModel":
        raise ValueError(f"model {model} has a {kind} as unet; {supported}")
    unet = configs["unet"]
    reads, makes = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latents = configs["vae"].get("latent_channels", 4)
    if reads != latents or makes != latents:
        kind = " (9 are those of inpainting models)" if reads == 9 else ""
        raise ValueError(
            f"model {model} has a UNet of {reads} input channels{kind} and {makes} output channels "
            f"for latents of {latents}; {supported}"
        )
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if (value := unet.get(name)) is not None:
            what = "an image embedding" if name == "encoder_hid_dim_type" else "a class"
            raise ValueError(
                f"model {model} has a UNet that reads {what} ({name} {value!r}); {supported}"
            )


def check_width(model: str, configs: Configs, encoders: Sequence[str]) -> None:
    """Refuse text encoders whose embeddings are not what the UNet reads.

    Raises:
        ValueError: naming both widths.
    """
    reads = configs["unet"].get("cross_attention_dim", 1280)
    makes = sum(configs[name].get("hidden_size", 512) for name in encoders)
    if reads != makes:
        names = "text encoder makes" if len(encoders) == 1 else "text encoders make"
        raise ValueError(
            f"model {model} has a UNet that reads text embeddings of width {reads}, but its "
            f"{names} those of {makes}"
        )


def require_lengths(pipe: Any, tokenizers: Sequence[Any], prompts: Sequence[str]) -> None:
    """Refuse prompts that are longer than a text encoder reads.

    Tokens of several vectors (textual inversion) count as often as they have vectors.

    Raises:
        ValueError: a prompt is too long; it is named.
    """
    whole = [str(prompt) for prompt in prompts]
    for tokenizer in tokenizers:
        limit, texts = tokenizer.model_max_length, whole
        if any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):
            texts = pipe.maybe_convert_prompt(texts, tokenizer)
        for prompt, tokens in zip(whole, tokenizer(texts).input_ids, strict=True):
            if len(tokens) > limit:
                shown = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}..."
                raise ValueError(
                    f"prompt {shown!r} has {len(tokens)} tokens; the model reads {limit}, and "
                    "nothing is cut off unseen: make it shorter"
                )
