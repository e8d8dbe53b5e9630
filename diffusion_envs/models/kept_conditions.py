"""Conditions by prompt: encoded when they are asked for, and a bounded number of them kept.

Ten thousand prompts of Stable Diffusion XL would be 6 GB of text embeddings. Prompts are encoded
one at a time, so that a prompt's numbers do not depend on which others were asked for with it, and
a run that is resumed has the same.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ctrl.devices import sent
from diffusion_envs.models.protocol import Condition, joined


@dataclass
class KeptConditions:
    """What a model is conditioned on for prompts; the least recently used are forgotten.

    Attributes:
        encode: prompts to their condition, a row each.
        device: of the conditions.
        most: conditions that are kept: 512 of Stable Diffusion XL are 323 MB.
    """

    encode: Callable[[Sequence[str]], Condition]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    most: int = 512
    _kept: OrderedDict[str, Condition] = field(default_factory=OrderedDict, init=False)

    @torch.no_grad()
    def of(self, prompts: Sequence[str]) -> Condition:
        """The condition of some prompts, a row each; each prompt is encoded once at most."""
        rows = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        asked = {prompt: self._of_one(prompt) for prompt in rows}
        for _ in range(len(self._kept) - self.most):
            self._kept.popitem(last=False)
        whole = joined(list(asked.values()))
        return whole[sent(torch.tensor([rows[prompt] for prompt in prompts]), self.device)]

    def _of_one(self, prompt: str) -> Condition:
        if prompt not in self._kept:
            self._kept[prompt] = self.encode([prompt])
        self._kept.move_to_end(prompt)
        return self._kept[prompt]
