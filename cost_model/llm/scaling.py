"""How large a model, and how many tokens, a budget of compute is best spent on.

Loss of a model of N parameters trained on D tokens (Hoffmann et al. 2022, arXiv 2203.15556,
equation 10, approach 3):

    L(N, D) = A / N^alpha + B / D^beta + E,        training takes C = 6 N D operations

With D = C / (6 N), the derivative in N vanishes where `alpha A / N^alpha = beta B / D^beta`, so

    N = G (C / 6)^(beta / (alpha + beta)),  D = (C / 6)^(alpha / (alpha + beta)) / G,
    G = (alpha A / (beta B))^(1 / (alpha + beta))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

FLOPS_PER_PARAMETER_AND_TOKEN: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    """Constants of the loss, and where they are from.

    Attributes:
      a, alpha: of the term that falls with parameters.
      b, beta: of the term that falls with tokens.
      floor: loss of the best conceivable model, E.
      source: of the figures.
    """

    a: float
    alpha: float
    b: float
    beta: float
    floor: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss in nats per token."""
        return self.a / parameters**self.alpha + self.b / tokens**self.beta + self.floor


SCALING_LAWS: Final = MappingProxyType(
    {
        "hoffmann": ScalingLaw(
            a=406.4, alpha=0.34, b=410.7, beta=0.29, floor=1.69,
            source="Hoffmann et al. 2022, arXiv 2203.15556, approach 3 (printed there with beta "
            "0.28; 0.29 as taught in UCSD CSE 234)",
        ),
        "besiroglu": ScalingLaw(
            a=482.01, alpha=0.3478, b=2085.43, beta=0.3658, floor=1.8172,
            source="Besiroglu et al. 2024, arXiv 2404.10102, a second fit to the same data",
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeOptimum:
    """The best use of a budget.

    Attributes:
      flops: the budget.
      parameters: of the model.
      tokens: to train it on.
      loss: predicted, nats per token.
    """

    flops: float
    parameters: float
    tokens: float
    loss: float


def compute_optimum(flops: float, law: ScalingLaw) -> ComputeOptimum:
    """Parameters and tokens with the least loss for a budget of training operations.

    Raises:
      ValueError: the budget is not a positive number.

    Example:
      >>> best = compute_optimum(5.76e23, SCALING_LAWS["besiroglu"])  # the budget of Chinchilla
      >>> round(best.parameters / 1e9), round(best.tokens / best.parameters)
      (72, 18)
    """
    if not 0 < flops < math.inf:
        raise ValueError(f"flops must be a positive number, found {flops!r}")
    product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
    total = law.alpha + law.beta
    balance = (law.alpha * law.a / (law.beta * law.b)) ** (1 / total)
    parameters = balance * product ** (law.beta / total)
    tokens = product / parameters
    return ComputeOptimum(
        flops=flops, parameters=parameters, tokens=tokens, loss=law.loss(parameters, tokens)
    )
