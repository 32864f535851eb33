"""How well SERAC's classifier tells queries in scope from others, on held-out records.

    PALIMPSEST_DATA=path/to/data python tests/benchmarks/bench_scope.py --editor exported/serac_smollm2 \\
        [--data counterfact:counterfact/counterfact-val.json.gz] [--records 200] [--pool_sizes 1 200]

Without --editor: the default encoder as it comes, untrained. The first `--records` records of the data are taken. At
pool size 1 each record is alone in the memory, so that (edit, query) pairs are judged; else all of a pool's edits are.
In scope: the edit's prompt and rephrases, right where this record's edit is found. Out of scope: its locality queries,
right where none is. "similarity" are quartiles of the best similarity, "separable" is the accuracy at the best of all
thresholds, chosen on these records, so an upper bound.
"""

import argparse

import torch
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.sources import Source, load
from modules.backbone import BackboneConfig
from modules.evaluation import split_pools, without_collisions
from modules.export import load_editor
from modules.serac.editor import SeracEditor
from modules.serac.metrics import ScopeAccuracy, scope_answers
from modules.trained.serac import SERAC

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def editor_of(folder: str | None) -> SeracEditor:
    if folder is None:  # the language models play no part
        return SERAC(BackboneConfig("random:llama", overrides=TINY)).editor()
    found = load_editor(folder)
    if not isinstance(found, SeracEditor):
        raise SystemExit(f"--editor {folder}: this is {found.name}, not SERAC")
    return found


def separable(inside: Tensor, outside: Tensor) -> float:
    """The best balanced accuracy of any threshold."""
    limits = torch.cat([inside, outside]).unique()
    right = (inside[None] > limits[:, None]).float().mean(1) + (outside[None] <= limits[:, None]).float().mean(1)
    return float(right.max() / 2)


def measure(editor: SeracEditor, records: list[EditRecord], pool_size: int) -> str:
    metric = ScopeAccuracy()
    similarities: dict[str, list[float]] = {"in": [], "out": []}
    pools, _ = split_pools(records, pool_size)
    for pool in pools:
        with editor.edit(editor.reader, [r for record in pool for r in record.requests]) as edited:
            metric.update(scope_answers(edited, pool))
            for record in without_collisions(pool)[0]:
                inside = [*(r.prompt for r in record.requests), *(q.prompt for q in record.rephrases)]
                outside = [q.prompt for queries in record.locality.values() for q in queries]
                similarities["in"] += [s for _, s in edited.scope(inside)]
                similarities["out"] += [s for _, s in edited.scope(outside)]
    values = {name: f"{100 * float(value):.1f}" for name, value in metric.compute().items()}
    asked = {name: torch.tensor(found) for name, found in similarities.items()}
    quartiles = {n: [round(float(q), 2) for q in t.quantile(torch.tensor([0.25, 0.5, 0.75]))] for n, t in asked.items()}
    counts = ", ".join(f"{len(t)} {n}" for n, t in asked.items())
    best = 100 * separable(asked["in"], asked["out"])
    return f"pool {pool_size:4d}: {values} ({counts}); similarity {quartiles}; separable {best:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor")
    parser.add_argument("--data", default="counterfact:counterfact/counterfact-val.json.gz")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--pool_sizes", type=int, nargs="+", default=[1, 200])
    args = parser.parse_args()
    data = load([Source(*args.data.split(":", 1), limit=args.records)])
    records = data.records(range(len(data)))
    editor = editor_of(args.editor)
    print(f"torch {torch.__version__}, {vars(args)}, {len(records)} records")
    for size in args.pool_sizes:
        print(measure(editor, records, size), flush=True)


if __name__ == "__main__":
    main()
