"""Records that are not in a table: not drawn, in no pool, not asked. The file and the table tell of them."""

import json
from pathlib import Path

import pytest

from trainers import evaluate as evaluate_command
from trainers.command import run

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GIVEN = [
    f"--backbone={json.dumps({'source': 'random:llama', 'overrides': SHAPE})}",
    '--data=[{"format": "facts", "options": {"split": "test"}, "limit": 9}]',
    "--baselines=[icl]",
    "--queries_per_kind=1",
    "--exact_match=false",
]


@pytest.mark.parametrize(
    ("how", "available", "told"),
    [
        (
            ["--records=7", "--pool_sizes=[1, 3, 7]", "--singles=2", "--asked=2"],
            9,
            [
                "7 of 9 records are drawn.",
                "Of these 7 records pools of 1 take 2, pools of 3 take 6.",
                "Of each pool the first 2 records are asked.",
            ],
        ),
        (["--records=20", "--pool_sizes=[3]"], 9, []),
        (["--records=7", "--mode=consecutive", "--batch=2", "--checkpoints=2"], 9, ["7 of 9 records are drawn."]),
    ],
)
def test_what_is_left_out_is_told(
    how: list[str], available: int, told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    run(evaluate_command.evaluate, [*GIVEN, f"--out={out}", *how])
    meta = json.loads(out.read_text())["meta"]
    assert meta["records_available"] == available
    screen = capsys.readouterr().out.splitlines()
    assert [line for line in screen if line.startswith(("Of ", f"{meta['records']} of"))] == told
