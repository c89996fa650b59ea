"""The inter-operator optimizers on plain arrays: `cluster` for layers, `stage_solve` for stages."""

from .cluster import Clustering as Clustering
from .cluster import auto_layer_num as auto_layer_num
from .cluster import cluster_layers as cluster_layers
from .cluster import crossing_bytes as crossing_bytes
from .interleaved import InterleavedSolution as InterleavedSolution
from .interleaved import evaluate_interleaved as evaluate_interleaved
from .interleaved import interleaved_in_flight as interleaved_in_flight
from .interleaved import solve_interleaved as solve_interleaved
from .placement import Placement as Placement
from .placement import host_distances as host_distances
from .placement import place_submeshes as place_submeshes
from .placement import verify_placement as verify_placement
from .stage_problem import Stage as Stage
from .stage_problem import StageProblem as StageProblem
from .stage_problem import StageProposal as StageProposal
from .stage_problem import StageSolution as StageSolution
from .stage_problem import StageTerms as StageTerms
from .stage_problem import brute_force_stages as brute_force_stages
from .stage_problem import evaluate_stages as evaluate_stages
from .stage_problem import gpipe_in_flight as gpipe_in_flight
from .stage_problem import one_f_one_b_in_flight as one_f_one_b_in_flight
from .stage_problem import verify_stage_problem as verify_stage_problem
from .stage_solve import solve_stage_candidates as solve_stage_candidates
from .stage_solve import solve_stages as solve_stages
from .submesh import Submesh as Submesh
from .submesh import submesh_shapes as submesh_shapes
