"""What a run's configuration says about memory and time, in one place, and in a form that can be varied."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry

from trainers.cli import TrainingCLI
from trainers.estimate.cards import Card
from trainers.estimate.families import Family, family_of

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


@dataclass(frozen=True)
class Sharding:
    """How a run's state is shared out, by the names that DeepSpeed has for it.

    Args:
        stage: of ZeRO; None without DeepSpeed, when every process holds all of it.
        reduce_bucket: elements of one bucket of gradients.
        buckets: how many of these there are: two where communication overlaps computation.
        max_live: elements that stage 3 holds gathered.
        threshold: parameters of fewer elements are not shared out.
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    partition_teacher: bool = False
    reduce_bucket: int = 0
    buckets: int = 1
    max_live: int = 1_000_000_000
    threshold: int = 100_000


@dataclass(frozen=True)
class Plan:
    """A run. `module` is not built, and is never changed: `altered` gives another plan.

    Args:
        records: of a micro-batch on one process.
        pool: the largest pool.
        accumulate: micro-batches of an optimizer step.
        precision: the Trainer's.
        gpus: processes of the job.
        nodes: machines that they are on.
        workers: loader processes of each of them.
        steps: `max_steps`; None where it is not set.
    """

    module: Any = field(repr=False)
    records: int
    pool: int
    accumulate: int
    precision: str
    sharding: Sharding
    gpus: int
    nodes: int
    workers: int
    steps: int | None
    card: Card

    @property
    def family(self) -> Family:
        """What is known of modules like this one."""
        return family_of(self.module)

    @property
    def compute(self) -> torch.dtype:
        """What matrices are multiplied in."""
        if self.precision.startswith("32"):
            return self.module.backbone_config.torch_dtype
        return _DTYPES[self.precision.split("-")[0]]

    @property
    def autocast(self) -> torch.dtype | None:
        """Weights stay as they are and are cast for each operation: mixed precision without DeepSpeed."""
        return self.compute if self.sharding.stage is None and self.precision.endswith("-mixed") else None

    @property
    def cast(self) -> torch.dtype | None:
        """What the module's weights are cast to before training; None: they stay as they were loaded."""
        whole = self.precision.endswith("-true") and not self.precision.startswith("32")
        return self.compute if whole or (self.sharding.stage is not None and self.precision[:2] != "32") else None

    def altered(self, **changes: Any) -> "Plan":
        """The plan with other values; those that are not its own are the module's."""
        own = {k: v for k, v in changes.items() if k in self.__dataclass_fields__}
        module = copy.deepcopy(self.module)
        for name, value in changes.items():
            if name not in own:
                setattr(module, name, value)
        return replace(self, module=module, **own)


def plan_of(cli: TrainingCLI, gpus: int, card: Card) -> Plan:
    """The plan of a parsed configuration. Needs no Trainer, so that it can be made where there is no GPU.

    Raises:
        ValueError: for an editor, a precision or a strategy whose memory is not known here.
    """
    module: Any = cli.model
    data, trainer = cli.datamodule, cli.config_init["trainer"]
    family_of(module)
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    precision = str(trainer["precision"] or "32-true")
    precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(precision, precision)
    if precision.split("-")[0] not in _DTYPES:
        raise ValueError(f"the dry run does not know trainer.precision {precision}; choose among bf16, 16 and 32")
    used = [size for size, rate in zip(data.pool_sizes, data.pool_rates, strict=True) if rate]
    steps = trainer["max_steps"]
    plan = Plan(
        module=module,
        records=data.records_per_batch,
        pool=min(max(used), data.records_per_batch),
        accumulate=int(trainer["accumulate_grad_batches"] or 1),
        precision=precision,
        sharding=sharding_of(trainer["strategy"]),
        gpus=gpus,
        nodes=int(trainer["num_nodes"] or 1),
        workers=data.num_workers,
        steps=steps if steps and steps > 0 else None,
        card=card,
    )
    if hasattr(module, "check"):  # what the module itself would refuse
        strategy = SimpleNamespace() if plan.sharding.stage is None else SimpleNamespace(hold=None)
        module.check(SimpleNamespace(precision=precision, strategy=strategy))
    return plan


def sharding_of(strategy: Any) -> Sharding:
    """How a strategy shares out, from the object or its name.

    Raises:
        ValueError: for one that is not known here.
    """
    if isinstance(strategy, str) and strategy in StrategyRegistry and strategy.startswith("deepspeed"):
        strategy = StrategyRegistry.get(strategy)
    if isinstance(strategy, DeepSpeedStrategy):
        assert isinstance(strategy.config, dict)
        zero = strategy.config["zero_optimization"]
        return Sharding(
            stage=int(zero["stage"]),
            offload_optimizer="offload_optimizer" in zero,
            offload_parameters="offload_param" in zero,
            partition_teacher=bool(getattr(strategy, "partition_teacher", False)),
            reduce_bucket=int(zero["reduce_bucket_size"]),
            buckets=2 if zero["overlap_comm"] and int(zero["stage"]) < 3 else 1,
            max_live=int(zero.get("stage3_max_live_parameters", Sharding.max_live)),
            threshold=int(zero.get("stage3_param_persistence_threshold", Sharding.threshold)),
        )
    plain = isinstance(strategy, (DDPStrategy, SingleDeviceStrategy))
    if plain or strategy in (None, "auto") or str(strategy).startswith("ddp"):
        return Sharding()
    raise ValueError(f"the dry run does not know trainer.strategy {strategy}; it knows auto, ddp and DeepSpeed's ZeRO")


def records_of(plan: Plan) -> Sequence[int]:
    """Smaller micro-batches that accumulate to the same step: their numbers of records, falling."""
    return [plan.records // n for n in (2, 4, 8, 16) if plan.records % n == 0]
