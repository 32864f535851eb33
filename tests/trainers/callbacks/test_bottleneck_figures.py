"""What BottleneckFigures logs: its numbers against the bottlenecks themselves, the projector's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from modules.gradients import gradient_factors
from modules.hypernetwork.batch import encode_edit, padded
from modules.trained.ibke import IBKE, IbkeConfig, IbkeLayers
from modules.trained.mend import MEND
from trainers.callbacks.bottleneck_figures import BottleneckFigures, SeenEdit, look, principal, scalars


@pytest.fixture
def module(tiny_config: Any, records: list[EditRecord]) -> IBKE:
    module = IBKE(tiny_config(), IbkeLayers([1, 2]), IbkeConfig(latents=3, width=8))
    module.configure_model()
    module.calibrate(records)
    return module


def test_each_edit_is_looked_at_by_itself(module: IBKE, records: list[EditRecord]) -> None:
    seen = look(module, records)
    assert [edit.record.id for edit in seen] == [r.id for r in records]
    backbone, network = module.deltas.backbone, module.deltas.network
    row = encode_edit(backbone.tokenizer, records[2].request)
    factors, _ = gradient_factors(backbone, module.deltas.names, *padded(backbone.tokenizer, [row]))
    expected, mask = network.look(factors)["model.layers.2.mlp.down_proj"]  # type: ignore[operator]
    found = seen[2]
    assert "".join(found.tokens) == backbone.tokenizer.decode(row.ids)
    torch.testing.assert_close(found.mean["2.mlp.down_proj"], expected.mean[0], rtol=1e-4, atol=1e-5)
    assert found.information["2.mlp.down_proj"] == pytest.approx(float(expected.information().sum()), rel=1e-3)
    scale = found.scale["2.mlp.down_proj"]
    assert scale.isnan().tolist() == (~mask[0]).tolist()
    assert scale.isnan()[-1]  # the last token predicts nothing
    torch.testing.assert_close(scale[mask[0]], expected.scale[0][mask[0]], rtol=1e-4, atol=1e-5)


def test_of_a_record_its_first_edit_is_looked_at(module: IBKE, records: list[EditRecord]) -> None:
    """Not further ones, nor the facts that a query rests on, which a batch edits in too."""
    hop = Query("The flag of Land 1 is", ("red",), hops=(EditRequest("Land 1 is in", "Asia", "Land 1"),))
    several = replace(records[1], requests=(records[1].request, records[3].request), rephrases=(hop,))
    assert len(module.collator()([Slot(several, 0, 0)]).edits) == 3
    seen = look(module, [records[0], several, records[2]])
    assert [edit.record.id for edit in seen] == [r.id for r in records[:3]]
    for found, plain in zip(seen, look(module, records[:3]), strict=True):
        assert found.tokens == plain.tokens
        for name, mean in plain.mean.items():
            torch.testing.assert_close(found.mean[name], mean, rtol=1e-4, atol=1e-5)


def edit_of(record: EditRecord, mean: list[float], nats: float, scale: list[float]) -> SeenEdit:
    return SeenEdit(record, ["a", "b"], {"0": torch.tensor([mean])}, {"0": nats}, {"0": torch.tensor(scale)})


def test_scalars(records: list[EditRecord]) -> None:
    nan = float("nan")
    seen = [edit_of(records[0], [0.0, 1.0], 2.0, [0.2, nan]), edit_of(records[1], [1.0, 1.05], 4.0, [0.4, 0.6])]
    found = scalars(seen)
    assert found == pytest.approx({"bottleneck/nats/0": 3, "bottleneck/active_units/0": 0.5, "bottleneck/scale/0": 0.4})
    free = [edit_of(r, [0.0, 0.0], 0.0, [1.0, 1.0]) for r in records[:2]]
    assert scalars(free) == {"bottleneck/active_units/0": 0.0, "bottleneck/scale/0": 1.0}


def test_principal_components_keep_distances() -> None:
    points = torch.randn(6, 20)
    torch.testing.assert_close(torch.cdist(principal(points, 50), principal(points, 50)), torch.cdist(points, points))
    assert principal(points, 2).shape == (6, 2)


def test_what_lies_in_the_run_folder(module: IBKE, records: list[EditRecord], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = BottleneckFigures(records=4, examples=2, every_n_validations=2)
    trainer: Any = L.Trainer(
        accelerator="cpu", logger=logger, max_steps=1, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.datamodule = type("Data", (), {"validation_records": lambda _: records})()
    module._trainer = trainer
    logged: dict[str, float] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    callback.on_validation_epoch_end(trainer, module)
    assert {name.split("/")[1] for name in logged} == {"nats", "active_units", "scale"}
    callback.on_validation_epoch_end(trainer, module)  # not looked at: every second one is
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert {name: len(events.Images(name)) for name in events.Tags()["images"]} == {
        "bottleneck/token_scale": 1,
        "bottleneck/latents": 1,
    }
    (labels, _) = (sorted(tmp_path.rglob("metadata.tsv")), None)
    assert len(labels) == 2
    lines = labels[0].read_text().splitlines()
    assert lines[0] == "relation\tedit"
    assert [line.split("\t")[1] for line in lines[1:]] == [r.request.statement for r in records]
    assert "latents/1.mlp.down_proj" in (tmp_path / "projector_config.pbtxt").read_text()


def test_other_editors_are_refused(tiny_config: Any) -> None:
    with pytest.raises(TypeError, match="MEND has no bottlenecks; take BottleneckFigures out"):
        BottleneckFigures().setup(None, MEND(tiny_config()), "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="records must be at least 2"):
        BottleneckFigures(records=1)
