"""Lightning callbacks, one a file, for the `trainer.callbacks` of a config."""

from trainers.callbacks.baselines import Baselines
from trainers.callbacks.bottleneck_figures import BottleneckFigures
from trainers.callbacks.final_evaluation import FinalEvaluation
from trainers.callbacks.grad_norm import GradNorm
from trainers.callbacks.non_finite import NonFinite
from trainers.callbacks.pool_sizes import PoolSizes
from trainers.callbacks.preemption import Preemption
from trainers.callbacks.progress_lines import ProgressLines
from trainers.callbacks.sample_edits import SampleEdits
from trainers.callbacks.save_checkpoints import SaveCheckpoints
from trainers.callbacks.selection_figures import SelectionFigures
from trainers.callbacks.step_seed import StepSeed
from trainers.callbacks.throughput import Throughput

__all__ = [
    "Baselines",
    "BottleneckFigures",
    "FinalEvaluation",
    "GradNorm",
    "NonFinite",
    "PoolSizes",
    "Preemption",
    "ProgressLines",
    "SampleEdits",
    "SaveCheckpoints",
    "SelectionFigures",
    "StepSeed",
    "Throughput",
]
