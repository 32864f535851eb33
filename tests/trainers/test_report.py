"""The report's shape."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_runs import RECORDS, run

from modules.metrics import PROTOCOLS
from modules.training_free.icl import InContext, Unedited


def test_schema(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    report, _ = run(tiny(), out, [Unedited(), InContext()])
    assert json.loads(out.read_text()) == report
    assert set(report) == {"meta", "made_of", "aggregate", "runs", "records"}
    meta = report["meta"]
    assert set(meta) == {
        "date",
        "hardware",
        "command",
        "data",
        "records",
        "edits",
        "mode",
        "protocol",
        "queries_per_kind",
        "pool_sizes",
        "backbone",
        "seed",
        "setup",
        "versions",
        "protocols",
    }
    assert (meta["data"], meta["records"], meta["edits"], meta["seed"]) == ("four cities", 4, 4, 3)
    assert (meta["mode"], meta["pool_sizes"], meta["protocols"]) == ("batch", [2, 4], PROTOCOLS)
    assert meta["backbone"]["source"] == "random:llama"
    assert meta["versions"]["torch"] == torch.__version__
    assert {"palimpsest", "torch", "transformers", "lightning"} <= set(meta["versions"])
    for part in ("aggregate", "runs", "records"):
        assert {editor: list(cells) for editor, cells in report[part].items()} == {
            "unedited": ["4"],  # no pool matters to it: the largest tells all
            "icl": ["2", "4"],
        }
    assert set(report["aggregate"]["icl"]["4"]) == {
        "reliability/token_accuracy",
        "generality/token_accuracy",
        "locality/token_agreement",
        "locality/far/token_agreement",
        "portability/token_accuracy",
        "portability/hop/token_accuracy",
    }
    assert set(report["aggregate"]["icl"]["4"]["reliability/token_accuracy"]) == {"value", "ci", "records"}
    assert set(report["runs"]["icl"]["4"]) == {
        "edit_seconds",
        "answer_seconds",
        "edit_bytes",
        "answer_seconds_per_query",
        "code",
        "context_tokens",
        "protocol",
        "exact_match",
        "batch_size",
        "max_new_tokens",
        "own_edit_only",
        "edited",
        "pools",
        "records",
        "records_dropped",
        "queries",
        "requests",
        "queries_left_out",
        "records_contradicted",
        "conflicting_edits",
        "bootstrap_seed",
    }
    run_facts = report["runs"]["icl"]["4"]
    assert (run_facts["queries"], report["runs"]["unedited"]["4"]["context_tokens"]) == (4 * 3 + 1, 0)  # one is shared
    assert run_facts["context_tokens"] == len(" ".join(r.request.statement for r in RECORDS)) + 1  # a token a byte
    assert run_facts["answer_seconds_per_query"] == pytest.approx(run_facts["answer_seconds"] / 13)
    record = report["records"]["icl"]["4"][0]
    assert set(record) == {"case_id", "requested_rewrite", "pre", "post", "left_out"}
    assert set(record["post"]) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
