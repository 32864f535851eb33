"""lm-eval's tasks by name, from those that it ships and from a folder of one's own, without running a stranger's code.

A task's file can name Python functions (`!function`), metrics that are scripts of the hub, and programs that a model
wrote and that are to be run; its Jinja templates can reach Python as well. None of it happens unless it is asked for.
What lm-eval ships is code of an installed package, like any other.
"""

import difflib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml

from datamodules.files import located

FEWSHOT_SEED, PYTHON_SEED, NUMPY_SEED = 1234, 0, 1234  # those of lm_eval.simple_evaluate
TRUST = "trust_remote_code: true lets it"


def needs_lm_eval() -> None:
    """Raises ValueError: where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install -e '.[lm-eval]'")


def loaded(name: str, include: str | None = None, shots: int | None = None, trust: bool = False) -> dict[str, Any]:
    """lm-eval's tasks that a name stands for, by their own names: one, or all of a group or tag.

    Args:
        include: a folder of task files, which come before those that lm-eval ships.
        shots: in place of the tasks' own number.
        trust: run the code that the folder's files name, metrics from the hub, and what a model wrote.

    Raises:
        FileNotFoundError: where the folder, or a task's data, cannot be had.
        ValueError: for an unknown name, a task that is asked without shots by its own file, one that wants more than
            text, and without `trust` for one that runs code.
    """
    folder = str(located(include)) if include else None
    if folder and not trust:
        for file in sorted(Path(folder).glob("**/*.yaml")):
            _refuse_code(file)
    manager = _manager(folder, folder is None)
    if folder and name not in manager.all_tasks:
        manager = _manager(folder, True)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"lm_eval: there is no task {name!r}{hint} Own tasks: give their folder as `include`")
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
    except ImportError as error:
        raise ValueError(f"lm_eval: {name} needs a package that is not installed: {error}") from error
    except OSError as error:
        raise FileNotFoundError(f"lm_eval: the data of {name} cannot be had: {' '.join(str(error).split())}") from error
    for task in tasks.values():
        _ready(task, shots, trust)
    return tasks


@contextmanager
def harmless(trust: bool) -> Iterator[None]:
    """Templates in a sandbox, no scripts of the hub (unless trusted), and the seeds that lm-eval sets."""
    import evaluate  # type: ignore
    import lm_eval.utils  # type: ignore

    def refused(name: str, *_: Any, **__: Any) -> None:
        raise ValueError(f"lm_eval: the metric {name!r} is a script of the hub; {TRUST}")

    states = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        if trust:
            yield
        else:
            with patch.object(lm_eval.utils, "env", _sandbox()), patch.object(evaluate, "load", refused):
                yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@cache
def _sandbox() -> Any:
    """lm-eval's own template environment, without the ways from a template to Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.utils import env  # type: ignore

    sandbox = SandboxedEnvironment(loader=env.loader, undefined=env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(env.filters)
    return sandbox


@cache
def _manager(folder: str | None, shipped: bool) -> Any:
    """The index of all task files; to read those that lm-eval ships takes a while."""
    from lm_eval.tasks import TaskManager  # type: ignore

    return TaskManager(include_path=folder, include_defaults=shipped)


def _refuse_code(file: Path, seen: frozenset[Path] = frozenset()) -> None:
    """Refuse a task file that names Python code, itself or by what it includes."""
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"lm_eval: {file} names Python code ({error.problem}); {TRUST}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"lm_eval: {file} cannot be read: {error}") from error
    more = (given.get("include") or []) if isinstance(given, dict) else []
    for name in [more] if isinstance(more, str) else more:
        if (base := (file.parent / name).resolve()) not in seen:
            _refuse_code(base, seen | {base})


def _ready(task: Any, shots: int | None, trust: bool) -> None:
    """Check one task, and make it draw its solved questions as `simple_evaluate` does."""
    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"lm_eval: {name} wants more than text of a model")
    if getattr(task, "UNSAFE_CODE", False) and not trust:
        raise ValueError(f"lm_eval: {name} runs programs that the model writes; {TRUST}")
    if not trust and not callable(task.config.process_results):
        scripts = [metric for metric, found in getattr(task, "_metric_fn_list", {}).items() if found is None]
        if scripts:
            raise ValueError(f"lm_eval: {name}: the metric {scripts[0]!r} is a script of the hub; {TRUST}")
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 != shots:
        raise ValueError(f"lm_eval: {name} is asked without solved questions by its own file (num_fewshot: 0)")
    task.set_config("num_fewshot", own or 0 if shots is None else shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
