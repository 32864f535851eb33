import json

import pytest

from datamodules.readers import read
from datamodules.readers.auto import detected

FLAT = {"prompt": "p of S", "target_new": "t", "ground_truth": "o", "rephrase_prompt": "r"}
UNIEDIT = {"1": {"edit": {}, "generality": {}, "locality": {}}}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"src": "q?", "alt": "a", "rephrase": "r"}, "zsre"),
        (FLAT | {"locality_prompt": "l", "locality_ground_truth": "g"}, "counterfact"),
        ({"requested_rewrite": {}}, "counterfact"),
        ({"requested_rewrite": [], "questions": []}, "mquake"),
        ({"prompt": "p", "target_new": ["t"], "ground_truth": "o"}, "knowedit"),
        (FLAT | {"locality": {}}, "knowedit"),
        ({"id": "1", "requests": [], "rephrases": []}, "records"),
        ({"edit": {}, "Relation_Specificity": [], "Forgetfulness": []}, "ripple"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_the_first_record_tells(write, row, format, name):
    assert detected(write([row, {}], name)) == format


@pytest.mark.parametrize("indent", [None, 1])
def test_files_that_are_one_object(tmp_path, indent):
    for content, format in ((UNIEDIT, "uniedit"), ({"edits:": ["a"], "test_inputs": [["q", "a"]]}, "dune")):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
        assert detected(path) == format
    (tmp_path / "a.json").write_text(json.dumps(UNIEDIT), encoding="utf-8")
    assert detected(tmp_path) == "uniedit"


def test_what_cannot_be_told(write, tmp_path):
    with pytest.raises(
        ValueError, match=r"may be of format counterfact or knowedit; say which; .*: prompt, target_new"
    ):
        read("auto", write([FLAT]))
    with pytest.raises(
        ValueError, match=r"of no format that can be told \(counterfact, .*has: known_id; name a format"
    ):
        read("auto", write([{"known_id": 1}]))
    with pytest.raises(ValueError, match="its first record has: str"):
        read("auto", write(["text"]))
    with pytest.raises(ValueError, match=r"is a folder; name one of its files: data\.json"):
        read("auto", tmp_path)
    (tmp_path / "data.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: broken JSON"):
        read("auto", tmp_path / "data.json")
    (tmp_path / "data.json").unlink()
    with pytest.raises(ValueError, match="folder without data files"):
        read("auto", tmp_path)
    with pytest.raises(FileNotFoundError, match="no data file"):
        read("auto", tmp_path / "data.json")


def test_it_reads_as_the_format_does_and_takes_its_options(write):
    rows = [{"src": "Who?", "alt": "A", "rephrase": "r", "answers": ["B"]}, {"src": "x"}]
    path = write(rows)
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        records = list(read("auto", path, target="answer", on_error="skip"))
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert records == list(read("zsre", path, target="answer", on_error="skip"))
    assert records[0].request.target == "B"
    with pytest.raises(ValueError, match=r"format 'zsre': .*targte"):
        read("auto", path, targte="answer")


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("zsre/zsre_mend_eval_portability_gpt4.json", "zsre"),
        ("zsre/zsre_subject_replace.json", "zsre"),
        ("zsre/zsre_inverse_relation.json", "zsre"),
        ("knowedit/ZsRE-test-all.json.gz", "knowedit"),
        ("knowedit/wiki_counterfact/test_cf.json.gz", "knowedit"),
        ("knowedit/wiki_counterfact/train_cf.json.gz", "knowedit"),
        ("knowedit/wiki_recent/recent_train.json.gz", "knowedit"),
        ("counterfact/counterfact-val.json.gz", "counterfact"),
        ("counterfact/counterfact_filtered.json.gz", "counterfact"),
        ("counterfact/counterfact_portability_gpt4.json.gz", "counterfact"),
        ("mquake/MQuAKE-hard.json.gz", "mquake"),
        ("mquake/MQuAKE-CF.akew.json.gz", "mquake"),
        ("ripple/gpt-j-popular.json.gz", "ripple"),
        ("dune/debiasing_I.json", "dune"),
        ("dune/debiasing_II.json.gz", "dune"),
    ],
)
def test_real_files(real, name, format):
    assert detected(real(name)) == format
