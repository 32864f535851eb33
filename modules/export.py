"""A trained editor as a folder, and back.

The folder holds, as safetensors and JSON alone:

    editor.json                                        which editor it is, backbone, switches, data, versions, metrics
    editor.safetensors                                 what was trained: a hypernetwork (MEND, IBKE); gist token,
                                                       selection, encoder (InComeS)

and of InComeS

    config.json, model*.safetensors, tokenizer files   the model that answers, a plain transformers model
    adapter_config.json, adapter_model.safetensors     instead of it, where adapters were trained (peft's format)

and of SERAC, in place of editor.safetensors

    counterfactual/, scope/                            the two trained models, plain transformers models
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from modules.editor import TrainedEditor
from modules.exported.distillmike import DISTILLED
from modules.exported.files import Kind
from modules.exported.gists import GISTS
from modules.exported.hypernetworks import HYPERNETWORKS, METHODS
from modules.exported.serac import SERACS
from modules.trained.distillmike import DistillMIKE
from modules.trained.incomes import InComeS
from modules.trained.serac import SERAC

FORMAT = 1


class Exported(NamedTuple):
    """A trained editor: its name in editor.json, its module, and how its folder is written and read."""

    name: str
    module: type[L.LightningModule]
    kind: Kind


EDITORS = (
    Exported("incomes", InComeS, GISTS),
    *(Exported(name, module, HYPERNETWORKS) for name, module in METHODS.items()),
    Exported(SERAC.method, SERAC, SERACS),
    Exported("distillmike", DistillMIKE, DISTILLED),
)


def versions() -> dict[str, str]:
    """What a result or an export was made with."""
    found = {}
    for name in ("palimpsest", "torch", "lightning", "transformers", "peft", "deepspeed", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def export(module: L.LightningModule, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a trained module to a folder. `about`: data, metrics and whatever else editor.json should tell.

    Raises:
        FileExistsError: where the folder has something in it.
        TypeError: for a module that is no editor known here.
    """
    known = next((known for known in EDITORS if isinstance(module, known.module)), None)
    if known is None:
        raise TypeError(f"{type(module).__name__} cannot be exported; there are: {', '.join(e.name for e in EDITORS)}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "format": FORMAT,
        "editor": known.name,
        **known.kind.write(module, folder),
        "versions": versions(),
        **(about or {}),
    }
    (folder / "editor.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_editor(folder: Path | str, trust_remote_code: bool = False) -> TrainedEditor:
    """The editor in a folder that `export` wrote.

    Args:
        trust_remote_code: run code that the models' own repositories ship, where the editor was trained with it. An
            export may be anybody's, so that what it says of that itself is not enough.

    Raises:
        ValueError: where the folder is none, or a file is missing or does not fit, or wants such code; it names the
            file.
    """
    folder = Path(folder)
    file = folder / "editor.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is no exported editor: it has no editor.json. Make one with `python -m trainers.export`"
        )
    with _named(file):
        facts = json.loads(file.read_text(encoding="utf-8"))
        known = {e.name: e.kind for e in EDITORS}
        if facts["format"] != FORMAT or facts["editor"] not in known:
            raise ValueError(f"format {facts['format']!r} of editor {facts['editor']!r} is not known here")
        kind = known[facts["editor"]]
        for part in ("backbone", "counterfactual"):  # Liger's kernels run on CUDA alone, and this may be used anywhere
            if part in facts:
                facts[part]["liger"] = False
        wants_code = any(_wants_code(facts.get(part, {})) for part in ("backbone", "counterfactual", "scope"))
    if wants_code and not trust_remote_code:
        raise ValueError(
            f"{file} asks to run code that its model's repository ships; if you trust that repository, give "
            "--trust_remote_code true"
        )
    with _named(file):
        module = kind.build(folder, facts)
    kind.fill(module, folder)
    return module.editor()


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What is wrong with a file says which one it is."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}; export again") from error


def _wants_code(model: dict[str, Any]) -> bool:
    """Whether a model as an editor.json tells of it, or one inside of that, is to run code of its own."""
    return bool(model.get("trust_remote_code")) or any(_wants_code(m) for m in model.values() if isinstance(m, dict))
