"""Hard negatives: questions of other records that look like an edit and are not about it.

As released with SERAC: of all locality questions the neighbours of an edit by a sentence encoder, without the nearest
ones, which may well be in scope; one is drawn with a weight that grows with its similarity.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from datamodules.records import EditRecord, Query
from modules.serac.encoder import EncoderConfig, TextEncoder


@dataclass
class HardConfig:
    """Hard negatives.

    Args:
        rate: how often one stands in for a record's own locality query; 0: never.
        first: of the neighbours that are drawn, counted from the nearest.
        last: of these neighbours.
        temperature: a neighbour is drawn with weight exp(similarity / temperature).
        records: training records whose locality questions are looked among.
        encoder: what measures similarity. It is not trained.
    """

    rate: float = 0.5
    first: int = 25
    last: int = 100
    temperature: float = 0.1
    records: int = 2048
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or self.temperature <= 0 or self.records < 1:
            raise ValueError(
                "queries.hard: rate must be between 0 and 1, temperature and records positive, got "
                f"{self.rate}, {self.temperature}, {self.records}"
            )
        if not 0 <= self.first < self.last:
            raise ValueError(f"queries.hard: first must be below last, got {self.first} and {self.last}")


class HardNegatives:
    """Questions with their vectors, on the CPU, and the neighbours of every text that was asked for.

    What is drawn depends on the record and the generator alone: each text is encoded by itself, so that no batch and no
    padding matters. It is pickled into the loader's workers.

    Args:
        encoder: of the texts, on the CPU.
        embed: what makes vectors of the questions, by the same encoder; by default the encoder, where it is.

    Raises:
        ValueError: where there are no more questions than `config.first`.
    """

    def __init__(
        self,
        config: HardConfig,
        encoder: TextEncoder,
        records: Iterable[EditRecord],
        embed: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.encoder = encoder
        every = (q for record in records for queries in record.locality.values() for q in queries)
        self.questions = list({q.prompt: q for q in every if q.prompt}.values())
        if len(self.questions) <= config.first:
            raise ValueError(
                f"queries.hard: the training records have {len(self.questions)} locality questions, and neighbours "
                f"from number {config.first} on are wanted; lower queries.hard.first, or set queries.hard.rate to 0"
            )
        self.vectors = _unit((embed or encoder.embed)([q.prompt for q in self.questions]))  # [C, d]
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def draw(self, record: EditRecord, text: str, draw: random.Random) -> Query | None:
        """A question near an edit's text that does not name its subject, nor is one that the record asks in scope."""
        numbers, similarities = self._neighbours(text)
        subject = record.request.subject
        own = {record.request.prompt, *(q.prompt for q in record.rephrases)}
        asked = [self.questions[i].prompt for i in numbers.tolist()]
        clear = torch.tensor([p not in own and not (subject and subject in p) for p in asked])
        if not clear.any():
            return None
        rates = (similarities.double() / self.config.temperature).masked_fill(~clear, -torch.inf).softmax(0)
        return self.questions[draw.choices(numbers.tolist(), rates.tolist())[0]]

    def _neighbours(self, text: str) -> tuple[Tensor, Tensor]:
        """Numbers and similarities of the neighbours that may be drawn, the nearest first."""
        if text not in self._known:
            similarity = self.vectors @ _unit(self.encoder.embed([text]))[0]  # [C]
            best = similarity.topk(min(self.config.last, len(similarity)))
            self._known[text] = best.indices[self.config.first :].int(), best.values[self.config.first :].half()
        return self._known[text]


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
