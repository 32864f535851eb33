"""What ZeRO is set to, and what is refused before any process is started. What it does: test_same_update.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import DeepSpeedPrecision

from modules.backbone import BackboneConfig
from modules.trained.incomes import InComeS
from trainers import fit
from trainers.cli import TrainingCLI
from trainers.strategies import Zero

CPU = ["--config=incomes_tiny", "--config=zero2_cpu", "--trainer.devices=2"]


def test_settings_reach_deepspeed() -> None:
    config = Zero(
        stage=3,
        offload_optimizer=True,
        offload_parameters=True,
        reduce_bucket_size=1000,
        allgather_bucket_size=2000,
        persistence_threshold=30,
    ).config
    assert isinstance(config, dict)
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (3, 1000, 2000)
    assert zero["stage3_param_persistence_threshold"] == 30
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert Zero().exclude_frozen_parameters


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stage": 2, "offload_parameters": True}, "offload_parameters"),
        ({"stage": 2, "partition_teacher": True}, "partition_teacher"),
        ({"timeout": 0}, "timeout"),
        ({"reduce_bucket_size": 0}, "bucket"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Zero(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fp16", "scale", "refused"), [(False, 0, True), (True, 0, False), (True, 128, True)])
def test_a_search_for_the_loss_scale_is_no_bad_step(fp16: bool, scale: float, refused: bool) -> None:
    """fp16 begins with too large a scale on purpose; with a fixed one, or in bf16, an overflow is what it seems."""
    engine = SimpleNamespace(
        fp16_enabled=lambda: fp16, dynamic_loss_scale=lambda: scale == 0, optimizer=SimpleNamespace(overflow=True)
    )
    strategy = SimpleNamespace(deepspeed_engine=engine)
    assert Zero.refused_step.fget(strategy) is refused  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--trainer.precision=16-mixed", "trainer.precision"),
        ("--data.init_args.val_pool=15", "val_pool"),
        ("--trainer.strategy.init_args.partition_teacher=true", "partition_teacher"),
        ("--trainer.strategy.init_args.stag=3", "stag"),
        ("--trainer.strategy=ddp_spawn", "trainer.strategy"),
    ],
)
def test_what_cannot_work_is_said_before_a_process_is_started(
    argument: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*args: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("torch.multiprocessing.start_processes", started)
    with pytest.raises(SystemExit) as end:
        fit.main([*CPU, f"--run_dir={tmp_path}", argument])
    said = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None)
    assert named in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [None, "float32", "float16"])
def test_a_teacher_keeps_the_precision_that_it_is_given(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it takes that of the training."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = InComeS(BackboneConfig("random:llama", overrides=shape), teacher_dtype=own)
    module.configure_model()
    strategy: Any = Zero(stage=2)
    strategy.precision_plugin = DeepSpeedPrecision("bf16-mixed")
    monkeypatch.setattr(Zero, "root_device", torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    module.on_fit_start()
    assert {p.dtype for p in module.teacher.parameters()} == {getattr(torch, own or "bfloat16")}


def test_layers_over_a_gpu_config(tmp_path: Path) -> None:
    """The 7B config with each way to spread it."""
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--run_dir={tmp_path}"]
    for layer, stage in {"zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}.items():
        strategy = TrainingCLI(["--config=incomes_qwen7b", f"--config={layer}", *here]).trainer.strategy
        assert isinstance(strategy, Zero)
        assert strategy.stage == stage
        assert isinstance(strategy.config, dict)
        assert ("offload_optimizer" in strategy.config["zero_optimization"]) == layer.endswith("offload")
        assert strategy.partition_teacher == (stage == 3)


def test_nothing_that_is_loaded_can_bring_code(tmp_path: Path) -> None:
    """Not even where a library asks for it, as DeepSpeed does."""

    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "harmed",)

    torch.save({"optimizer": Harm()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "harmed").exists()
