"""`python -m trainers.scope`: figures of what hook layers answer for."""

import json
from pathlib import Path

import pytest

from trainers import scope as scope_command
from trainers.command import run
from trainers.scope import scope

MODEL = [
    "--backbone.source=random:llama",
    "--backbone.overrides={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 4, "
    "num_key_value_heads: 2}",
    "--data=[{format: facts, options: {split: test}}]",
    "--records=4",
    "--queries_per_kind=1",
]


def test_scores_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = f"{{tokens: 300, length: 40, folder: {tmp_path}}}"
    small = f"layers: [1, 2], moments: {moments}, contexts: {{counts: {{8: 2}}}}, values: {{steps: 4}}"
    run(scope, [*MODEL, f"--editor={{editor: coachhook, {small}}}", f"--out={tmp_path / 'scope.json'}"])
    told = json.loads((tmp_path / "scope.json").read_text())
    assert told["meta"]["records"] == 4
    layers = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert list(told["alphas"]) == layers
    assert {s["layer"] for s in told["scores"]} == set(layers)
    assert sum(s["kind"] == "reliability" for s in told["scores"]) == 8
    assert (tmp_path / "scope.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert all(layer in said for layer in layers)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--editor=ft_m"], "--editor ft_m has no hook layers"),
        (["--editor={export}"], "--editor .*export has no hook layers"),
        (["--records=0"], "--records must be at least 1"),
        (["--queries_per_kind=0"], "queries_per_kind must be at least 1, or null to ask all queries; got 0"),
        (["--out={export}"], "--out .*export is a folder; give a file in it"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope_command, "build", None)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "editor.json").write_text("{}")
    with pytest.raises(SystemExit, match=message):
        run(scope, [*MODEL, *(given.format(export=tmp_path / "export") for given in more)])
