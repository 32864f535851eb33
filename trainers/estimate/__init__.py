"""The dry run: what a configured run needs, without loading weights or starting processes.

`python -m trainers.estimate --config incomes_qwen7b.yaml --gpus 8 --gpu h100 [--a.b.c value ...]`
"""

from trainers.estimate.cards import Card, named, sized
from trainers.estimate.command import main
from trainers.estimate.remedies import DoesNotFit, refuse
from trainers.estimate.totals import Estimate, estimate

__all__ = ["Card", "DoesNotFit", "Estimate", "estimate", "main", "named", "refuse", "sized"]
