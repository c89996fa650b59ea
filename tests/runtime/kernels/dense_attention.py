"""Attention with the whole score matrix, in float64 NumPy, and its gradients in closed form."""

from typing import NamedTuple

import numpy as np


class Dense(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def visible_pairs(
    batch, q_len, kv_len, *, causal=False, left=None, right=None, q_offset=0, kv_offset=0,
    q_ids=None, kv_ids=None,
):  # fmt: skip
    """`[batch, q_len, kv_len]`, pair by pair from the definition in the docstring of the API."""
    keep = np.zeros((batch, q_len, kv_len), bool)
    q_offset, kv_offset = (np.broadcast_to(x, (batch,)) for x in (q_offset, kv_offset))
    for b in range(batch):
        p = q_offset[b] + np.arange(q_len)[:, None]
        s = kv_offset[b] + np.arange(kv_len)[None, :]
        keep[b] = True
        if causal:
            keep[b] &= s <= p
        if left is not None:
            keep[b] &= s >= p - left
        if right is not None:
            keep[b] &= s <= p + right
        if q_ids is not None:
            keep[b] &= np.asarray(q_ids)[b][:, None] == np.asarray(kv_ids)[b][None, :]
    return keep


def dense_attention(q, k, v, keep, *, scale, softcap=None, dout=None, dlse=None):
    """Values and gradients for the cotangents `dout` and `dlse`, all in float64.

    With scores `s`, probabilities `p` and output `o` of a row, `dp_j = dout . v_j` and
    `ds_j = p_j (dp_j - o . dout + dlse)`; through the cap `c tanh(x / c)` a factor `1 - tanh^2`.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    raw = np.einsum("bthd,bshd->bhts", q, wide_k) * scale
    slope = np.ones_like(raw)
    if softcap is not None:
        t = np.tanh(raw / softcap)
        raw, slope = softcap * t, 1 - t**2
    s = np.where(keep[:, None], raw, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    top = np.where(np.isinf(top), 0.0, top)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out = np.einsum("bhts,bshd->bthd", p, wide_v)
    dout = np.zeros_like(out) if dout is None else np.asarray(dout).astype(np.float64)
    dlse = np.zeros_like(lse) if dlse is None else np.asarray(dlse).astype(np.float64)
    dp = np.einsum("bthd,bshd->bhts", dout, wide_v)
    delta = (out * dout).sum(-1).swapaxes(1, 2) - dlse
    ds = p * (dp - delta[..., None]) * slope * scale
    dq = np.einsum("bhts,bshd->bthd", ds, wide_k)
    dk = np.einsum("bhts,bthd->bshd", ds, q)
    dv = np.einsum("bhts,bthd->bshd", p, dout)
    dk, dv = (x.reshape(*x.shape[:2], k.shape[2], group, -1).sum(3) for x in (dk, dv))
    return Dense(out, lse, dq, dk, dv)


def relative_l2(found, expected):
    """Distance over the length of `expected`; over 1 where that is 0."""
    found, expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0)
