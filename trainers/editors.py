"""Editors by what a user writes: a name or path of a training-free one, with or without changes, or an exported folder.

memit                                           configs/training_free/memit.yaml
mine/memit.yaml                                 a file of the same form
{editor: memit, name: heavy, weight: 30000}     with other arguments, and a name for results to be filed under
exported/mend                                   a folder written by trainers.export
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn

from modules.backbone import Backbone
from modules.editor import Editor
from modules.export import load_editor
from modules.training_free.icl import InContext, RightEdit, Unedited
from modules.training_free.known import KNOWN, known_as

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "training_free"
Spec = dict[str, Any] | str
BASELINES: dict[str, type[Editor]] = {e.name: e for e in (Unedited, InContext, RightEdit)}  # to compare others with


@dataclass(frozen=True)
class TrainingFree:
    """A training-free editor as configured: everything but the model that it is to edit.

    Args:
        name: what results are filed under.
        kind: its class.
        arguments: its constructor's, for any model.
        backbones: put over them for a known model, by the model's name.
        changes: the user's own, over both.
        file: where it is configured.
    """

    name: str
    kind: type[Editor]
    arguments: dict[str, Any]
    backbones: dict[str, dict[str, Any]]
    changes: dict[str, Any]
    file: Path

    def resolved(self, model: str | None) -> dict[str, Any]:
        """All arguments, defaults too, for a known model by name, or None for any other.

        Raises:
            ValueError: for a value of a wrong type; it names file and argument.
        """
        parsed = self._parsed(model)
        return json.loads(_parser(self.kind).dump(parsed, format="json", skip_none=False)).get("editor", {})

    def build(self, backbone: Backbone) -> Editor:
        """The editor for a model. One that is none of the file's backbones gets the defaults, with a warning.

        Raises:
            ValueError: as `resolved`, and what the constructor raises.
        """
        model = known_as(backbone)
        if self.backbones and model not in self.backbones:
            rank_zero_warn(
                f"{self.name}: {self.file.name} has no values for {backbone.config.source!r}, only for "
                f"{', '.join(self.backbones)}; it runs with its defaults"
            )
        return self.made_for(model)

    def made_for(self, model: str | None) -> Editor:
        """The editor for a known model by name, or None for any other."""
        built = _parser(self.kind).instantiate(self._parsed(model))
        editor: Editor = built.editor if "editor" in built else self.kind()  # without arguments there is no such key
        editor.name = self.name
        return editor

    def _parsed(self, model: str | None) -> Any:
        given = _over(_over(self.arguments, self.backbones.get(model or "", {})), self.changes)
        try:
            return _parser(self.kind).parse_object({"editor": given} if given else {})
        except ArgumentError as error:
            raise ValueError(f"{self.name} ({self.file.name}): {_one_line(error)}") from error


@dataclass(frozen=True)
class Chosen:
    """An editor, and what it was made of.

    Args:
        editor: ready to edit.
        made_of: JSON values, or the folder that it was exported to.
    """

    editor: Editor
    made_of: dict[str, Any] | Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """JSON values: two editors of the same facts give the same results. An exported one is read to the end when
        they are first asked for, which not every command does, and no worker process."""
        return {"export": _digest(self.made_of)} if isinstance(self.made_of, Path) else self.made_of


def training_free(spec: Spec) -> TrainingFree:
    """Read what configures a training-free editor. Nothing is built, no model is needed.

    Raises:
        ValueError: for an unknown name, key, argument or backbone, or a value of a wrong type; one line each, with what
            there is.
    """
    changes = {"editor": spec} if isinstance(spec, str) else dict(spec)
    if not isinstance(changes.get("editor"), str):
        raise ValueError(f"an editor with changes needs the key `editor`, such as {{editor: memit}}; got {spec!r}")
    file = _file(changes.pop("editor"))
    name = str(changes.pop("name", file.stem))
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    keys = ("class_path", "init_args", "backbones")
    if not isinstance(raw, Mapping) or "class_path" not in raw or set(raw) - set(keys):
        found = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
        raise ValueError(f"{file}: needs class_path and may have init_args and backbones, nothing else; got {found}")
    kind = _class(raw["class_path"], file)
    arguments, backbones = dict(raw.get("init_args") or {}), dict(raw.get("backbones") or {})
    _refuse_unknown(f"{file.name}: backbone", backbones, KNOWN)
    every = _parser(kind).get_defaults().as_dict().get("editor", {})
    parts = [("init_args", arguments), *((f"backbones.{n}", values) for n, values in backbones.items())]
    for where, values in (*parts, ("changes", changes)):
        if not isinstance(values, Mapping):
            raise ValueError(f"{file}: {where} must be a mapping of arguments to values, got {values!r}")
        _refuse_unknown(f"{name} ({file.name}, {where}): argument", values, every)
    found = TrainingFree(name, kind, arguments, backbones, changes, file)
    for model in backbones or (None,):
        found.resolved(model)
    return found


def read(specs: Sequence[Spec]) -> list[TrainingFree | Path]:
    """What each stands for: a configuration, or the folder of an exported editor. Nothing is loaded.

    Raises:
        ValueError: as `training_free` does.
    """
    return [Path(s) if isinstance(s, str) and (Path(s) / "editor.json").is_file() else training_free(s) for s in specs]


def choose(
    wanted: Sequence[TrainingFree | Path], backbone: Backbone, exported: Mapping[Path, Editor] | None = None
) -> list[Chosen]:
    """Editors for one model, in the order given, each under a name of its own.

    Args:
        exported: editors of folders that are loaded already.

    Raises:
        ValueError: as `TrainingFree.build` does, and for two editors of one name that no folder tells apart.
    """
    chosen = []
    for one in wanted:
        if isinstance(one, Path):
            chosen.append(Chosen((exported or {}).get(one) or load_editor(one), one))
        else:
            facts = {"class_path": f"{one.kind.__module__}.{one.kind.__qualname__}"}
            facts |= {"init_args": one.resolved(known_as(backbone))}
            chosen.append(Chosen(one.build(backbone), facts))
    _tell_apart(wanted, [c.editor for c in chosen])
    return chosen


def known_names() -> list[str]:
    """The training-free editors that ship with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _file(name: str) -> Path:
    for path in (Path(name), FOLDER / name, FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ValueError(
        f"no editor {name!r}: there is no such file, the folder has no editor.json (trainers.export makes one), and "
        f"the training-free editors are: {', '.join(known_names())}"
    )


def _class(path: Any, file: Path) -> type[Editor]:
    module, _, name = str(path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: class_path {path!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Editor)):
        raise ValueError(f"{file}: class_path {path!r} is no Editor (modules/editor.py)")
    return kind


def _parser(kind: type[Editor]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "editor")
    return parser


def _refuse_unknown(what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        there = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{what} {unknown[0]!r} is not known; there are: {there}")


def _over(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` over `base`, mappings of names within them likewise; one of numbers ({10: 5}) is a value, and replaced."""
    merged = dict(base)
    for key, value in more.items():
        old = merged.get(key)
        merged[key] = _over(old or {}, value) if _named(old) and _named(value) else value
    return merged


def _named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _one_line(error: Exception) -> str:
    """jsonargparse's message without the place in our own parser."""
    return " ".join(str(error).replace('"editor.', '"').replace("editor.", "").split())


def _tell_apart(wanted: Sequence[TrainingFree | Path], editors: Sequence[Editor]) -> None:
    names = [e.name for e in editors]
    for one, editor in zip(wanted, editors, strict=True):
        if names.count(editor.name) > 1 and isinstance(one, Path):
            editor.name = f"{editor.name} ({one.name})"
    refuse_twins([e.name for e in editors])


def refuse_twins(names: Sequence[str]) -> None:
    """Refuse two editors of one name, by which results are told apart.

    Raises:
        ValueError: naming it.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two editors are called {twice!r}; give each a name: {{editor: ..., name: ...}}")


def _digest(folder: Path) -> str:
    """A hash of all that an exported editor's files are called and hold, so that a copy is the same editor. It reads
    half a gigabyte to two a second, as the hash of the backbone's weights that stands beside it does."""
    digest = sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            file_digest(file, lambda: digest)
    return digest.hexdigest()
