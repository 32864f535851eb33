"""DeepSpeed ZeRO as this project uses it: on GPUs and on CPUs, with checkpoints that are whole or do not count."""

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.strategies.deepspeed import _validate_device_index_selection
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

# DeepSpeed looks for a device as it is imported, and warns where there is none
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from modules.backbone import cast as cast_parameters
from trainers import compile_lock
from trainers.checkpoints import zero


class Zero(DeepSpeedStrategy):
    """DeepSpeed ZeRO through Lightning, for CUDA (NCCL) and for CPU (gloo).

    Frozen parameters are never saved. Gradients are checked on all ranks before each step, in every precision: a step
    with one that is not finite changes nothing (see callbacks/non_finite.py). Gradient clipping and accumulation are
    the Trainer's `gradient_clip_val` and `accumulate_grad_batches`, the precision is the Trainer's.

    Args:
        stage: what is shared out over the ranks: 1 optimizer states, 2 gradients too, 3 parameters too.
        offload_optimizer: keep optimizer states, and step, in the host's memory.
        offload_parameters: keep the shards of the parameters there (stage 3).
        partition_teacher: share out a frozen model beside the trained one too (stage 3); otherwise each rank has it
            whole, which is faster.
        reduce_bucket_size: elements of one reduction of gradients, a buffer in memory.
        allgather_bucket_size: elements of one gathering of parameters, likewise.
        persistence_threshold: parameters with fewer elements are not shared out (stage 3).
        overlap_comm: communicate during the backward pass.
        timeout: seconds after which a rank that waits for another gives up.
        loss_scale: of 16-bit floats; 0 adapts it.
        initial_scale_power: a loss scale that adapts begins at 2 to this power.

    Raises:
        ValueError: for settings that do not go together; it names them.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        partition_teacher: bool = False,
        reduce_bucket_size: int = 200_000_000,
        allgather_bucket_size: int = 200_000_000,
        persistence_threshold: int = 100_000,
        overlap_comm: bool = True,
        timeout: float = 1800,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
    ) -> None:
        for name, needs in {"offload_parameters": offload_parameters, "partition_teacher": partition_teacher}.items():
            if needs and stage != 3:
                raise ValueError(f"strategy.{name} needs stage 3, which shares out parameters; the stage is {stage}")
        if timeout <= 0 or min(reduce_bucket_size, allgather_bucket_size) < 1:
            raise ValueError(
                f"strategy: timeout and bucket sizes must be positive, got {timeout}, {reduce_bucket_size}, "
                f"{allgather_bucket_size}"
            )
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            reduce_bucket_size=reduce_bucket_size,
            allgather_bucket_size=allgather_bucket_size,
            overlap_comm=overlap_comm,
            contiguous_gradients=True,
            timeout=timedelta(seconds=timeout),
            loss_scale=loss_scale,
            initial_scale_power=initial_scale_power,
            exclude_frozen_parameters=True,
            logging_batch_size_per_gpu=1,  # DeepSpeed wants a number, and only prints with it
        )
        self.stage = stage
        self.partition_teacher = partition_teacher
        assert isinstance(self.config, dict)
        # torch's AdamW steps on the host too; DeepSpeed's own would have to be compiled
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.config["zero_optimization"] |= {"stage3_param_persistence_threshold": persistence_threshold}
        self._held: list[Any] = []  # engines of frozen models
        self._gathered = 0

    def check(self) -> None:
        """Refuse what can be known to be wrong before any process is started.

        Raises:
            ValueError: naming the setting, or the lock that a killed compilation has left.
        """
        if isinstance(self.accelerator, CPUAccelerator) and self.precision_plugin.precision.startswith("16"):
            raise ValueError(
                f"trainer.precision {self.precision_plugin.precision}: processors have no fp16 for DeepSpeed; take "
                "32-true or bf16-mixed"
            )
        if isinstance(self.accelerator, CPUAccelerator) and not any(map(shutil.which, ("c++", "g++"))):
            raise ValueError("ZeRO on processors compiles an operator of DeepSpeed's: install a C++ compiler (g++)")
        if isinstance(self.accelerator, CPUAccelerator):
            compile_lock.await_lock(compile_lock.folder_of(compile_lock.SHARED_MEMORY))

    # ------------------------------------------------------------------ processes

    def setup_environment(self) -> None:
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        if isinstance(self.accelerator, CPUAccelerator):
            if cast(Any, get_accelerator())._name != "cpu":
                set_accelerator(CPU_Accelerator())
        elif not isinstance(self.accelerator, CUDAAccelerator):
            raise ValueError(
                f"ZeRO runs on CUDA and on CPU, not on {type(self.accelerator).__name__}; set trainer.accelerator"
            )
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        from deepspeed.comm import comm as deepspeed_comm

        assert self.parallel_devices is not None
        if self.root_device.type == "cuda":
            _validate_device_index_selection(self.parallel_devices)
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        # most of DeepSpeed's messages go through groups of its own, which it makes with PyTorch's default timeout
        backend: Any = deepspeed_comm.cdb
        backend.new_group = partial(torch.distributed.new_group, timeout=self._timeout)

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        if self.config.get("bf16", {}).get("enabled"):
            self.config["bf16"]["check_grad_overflow"] = True

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        # The module is built whole on each rank and shared out afterwards, parameter by parameter: what it does with
        # its weights while it is built (a teacher's copy, the gist's embedding, calibration) then needs no gathering.
        self._init_config_if_needed()
        yield

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank),
            config=self.config,
            model=model,
            model_parameters=cast(Any, [p for p in model.parameters() if p.requires_grad]),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        engine.checkpoint_engine = zero.ShardFiles()
        return engine, cast(Optimizer, wrapped)

    @property
    def _device_rank(self) -> int:
        return self.local_rank if self.root_device.index is None else self.root_device.index

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The loss is a share of the step's already: Lightning divides it by the number of accumulated micro-batches,
        as it does for all strategies, and DeepSpeed would do so again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # ------------------------------------------------------------------ shards

    def hold(self, frozen: PreTrainedModel, keep_dtype: bool = False) -> None:
        """Bring a frozen model that stands beside the trained one to the device, in the precision of the training or,
        with `keep_dtype`, in its own; its decoder in shards, if configured.

        An untied output head stays whole: the losses read its weight outside any forward pass.
        """
        if not keep_dtype:
            # as DeepSpeed does with the trained one
            cast_parameters(frozen, cast(Any, self.precision_plugin)._desired_dtype)  # type: ignore[arg-type]
        if not self.partition_teacher:
            cast(nn.Module, frozen).to(self.root_device)
            return
        import deepspeed

        decoder = frozen.base_model
        tied = {id(p) for p in decoder.parameters()}
        for module in frozen.modules():
            for p in module.parameters(recurse=False):
                if id(p) not in tied:
                    p.data = p.data.to(self.root_device)
        assert isinstance(self.config, dict)
        config = {k: self.config[k] for k in ("train_micro_batch_size_per_gpu", "zero_optimization")}
        for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
            config[name] = {"enabled": next(decoder.parameters()).dtype == dtype}
        engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank),
            config=config,
            model=decoder,
            dist_init_required=False,
        )
        self._held.append(engine)

    def register_external(self, parameters: Iterable[nn.Parameter]) -> None:
        """Under stage 3, let the module's forward and backward pass have these parameters whole: it reads them outside
        the forward pass of the submodule they belong to."""
        from deepspeed.runtime.zero import register_external_parameter

        for p in parameters:
            if hasattr(p, "ds_id"):
                register_external_parameter(self.lightning_module, p)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole on every rank, to be read: under stage 3 whoever uses the model outside a training step
        needs this, on all ranks together. Within, ranks need not do equal work. Nested uses cost nothing."""
        if self.stage != 3 or self._gathered:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        engines = [self.model, *self._held]
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(_without_hooks(engine))
            parameters = [p for engine in engines for p in engine.module.parameters() if hasattr(p, "ds_id")]
            stack.enter_context(GatheredParameters(parameters))
            self._gathered += 1
            try:
                yield
            finally:
                self._gathered -= 1

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self.stage != 3:
            return super().validation_step(*args, **kwargs)
        assert self.lightning_module is not None
        # whole on every rank: edits of unlike records take unlike numbers of passes, and ranks that fetched weights
        # layer by layer would wait for one another for ever
        with self.gathered(), self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save on all ranks into one folder, which appears under its name when it is whole.

        Raises:
            CheckpointError: on all ranks, if any could not write.
        """
        assert self.lightning_module is not None
        kept = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        kept["buffers"] = {n: checkpoint["state_dict"][n] for n in self._buffers() & checkpoint["state_dict"].keys()}
        facts = {
            "step": int(checkpoint["global_step"]),
            "kind": "zero",
            "world_size": self.world_size,
            "stage": self.stage,
            "parameters": zero.parameters(self.lightning_module),
        }
        zero.save(self.deepspeed_engine, Path(self.broadcast(str(filepath))), kept, facts)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load on all ranks what was saved under ZeRO, by any number of ranks at any stage.

        Raises:
            CheckpointError: for a checkpoint that was not, or is of other parameters.
        """
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING

        def wait() -> None:
            with _InfiniteBarrier() as barrier:
                barrier()

        path = Path(self.broadcast(str(checkpoint_path)))
        state = zero.load(self.deepspeed_engine, path, self.stage, fitting, wait)
        buffers = dict(self.lightning_module.named_buffers())
        for name, value in state.pop("buffers").items():
            buffers[name].copy_(value)
        return state

    @property
    def refused_step(self) -> bool:
        """Whether a gradient of the last optimizer step was not finite, on any rank, so that no parameter changed.
        Where fp16 is looking for its loss scale, such steps are a part of the search and do not count."""
        engine = cast(Any, self.deepspeed_engine)
        searching = engine.fp16_enabled() and engine.dynamic_loss_scale()
        return not searching and bool(engine.optimizer.overflow)

    def _buffers(self) -> set[str]:
        assert self.lightning_module is not None
        return {n for n, _ in self.lightning_module.named_buffers()}


@contextmanager
def _without_hooks(engine: Any) -> Iterator[None]:
    """An engine's module without the hooks that fetch and release parameters around each submodule (stage 3)."""
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    for p in offload.module.parameters():
        if hasattr(p, "ds_active_sub_modules"):
            p.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload._register_deepspeed_module(offload.module)
