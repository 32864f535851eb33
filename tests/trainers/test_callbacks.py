"""The callbacks in runs of a tiny random model: what they log, and that training does not notice them."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.edits import EditDataModule
from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import pool_sizes as schedule_sizes
from datamodules.sources import Source
from modules.backbone import BackboneConfig
from modules.byte_tokenizer import byte_tokenizer
from modules.editor import Edited
from modules.evaluation import Answers, evaluate
from modules.gist.analysis import ask, in_and_out_of_scope, profile
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions
from modules.training_free.icl import InContext, Unedited
from trainers.callbacks import sample_edits, selection_figures, throughput
from trainers.callbacks.common import untouched, validation_records
from trainers.callbacks.figures import heat_map
from trainers.callbacks.final_evaluation import FinalEvaluation, drawn_records
from trainers.callbacks.grad_norm import GradNorm
from trainers.callbacks.pool_sizes import PoolSizes, pool_sizes
from trainers.callbacks.sample_edits import SampleEdits
from trainers.callbacks.selection_figures import SelectionFigures
from trainers.callbacks.throughput import Throughput, count

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
STEPS = 2


def data(cache) -> EditDataModule:
    return EditDataModule(
        train=[Source("facts", options={"split": "train"}, limit=40)],
        val=[Source("facts", options={"split": "val"}, limit=8)],
        test=[Source("facts", options={"split": "test"}, limit=8)],
        records_per_batch=6,
        pool_sizes=[2, 4],
        pool_rates=[0.5, 0.5],
        val_pool=4,
        val_records=4,
        cache_dir=str(cache),
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("arrow")


def fit(folder, cache, callbacks, selection="qk", **options):
    """A run of two optimizer steps, with a validation after each; the module and the values that it logged."""
    L.seed_everything(3)
    torch.set_num_threads(1)
    train, checkpoint = options.pop("train", "full"), options.pop("ckpt_path", None)
    module = InComeS(
        BackboneConfig("random:llama", overrides=TINY),
        GistConfig(selection=selection),
        train=train,
        lora=LoraOptions(rank=2),
    )
    settings = {"max_steps": STEPS, "val_check_interval": 1, "log_every_n_steps": 1} | options
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False),
        default_root_dir=str(folder),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, data(cache), ckpt_path=checkpoint and str(folder / checkpoint))
    generators = torch.get_rng_state(), random.getstate()
    sizes = dict.fromkeys(("images", "scalars", "tensors", "histograms"), 0)  # 0: keep all
    events = EventAccumulator(str(folder), sizes).Reload()
    return SimpleNamespace(module=module, trainer=trainer, events=events, folder=folder, generators=generators)


def scalars(events, tag):
    return [e.value for e in events.Scalars(tag)]


def everything():
    return [
        Throughput(window=1),
        GradNorm(),
        PoolSizes(),
        SelectionFigures(records=4, examples=2),
        SampleEdits(count=2, max_new_tokens=3),
        FinalEvaluation([1, 4], records=4, pool_1_records=2),
    ]


@pytest.fixture(scope="module", params=["qk", "hidden"])
def run(request, tmp_path_factory, cache):
    """A run with all callbacks, of either selection, and its heat maps."""
    figures = []

    def keep(*args: Any) -> Any:
        figures.append(heat_map(*args))
        return figures[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_figures, "heat_map", keep)
        found = fit(tmp_path_factory.mktemp(request.param), cache, everything(), request.param)
    found.selection, found.figures = request.param, figures
    return found


def test_a_run_does_not_notice_its_callbacks(run, tmp_path, cache):
    plain = fit(tmp_path, cache, [], run.selection)
    ours, theirs = run.module.state_dict(), plain.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(run.generators[0], plain.generators[0])
    assert run.generators[1] == plain.generators[1]
    modes = [{n: m.training for n, m in r.module.named_modules()} for r in (run, plain)]
    assert modes[0] == modes[1]


def test_untouched_restores_modes_and_generators():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    with untouched(module):
        module.train()
        assert not (torch.rand(1) * torch.ones(1, requires_grad=True)).requires_grad
    assert [m.training for m in module] == [True, False]
    assert torch.equal(torch.rand(1), wanted)


# ---------------------------------------------------------------- throughput, gradients, pools


def test_throughput_is_logged(run):
    for name in ("tokens_per_second", "queries_per_second", "padding_share", "memory_gib"):
        assert len(scalars(run.events, f"train/{name}")) == STEPS
    tokens, queries = (scalars(run.events, f"train/{n}_per_second") for n in ("tokens", "queries"))
    assert all(t > 20 * q > 0 for t, q in zip(tokens, queries, strict=True))  # a query and its edit: 20 bytes and more
    assert all(0 < share < 1 for share in scalars(run.events, "train/padding_share"))
    assert all(0.05 < gib < 100 for gib in scalars(run.events, "train/memory_gib"))


class Batch:
    """2 queries of 3 and 5 tokens, one edit of 4; the teacher's rows hold 9 and 10."""

    queries_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def __init__(self) -> None:
        self.queries_mask = Batch.queries_mask
        self.edits_mask = torch.ones(1, 4)
        self.teacher_blocks = torch.tensor([[1] * 4 + [2] * 5 + [0], [2] * 10])

    def __len__(self) -> int:
        return 2


def test_count_of_a_batch():
    assert count(Batch()).tolist() == [12, 2, 3, 34]
    with pytest.raises(ValueError, match="_mask"):
        count(SimpleNamespace(queries=torch.ones(1)))


def test_throughput_counts_loading_but_neither_validation_nor_checkpoints(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=2, strategy=SimpleNamespace(reduce=lambda t, reduce_op: 2 * t)
    )
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log_dict=logged.update, log=lambda k, v, **_: logged.update({k: v})
    )
    callback = Throughput(window=2)
    callback.on_train_start(trainer, module)

    def step(loading: float, training: float, micro_batches: int = 2) -> None:
        for i in range(micro_batches):
            clock.now += loading
            callback.on_train_batch_start(trainer, module, Batch(), i)
            clock.now += training
            trainer.global_step += i == micro_batches - 1
            callback.on_train_batch_end(trainer, module, None, Batch(), i)

    step(1, 3)
    assert "train/tokens_per_second" not in logged  # no full window yet
    assert logged["train/padding_share"] == pytest.approx(3 / 34)
    callback.on_validation_start(trainer, module)
    clock.now += 1000
    step(0, 2)  # what stands between a validation's end and the next batch is not counted
    rate = 2 * 2 * 2 * 12 / (2 * 4 + 2 * 2)  # ranks x steps x micro-batches x tokens
    assert logged["train/tokens_per_second"] == pytest.approx(rate)
    assert logged["train/queries_per_second"] == pytest.approx(rate / 6)
    callback.on_save_checkpoint(trainer, module, {})
    clock.now += 1000
    step(0, 1)
    assert logged["train/tokens_per_second"] == pytest.approx(2 * 2 * 2 * 12 / (2 * 2 + 2 * 1))  # the first has left
    assert logged["train/memory_gib"] > 0


def test_gradient_norm_is_that_before_clipping(run, tmp_path, cache):
    norms = scalars(run.events, "train/grad_norm")
    seen = Seen()
    clipped = fit(tmp_path, cache, [GradNorm(), seen], run.selection, gradient_clip_val=1e-3)
    assert scalars(clipped.events, "train/grad_norm")[0] == pytest.approx(norms[0], rel=1e-5)
    assert seen.norm == pytest.approx(1e-3, rel=1e-3)
    assert norms[0] > 1e-2


class Seen(L.Callback):
    """The norm of the gradients that the optimizer used."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.norm = float(torch.stack([p.grad.norm() for p in pl_module.parameters() if p.grad is not None]).norm())


def test_gradient_norm_is_the_engines_where_there_is_one():
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log=lambda name, value: logged.update({name: value}))
    trainer: Any = SimpleNamespace(model=SimpleNamespace(get_global_grad_norm=lambda: 4.0), global_step=0)
    callback = GradNorm()
    callback.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert not logged  # within an accumulation
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, None, 1)
    assert logged == {"train/grad_norm": 4.0}


def test_pool_sizes_are_counted_once_a_pool():
    visible = torch.block_diag(torch.ones(3, 2), torch.ones(1, 1), torch.ones(2, 4)).bool()
    assert sorted(pool_sizes(visible).tolist()) == [1, 2, 4]


def test_pool_sizes_are_logged(tmp_path, cache):
    watched = fit(tmp_path, cache, [PoolSizes()], accumulate_grad_batches=2, log_every_n_steps=2, val_check_interval=4)
    (event,) = watched.events.Histograms("train/pool_size")
    schedule = [pools(watched, step) for step in (0, 0, 1, 1)]  # two steps of two micro-batches
    drawn = [size for sizes in schedule for size in sizes]
    assert event.step == 2
    assert event.histogram_value.num == len(drawn)
    assert event.histogram_value.sum == sum(drawn) == 24
    assert scalars(watched.events, "train/pool_size_mean") == [pytest.approx(24 / len(drawn))]


def pools(run, step: int) -> list[int]:
    module = run.trainer.datamodule
    return schedule_sizes(module.seed, 0, step, 6, module.pool_sizes, module.pool_rates)


# ---------------------------------------------------------------- figures of selection


def test_selection_is_logged_after_each_validation(run):
    images = set(run.events.Tags()["images"])
    assert {f"selection/{n}" for n in ("heat_map_0", "heat_map_1", "layer_profile", "token_trace")} == images
    assert [e.step for e in run.events.Images("selection/heat_map_0")] == [1, 2]
    names = ("zero_gist_in_scope", "zero_gist_out_of_scope", "golden", "entropy")
    values = {n: scalars(run.events, f"selection/{n}") for n in names}
    assert all(len(v) == STEPS for v in values.values())
    assert all(0 < p < 1 for n in names[:3] for p in values[n])
    assert all(0 < nats <= math.log(5) for nats in values["entropy"])


def test_selection_has_a_panel_per_layer_or_one_for_all(run):
    titles = [a.get_title() for a in run.figures[0].axes if a.get_images() and a.get_title()]
    assert titles == (["layer 2", "layer 3"] if run.selection == "qk" else ["all active layers (2-3)"])
    assert len(run.figures) == 2 * STEPS


def test_selection_scalars_are_those_of_the_trained_model(run):
    records = run.trainer.datamodule.validation_records()[:4]
    editor = run.module.editor()
    with editor.edit(editor.model.backbone, [r.request for r in records]) as edited:
        inside, outside = in_and_out_of_scope(edited, records)
    assert [s.golden for s in inside] == [0, 1, 2, 3]
    assert [s.golden for s in outside] == [None] * len(outside)
    assert len(outside) > 0
    first, query = inside[0], records[0].rephrases[0]
    assert len(first.tokens) == len(f"{query.prompt} {query.target}".encode()) - 1  # the tokens are bytes
    assert len(first.tokens) - first.answer_from == len(query.target.encode())
    assert float(first.probabilities.sum(-1).min()) == pytest.approx(1, abs=1e-4)
    assert scalars(run.events, "selection/golden")[-1] == pytest.approx(float(profile(inside).golden.mean()), rel=1e-4)
    outside_zero = float(profile(outside).zero.mean())
    assert scalars(run.events, "selection/zero_gist_out_of_scope")[-1] == pytest.approx(outside_zero, rel=1e-4)


def test_ask_knows_right_from_wrong_and_golden_from_zero():
    tokenizer = byte_tokenizer()
    logp = torch.randn(2, 8, 3).log_softmax(-1)

    def decode(ids, mask, trace):
        trace |= {0: logp, 1: logp}
        states = F.one_hot(ids.roll(-1, 1), len(tokenizer)).float()  # each token predicts the next one
        states[1, 3] = states[1, 2]
        return SimpleNamespace(last_hidden_state=states), None

    model = SimpleNamespace(get_output_embeddings=torch.nn.Identity)
    backbone = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"), model=model)
    edited: Any = SimpleNamespace(backbone=backbone, bos=False, decode=decode, requests=[EditRequest("q", "a")])
    right, wrong = ask(edited, [Query("what", ("yes",)), Query("who", ("you",))], [0, None])
    assert (right.right, wrong.right) == (True, False)
    assert (right.golden, wrong.golden) == (0, None)
    assert (right.edit, wrong.edit) == ("q a.", "")
    assert right.tokens == [*"what", "␣", *"ye"]
    assert (right.answer_from, wrong.answer_from) == (4, 3)  # the space before an answer belongs to the prompt
    assert right.probabilities.shape == (1, 7, 3)  # one choice for both layers
    torch.testing.assert_close(wrong.probabilities[0], logp[1, :6].exp())


def test_selection_every_second_validation(tmp_path, cache):
    watched = fit(tmp_path, cache, [SelectionFigures(4, 1, every_n_validations=2)], max_steps=3)
    assert [e.step for e in watched.events.Images("selection/heat_map_0")] == [1, 3]


def test_selection_needs_gists_and_records():
    trainer: Any = SimpleNamespace(sanity_checking=False)
    module: Any = SimpleNamespace(editor=Unedited, original=None)
    with pytest.raises(TypeError, match="'unedited' has no gists"):
        SelectionFigures().on_validation_epoch_end(trainer, module)
    with pytest.raises(TypeError, match=r"editor\(\) and original\(\)"):
        SelectionFigures().on_validation_epoch_end(trainer, L.LightningModule())
    with pytest.raises(TypeError, match="validation_records"):
        validation_records(trainer, 1)
    with pytest.raises(ValueError, match="at least 1"):
        SelectionFigures(records=0)


# ---------------------------------------------------------------- samples


def test_samples_show_the_original_before_and_the_edited_model_after(run):
    events = run.events.Tensors("samples/edits/text_summary")
    assert [e.step for e in events] == [1, 2]
    lines = events[-1].tensor_proto.string_val[0].decode().split("\n")
    records = run.trainer.datamodule.validation_records()[:2]
    assert lines[0] == "| edit | asked | prompt | before | after | target |"
    samples = list(sample_edits.samples_of(records))
    assert [s.kind for s in samples][:3] == ["request", "rephrase", "neighbour"]
    prompts = [s.query.prompt for s in samples]
    with run.module.original() as backbone, Unedited().edit(backbone, []) as original:
        before = original.generate(prompts, 3)
    with run.module.editor().edit(backbone, [r.request for r in records]) as edited:
        after = edited.generate(prompts, 3)
    assert "\n".join(lines) == sample_edits.table(samples, before, after)


def test_samples_are_one_row_each_whatever_is_in_them():
    record = EditRecord("1", (EditRequest("a | b is", "c\nd"),), (Query("*b*", ("`c`",)),))
    rows = sample_edits.table(list(sample_edits.samples_of([record])), ["x|y", ""], ["", "<b>"]).split("\n")
    assert len(rows) == 4
    assert rows[2] == r"| a \| b is c d. | request | a \| b is | x\|y |  | c d |"
    assert rows[3].split(" | ")[2:] == [r"\*b\*", "", r"\<b\>", r"\`c\` |"]


# ---------------------------------------------------------------- final evaluation


def rows(report: dict[str, Any], editor: str) -> dict[str, dict[str, float]]:
    return {n: {k: v["value"] for k, v in cell.items()} for n, cell in report["aggregate"][editor].items()}


def test_final_evaluation_is_written(run):
    report = json.loads((run.folder / "evaluation.json").read_text())
    assert list(report["aggregate"]) == ["unedited", "icl", "icl_right_edit", "incomes (untrained)", "incomes"]
    for name in ("incomes (untrained)", "incomes"):
        assert {n: run["records"] for n, run in report["runs"][name].items()} == {"1": 2, "4": 4}
    assert "facts" in report["meta"]["data"]
    assert rows(report, "unedited")["4"]["locality/token_agreement"] == 1


@pytest.mark.parametrize("train", ["full", "lora"])
def test_final_evaluation_is_that_of_the_trained_editor(train, tmp_path, cache, capsys):
    callback = FinalEvaluation([4], records=4, baselines=False, exact_match=False)
    found = fit(tmp_path, cache, [Disturb(), callback], "hidden", train=train, val_check_interval=4)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    records, _ = drawn_records(found.trainer, 4, 0)
    with found.module.original() as backbone:
        originals = Answers(Edited(backbone))
        originals.ask(records)
    direct = evaluate(found.module.editor(), backbone, records, 4, originals=originals)
    assert report["records"]["incomes"]["4"] == direct.records
    assert report["records"]["incomes"]["4"] != report["records"]["incomes (untrained)"]["4"]
    value = direct.aggregates["reliability/token_accuracy"]["value"]
    assert scalars(found.events, "final/reliability_token_accuracy_at_4") == [pytest.approx(value)]
    (info,) = (m for t, m in found.events.summary_metadata.items() if t.endswith("session_start_info"))
    assert b"incomes" in info.plugin_data.content  # the hyperparameters that TensorBoard shows beside the metrics
    assert "Reliability" in capsys.readouterr().out


def test_final_evaluation_leaves_out_what_the_unedited_model_cannot_know(tmp_path, cache, monkeypatch, caplog):
    hard = Query("It rests on", ("this",), conditions=(Query("Nobody knows", ("whether xyzzy is so",)),))
    plain = EditDataModule.test_records

    def conditional(self: Any) -> list[EditRecord]:
        return [replace(r, portability={**r.portability, "hard": (hard,)}) for r in plain(self)]

    monkeypatch.setattr(EditDataModule, "test_records", conditional)
    callback = FinalEvaluation([2], records=2, exact_match=False, baselines=False)
    fit(tmp_path, cache, [callback], val_check_interval=4)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("incomes (untrained)", "incomes"):
        assert len(report["records"][name]["2"]) == 2
        assert not any("hard_acc" in r["post"]["portability"] for r in report["records"][name]["2"])
        assert any(r["post"]["portability"] for r in report["records"][name]["2"])
    assert caplog.text.count("2 questions are left out: the unedited model does not know what they rest on") == 1


class Disturb(L.Callback):
    """Changes what is trained so much that answers change."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with torch.no_grad():
            for p in pl_module.parameters():
                if p.requires_grad:
                    p += torch.ones_like(p).cumsum(-1).sin()


def test_final_evaluation_of_a_resumed_run_keeps_its_rows(tmp_path, cache):
    first = fit(tmp_path, cache, [FinalEvaluation([2], records=2, exact_match=False)], val_check_interval=4)
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = json.loads((tmp_path / "evaluation.json").read_text())
    callback = FinalEvaluation([2], records=2, exact_match=False)
    again = fit(tmp_path, cache, [callback], max_steps=3, ckpt_path="last.ckpt")
    after = json.loads((tmp_path / "evaluation.json").read_text())
    assert again.trainer.global_step == 3
    assert list(after["aggregate"]) == list(before["aggregate"])
    assert after["runs"]["incomes (untrained)"] == before["runs"]["incomes (untrained)"]  # the seconds are the same
    assert after["runs"]["incomes"] != before["runs"]["incomes"]


def test_final_evaluation_marks_what_fails(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(InContext, "edit", lambda *_: (_ for _ in ()).throw(ValueError("no room")))
    fit(tmp_path, cache, [FinalEvaluation([2], records=2, exact_match=False, before=False)], val_check_interval=4)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["aggregate"]["icl"]["2"]["error"] == "ValueError: no room"
    assert "incomes (untrained)" not in report["aggregate"]
    assert "reliability/token_accuracy" in report["aggregate"]["incomes"]["2"]


def test_final_evaluation_refuses_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        FinalEvaluation([0])
    with pytest.raises(TypeError, match="test_records"):
        drawn_records(SimpleNamespace(datamodule=None), 1, 0)  # type: ignore[arg-type]
