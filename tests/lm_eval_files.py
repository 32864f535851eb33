"""Task files of lm-eval over local data, and the same questions as this project's MMLU reads them."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

LETTERS = "ABCD"
MMLU = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def questions(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"{split} {i * i}?",
            "choices": [f"{w} {i}" for w in ("one", "two", "ten", "six")],
            "answer": i % 4,
        }
        for i in range(count)
    ]


def task_file(folder: Path, name: str, rows: dict[str, list[dict[str, Any]]], **config: Any) -> None:
    """A task over JSON files, one for each split, with its cache beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, some in rows.items():
        files[split] = str(folder / f"{name}_{split}.json")
        Path(files[split]).write_text("\n".join(map(json.dumps, some)))
    about = {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    about["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(about | config))


def mmlu(folder: Path, asked: int = 16, solved: int = 3) -> None:
    """A subject of MMLU as lm-eval has it, in folder/tasks, and as `modules.ability.mmlu` reads it, in folder/mmlu."""
    rows = {"test": questions("test", asked), "dev": questions("dev", solved)}
    head = "The following are multiple choice questions (with answers) about law.\n\n"
    task_file(
        folder / "tasks",
        "law",
        rows,
        description=head,
        output_type="multiple_choice",
        doc_to_text=MMLU,
        doc_to_choice=list(LETTERS),
        doc_to_target="answer",
        fewshot_split="dev",
        fewshot_config={"sampler": "first_n"},
        num_fewshot=solved,
        metric_list=ACC,
    )
    for split, some in rows.items():
        (folder / "mmlu" / split).mkdir(parents=True)
        with (folder / "mmlu" / split / f"law_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([r["question"], *r["choices"], LETTERS[r["answer"]]] for r in some)


def text_tasks(folder: Path) -> None:
    """`words`, perplexity; `writes`, exact match of what is written."""
    texts = [{"text": f"the year {i} was a long one for {'many ' * i}people"} for i in range(5)]
    measures = [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ]
    task_file(
        folder,
        "words",
        {"test": texts},
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=measures,
    )
    task_file(
        folder,
        "writes",
        {"test": [{"q": f"Say {w}.", "a": w} for w in ("yes", "no", "so")]},
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n", "."], "max_gen_toks": 40, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
