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


def load_editor(folder: Path | str) -> TrainedEditor:
    """The editor in a folder that `export` wrote.

    Raises:
        ValueError: where the folder is none, or a file is missing or does not fit; it names the file.
    """
    folder = Path(folder)
    file = folder / "editor.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is no exported editor: it has no editor.json. Make one with `python -m trainers.export`"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        known = {e.name: e.kind for e in EDITORS}
        if facts["format"] != FORMAT or facts["editor"] not in known:
            raise ValueError(f"format {facts['format']!r} of editor {facts['editor']!r} is not known here")
        kind = known[facts["editor"]]
        for part in ("backbone", "counterfactual"):  # Liger's kernels run on CUDA alone, and this may be used anywhere
            if part in facts:
                facts[part]["liger"] = False
        module = kind.build(folder, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}; export again") from error
    kind.fill(module, folder)
    return module.editor()
