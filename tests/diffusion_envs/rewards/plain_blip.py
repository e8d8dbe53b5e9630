"""ImageReward in float64, from the formulas, on tensors under their published names.

Sources  Dosovitskiy et al. 2020 (ViT, pre-norm), Devlin et al. 2018 (BERT, post-norm), Li et al.
2022 (BLIP: every BERT layer attends to the picture after it has attended to the words).
"""

import math

import numpy as np
import torch
from torch.nn import functional

from tests.diffusion_envs.rewards import plain_resize

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
# no [CLS] at 101, so that nothing works by a default; "##s" and "##fa" go on with a word
VOCABULARY = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]", "a", "cat", "dog", "##s", "on"]
VOCABULARY += [",", "so", "##fa", "red", "blue"]
WORDS = [*VOCABULARY, "[DEC]", "[ENC]"]
PROMPTS = ["A cat, on a Sofa", "red dogs", "", "cat " * 40]
ROWS = [["a", "cat", ",", "on", "a", "so", "##fa"], ["red", "dog", "##s"], [], ["cat"] * 40]
LIMIT = 33  # words of one token each: with [CLS] and [SEP] they are 35


def state(generator, side=28, patch=7, width=128, text_width=192, layers=2, positions=64):
    """Random tensors in the layout of ``ImageReward.pt``, large enough that all of them count."""
    tensors = {}

    def tensor(name, *shape, std=1.0, mean=0.0):
        tensors[name] = mean + std * torch.randn(*shape, generator=generator)

    def linear(name, before, after):
        tensor(f"{name}.weight", after, before, std=before**-0.5)
        tensor(f"{name}.bias", after, std=0.3)

    def norm(name, width):
        tensor(f"{name}.weight", width, std=0.3, mean=1.0)
        tensor(f"{name}.bias", width, std=0.3)

    eyes, words = "blip.visual_encoder", "blip.text_encoder"
    tensor(f"{eyes}.cls_token", 1, 1, width)
    tensor(f"{eyes}.pos_embed", 1, (side // patch) ** 2 + 1, width)
    tensor(f"{eyes}.patch_embed.proj.weight", width, 3, patch, patch, std=(3 * patch**2) ** -0.5)
    tensor(f"{eyes}.patch_embed.proj.bias", width, std=0.3)
    for k in range(layers):
        block = f"{eyes}.blocks.{k}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", width, 2 * width)
        linear(f"{block}.mlp.fc2", 2 * width, width)
    norm(f"{eyes}.norm", width)
    tensors[f"{words}.embeddings.position_ids"] = torch.arange(positions)[None]
    tensor(f"{words}.embeddings.word_embeddings.weight", len(VOCABULARY) + 2, text_width)
    tensor(f"{words}.embeddings.position_embeddings.weight", positions, text_width)
    norm(f"{words}.embeddings.LayerNorm", text_width)
    for k in range(layers + 1):
        layer = f"{words}.encoder.layer.{k}"
        for attention, source in (("attention", text_width), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", text_width, text_width)
            linear(f"{layer}.{attention}.self.key", source, text_width)
            linear(f"{layer}.{attention}.self.value", source, text_width)
            linear(f"{layer}.{attention}.output.dense", text_width, text_width)
            norm(f"{layer}.{attention}.output.LayerNorm", text_width)
        linear(f"{layer}.intermediate.dense", text_width, 3 * text_width)
        linear(f"{layer}.output.dense", 3 * text_width, text_width)
        norm(f"{layer}.output.LayerNorm", text_width)
    linear("blip.vision_proj", width, 16)  # published, and unused
    linear("blip.text_proj", text_width, 16)
    for k, (before, after) in zip(
        (0, 2, 4, 6, 7), ((text_width, 40), (40, 30), (30, 20), (20, 10), (10, 1)), strict=True
    ):
        linear(f"mlp.layers.{k}", before, after)
    return tensors


def write(folder, tensors):
    """The published files."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def scores(tensors, images, rows):
    """Scores of pictures with prompts that are rows of words and pieces, float64."""
    return torch.stack([_score(tensors, *pair) for pair in zip(images, rows, strict=True)])


def patches(tensors, image):
    """[1 + patches, width] of one picture."""
    own = {
        name.removeprefix("blip.visual_encoder."): value.double() for name, value in tensors.items()
    }
    width, _, patch, _ = own["patch_embed.proj.weight"].shape
    side = patch * math.isqrt(own["pos_embed"].shape[1] - 1)
    cut = _prepared(image, side).reshape(3, side // patch, patch, side // patch, patch)
    cut = cut.permute(1, 3, 0, 2, 4).reshape(-1, 3 * patch * patch)
    kernel = own["patch_embed.proj.weight"].reshape(width, -1)
    x = cut @ kernel.T + own["patch_embed.proj.bias"]
    x = torch.cat([own["cls_token"][0], x]) + own["pos_embed"][0]
    k = 0
    while f"blocks.{k}.norm1.weight" in own:
        block = f"blocks.{k}."
        y = _norm(own, f"{block}norm1", x, 1e-6)
        qkv = _linear(own, f"{block}attn.qkv", y).chunk(3, -1)
        x = x + _linear(own, f"{block}attn.proj", _attend(*qkv))
        y = _linear(own, f"{block}mlp.fc1", _norm(own, f"{block}norm2", x, 1e-6))
        x = x + _linear(own, f"{block}mlp.fc2", _gelu(y))
        k += 1
    return _norm(own, "norm", x, 1e-6)


def _score(tensors, image, row):
    seen = patches(tensors, image)
    own = {
        name.removeprefix("blip.text_encoder."): value.double() for name, value in tensors.items()
    }
    ids = [WORDS.index(word) for word in ["[CLS]", *row[:LIMIT], "[SEP]"]]
    # what is padded is attended to by nobody, so it need not be there
    x = own["embeddings.word_embeddings.weight"][ids]
    x = x + own["embeddings.position_embeddings.weight"][: len(ids)]
    x = _norm(own, "embeddings.LayerNorm", x, 1e-12)
    k = 0
    while f"encoder.layer.{k}.output.dense.weight" in own:
        layer = f"encoder.layer.{k}."
        for attention, source in (("attention", None), ("crossattention", seen)):
            name = f"{layer}{attention}."
            source = x if source is None else source
            query = _linear(own, f"{name}self.query", x)
            key, value = (_linear(own, f"{name}self.{w}", source) for w in ("key", "value"))
            y = _linear(own, f"{name}output.dense", _attend(query, key, value))
            x = _norm(own, f"{name}output.LayerNorm", x + y, 1e-12)
        y = _gelu(_linear(own, f"{layer}intermediate.dense", x))
        y = _linear(own, f"{layer}output.dense", y)
        x = _norm(own, f"{layer}output.LayerNorm", x + y, 1e-12)
        k += 1
    head = x[0]
    for k in (0, 2, 4, 6, 7):
        head = _linear(own, f"mlp.layers.{k}", head)
    return (head[0] - 0.16717362830052426) / 1.0333394966054072


def _prepared(image, side):
    picture = image.double().clamp(0, 1).numpy()
    height, width = picture.shape[-2:]
    short = min(height, width)
    tall, wide = (side if n == short else int(side * n / short) for n in (height, width))
    small = np.clip(plain_resize.resize(picture, tall, wide), 0, 1)
    top, left = round((tall - side) / 2.0), round((wide - side) / 2.0)
    small = small[:, top : top + side, left : left + side]
    return torch.from_numpy((small - MEAN[:, None, None]) / STD[:, None, None])


def _linear(own, name, x):
    return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]


def _norm(own, name, x, epsilon):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return centred / scale * own[f"{name}.weight"] + own[f"{name}.bias"]


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _attend(query, key, value):
    """Heads of width 64, each with a softmax of its own."""
    heads = []
    for q, k, v in zip(query.split(64, -1), key.split(64, -1), value.split(64, -1), strict=True):
        heads.append(functional.softmax(q @ k.T / 8, -1) @ v)
    return torch.cat(heads, -1)
