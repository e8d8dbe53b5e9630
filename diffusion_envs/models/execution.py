"""How networks are run: memory layout, compilation, the decoder in pieces. What they say stays.

Layout and compilation add in another order: outputs differ by round-off. Pictures that are decoded
one by one are the same to round-off too; those that are decoded in tiles, blended where they
overlap, are not: each tile is normalised by itself (``docs/speed.md`` says how far they differ).
"""

from dataclasses import dataclass
from typing import Any

import torch

from diffusion_envs.models.adapters import AdapterSwitch

BACKEND = "inductor"  # that torch.compile uses


@dataclass(frozen=True)
class Execution:
    """How the networks of a pipeline are run.

    Attributes:
        compile: compile the UNet (minutes at first, for each of: with a gradient, without, and
            without the adapter; and again for a second number of rows).
        channels_last: keep weights of convolutions with the channels last.
        decode_slices: decode one picture at a time.
        decode_tiles: decode pictures that are larger than the autoencoder's own in tiles.
    """

    compile: bool = False
    channels_last: bool = False
    decode_slices: bool = False
    decode_tiles: bool = False

    def require_fit(self, reference: str, sharded: bool = False) -> None:
        """Refuse what cannot be compiled, and layouts that cannot be sharded.

        Raises:
            ValueError: ``reference`` is "offloaded", or weights are sharded.
        """
        wrong = [name for name in ("compile", "channels_last") if getattr(self, name)]
        if sharded and wrong:
            raise ValueError(
                f"{' and '.join(wrong)} must be left out with sharded: shards are made whole from "
                "call to call, of contiguous tensors, and each change would compile anew"
            )
        if self.compile and reference == "offloaded":
            raise ValueError(
                "compile must be left out with reference='offloaded': the frozen network's weights "
                "are exchanged, and each exchange would compile it anew; use reference='copy'"
            )

    def arrange(self, pipe: Any) -> None:
        """Before anything is attached: layouts, and how the decoder works."""
        if self.channels_last:
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
        if self.decode_slices:
            pipe.vae.enable_slicing()
        if self.decode_tiles:
            pipe.vae.enable_tiling()

    def compiled(self, network: Any, switch: AdapterSwitch) -> None:
        """After all is attached: compile the network, and its frozen copy where there is one.

        In place: names of parameters, exports and checkpoints know nothing of it.
        """
        if not self.compile:
            return
        for one in (network, switch.pretrained):
            if one is not None:
                one.compile(backend=BACKEND)
