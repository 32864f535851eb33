"""Prompts and judgements of each task, worked out by hand on small files of the published shapes."""

import gzip
import json
from pathlib import Path

import pytest

from modules.ability.mmlu import Mmlu
from modules.ability.nq_open import NqOpen, span_match
from modules.ability.rte import Rte
from modules.ability.samsum import Samsum
from modules.ability.squad import Squad
from modules.ability.sst2 import Sst2
from modules.ability.task import Example


def test_rte_prompt_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "rte.tsv.gz"
    rows = 'index\tsentence1\tsentence2\tlabel\n7\t"It rains," he said.\tIt rains.\tentailment\n'
    rows += "8\tA.\tB.\tnot_entailment\n"
    file.write_bytes(gzip.compress(rows.encode()))
    first, second = Rte(str(file)).examples()
    assert first.id == "7"
    assert first.prompt == '"It rains," he said. entails the It rains.. True or False? answer:'
    assert (first.answers, second.answers) == (("True",), ("False",))
    assert first.options == ("True", "False")


def test_sst2_prompt_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text("text\tlabel\na joy . \t1\nbleak\t0\n")
    first, second = Sst2(str(file)).examples()
    assert first.prompt == (
        "For each snippet of text, label the sentiment of the text as positive or negative. The answer should be exact "
        "'positive' or 'negative'. text: a joy . answer:"
    )
    assert (first.answers, second.answers) == (("positive",), ("negative",))


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (Rte, "index\ta\tb\tlabel\n1\tx\ty\n", "line 2: 3 columns, 4 are needed"),
        (Rte, "index\ta\tb\tlabel\n1\tx\ty\tneutral\n", "row 1: label 'neutral'"),
        (Sst2, "text\tlabel\nfine\t2\n", "row 0: label '2'"),
        (NqOpen, '{"question": "who"}\n', "record 0: needs `question` and `answer`"),
        (Samsum, '[{"dialogue": "A: hi"}]', "record 0: needs `dialogue` and `summary`"),
        (Squad, '{"data": [{"title": "x"}]}', "shape of SQuAD"),
    ],
)
def test_a_malformed_file_is_named_with_its_place(task: type, text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        task(str(file)).examples()
    assert str(file) in str(caught.value)


def test_a_token_decides_by_the_released_rule() -> None:
    task = Rte(released=True)
    example = _example(("True",), ("True", "False"))
    name = "rte/generated_accuracy"
    # right, wrong, and undecided: the last is wrong in one accuracy, and not counted in the other
    assert task.judge(example, {"choice": "True", "text": " true"}) == {
        "rte/accuracy": 1,
        name: 1,
        f"{name}_decided": 1,
    }
    assert task.judge(example, {"choice": "False", "text": "False"}) == {
        "rte/accuracy": 0,
        name: 0,
        f"{name}_decided": 0,
    }
    assert task.judge(example, {"choice": "True", "text": " The"}) == {"rte/accuracy": 1, name: 0}
    assert set(task.protocols) == {"rte/accuracy", name, f"{name}_decided"}
    assert set(Rte().protocols) == set(Rte().judge(example, {"choice": "True"})) == {"rte/accuracy"}


def test_nq_open_with_and_without_passages(tmp_path: Path) -> None:
    file = tmp_path / "nq.jsonl"
    rows = [
        {"question": "who wrote it", "answer": ["Bobby Scott", "Bob Russell"]},
        {"question": "who wrote it", "answer": ["Bobby Scott"], "output": ["Bobby Scott wrote it.", "another"]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    closed, passage = NqOpen(str(file)).examples()
    assert closed.prompt == "Answer the following question. Question: who wrote it Answer:"
    assert closed.answers == ("Bobby Scott", "Bob Russell")
    assert passage.prompt == (
        "Refer to the passage below and answer the following question. Passage: Bobby Scott wrote it. "
        "Question: who wrote it"
    )


@pytest.mark.parametrize(
    ("text", "exact", "span"),
    [
        (" Bob Russell", 1, 1),
        (" the Bob Russell.\nQuestion: who", 1, 1),  # begins with it, after normalisation
        (" It was Bob Russell", 0, 1),
        (" Bob", 0, 0),
        (" Bobby Russell", 0, 0),
        ("", 0, 0),
    ],
)
def test_nq_open_judgement(text: str, exact: float, span: float) -> None:
    example = _example(("Bobby Scott", "Bob Russell"))
    assert NqOpen().judge(example, {"text": text}) == {"nq_open/exact_match": exact, "nq_open/span_match": span}


def test_the_released_denominator_is_a_switch() -> None:
    values = [{"nq_open/exact_match": 0.0, "nq_open/span_match": s} for s in (1.0, 1.0, 0.0, 0.0)]
    plain, released = NqOpen().aggregate(values), NqOpen(released=True).aggregate(values)
    assert plain["nq_open/span_match"]["value"] == 0.5
    assert set(plain) == set(NqOpen().protocols)
    assert set(released) == set(NqOpen(released=True).protocols)
    assert released["nq_open/span_match_of_3610"]["value"] == pytest.approx(2 / 3610)
    assert released["nq_open/span_match"] == plain["nq_open/span_match"]


def test_spans_are_whole_words_and_an_empty_answer_is_nowhere() -> None:
    assert span_match("in 1,000 years", ["1,000"])
    assert not span_match("in 1,0001 years", ["1,000"])
    assert not span_match("anything", ["the"])


def test_squad_gives_the_passage(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    answers = [{"text": "308", "answer_start": 0}, {"text": "308 points", "answer_start": 0}]
    paragraph = {
        "context": "They gave up 308 points.",
        "qas": [{"id": "q1", "question": "How many?", "answers": answers}],
    }
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    (example,) = Squad(str(file)).examples()
    assert example.prompt.endswith("Passage: They gave up 308 points. Question: How many?")
    assert example.answers == ("308", "308 points")
    assert (
        set(Squad().judge(example, {"text": "308"}))
        == set(Squad().protocols)
        == {"squad/exact_match", "squad/span_match"}
    )


def test_rouge_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "samsum.json"
    file.write_text(json.dumps([{"id": "13", "dialogue": "A: hi\r\nB: ho", "summary": "The cat sat on the mat."}]))
    (example,) = Samsum(str(file)).examples()
    assert example.prompt == "A: hi\r\nB: ho TL;DR:"
    assert Samsum(str(file), released=True).examples()[0].prompt == "A: hi\r\nB: ho\nTL;DR:"
    # reference: the cat sat on the mat (6 words); text: the mat the cat sat (5 words)
    # ROUGE-1: the x2, cat, sat, mat = 5 hits, P 5/5, R 5/6, F 10/11
    # ROUGE-2: text has the-mat mat-the the-cat cat-sat (4), reference 5; the-mat, the-cat, cat-sat: P 3/4, R 3/5, F 2/3
    # ROUGE-L: the cat sat = 3, P 3/5, R 3/6, F 6/11
    values = Samsum().judge(example, {"text": " The mat, the cat sat"})
    assert values == pytest.approx(
        {
            "samsum/rouge1": 10 / 11,
            "samsum/rouge2": 2 / 3,
            "samsum/rougeL": 6 / 11,
            "samsum/rouge": (10 / 11 + 2 / 3 + 6 / 11) / 3,
        }
    )
    assert set(values) == set(Samsum().protocols)
    assert set(Samsum().judge(example, {"text": ""}).values()) == {0.0}


def _mmlu(folder: Path) -> str:
    for split, name in (("dev", "dev"), ("test", "test")):
        (folder / split).mkdir()
        head = "question,choice0,choice1,choice2,choice3,answer\n" if split == "dev" else ""
        answers = ("0", "3") if split == "dev" else ("B", "C")
        rows = "".join(f'"{split} {i}, what?",p,q,r,s,{a}\n' for i, a in enumerate(answers))
        (folder / split / f"high_school_physics_{name}.csv").write_text(head + rows)
    return str(folder)


def test_mmlu_prompt(tmp_path: Path) -> None:
    first, second = Mmlu(_mmlu(tmp_path), shots=2).examples()
    assert (first.id, first.answers, second.answers) == ("high_school_physics/0", ("B",), ("C",))
    assert first.head == "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert first.shots == (
        "dev 0, what?\nA. p\nB. q\nC. r\nD. s\nAnswer: A\n\n",
        "dev 1, what?\nA. p\nB. q\nC. r\nD. s\nAnswer: D\n\n",
    )
    assert first.prompt == "test 0, what?\nA. p\nB. q\nC. r\nD. s\nAnswer:"


def test_mmlu_refuses_what_it_has_not(tmp_path: Path) -> None:
    path = _mmlu(tmp_path)
    with pytest.raises(ValueError, match="2 solved questions, 5 shots are wanted"):
        Mmlu(path).examples()
    with pytest.raises(ValueError, match=r"no subject 'law'.*high_school_physics"):
        Mmlu(path, subjects=["law"]).examples()
    with pytest.raises(ValueError, match="must not be negative"):
        Mmlu(path, shots=-1)
    (tmp_path / "test" / "x_test.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(ValueError, match=r"x_test\.csv, question 0"):
        Mmlu(path, shots=0, subjects=["x"]).examples()
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        Mmlu(str(tmp_path / "nowhere")).examples()


def _example(answers: tuple[str, ...], options: tuple[str, ...] = ()) -> Example:
    return Example("0", "?", answers, options)
