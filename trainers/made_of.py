"""What a result hangs on, as JSON values: by these a later call tells which results it may keep."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from datamodules.files import hashes
from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.fingerprint import weights_hash
from modules.judging import Judge
from trainers.protocols import Judging


def of_model(backbone: Backbone, weights: str | None = None) -> dict[str, Any]:
    """`weights`, a hash of the model's, and `overrides` of its config: rope_theta, for one, leaves no trace in weights.

    Args:
        weights: the hash, where it is known: to make it reads every weight.
    """
    overrides = json.loads(json.dumps(backbone.config.overrides))  # as a file will have them
    return {"weights": weights_hash(backbone.model) if weights is None else weights, "overrides": overrides}


def of_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts`, and `files`, hashes of what the files hold that they name: demonstrations, texts of second moments.

    Args:
        facts: JSON values, as an editor's (`trainers.editors.Chosen.facts`) or a protocol's options.
    """
    return {"facts": json.loads(json.dumps(facts)), "files": hashes(facts)}


def of_evaluation(
    backbone: Backbone, records: Sequence[EditRecord], judging: Judging, judge: Judge, **how: Any
) -> dict[str, Any]:
    """The setup of an evaluation: all that its results hang on besides the editors, by name.

    Args:
        judge: of `judging`.
        how: whatever else, as JSON values.
    """
    judged = of_facts(judging.told())
    told = {"protocol": judged["facts"], "protocol's files": judged["files"], "options": judge.options()}
    return {"records": digest([record.to_json() for record in records]), **of_model(backbone), **told, **how}


def same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether two of `of_facts` are of the same facts, and the files that were there before hold the same."""
    return now["facts"] == before["facts"] and all(now["files"].get(name) == of for name, of in before["files"].items())


def digest(values: Any) -> str:
    """A hash of JSON values."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
