"""Second moments: against numpy, under padding, from each kind of text, and from disk."""

import copy
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from datamodules.tokens import encode, windows
from modules.backbone import Backbone
from modules.training_free import second_moments as module
from modules.training_free.closed_form import Projection
from modules.training_free.metrics import Metrics, forget
from modules.training_free.second_moments import Moments, count, fingerprint, null_space, second_moments

DOWN = "model.layers.1.mlp.down_proj"
LOW = "model.layers.0.mlp.down_proj"
TEXT = "\n\n".join(f"City {i} lies in the land {i * i}, by the river {i % 7}." for i in range(60))


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return str(file)


def plainly(backbone: Backbone, layer: str, rows: list[tuple[int, ...]]) -> np.ndarray:
    """Window by window, no padding, in numpy."""
    keys: list[np.ndarray] = []
    linear: Any = backbone.model.get_submodule(layer)
    handle = linear.register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double().numpy()))
    with torch.no_grad():
        for row in rows:
            backbone.model(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    every = np.concatenate(keys)
    return every.T @ every / len(every)


@pytest.mark.parametrize(("batch", "accumulate"), [(3, "float64"), (8, "float32")])
def test_against_numpy_without_padding(tiny: Callable[..., Backbone], text: str, batch: int, accumulate: Any) -> None:
    backbone = tiny()
    moments = Moments(text, tokens=500, length=37, batch=batch, accumulate=accumulate)
    rows = list(windows(backbone.tokenizer, TEXT.split("\n\n"), 37, 500))
    assert len(rows[-1]) < 37  # the last one is padded in its batch
    found = count(backbone, [LOW, DOWN], moments)
    for layer in (LOW, DOWN):
        matrix, tokens, _ = found[layer]
        assert tokens == 500
        np.testing.assert_allclose(matrix, plainly(backbone, layer, rows), rtol=1e-4, atol=1e-5)


def test_a_compressed_file_gives_the_same(tiny: Callable[..., Backbone], text: str, tmp_path: Path) -> None:
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    plain, zipped = (count(tiny(), [DOWN], Moments(t, 200, 40))[DOWN] for t in (text, str(packed)))
    assert torch.equal(plain[0], zipped[0])
    assert plain[2] == zipped[2]


def test_text_of_the_model_itself_is_drawn_by_its_seed(tiny: Callable[..., Backbone]) -> None:
    before = torch.get_rng_state()
    first, same, other = (count(tiny(), [DOWN], Moments(tokens=200, length=25, seed=s))[DOWN] for s in (0, 0, 1))
    assert first[1] == 200
    assert torch.equal(first[0], same[0])
    assert first[2] == same[2] != other[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_on_disk_until_anything_changes(
    tiny: Callable[..., Backbone], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    moments = Moments(text, tokens=300, length=50, folder=str(tmp_path / "cache"))
    first = second_moments(backbone, [LOW, DOWN], moments)
    file = moments.file(backbone, DOWN)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["tokens"] == "300"
        assert len(opened.metadata()["sample"]) == 64
    with monkeypatch.context() as patch:
        patch.setattr(module, "count", None)  # calling it would fail
        assert torch.equal(second_moments(tiny(), [DOWN], moments)[DOWN], first[DOWN])
    keys = {moments.file(backbone, LOW), file}
    for change in ({"tokens": 299}, {"length": 51}, {"seed": 1}, {"text": "model"}):
        keys.add(
            Moments(**({"text": text, "tokens": 300, "length": 50, "folder": moments.folder} | change)).file(
                backbone, DOWN
            )
        )
    Path(text).write_text(TEXT + " ", encoding="utf-8")
    keys.add(moments.file(backbone, DOWN))
    backbone.model.get_submodule(DOWN).weight.data[3, 5] += 1e-3  # type: ignore[union-attr, operator, index]
    vars(backbone.model).pop("_palimpsest_fingerprint")
    keys.add(moments.file(backbone, DOWN))
    assert len(keys) == 8
    file.write_bytes(b"not this")
    Path(text).write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match="remove it"):
        second_moments(tiny(), [DOWN], moments)


def test_a_step_of_training_changes_the_fingerprint(tiny: Callable[..., Backbone]) -> None:
    model = tiny().model
    first = fingerprint(model)
    assert fingerprint(tiny().model) == first
    for p in model.parameters():
        p.data += 1e-3  # as optimizers that write to .data do
    assert fingerprint(model) != first


def test_a_change_of_one_column_changes_the_fingerprint_and_so_does_the_config(tiny: Callable[..., Backbone]) -> None:
    model = tiny().model
    first = fingerprint(model)
    other = copy.deepcopy(model)
    assert fingerprint(other) == first
    with torch.no_grad():
        other.get_submodule(DOWN).weight[:, 5] += 1  # type: ignore[union-attr, operator, index]
    assert fingerprint(other) != first
    with torch.no_grad():
        model.get_submodule(DOWN).weight[2, 5] += 1  # type: ignore[union-attr, operator, index]
    assert fingerprint(model) not in (first, fingerprint(other))
    assert fingerprint(tiny(rms_norm_eps=1e-3).model) != first  # of the same weights


def test_editors_have_metrics_in_common_until_the_weights_change(
    tiny: Callable[..., Backbone], text: str, tmp_path: Path
) -> None:
    backbone = tiny()
    one, other = (Metrics(Moments(text, tokens=400, length=50, folder=str(tmp_path))) for _ in range(2))
    (first,) = one.inverse(backbone, [DOWN])
    assert other.inverse(backbone, [DOWN]) == [first]
    forget(backbone.model)
    (again,) = other.inverse(backbone, [DOWN])
    assert again is not first
    with torch.no_grad():
        next(backbone.model.parameters())[0] += 1
    assert one.inverse(backbone, [DOWN]) != [again]


@pytest.mark.parametrize("relative", [False, True])
def test_null_space(tiny: Callable[..., Backbone], text: str, tmp_path: Path, relative: bool) -> None:
    backbone = tiny()
    moments = Moments(text, tokens=400, length=50, folder=str(tmp_path))
    matrix = second_moments(backbone, [DOWN], moments)[DOWN].double()
    values, vectors = np.linalg.eigh(matrix.numpy())
    threshold = float(np.median(values)) / (float(values.mean()) if relative else 1)
    basis, rank = null_space(backbone, DOWN, moments, threshold, relative)
    free = vectors[:, values < threshold * (values.mean() if relative else 1)]
    assert rank == free.shape[1] == len(matrix) // 2
    keys = torch.randn(3, len(matrix), dtype=torch.float64)
    np.testing.assert_allclose(Projection(basis)(keys), keys.numpy() @ free @ free.T, atol=1e-5)
    assert torch.equal(null_space(backbone, DOWN, moments, threshold, relative)[0], basis)  # from disk
    metrics = Metrics(moments)
    metrics.projection(backbone, [DOWN], threshold, relative)
    assert metrics.ranks == {DOWN: rank}
    with pytest.raises(ValueError, match="nothing can be edited there"):
        null_space(backbone, DOWN, moments, 1e-12, relative)


def test_errors_name_the_remedy(tiny: Callable[..., Backbone], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"20 tokens .* too few for the 48 inputs .* raise moments.tokens"):
        count(tiny(), [DOWN], Moments(text, tokens=20))
    with pytest.raises(ValueError, match="only linear layers"):
        second_moments(tiny(), ["model.layers.1"], Moments(text, folder=str(tmp_path)))
    with pytest.raises(ValueError, match="length at least 2"):
        Moments(length=1)
    assert encode(tiny().tokenizer, TEXT[:5]).ids  # the texts above are more than nothing
