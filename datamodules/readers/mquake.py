"""MQuAKE: cases of one to four edits, judged by multi-hop questions; and AKEW's copy with the edits as paragraphs.

Sources: Zhong et al. 2023, MQuAKE; Wu et al. 2024, AKEW. How its answers are judged: `modules.protocols.mquake`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_keyed, load_rows, read_all
from datamodules.readers.fields import distinct, items, record_id, subject_in, text, texts
from datamodules.records import EditRecord, EditRequest, Query

HOP = "single_hop"


def read_mquake(
    path: str | Path, on_error: OnError = "raise", unstructured: bool = False, conflicts: bool = True
) -> Iterator[EditRecord]:
    """Read MQuAKE (CF, CF-3k and its version 2, hard, T) or AKEW's version of it.

    Fields: `case_id`, `requested_rewrite` [{`prompt` with "{}" for the subject, `subject`, `target_new.str`,
    `target_true.str`, `question`, `relation_id`}], `questions` (any one counts), `new_answer`, `new_answer_alias`,
    `new_single_hops` [{`question`, `cloze`, `answer`, `answer_alias`}]. Rephrases are the edits' own questions, where
    they exist. Portability is kind `single_hop`: every hop of the new chain, the edited ones among them, asked by its
    question (by its cloze where it has none); the question of an edited hop is thus a rephrase too. The criteria of
    the multi-hop questions say how long the chain is and how many edits the case has: ("2_hops", "1_edit").
    `domain` is the relation id where all edits of the case share one.

    In CF-3k (version 1) a case's edits can contradict another case's unedited hops, see `conflicting`.

    Args:
        unstructured: let each edit's `text` be AKEW's paragraph `fact_new_uns`.
        conflicts: whether to keep the cases that another case of the file contradicts. With them, those that are
            contradicted within a pool are not asked (protocol mquake), or not their multi-hop questions (the others),
            and counted; without them, any number of cases can be edited together, and all are asked.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`.
        MalformedRecord: for a record without a required field; with `unstructured`, for one without the paragraph.
    """
    rows = load_rows(path)
    records = read_all(rows, path, lambda row, i: _record(row, record_id(row, path, i), unstructured), on_error)
    return records if conflicts else _consistent(records)


def _consistent(records: Iterator[EditRecord]) -> Iterator[EditRecord]:
    every = list(records)
    yield from (record for record, out in zip(every, conflicting(every), strict=True) if not out)


def conflicting(records: Sequence[EditRecord]) -> list[bool]:
    """Which cases rest on a hop that another case edits to something else.

    Under all the edits such a case has no right answer: its own is built on the one, the other's edit says the other.
    In CF-3k (version 1) these are unedited hops, but for three cases on namesakes ("Ford Mustang" is two entities). A
    hop and an edit are the same fact where their questions (or clozes) are the same, as they are to a model.
    """
    new: dict[str, set[str]] = {}
    for record in records:
        for asked, target in _edited(record):
            new.setdefault(asked, set()).add(target)

    def contradicted(record: EditRecord) -> bool:
        own = {target for _, target in _edited(record)}
        return any(new.get(hop.prompt, set()) - own - set(hop.answers) for hop in record.portability.get(HOP, ()))

    return [contradicted(record) for record in records]


def unedited(record: EditRecord) -> list[Query]:
    """The hops of a case's new chain that no edit of the case is about; none of another source's record."""
    own = {request.prompt for request in record.requests} | {query.prompt for query in record.rephrases}
    return [hop for hop in record.portability.get(HOP, ()) if hop.prompt not in own]


def _edited(record: EditRecord) -> list[tuple[str, str]]:
    """The cloze and the question of each edit, with its target."""
    clozes = [(request.prompt, request.target) for request in record.requests]
    return clozes + [(query.prompt, query.target) for query in record.rephrases]


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)}_{name}{'' if len(things) == 1 else 's'}"


def _record(row: Mapping[str, Any], name: str, unstructured: bool) -> EditRecord:
    rewrites = items(row, "requested_rewrite")
    questions, answers = texts(row, "questions"), _with_aliases(row, "new_answer")
    if not questions:
        raise KeyError("questions")
    hops = tuple(map(_hop, items(row, "new_single_hops")))
    relations = {relation for rewrite in rewrites for relation in texts(rewrite, "relation_id")}
    return EditRecord(
        id=name,
        requests=tuple(_request(rewrite, unstructured) for rewrite in rewrites),
        rephrases=tuple(
            Query(text(rewrite, "question"), (text(rewrite, "target_new.str"),))
            for rewrite in rewrites
            if texts(rewrite, "question")
        ),
        portability={HOP: hops},
        multi_hop=tuple(
            Query(question, answers, criteria=(_count(hops, "hop"), _count(rewrites, "edit"))) for question in questions
        ),
        domain=relations.pop() if len(relations) == 1 else None,
    )


def _request(rewrite: Mapping[str, Any], unstructured: bool) -> EditRequest:
    if unstructured and "fact_new_uns" not in rewrite:
        raise ValueError("field 'requested_rewrite.fact_new_uns' is missing; unstructured=True is for AKEW's files")
    prompt = text(rewrite, "prompt").replace("{}", text(rewrite, "subject"))
    return EditRequest(
        prompt=prompt,
        target=text(rewrite, "target_new.str"),
        subject=subject_in(prompt, rewrite),
        text=text(rewrite, "fact_new_uns") if unstructured else None,
        old_target=text(rewrite, "target_true.str"),
    )


def _hop(hop: Mapping[str, Any]) -> Query:
    prompt = text(hop, "question" if texts(hop, "question") else "cloze")
    return Query(prompt, _with_aliases(hop, "answer"))


def _with_aliases(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    return distinct((text(row, field), *texts(row, f"{field}_alias")))


def read_few_shot(multi_hop: str | Path, relations: str | Path | None = None) -> dict[str, Any]:
    """MQuAKE's demonstrations, as arguments of `modules.protocols.few_shot.FewShot`.

    Args:
        multi_hop: multihop-prompts.txt, or multihop-cot-prompts.txt.
        relations: rel-prompts.json.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if it is empty or not of its shape.
    """
    path = Path(multi_hop)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} of demonstrations (MQuAKE's prompts/multihop-prompts.txt)")
    few_shot: dict[str, Any] = {"multi_hop": path.read_text(encoding="utf-8").strip()}
    if not few_shot["multi_hop"]:
        raise ValueError(f"{path} is empty; fetch it again, or leave it out for the demonstrations of this project")
    if relations is not None:
        few_shot["relations"] = dict(load_keyed(relations))
        wrong = [name for name, shown in few_shot["relations"].items() if not isinstance(shown, str)]
        if wrong:
            raise ValueError(f"{relations}: field {wrong[0]!r} must be text, lines of 'Q: ... A: ...'")
    return few_shot
