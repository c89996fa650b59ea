"""`FlashSpec`: what one attention computes, apart from its arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# How it can be computed. `choice.py` says which one runs where.
SCAN = "scan"
PALLAS = "pallas"
MOSAIC_GPU = "mosaic_gpu"
IMPLEMENTATIONS = (SCAN, PALLAS, MOSAIC_GPU)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashSpec:
    """The static half of an attention; hashable, a parameter of the primitives.

    The query at position `p` sees the keys at positions `p - left` to `p + right`, both included.
    Causal is `right=0`, a sliding window of `n` keys is `left=n-1, right=0`.

    Attributes:
      scale: of the scores, positive.
      left: how many positions a query looks back; None for all.
      right: how many positions a query looks ahead; None for all.
      softcap: scores become `softcap * tanh(score / softcap)`; None for no cap.
      implementation: one of `IMPLEMENTATIONS`, None to choose by platform.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    implementation: str | None = None

    @property
    def banded(self) -> bool:
        """Whether positions matter."""
        return self.left is not None or self.right is not None
