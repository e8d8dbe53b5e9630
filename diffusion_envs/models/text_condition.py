"""What a text-to-image UNet is conditioned on: text embeddings, and what Stable Diffusion XL adds.

Source  Podell et al. 2023, Stable Diffusion XL, arXiv 2307.01952, section 2.2, for the sizes that a
        network is told.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TextCondition:
    """One row for each prompt; ``condition[rows]`` picks rows."""

    tokens: Float[Tensor, "rows tokens width"]
    pooled: Float[Tensor, "rows pooled"] | None = None  # of the whole prompt; SDXL alone reads it
    # original size, corner of the crop, target size: (height, width) or (top, left) each
    time_ids: Float[Tensor, "rows numbers"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> "TextCondition":
        return self._changed(lambda part: part[rows])

    def expanded(self, rows: int) -> "TextCondition":
        """The one row that this is, so many times; nothing is copied."""
        return self._changed(lambda part: part.expand(rows, *part.shape[1:]))

    def like(self, other: Tensor) -> "TextCondition":
        """The same on a tensor's device, in its dtype."""
        return self._changed(lambda part: part.to(other))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "TextCondition":
        pooled, sizes = self.pooled, self.time_ids
        return TextCondition(
            change(self.tokens),
            None if pooled is None else change(pooled),
            None if sizes is None else change(sizes),
        )
