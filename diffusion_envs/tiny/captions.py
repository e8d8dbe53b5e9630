"""Captions of CIFAR-10 pictures, and a CLIP tokenizer with a small vocabulary for them."""

import json
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Generator

from diffusion_envs.cifar10.data import CLASSES, SYNONYMS

TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a small photo of a {}",
    "a blurry photo of a {}",
    "a photo of the {}",
    "a {}",
    "{}",
)
LENGTH = 32  # tokens a prompt, begin and end included


def caption(label: int, generator: Generator) -> str:
    """A caption of a picture of this class, in random wording; the plain one half the time."""
    noun_index, template_index = torch.randint(0, 2**30, (2,), generator=generator).tolist()
    nouns = SYNONYMS.get(CLASSES[label], (CLASSES[label],))
    noun = nouns[noun_index % len(nouns)]
    template = TEMPLATES[max(0, template_index % (2 * len(TEMPLATES)) - len(TEMPLATES))]
    return with_article(template.format(noun))


def with_article(text: str) -> str:
    """The same words with "an" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer to which every word of the captions is one token (``write_bpe``)."""
    nouns = [n for name in CLASSES for n in SYNONYMS.get(name, (name,))]
    words = {word for template in TEMPLATES for word in re.findall(r"[a-z]+", template)}
    write_bpe(folder, words | {"an", *nouns, *(n + "s" for n in nouns)}, LENGTH)


def write_bpe(folder: Path, words: Collection[str], length: int) -> None:
    """Write ``vocab.json`` and ``merges.txt`` of a byte-level BPE, in CLIP's format.

    Args:
        folder: where they go.
        words: those that are one token; any other text is spelled in bytes, so all of it encodes.
        length: most tokens of a prompt, begin and end included.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    known = set(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:  # what the merges so far make of the word
            pieces = _merge(pieces, left, right)
        while len(pieces) > 1:  # then join from the left until it is whole
            left, right = pieces[0], pieces[1]
            merges.append((left, right))
            if left + right not in known:
                known.add(left + right)
                vocabulary.append(left + right)
            pieces = _merge(pieces, left, right)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _merge(pieces: list[str], left: str, right: str) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and joined[-1] == left and piece == right:
            joined[-1] = left + right
        else:
            joined.append(piece)
    return joined
