"""alpa-lite: an auto-parallelizing compiler for JAX train steps."""

from alpa_lite.api import ParallelStep as ParallelStep
from alpa_lite.api import parallelize as parallelize
from alpa_lite.cost_model import Cluster as Cluster
from alpa_lite.errors import AlpaLiteError as AlpaLiteError
from alpa_lite.errors import InfeasibleError as InfeasibleError
from alpa_lite.errors import PlanError as PlanError
from alpa_lite.errors import StepError as StepError
from alpa_lite.ir.grad import grad as grad
from alpa_lite.ir.grad import value_and_grad as value_and_grad
from alpa_lite.ir.marks import mark_layer as mark_layer
from alpa_lite.passes.methods import AutoParallel as AutoParallel
from alpa_lite.passes.methods import DataParallel as DataParallel
from alpa_lite.passes.methods import ManualParallel as ManualParallel
from alpa_lite.passes.methods import ShardParallel as ShardParallel
from alpa_lite.passes.methods import Zero1Parallel as Zero1Parallel
from alpa_lite.passes.methods import Zero2Parallel as Zero2Parallel
from alpa_lite.passes.methods import Zero3Parallel as Zero3Parallel
from alpa_lite.passes.pipeline_methods import ManualPipeline as ManualPipeline
from alpa_lite.passes.pipeline_methods import PipeshardParallel as PipeshardParallel
from alpa_lite.passes.pipeline_methods import ThreeDParallel as ThreeDParallel
from alpa_lite.passes.pipeline_plan import PipelinePlan as PipelinePlan
from alpa_lite.passes.pipeline_plan import load_plan as load_plan
from alpa_lite.passes.plan import Plan as Plan
from alpa_lite.passes.rules import register_sharding_rule as register_sharding_rule
from alpa_lite.runtime.calibrate import calibrate as calibrate
from alpa_lite.version import __version__ as __version__
