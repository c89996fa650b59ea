"""Bytes and seconds of what goes from one stage to the next."""

from __future__ import annotations

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.graph import aval_bytes
from alpa_lite.passes.inter_op import Placement, Submesh
from alpa_lite.passes.stages.source import CutStep


def link_bytes(cut: CutStep, stage: int) -> tuple[int, int]:
    """Bytes that a stage hands on per microbatch, and bytes of cotangents that come back.

    What goes to a later stage than the next is counted here too: it leaves at the same time.
    """
    there = back = 0
    for link in cut.cuts[stage].sent:
        size = aval_bytes(link.variable.aval)
        there += size
        back += size if link.differentiable else 0
    return there, back


def transfer_s(num_bytes: float, source: Placement, target: Placement, cluster: Cluster) -> float:
    """Seconds to move an array between two placed submeshes; see `seconds_between`.

    Args:
      num_bytes: of the whole array.
      source: where one submesh lies.
      target: where the other lies.
      cluster: the hardware.
    """
    if source == target:
        return 0.0
    same_host = list(source.hosts) == list(target.hosts) and len(source.hosts) == 1
    return seconds_between(num_bytes, source.submesh, target.submesh, same_host, cluster)


def seconds_between(
    num_bytes: float, source: Submesh, target: Submesh, same_host: bool, cluster: Cluster
) -> float:
    """Seconds to move an array between two submeshes, each byte once.

    As many devices send as the smaller submesh has; within a host over its links, between hosts
    each over its share of the network. What the target gathers afterwards is not counted.

    Args:
      num_bytes: of the whole array.
      source: shape of one submesh.
      target: shape of the other.
      same_host: whether they share a host.
      cluster: the hardware.
    """
    if not num_bytes:
        return 0.0
    link = cluster.intra_host if same_host else cluster.inter_host
    senders = min(source.num_devices, target.num_devices)
    return link.alpha_s + num_bytes / senders * link.beta_s_per_byte
