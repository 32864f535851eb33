"""`python -m trainers.moments`: second moments on disk, and what is left to AlphaEdit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainers import moments as moments_command
from trainers.command import run
from trainers.moments import moments

MODEL = [
    "--backbone.source=random:llama",
    "--backbone.overrides={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 4, "
    "num_key_value_heads: 2}",
    "--moments.tokens=300",
    "--moments.length=40",
]


def test_moments_are_written_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"City {i} lies in the land {i * i}." for i in range(30)), encoding="utf-8")
    given = [*MODEL, f"--moments.text={text}", f"--moments.folder={tmp_path}", "--layers=[0.25, 2]"]
    run(moments, [*given, "--null_space_below=0.5", "--relative=true"])
    said = capsys.readouterr().out
    files = sorted(tmp_path.glob("moments-*.safetensors"))
    assert [f.name.split("-")[2] for f in files] == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert all(str(f) in said for f in files)
    assert load_file(files[0])["moments"].shape == (48, 48)
    assert said.count(" of 48 directions") == 2
    times = [f.stat().st_mtime_ns for f in files]
    for layers in ("--layers=0.25,2", "--layers=1"):  # as a person types them
        run(moments, [*given[:-1], layers])
    assert [f.stat().st_mtime_ns for f in files] == times
    assert sorted(tmp_path.glob("moments-*.safetensors")) == files


def test_a_device_is_looked_for_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_command, "load_backbone", None)
    with pytest.raises(SystemExit, match="--device 'gpu9' is none"):
        run(moments, [*MODEL, "--layers=[1]", "--device=gpu9"])


def test_a_text_that_cannot_be_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"error: text '\./nowhere\.txt' is neither a file nor a data set"):
        run(moments, [*MODEL, "--layers=[1]", "--moments.text=./nowhere.txt", f"--moments.folder={tmp_path}"])
    with pytest.raises(SystemExit, match="layers must be numbers from 0 to 3"):
        run(moments, [*MODEL, "--layers=[4]", f"--moments.folder={tmp_path}"])
