"""Rows from the Hugging Face hub, for every reader: `hub:owner/name:train` in place of a file's path.

What stands after the name is a split, or a file of the repository (it ends in .json or .jsonl, perhaps with .gz):

    hub:owner/name:train            a split of a data set
    hub:owner/name:subset:train     of one of its subsets
    hub:owner/name:test_cf.json     one file, read as it would be from disk
    hub:owner/name@v1.0:train       any of these at a revision: a branch, a tag or a commit

KnowEdit is such a folder of files of several shapes, which no one table could hold. A local folder may stand for the
name: a data set that was saved by `datasets`, or a folder of data files.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.readers.errors import DataError

PREFIX = "hub:"


def is_hub(path: str | Path) -> bool:
    return str(path).startswith(PREFIX)


def hub_file(path: str | Path) -> Path | None:
    """The local copy of a file of the hub, fetched where it is not there yet; None where `path` names a split.

    Raises:
        ValueError: if `path` is not of one of the three forms.
        DataError: if the file cannot be had.
    """
    name, revision, subset, last = _parts(path)
    if not last.removesuffix(".gz").endswith((".json", ".jsonl")):
        return None
    if subset:
        raise ValueError(f"{path}: a file has no subset; write {PREFIX}{name}:path/of/the/file.json")
    if Path(name).is_dir():
        return Path(name) / last
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, last, repo_type="dataset", revision=revision))
    except Exception as error:  # the client's errors share no base class
        raise DataError(f"cannot fetch {last} of data set {name!r}: {error}; check the name and the network") from error


def hub_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a split, memory-mapped, without the fields that a row does not have (a table holds None there).

    Raises:
        DataError: if the data set cannot be loaded.
    """
    name, revision, subset, split = _parts(path)
    return map(_given, load_table(name, subset, split, revision))


def load_table(name: str, subset: str | None, split: str, revision: str | None = None) -> Any:
    """A split of a data set. No code of its own is run, so one that needs a loading script is refused.

    Raises:
        DataError: if it cannot be loaded, for whatever reason.
    """
    import datasets  # takes a second to import, which readers of local files need not wait for

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        if (Path(name) / "dataset_info.json").is_file() and (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)  # one split, saved without its name
        return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=False)
    except Exception as error:  # the hub client's errors share no base class
        raise DataError(
            f"cannot load dataset {name!r} (subset {subset!r}, split {split!r}, revision {revision!r}): {error}; check "
            f"these names and the network, or save its rows as JSON Lines and read them with the format 'pairs'"
        ) from error


def commit(path: str, revision: str | None = None) -> str | None:
    """The commit that a data set is read at, as the hub's client last saw it: told by its local cache or, where it has
    not read that revision yet, by the hub. None where neither tells, and for a local folder.

    Args:
        path: `hub:...`, or a data set's name.
        revision: of a name.
    """
    name, revision = _parts(path)[:2] if is_hub(path) else (path, revision)
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return revision
    if Path(name).is_dir():
        return None
    from huggingface_hub import HfApi, constants

    told = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", revision or "main")
    if told.is_file():
        return told.read_text(encoding="utf-8").strip()
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # the client's errors share no base class; what cannot be had fails where it is read
        return None


def _parts(path: str | Path) -> tuple[str, str | None, str | None, str]:
    """Name, revision, subset, and split or file."""
    parts = str(path).removeprefix(PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{path}: write {PREFIX}owner/name:split, :subset:split, or :file.json after the name")
    name, _, revision = (parts[0], "", "") if Path(parts[0]).is_dir() else parts[0].partition("@")
    return name, revision or None, parts[1] if len(parts) == 3 else None, parts[-1]


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value
