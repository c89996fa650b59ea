"""The arithmetic of transformers: parameters, FLOPs, bytes and scaling laws in closed form.

Knows neither models nor clusters: a `TransformerShape` goes in, numbers come out. The planner does
not use it; it prices the traced graph. What both count is the same within 1 %, see
`tests/cli/test_model_against_graph.py`.
"""

from alpa_lite.cost_model.llm.attention import Attention as Attention
from alpa_lite.cost_model.llm.attention import HeadAttention as HeadAttention
from alpa_lite.cost_model.llm.attention import LatentAttention as LatentAttention
from alpa_lite.cost_model.llm.feed_forward import MLP as MLP
from alpa_lite.cost_model.llm.feed_forward import DenseMLP as DenseMLP
from alpa_lite.cost_model.llm.feed_forward import ExpertMLP as ExpertMLP
from alpa_lite.cost_model.llm.flops import PartFlops as PartFlops
from alpa_lite.cost_model.llm.flops import count_flops as count_flops
from alpa_lite.cost_model.llm.flops import recomputed_flops as recomputed_flops
from alpa_lite.cost_model.llm.memory import activation_bytes as activation_bytes
from alpa_lite.cost_model.llm.memory import kv_cache_bytes as kv_cache_bytes
from alpa_lite.cost_model.llm.scaling import ComputeOptimum as ComputeOptimum
from alpa_lite.cost_model.llm.scaling import ScalingLaw as ScalingLaw
from alpa_lite.cost_model.llm.scaling import compute_optimum as compute_optimum
from alpa_lite.cost_model.llm.shape import Block as Block
from alpa_lite.cost_model.llm.shape import TransformerShape as TransformerShape
from alpa_lite.cost_model.llm.shape import count_parameters as count_parameters
