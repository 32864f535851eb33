"""MQuAKE: cases of one to four edits, judged by multi-hop questions; and AKEW's copy with the edits as paragraphs.

Sources: Zhong et al. 2023, MQuAKE; Wu et al. 2024, AKEW.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.readers.fields import distinct, items, record_id, subject_in, text, texts
from datamodules.records import EditRecord, EditRequest, Query


def read_mquake(path: str | Path, on_error: OnError = "raise", unstructured: bool = False) -> Iterator[EditRecord]:
    """Read MQuAKE (CF, CF-3k, hard, T) or AKEW's version of it.

    Fields: `case_id`, `requested_rewrite` [{`prompt` with "{}" for the subject, `subject`, `target_new.str`,
    `target_true.str`, `question`, `relation_id`}], `questions` (any one counts), `new_answer`, `new_answer_alias`,
    `new_single_hops` [{`question`, `cloze`, `answer`, `answer_alias`}]. Rephrases are the edits' own questions, where
    they exist. Portability is kind `single_hop`: every hop of the new chain, the edited ones among them, asked by its
    question (by its cloze where it has none); the question of an edited hop is thus a rephrase too. `domain` is the
    relation id where all edits of the case share one.

    A case's edits can contradict another case's unedited hops: of CF-3k, score each case on its own edits.

    Args:
        unstructured: let each edit's `text` be AKEW's paragraph `fact_new_uns`.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`.
        MalformedRecord: for a record without a required field; with `unstructured`, for one without the paragraph.
    """
    return read_all(load_rows(path), path, lambda row, i: _record(row, record_id(row, path, i), unstructured), on_error)


def _record(row: Mapping[str, Any], name: str, unstructured: bool) -> EditRecord:
    rewrites = items(row, "requested_rewrite")
    questions, answers = texts(row, "questions"), _with_aliases(row, "new_answer")
    if not questions:
        raise KeyError("questions")
    relations = {relation for rewrite in rewrites for relation in texts(rewrite, "relation_id")}
    return EditRecord(
        id=name,
        requests=tuple(_request(rewrite, unstructured) for rewrite in rewrites),
        rephrases=tuple(
            Query(text(rewrite, "question"), (text(rewrite, "target_new.str"),))
            for rewrite in rewrites
            if texts(rewrite, "question")
        ),
        portability={"single_hop": tuple(map(_hop, items(row, "new_single_hops")))},
        multi_hop=tuple(Query(question, answers) for question in questions),
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
