"""The schedules by name, each with its theory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from . import bubble, in_flight
from .chimera import make_chimera
from .dualpipe import make_dualpipe, make_dualpipev
from .gpipe import make_gpipe
from .inference import make_inference
from .interleaved import make_interleaved_1f1b
from .one_f_one_b import make_1f1b, make_eager_1f1b
from .task import Schedule, check_counts
from .zero_bubble import make_zb_h1, make_zbv


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All schedules of one name.

    The functions take the numbers of meshes, of microbatches, and of stages per mesh.

    Attributes:
      make: builds one.
      in_flight: per mesh, activations in flight; see `in_flight.max_in_flight`.
      bubble_share: for equal stages with `whole_backward_s`; None where no closed form is known.
      num_virtual: stages per mesh; None if any number will do.
      even: whether meshes and microbatches must be even.
      whole_backward_s: seconds of a whole backward for which `bubble_share` holds, where forward,
        input part and weight part take 1 each.
    """

    make: Callable[[int, int, int], Schedule]
    in_flight: Callable[[int, int, int], tuple[int, ...]]
    bubble_share: Callable[[int, int, int], float | None]
    num_virtual: int | None = 1
    even: bool = False
    whole_backward_s: float = 2.0


SCHEDULES: Mapping[str, Family] = MappingProxyType(
    {
        "gpipe": Family(
            make=lambda m, n, v: make_gpipe(m, n),
            in_flight=lambda m, n, v: in_flight.gpipe_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.one_f_one_b_bubble_share(m, n),
        ),
        "1f1b": Family(
            make=lambda m, n, v: make_1f1b(m, n),
            in_flight=lambda m, n, v: in_flight.one_f_one_b_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.one_f_one_b_bubble_share(m, n),
        ),
        "eager_1f1b": Family(
            make=lambda m, n, v: make_eager_1f1b(m, n),
            in_flight=lambda m, n, v: in_flight.eager_1f1b_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.one_f_one_b_bubble_share(m, n),
        ),
        "interleaved_1f1b": Family(
            make=make_interleaved_1f1b,
            in_flight=in_flight.interleaved_in_flight,
            bubble_share=bubble.interleaved_bubble_share,
            num_virtual=None,
        ),
        "zb-h1": Family(
            make=lambda m, n, v: make_zb_h1(m, n),
            in_flight=lambda m, n, v: in_flight.one_f_one_b_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.zb_h1_bubble_share(m, n),
        ),
        "zbv": Family(
            make=lambda m, n, v: make_zbv(m, n),
            in_flight=lambda m, n, v: in_flight.zbv_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.v_shape_bubble_share(m, n, 2 * m - 1),
            num_virtual=2,
        ),
        "chimera": Family(
            make=lambda m, n, v: make_chimera(m, n),
            even=True,
            in_flight=lambda m, n, v: in_flight.chimera_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.chimera_bubble_share(m, n),
            whole_backward_s=1.0,
        ),
        "dualpipe": Family(
            make=lambda m, n, v: make_dualpipe(m, n),
            even=True,
            in_flight=lambda m, n, v: in_flight.dualpipe_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.dualpipe_bubble_share(m, n),
        ),
        "dualpipev": Family(
            make=lambda m, n, v: make_dualpipev(m, n),
            in_flight=lambda m, n, v: in_flight.dualpipev_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.v_shape_bubble_share(m, n, 2 * m),
            num_virtual=2,
        ),
        "inference": Family(
            make=lambda m, n, v: make_inference(m, n),
            in_flight=lambda m, n, v: in_flight.inference_in_flight(m, n),
            bubble_share=lambda m, n, v: bubble.one_f_one_b_bubble_share(m, n),
        ),
    }
)

# What other projects call them, without signs and in lower case.
_ALIASES = {
    "1f1boverlapfriendly": "eager_1f1b",
    "pipedreamflush": "1f1b",
    "dapple": "1f1b",
    "interleaved": "interleaved_1f1b",
    "zb1p": "zb-h1",
    "zbvzerobubble": "zbv",
}


def schedule_name(name: str) -> str:
    """The name in `SCHEDULES` of a schedule, however it is spelt.

    >>> schedule_name("ZB_H1"), schedule_name("Interleaved1F1B"), schedule_name("pipedream_flush")
    ('zb-h1', 'interleaved_1f1b', '1f1b')

    Raises:
      ValueError: there is no such schedule.
    """
    letters = _letters(name)
    spelt = {_letters(each): each for each in SCHEDULES} | _ALIASES
    if letters not in spelt:
        raise ValueError(f"there is no schedule {name!r}; use one of {', '.join(SCHEDULES)}")
    return spelt[letters]


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def make_schedule(
    name: str, num_meshes: int, num_microbatches: int, num_virtual: int | None = None
) -> Schedule:
    """A schedule by name.

    Args:
      name: one of `SCHEDULES`, in any spelling that `schedule_name` knows.
      num_meshes: at least 1; even for chimera and dualpipe.
      num_microbatches: at least 1; even for chimera and dualpipe.
      num_virtual: stages per mesh. May be left out: 2 for interleaved 1F1B, and the only possible
        number for the others. The schedule has `num_meshes * num_virtual` stages.

    Raises:
      ValueError: an argument is not one of these.
    """
    name = schedule_name(name)
    family = SCHEDULES[name]
    if num_virtual is None:
        num_virtual = family.num_virtual or 2
    check_shape(name, num_meshes, num_microbatches, num_virtual)
    return family.make(num_meshes, num_microbatches, num_virtual)


def check_shape(name: str, num_meshes: int, num_microbatches: int, num_virtual: int) -> None:
    """Refuse numbers of which there is no schedule of a name.

    Args:
      name: one of `SCHEDULES`.
      num_meshes: see `make_schedule`, as the others.
      num_microbatches: see there.
      num_virtual: see there.

    Raises:
      ValueError: see `make_schedule`.
    """
    family = SCHEDULES[name]
    counts = {"meshes": num_meshes, "microbatches": num_microbatches}
    check_counts(name, counts, even=family.even)
    check_counts(name, {"stages per mesh": num_virtual})
    if family.num_virtual not in (None, num_virtual):
        raise ValueError(
            f"{name} has {family.num_virtual} stage(s) per mesh, found num_virtual={num_virtual}; "
            "leave it out, or use interleaved_1f1b, which takes any"
        )
