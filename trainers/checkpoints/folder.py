"""A checkpoint on disk: a folder `step<N>.ckpt` that is whole or does not count.

It is written beside, as `.step<N>.ckpt.partial`; its manifest, with size and hash of every file, is written last; then
it gets its name. So a folder with that name is whole unless something has happened to it since, and then `verify` says
to which file. Hidden names are what an interrupted save (`.partial`), removal (`.removed`) or conversion to another
number of ranks (`.universal`) left behind.

    {"format": 1, "step": 600, "kind": "file", "world_size": 1,
     "files": {"state.ckpt": {"bytes": 1234, "sha256": "..."}}, "sha256": "... of all the rest"}
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
THREADS = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is damaged. The text names the file and the remedy."""


# ------------------------------------------------------------------------------------------------ writing


def partial(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name `path`."""
    return path.with_name(f".{path.name}.partial")


def stage(path: Path) -> Path:
    """The folder to write the checkpoint `path` into: new and empty.

    Raises:
        OSError: if it cannot be made.
    """
    staged = partial(path)
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir(parents=True)
    return staged


def digest(folder: Path, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """{name relative to the folder: {"bytes": size, "sha256": hex}} of these files; by default of all but the manifest.

    Raises:
        CheckpointError: naming a file that cannot be read.
    """
    if names is None:
        files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        names = sorted(name for name in files if name != MANIFEST)
    with ThreadPoolExecutor(THREADS) as threads:  # hashing releases the interpreter
        return dict(zip(names, threads.map(_digest, [folder / name for name in names]), strict=True))


def _digest(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256")
            return {"bytes": opened.tell(), "sha256": found.hexdigest()}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def seal(staged: Path, path: Path, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Make what lies in `staged` the checkpoint `path`, all at once.

    A checkpoint that is already there (the same step again) goes once the new one is in its place.

    Args:
        staged: from `stage`.
        path: its name from now on.
        files: from `digest`, of every file.
        facts: of the whole: at least "step": int, "kind": "file" or "zero", "world_size": int.

    Raises:
        CheckpointError: naming the path and the reason. What was there before is as it was.
    """
    aside = path.with_name(f"{path.stem}.replaced{path.suffix}")
    folders = {folder for name in files for folder in (staged / name).parents if folder.is_relative_to(staged)}
    try:
        for name, wanted in files.items():
            sync(staged / name, wanted["bytes"])
        write(staged / MANIFEST, _text({"format": FORMAT, **facts, "files": files}))
        for folder in folders | {staged}:
            sync(folder)
        if path.exists():
            # under a name that counts: killed between the two renames, the old one is still found
            remove(aside)
            path.rename(aside)
        staged.rename(path)
        sync(path.parent)
    except OSError as error:
        raise failed(path, error) from error
    remove(aside)


def failed(path: Path, error: Exception) -> CheckpointError:
    """What to raise where the checkpoint `path` could not be written: the reason, and what there is to go on from."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    with suppress(OSError):
        reason += f" ({shutil.disk_usage(path.parent).free / 2**30:.1f} GiB are free there)"
    intact = [f"; the previous checkpoint {p.name} is intact" for p in whole(path.parent)[:1]]
    return CheckpointError(
        f"could not save {path}: {reason}{''.join(intact)}. Make room there, or see that it can be written; then go "
        "on with --ckpt_path last"
    )


def write(path: Path, text: str) -> None:
    """Write a small file so that it is on disk whole, or as it was before.

    Raises:
        OSError: if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sync(path: Path, size: int | None = None) -> None:
    """Have a file or folder on disk. A file of another size than `size` is an OSError."""
    opened = os.open(path, os.O_RDONLY)
    try:
        if size is not None and os.fstat(opened).st_size != size:
            raise OSError(0, f"{path.name} has {os.fstat(opened).st_size} bytes instead of {size}")
        os.fsync(opened)
    finally:
        os.close(opened)


def _text(manifest: Mapping[str, Any]) -> str:
    """The manifest as it stands in its file: one text only for one content, closed by its own hash."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}, indent=1) + "\n"


# ------------------------------------------------------------------------------------------------ reading


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of the checkpoint `path` says.

    Raises:
        CheckpointError: if there is none, or it is not as it was written; it names the file.
    """
    file = path / MANIFEST
    if path.is_file():
        raise CheckpointError(f"{path} is a single file, as an older version wrote it; this version cannot read it")
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    try:
        manifest = json.loads(raw)
        intact = _text(manifest).encode() == raw
    except (ValueError, AttributeError):  # not text, not JSON, not an object
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: content changed")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']}, and this version reads {FORMAT}: update it")
    return manifest


def verify(path: Path, hashes: bool = True) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, every file of which is as it was written.

    Files that the manifest does not list are passed over: nothing reads them, and a user's note does no harm.

    Args:
        hashes: also read every file and compare its content. Without, only its size is compared.

    Raises:
        CheckpointError: naming the files, and what is wrong with them.
    """
    manifest = read_manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = {name: problem for name, wanted in files.items() if (problem := _size(path / name, wanted["bytes"]))}
    if hashes:
        found = digest(path, [name for name in files if name not in problems])
        problems |= {n: "content changed" for n in found if found[n]["sha256"] != files[n]["sha256"]}
    if problems:
        named = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:3])
        more = f"; and {len(problems) - 3} more files" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} is damaged: {named}{more}")
    return manifest


def _size(file: Path, wanted: int) -> str | None:
    """What is wrong with a file's size."""
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    return None if size == wanted else f"{size} bytes instead of {wanted}"


def whole(folder: Path) -> list[Path]:
    """The checkpoints `*.ckpt` of a folder whose files are all there with their sizes, the latest step first."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("*.ckpt"):
        with suppress(CheckpointError):
            found.append((verify(path, hashes=False)["step"], path))
    return [path for _, path in sorted(found, key=_latest_first)]


def newest(folder: Path, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the latest step, and what there is to say about those that are passed over.

    Returns:
        The checkpoint, or None; and lines: one for all that was never finished, one for each file of an older version,
        one for each damaged checkpoint of a later step, naming it and its file.
    """
    entries = sorted(folder.glob("*.ckpt"))
    finished = [path for path in entries if (path / MANIFEST).exists()]
    unfinished = [p for p in entries if p.is_dir() and p not in finished] + sorted(folder.glob(".*.ckpt.partial"))
    chosen, damaged = None, []
    for _, path in sorted(((_step(p), p) for p in finished), key=_latest_first):
        try:
            verify(path, hashes)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            chosen = path
            break
    instead = f"using {chosen.name} instead" if chosen else "there is no whole one to use instead"
    warnings = [f"{text}; {instead}" for text in damaged]
    warnings += [
        f"{path} is a single file, as an older version wrote it; this version cannot read it"
        for path in entries
        if path.is_file()
    ]
    if unfinished:
        names = ", ".join(path.name for path in unfinished)
        warnings.append(f"{folder}: passing over what was never finished: {names}")
    return chosen, warnings


def _step(path: Path) -> int:
    """A checkpoint's step by its manifest; by its name where that is damaged."""
    try:
        return read_manifest(path)["step"]
    except CheckpointError:
        return int(next(iter(re.findall(r"\d+", path.name)), -1))


def _latest_first(found: tuple[int, Path]) -> tuple[int, str]:
    return -found[0], found[1].name  # step6.ckpt goes before step6.replaced.ckpt


# ------------------------------------------------------------------------------------------------ removing


def remove(path: Path) -> str | None:
    """Remove a checkpoint, so that an interrupted removal leaves nothing that looks whole.

    Returns:
        What to warn of, if that failed; training need not end for it.
    """
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.removed")
    try:
        if hidden != path and path.exists():
            if hidden.exists():
                shutil.rmtree(hidden)
            path.rename(hidden)
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        return f"could not remove {error.filename or path}: {error.strerror}; remove it by hand"
    return None


def clear_partials(folder: Path) -> None:
    """Remove what interrupted saves, removals and conversions left behind. Nothing may be saving there now."""
    for pattern in (".*.partial", ".*.removed", ".*.ckpt.universal"):
        for path in folder.glob(pattern):
            remove(path)
