"""Conditions by prompt: each encoded alone and once, a bounded number kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from diffusion_envs.environment import Environment
from diffusion_envs.models.kept_conditions import KeptConditions
from diffusion_envs.models.protocol import joined
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.rewards import Colour
from diffusion_envs.samplers import DDIM


@dataclass
class Encoder:
    """Encodes a prompt as its length, and remembers what it was asked."""

    asked: list[str]

    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        self.asked += prompts
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return TextCondition(lengths[:, None, None], lengths[:, None] + 0.5)


def test_rows_are_those_of_the_prompts_and_each_is_encoded_once():
    encoder = Encoder([])
    kept = KeptConditions(encoder)
    for _ in range(2):
        condition = kept.of(["ccc", "a", "ccc", "bb"])
        assert condition.tokens.flatten().tolist() == [3, 1, 3, 2]
        assert condition.pooled.flatten().tolist() == [3.5, 1.5, 3.5, 2.5]
        assert condition.time_ids is None
    assert encoder.asked == ["ccc", "a", "bb"]


def test_the_least_recently_used_are_forgotten():
    encoder = Encoder([])
    kept = KeptConditions(encoder, most=2)
    for prompt in ("a", "bb", "a", "ccc", "a", "bb"):
        kept.of([prompt])
    assert encoder.asked == ["a", "bb", "ccc", "bb"]  # bb made room for ccc
    everything = kept.of(["a", "bb", "ccc", "dddd"])  # more at once than are kept
    assert everything.tokens.flatten().tolist() == [1, 2, 3, 4]
    assert len(kept._kept) == 2


def test_what_is_no_condition_is_named():
    assert joined([None, None]) is None
    assert joined([torch.zeros(1, 2), torch.ones(2, 2)]).tolist() == [[0, 0], [1, 1], [1, 1]]
    with pytest.raises(TypeError, match="a tensor or a dataclass of tensors, got list"):
        joined([[1], [2]])


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_ten_thousand_prompts_are_checked_but_not_encoded():
    model = TextToImageUNet.load(guidance=1.0)
    prompts = [f"a cat {k}" for k in range(10_000)]
    encoded: list[str] = []
    encode = model.encode

    def watched(some: Sequence[str]) -> TextCondition:
        encoded.extend(some)
        return encode(some)

    model.encode = watched
    sampler = DDIM().bind(model.table, 2)
    environment = Environment(model, sampler, Colour(), prompts, seed=0)
    assert encoded == []
    index = torch.tensor([9_999, 3, 9_999])
    alone = torch.cat([encode([prompts[k]]).tokens for k in index.tolist()])
    assert torch.equal(environment.condition_of(index).tokens, alone)  # whatever its company
    assert encoded == [prompts[9_999], prompts[3]]
    prompts[7_000] = "a cat " * 40
    said = (
        r"^prompt 'a cat a cat .{40,60}\.\.\.' has \d+ tokens; the model reads .*: make it shorter$"
    )
    with pytest.raises(ValueError, match=said):
        Environment(model, sampler, Colour(), prompts, seed=0)
