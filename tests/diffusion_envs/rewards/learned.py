"""Learned rewards on small random networks in their published layouts, with plain formulas beside.

Every one of ``CASES`` goes through the same tests: ``test_learned.py`` and, on the simulated
accelerator, ``tests/device/test_learned_rewards.py``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_envs.rewards import aesthetic, clip_score, hps, image_reward, pick_score
from diffusion_envs.rewards.weights import Weights
from tests.diffusion_envs.rewards import plain_blip, plain_clip, plain_resize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = plain_clip.VISION["size"]


@dataclass(frozen=True)
class Case:
    """A learned reward, how its files are made, and its formula.

    Attributes:
        name: of the test.
        make: the reward from its files' folder or from another source, and from ``batch``.
        weights: its files.
        state: random tensors.
        write: writes them and what belongs to them into a folder.
        scores: (tensors, images, rows) -> float64, by plain formulas.
        unit: size of the scores, in which errors are measured.
        prompts: four, the third empty, the last one over the limit.
        rows: the words that the prompts consist of.
        limit: words of one token each that a prompt may have; None if prompts are not read.
    """

    name: str
    make: Callable[..., Any]
    weights: Weights
    state: Callable[[torch.Generator], dict[str, Tensor]]
    write: Callable[[Path, dict[str, Tensor]], Path]
    scores: Callable[[dict[str, Tensor], Tensor, Sequence[Sequence[str]]], Tensor]
    unit: float
    prompts: Sequence[str] = tuple(plain_clip.PROMPTS)
    rows: Sequence[Sequence[str]] = tuple(plain_clip.ROWS)
    limit: int | None = plain_clip.PLACES - 2


def _cosines(tensors, images, rows, *, act, fit, rounding, saturate=True):
    prepared = plain_resize.prepare(images, SIDE, fit, rounding, MEAN, STD, saturate)
    return plain_clip.cosines(tensors, prepared, rows, act)


def _clip_score(scale, act, unit, formula):
    own = partial(_cosines, act=act, fit="crop", rounding="transformers")
    return Case(
        name=f"clip-score {scale}",
        make=partial(clip_score.CLIPScore, scale=scale),
        weights=clip_score.WEIGHTS,
        state=plain_clip.state,
        write=partial(plain_clip.write_hugging_face, act=act),
        scores=lambda tensors, *rest: formula(own(tensors, *rest), tensors["logit_scale"]),
        unit=unit,
    )


def _pick_score(scale, unit, formula):
    own = partial(_cosines, act="gelu", fit="crop", rounding="transformers")
    return Case(
        name=f"pick-score {scale}",
        make=partial(pick_score.PickScore, scale=scale),
        weights=pick_score.WEIGHTS,
        state=plain_clip.state,
        write=partial(plain_clip.write_hugging_face, act="gelu", name="pytorch_model.bin"),
        scores=lambda tensors, *rest: formula(own(tensors, *rest), tensors["logit_scale"]),
        unit=unit,
    )


def _hps(version, weights, file):
    return Case(
        name=f"hps {version}",
        make=partial(hps.HPS, version=version, heads=plain_clip.HEADS),
        weights=weights,
        state=plain_clip.state,
        write=partial(plain_clip.write_open_clip, name=file),
        scores=partial(_cosines, act="gelu", fit="pad", rounding="open_clip", saturate=False),
        unit=1.0,
    )


def _aesthetic_state(generator, version):
    tensors = plain_clip.state(generator)
    sizes = {"v2": (plain_clip.WIDTH, 32, 16, 8, 4, 1), "v1": (plain_clip.WIDTH, 1)}[version]
    names = {"v2": [f"layers.{k}." for k in (0, 2, 4, 6, 7)], "v1": [""]}[version]
    for name, before, after in zip(names, sizes[:-1], sizes[1:], strict=True):
        weight = torch.randn(after, before, generator=generator) / before**0.5
        tensors[f"head:{name}weight"] = weight
        tensors[f"head:{name}bias"] = torch.randn(after, generator=generator)
    return tensors


def _write_aesthetic(folder, tensors, file):
    network = {k: v for k, v in tensors.items() if not k.startswith("head:")}
    plain_clip.write_hugging_face(folder, network, "quick_gelu")
    for name in ("vocab.json", "merges.txt"):  # it reads no prompts
        (folder / name).unlink()
    head = {k.removeprefix("head:"): v for k, v in tensors.items() if k.startswith("head:")}
    torch.save(head, folder / file)
    return folder


def _aesthetic_scores(tensors, images, rows):
    prepared = plain_resize.prepare(images, SIDE, "crop", "torchvision", MEAN, STD)
    x = plain_clip.image_embeddings(tensors, prepared, "quick_gelu")
    for name in [n for n in tensors if n.startswith("head:") and n.endswith("weight")]:
        bias = tensors[name.replace("weight", "bias")].double()
        x = x @ tensors[name].double().T + bias
    return x[:, 0]


def _aesthetic(version, weights, file):
    return Case(
        name=f"aesthetic {version}",
        make=partial(aesthetic.Aesthetic, version=version),
        weights=weights,
        state=partial(_aesthetic_state, version=version),
        write=partial(_write_aesthetic, file=file),
        scores=_aesthetic_scores,
        unit=1.0,
        limit=None,
    )


LOGIT = math.exp(3.0)  # of ``plain_clip.state``
CASES = [
    _clip_score("logit", "quick_gelu", LOGIT, lambda cos, scale: scale.double().exp() * cos),
    _clip_score("logit/30", "gelu", LOGIT / 30, lambda c, s: s.double().exp() * c / 30),
    _clip_score("percent", "quick_gelu", 100.0, lambda cos, _: 100 * cos.clamp(min=0)),
    _clip_score("cosine", "quick_gelu", 1.0, lambda cos, _: cos),
    _pick_score("logit", LOGIT, lambda cos, scale: scale.double().exp() * cos),
    _pick_score("logit/26", LOGIT / 26, lambda c, s: s.double().exp() * c / 26),
    _hps("2.1", hps.WEIGHTS, "HPS_v2.1_compressed.pt"),
    _hps("2.0", hps.WEIGHTS_2_0, "HPS_v2_compressed.pt"),
    _aesthetic("v2", aesthetic.WEIGHTS, "sac+logos+ava1-l14-linearMSE.pth"),
    _aesthetic("v1", aesthetic.WEIGHTS_V1, "sa_0_4_vit_l_14_linear.pth"),
    Case(
        name="image-reward",
        make=image_reward.ImageReward,
        weights=image_reward.WEIGHTS,
        state=plain_blip.state,
        write=plain_blip.write,
        scores=plain_blip.scores,
        unit=1.0,
        prompts=plain_blip.PROMPTS,
        rows=plain_blip.ROWS,
        limit=plain_blip.LIMIT,
    ),
]
