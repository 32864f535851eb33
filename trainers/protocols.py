"""The protocols by which answers are judged, by the names that `--protocol` takes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from datamodules.readers.mquake import read_few_shot
from datamodules.records import EditRecord
from datamodules.sources import Source
from modules.counterfact import COUNTERFACT
from modules.evaluation import Answers, Evaluation, evaluate
from modules.metrics import PROTOCOLS
from modules.protocols.dune import DUNE_PROTOCOLS, check_dune, evaluate_dune
from modules.protocols.few_shot import FewShot
from modules.protocols.mquake import MQUAKE_PROTOCOLS, check_mquake, evaluate_mquake
from modules.published import Published, evaluate_published
from modules.uniedit import UNIEDIT_PROTOCOLS, evaluate_uniedit
from modules.zsre import ZSRE

Protocol = Literal["default", "uniedit", "counterfact", "zsre", "mquake", "dune"]
PUBLISHED: dict[str, Published] = {protocol.name: protocol for protocol in (COUNTERFACT, ZSRE)}
_CHECKS: dict[str, Callable[[Iterable[EditRecord]], None]] = {
    "mquake": check_mquake,
    "dune": check_dune,
    **{name: protocol.check for name, protocol in PUBLISHED.items()},
}


@dataclass
class Demonstrations:
    """MQuAKE's files of demonstrations, looked for where data is; by default the project's own.

    Args:
        multi_hop: before multi-hop questions: multihop-prompts.txt, or with chains of thought multihop-cot-prompts.txt.
        relations: before single-hop questions, by relation: rel-prompts.json.
    """

    multi_hop: str | None = None
    relations: str | None = None

    def read(self) -> FewShot:
        """The demonstrations.

        Raises:
            FileNotFoundError, ValueError: for a file that is not there, or is of another form.
        """
        if not self.multi_hop:
            if self.relations:
                raise ValueError("demonstrations.relations needs demonstrations.multi_hop beside it")
            return FewShot()
        files = [Source("records", path).located() if path else None for path in (self.multi_hop, self.relations)]
        return FewShot(**read_few_shot(str(files[0]), files[1]))


def check_records(protocol: Protocol, records: Iterable[EditRecord]) -> None:
    """Refuse records that a protocol cannot judge, before any work."""
    if protocol in _CHECKS:
        _CHECKS[protocol](records)


def judge_of(
    protocol: Protocol,
    originals: Answers,
    exact_match: bool,
    max_new_tokens: int = 16,
    demonstrations: Demonstrations | None = None,
) -> tuple[Mapping[str, str], Callable[..., Evaluation]]:
    """A protocol's metrics by name, and what evaluates one editor at one pool size.

    That is called with editor, backbone, records, pool size, and batch_size, seed, progress and look where wanted, as
    `modules.evaluation.evaluate` is.

    Args:
        originals: the unedited model's answers, which most protocols ask for.
        exact_match, max_new_tokens: of the default protocol.
        demonstrations: of MQuAKE's.
    """
    if protocol in PUBLISHED:
        return PUBLISHED[protocol].definitions, partial(evaluate_published, PUBLISHED[protocol])
    if protocol == "mquake":
        few_shot = (demonstrations or Demonstrations()).read()
        return MQUAKE_PROTOCOLS, partial(evaluate_mquake, originals=originals, few_shot=few_shot)
    if protocol == "dune":
        return DUNE_PROTOCOLS, partial(evaluate_dune, originals=originals)
    if protocol == "uniedit":
        return UNIEDIT_PROTOCOLS, partial(evaluate_uniedit, originals=originals)
    options: dict[str, Any] = {"exact_match": exact_match, "max_new_tokens": max_new_tokens}
    return PROTOCOLS, partial(evaluate, originals=originals, **options)
