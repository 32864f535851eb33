"""The protocols by which answers are judged, by the names that `--protocol` takes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from datamodules.files import located
from datamodules.readers.counterfact import read_snippets
from datamodules.readers.mquake import read_few_shot
from datamodules.records import EditRecord
from modules.counterfact import COUNTERFACT, CounterFact
from modules.evaluation import Answers, TokenAccuracy
from modules.fluency import References
from modules.judging import Judge
from modules.metrics import record_values
from modules.protocols.dune import Dune, check_dune, dune_values
from modules.protocols.few_shot import FewShot
from modules.protocols.mquake import MQuAKE, check_mquake, mquake_values
from modules.published import harmonic_mean
from modules.uniedit import UniEdit, uniedit_values
from modules.zsre import ZSRE, Zsre

Protocol = Literal["default", "uniedit", "counterfact", "zsre", "mquake", "dune"]


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
        files = [located(path) if path else None for path in (self.multi_hop, self.relations)]
        return FewShot(**read_few_shot(str(files[0]), files[1]))


@dataclass(frozen=True)
class Measures:
    """How a protocol's figures come from its per-record results.

    Args:
        values: metric name -> value of one record, from the `post` of its result.
        scores: the metrics that are harmonic means of others' means, with these; all others are means over records.
    """

    values: Callable[[Mapping[str, Any]], Mapping[str, float]]
    scores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def parts(self, metric: str) -> tuple[str, ...]:
        """The values of a record that a metric needs."""
        return self.scores.get(metric, (metric,))

    @staticmethod
    def of(rows: np.ndarray) -> float:
        """A metric of records, from their parts [records, parts]: the mean, or of several means the harmonic one."""
        means = rows.mean(0)
        return float(means[0] if len(means) == 1 else harmonic_mean(means))


MEASURES: dict[str, Measures] = {
    "default": Measures(record_values),
    "uniedit": Measures(uniedit_values),
    "mquake": Measures(mquake_values),
    "dune": Measures(dune_values),
    **{p.name: Measures(p.values, {p.score: p.parts}) for p in (COUNTERFACT, ZSRE)},
}


_CHECKS: dict[str, Callable[[Iterable[EditRecord]], None]] = {
    "mquake": check_mquake,
    "dune": check_dune,
    "zsre": ZSRE.check,
}


@dataclass
class Judging:
    """How answers are judged: the protocol and its options.

    Args:
        exact_match: of the default protocol: also generate and compare whole answers.
        demonstrations: of MQuAKE's.
        fluency: of CounterFact's: also let the model write, and measure fluency (GE).
        references: a file of reference texts in the shape of ROME's attribute_snippets.json, looked for where data is;
            with it the consistency (RS) of what is written is measured too.

    Raises:
        ValueError: for an option of another protocol, or references without fluency.
    """

    protocol: Protocol = "default"
    exact_match: bool = False
    demonstrations: Demonstrations = field(default_factory=Demonstrations)
    fluency: bool = False
    references: str | None = None

    def __post_init__(self) -> None:
        if self.fluency and self.protocol != "counterfact":
            raise ValueError(f"--fluency is of --protocol counterfact; the protocol is {self.protocol}")
        if self.references and not self.fluency:
            raise ValueError("--references are for the consistency of what a model writes: give --fluency true too")
        if self.demonstrations != Demonstrations() and self.protocol != "mquake":
            raise ValueError(f"demonstrations are of --protocol mquake; the protocol is {self.protocol}")

    def check(self, records: Iterable[EditRecord]) -> None:
        """Refuse records that the protocol cannot judge, before any work.

        Raises:
            FileNotFoundError, ValueError: for a file of the protocol's that cannot be read.
            ValueError: names the first record, and what it lacks.
        """
        self.demonstrations.read()
        if self.protocol == "counterfact":
            self._counterfact().check(records)
        elif self.protocol in _CHECKS:
            _CHECKS[self.protocol](records)

    def judge(self, originals: Answers, batch_size: int = 32, max_new_tokens: int = 16) -> Judge:
        """What judges edited models.

        Args:
            originals: the unedited model's answers, which most protocols ask for.
            max_new_tokens: of the default protocol's generated answers.
        """
        if self.protocol == "counterfact":
            return self._counterfact(batch_size)
        if self.protocol == "zsre":
            return Zsre(batch_size)
        if self.protocol == "mquake":
            return MQuAKE(self.demonstrations.read(), batch_size)
        if self.protocol == "dune":
            return Dune(originals, batch_size)
        if self.protocol == "uniedit":
            return UniEdit(originals, batch_size)
        return TokenAccuracy(originals, self.exact_match, batch_size, max_new_tokens)

    def told(self) -> dict[str, Any]:
        """As JSON values, without the options that are not used."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("fluency", "references")}

    def _counterfact(self, batch_size: int = 32) -> CounterFact:
        return CounterFact(batch_size, self.fluency, _references(self.references) if self.references else None)


@cache
def _references(file: str) -> References:
    try:
        return References(read_snippets(located(file)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--references: {error}") from error
