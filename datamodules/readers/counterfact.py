"""CounterFact, in ROME's original shape and in EasyEdit's flat one.

Sources: Meng et al. 2022, ROME (original records); Yao et al. 2023, EasyEdit (flat records, portability questions).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.readers.fields import items, one_hop, record_id, subject_in, text, texts
from datamodules.records import EditRecord, EditRequest, Query


def read_counterfact(path: str | Path, on_error: OnError = "raise") -> Iterator[EditRecord]:
    """Read CounterFact; a record that has `requested_rewrite` is of ROME's shape, any other of EasyEdit's.

    ROME: `case_id`, `requested_rewrite` {`prompt` with "{}" for the subject, `subject`, `target_new.str`,
    `target_true.str`, `relation_id`}, `paraphrase_prompts`, `neighborhood_prompts`; optional `target_new.id`,
    `generation_prompts`, `attribute_prompts` (the record's `target_id`, `generation`, `attribute`: they are neither
    rephrases nor locality) and `portability`.

    EasyEdit: `case_id`, `prompt`, `target_new`, `subject`, `ground_truth`, `rephrase_prompt`; `locality_prompt` with
    `locality_ground_truth`. The two numberings of `case_id` are not the same.

    Locality is kind `neighborhood`: subjects that share the old target, which is their gold answer. Portability is kind
    `one_hop`. `domain` is the relation id, which EasyEdit's shape does not have.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`.
        MalformedRecord: for a record of neither shape.
    """

    def convert(row: Mapping[str, Any], index: int) -> EditRecord:
        name = record_id(row, path, index)
        return _rome(row, name) if "requested_rewrite" in row else _easyedit(row, name)

    return read_all(load_rows(path), path, convert, on_error)


def _rome(row: Mapping[str, Any], name: str) -> EditRecord:
    rewrite = row["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise TypeError("field 'requested_rewrite' must be one object; for a list of them use the format 'mquake'")
    new, true = text(row, "requested_rewrite.target_new.str"), text(row, "requested_rewrite.target_true.str")
    prompt = text(row, "requested_rewrite.prompt").replace("{}", text(row, "requested_rewrite.subject"))
    return EditRecord(
        id=name,
        requests=(EditRequest(prompt, new, subject_in(prompt, rewrite), old_target=true),),
        rephrases=_queries(row, "paraphrase_prompts", new),
        locality={"neighborhood": _queries(row, "neighborhood_prompts", true)},
        portability=one_hop(row),
        domain=next(iter(texts(rewrite, "relation_id")), None),
        generation=texts(row, "generation_prompts"),
        attribute=tuple(Query(prompt, (new,)) for prompt in texts(row, "attribute_prompts")),
        target_id=next(iter(texts(rewrite["target_new"], "id")), None),
    )


def _easyedit(row: Mapping[str, Any], name: str) -> EditRecord:
    prompt, new = text(row, "prompt"), text(row, "target_new")
    locality = {}
    if "locality_prompt" in row:
        locality["neighborhood"] = (Query(text(row, "locality_prompt"), (text(row, "locality_ground_truth"),)),)
    return EditRecord(
        id=name,
        requests=(EditRequest(prompt, new, subject_in(prompt, row), old_target=text(row, "ground_truth")),),
        rephrases=(Query(text(row, "rephrase_prompt"), (new,)),),
        locality=locality,
        portability=one_hop(row),
    )


def _queries(row: Mapping[str, Any], field: str, answer: str) -> tuple[Query, ...]:
    if field not in row:
        raise KeyError(field)
    return tuple(Query(prompt, (answer,)) for prompt in texts(row, field))


def read_snippets(path: str | Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """ROME's attribute_snippets.json: texts about subjects that have an attribute, by (relation id, target id).

    Shape: [{`relation_id`, `target_id`, `samples`: [{`text`, ...}]}]; gzipped if the name ends in `.gz`.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`; ValueError also for a row of another shape, which it names.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for index, row in enumerate(load_rows(path)):
        try:
            key = text(row, "relation_id"), text(row, "target_id")
            found[key] = found.get(key, ()) + tuple(text(sample, "text") for sample in items(row, "samples"))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"field {error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path}, record {index}: {reason}; reference texts are a list of {{relation_id, target_id, samples: "
                "[{text}]}}, as ROME publishes attribute_snippets.json"
            ) from error
    return found
