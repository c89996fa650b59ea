"""How values go from one mesh to another: `Mover`, `Move`.

In: type and layouts of a value. Out: a `Move`, which takes one value after the other. Within a
process that is a `Transfer`; between processes it has two ends, a channel of a `Transport`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from alpa_lite.runtime.arrays import is_local, keys_as_data
from alpa_lite.runtime.transfer import plan_transfer
from alpa_lite.runtime.transport import Transport


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """What this process does to take values from one mesh to another; calls only enqueue.

    Attributes:
      start: all of it, if no other process sends or receives. The result shares no memory with the
        value, which may be donated right afterwards.
      send: the source's end, if others receive and this process has some of the source's devices.
      receive: the target's end likewise; values arrive in the order in which they were sent.
      lends: whether a value that was sent is read later on, and must not be donated before.
    """

    start: Callable[[jax.Array], jax.Array] | None = None
    send: Callable[[jax.Array], None] | None = None
    receive: Callable[[], jax.Array] | None = None
    lends: bool = False


class Mover:
    """Plans moves; every process asks for the same ones in the same order."""

    def __init__(self, transport: Transport | None = None) -> None:
        """Nothing happens yet.

        Args:
          transport: between processes; None if there is one.
        """
        self._transport = transport
        self._count = 0

    def __call__(self, aval: Any, source: NamedSharding, target: NamedSharding) -> Move:
        """This process's part in moving values of a type.

        Args:
          aval: shape and dtype.
          source: how they lie.
          target: how they shall lie.
        """
        tag, self._count = self._count, self._count + 1
        if not (is_local(source) or is_local(target)):
            return Move()
        if source.device_set & target.device_set:
            return Move(jax.jit(_same, in_shardings=source, out_shardings=target, keep_unused=True))
        if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
            return self._move_keys(tag, aval, source, target)
        return self._move(tag, aval, source, target)

    def _move(self, tag: int, aval: Any, source: NamedSharding, target: NamedSharding) -> Move:
        transfer = plan_transfer(aval, source, target)
        if source.is_fully_addressable and target.is_fully_addressable:
            return Move(transfer.start)
        assert self._transport is not None, "moves between processes need a transport"
        channel = self._transport.open(tag, transfer)
        return Move(
            send=channel.send if is_local(source) else None,
            receive=channel.receive if is_local(target) else None,
            lends=transfer.prepare is None,
        )

    def _move_keys(self, tag: int, aval: Any, source: NamedSharding, target: NamedSharding) -> Move:
        """Keys travel as numbers."""
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        moved = self._move(tag, data, keys_as_data(aval, source), keys_as_data(aval, target))
        unwrap = jax.jit(jax.random.key_data, out_shardings=keys_as_data(aval, source))
        name = aval.dtype._impl.name
        wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=name), out_shardings=target)
        start, send, receive = moved.start, moved.send, moved.receive
        return Move(
            start=None if start is None else lambda keys: wrap(start(unwrap(keys))),
            send=None if send is None else lambda keys: send(unwrap(keys)),
            receive=None if receive is None else lambda: wrap(receive()),
        )


def _same(x: jax.Array) -> jax.Array:
    return x
