"""AdamW whose moments have 8 bits: bitsandbytes' own, for all weights of a large network.

Step         AdamW's, of moments that are rounded to 8 bits in blocks.
Cost         Two bytes a weight for the moments instead of eight. Tensors of fewer than 4096 numbers
             keep 32 bits, as bitsandbytes has it.
Sources      Dettmers et al. 2022, 8-bit optimizers via block-wise quantization, arXiv 2110.02861.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from diffusion_envs.environment import Environment
from diffusion_envs.training.optimisers.adamw import TorchStepper
from diffusion_envs.training.optimisers.protocol import Groups

_SMALLEST = 4096  # numbers of a tensor whose moments have 8 bits


@dataclass(frozen=True)
class AdamW8bit:
    """bitsandbytes' AdamW8bit at the objective's learning rate and ``UpdateSize``'s weight decay.

    Attributes:
        paged: let moments go to the CPU's memory while a GPU's is short (CUDA only).
    """

    paged: bool = False

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> TorchStepper:
        """Begin, on any parameters.

        Raises:
            ValueError: bitsandbytes is not installed, or cannot work here.
        """
        try:
            library: Any = importlib.import_module("bitsandbytes")
        except (ImportError, RuntimeError, OSError) as error:  # also of a CUDA that it cannot use
            raise ValueError(
                f"AdamW8bit needs bitsandbytes, which cannot be imported ({error}): pip install "
                "bitsandbytes, or use AdamW(fused=True)"
            ) from error
        kind = library.optim.PagedAdamW8bit if self.paged else library.optim.AdamW8bit
        made = kind(groups, lr=rate, weight_decay=weight_decay, min_8bit_size=_SMALLEST)
        return TorchStepper(made)
