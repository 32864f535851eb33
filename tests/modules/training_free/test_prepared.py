"""How prompts are put into passes."""

from collections.abc import Callable

import torch

from modules.backbone import Backbone
from modules.training_free.prepared import PASS_ON_CPU, Prompt, _passes, prepare
from modules.training_free.subject import Row


def prompts(*lengths: int) -> list[Prompt]:
    """Of so many tokens from the subject on, of which the last is the target."""
    return [Prompt(Row(tuple(range(1, 3 + n)), 2, 1 + n), i, 1.0) for i, n in enumerate(lengths)]


def cut(lengths: list[int], chunk: int, worth: int) -> list[list[int]]:
    passes = _passes(prompts(*lengths), chunk, worth)
    return [[len(p.row.ids) - p.row.subject for p in part] for part in passes]


def test_a_further_pass_where_it_spares_more_padding_than_it_is_worth() -> None:
    assert cut([2, 2, 2, 4, 4, 5], 9, worth=5) == [[2, 2, 2], [4, 4, 5]]  # 3 rows by 2 tokens; then 2 by 1
    assert cut([2, 2, 2, 4, 4, 5], 9, worth=6) == [[2, 2, 2, 4, 4, 5]]
    assert cut([2] * 7, 3, worth=0) == [[2] * 3, [2] * 3, [2]]
    assert cut([2, 3], 9, worth=0) == [[2], [3]]
    assert cut([], 9, worth=0) == []


def test_passes_on_a_processor_read_little_padding(tiny: Callable[..., Backbone]) -> None:
    found = prepare(tiny(), prompts(*[2] * 40, *[9] * 30), 1, chunk=256)
    assert [tuple(rows.ids.shape) for rows in found] == [(40, 1), (30, 8)]  # less the target's last token
    assert PASS_ON_CPU < 40 * 7
    edits = torch.cat([rows.edit for rows in found])
    assert sorted(edits.tolist()) == list(range(70))
