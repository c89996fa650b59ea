"""What stands between attention layers, in closed form: a dense MLP, or experts.

Letters: h hidden, i MLP width, E experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

# Operations per element. silu: exp, add, divide, multiply; gelu in its tanh form: cube (2), scale,
# add, scale, tanh, add, halve, multiply; relu2 squares.
ACTIVATION_FLOPS: Final = MappingProxyType({"silu": 4, "gelu": 9, "relu": 1, "relu2": 2})


class MLP(Protocol):
    """What the counts need to know of the part between attention layers."""

    def parameters(self, hidden: int) -> int:
        """Trained scalars of one layer."""

    def active_parameters(self, hidden: int) -> int:
        """Those that one token is multiplied with."""

    def matmul_flops(self, hidden: int) -> float:
        """Per token: products of activations with kernels."""

    def dispatch_flops(self, hidden: int) -> float:
        """Per token: dispatch of tokens to experts where that is a matrix product, one way."""

    def activation_flops(self) -> float:
        """Per token: nonlinearity, and the product with the gate."""

    def saved_elements(self, hidden: int) -> float:
        """Numbers per token inside the layer that a backward pass needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """Two matrices with a nonlinearity between, three if it is gated.

    Attributes:
      size: i.
      gated: whether a third matrix makes a gate (SwiGLU, GeGLU).
      bias: whether every matrix has one.
      activation: a key of `ACTIVATION_FLOPS`.
    """

    size: int
    gated: bool = True
    bias: bool = False
    activation: str = "silu"

    @property
    def matrices(self) -> int:
        """2 or 3."""
        return 3 if self.gated else 2

    def parameters(self, hidden: int) -> int:
        """`3 h i` or `2 h i`, and biases."""
        bias = (self.matrices - 1) * self.size + hidden
        return self.matrices * hidden * self.size + self.bias * bias

    def active_parameters(self, hidden: int) -> int:
        """All of them."""
        return self.parameters(hidden)

    def matmul_flops(self, hidden: int) -> float:
        """`6 h i` or `4 h i`."""
        return 2.0 * self.matrices * hidden * self.size

    def dispatch_flops(self, hidden: int) -> float:
        """None."""
        return 0.0

    def activation_flops(self) -> float:
        """For SwiGLU `4 i + i`."""
        return float((ACTIVATION_FLOPS[self.activation] + self.gated) * self.size)

    def saved_elements(self, hidden: int) -> float:
        """Inputs of the nonlinearity, of the gate, and of the last matrix."""
        return float(self.matrices * self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMLP:
    """A router and experts, each a `DenseMLP`, of which every token uses a few.

    Attributes:
      expert: one of them.
      num_experts: E.
      experts_per_token: k.
      shared: an MLP that every token uses too.
      shared_gate: whether a learned gate of one number weighs it.
      slots_per_token: expert slots computed per token: k without padding or dropping, more or less
        with a fixed capacity.
      dispatch_slots: slots of all experts in one group of tokens where dispatch and combination
        are matrix products with a one-hot matrix (GShard), 0 where tokens are moved.
    """

    expert: DenseMLP
    num_experts: int
    experts_per_token: int
    shared: DenseMLP | None = None
    shared_gate: bool = False
    slots_per_token: float | None = None
    dispatch_slots: int = 0

    @property
    def slots(self) -> float:
        """Expert slots per token."""
        if self.slots_per_token is None:
            return float(self.experts_per_token)
        return self.slots_per_token

    def _common(self, hidden: int) -> int:
        shared = 0 if self.shared is None else self.shared.parameters(hidden)
        return hidden * self.num_experts + shared + self.shared_gate * hidden

    def parameters(self, hidden: int) -> int:
        """Router, all experts, and what is shared."""
        return self._common(hidden) + self.num_experts * self.expert.parameters(hidden)

    def active_parameters(self, hidden: int) -> int:
        """Router, k experts, and what is shared."""
        return self._common(hidden) + self.experts_per_token * self.expert.parameters(hidden)

    def matmul_flops(self, hidden: int) -> float:
        """`2 h E` for the router, and the experts' slots."""
        shared = 0.0 if self.shared is None else self.shared.matmul_flops(hidden)
        router = 2.0 * hidden * (self.num_experts + self.shared_gate)
        return router + shared + self.slots * self.expert.matmul_flops(hidden)

    def dispatch_flops(self, hidden: int) -> float:
        """`2 h` per slot of the token's group."""
        return 2.0 * hidden * self.dispatch_slots

    def activation_flops(self) -> float:
        """Those of all slots and of what is shared."""
        shared = 0.0 if self.shared is None else self.shared.activation_flops()
        return shared + self.slots * self.expert.activation_flops()

    def saved_elements(self, hidden: int) -> float:
        """Router output, and per slot the token and what its expert keeps."""
        shared = 0.0 if self.shared is None else self.shared.saved_elements(hidden)
        slots = self.slots * (hidden + self.expert.saved_elements(hidden))
        return self.num_experts + shared + slots
