"""Attention without the score matrix; see `docs/design/004-flash-attention.md`."""

from alpa_lite.runtime.kernels.flash.attention import flash_attention as flash_attention
