"""A backbone and editors on a device: what a command builds once, and each of its worker processes for itself."""

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from modules.backbone import Backbone, BackboneConfig, WithoutAdapters, load_backbone
from modules.editor import Editor
from modules.export import load_editor
from trainers.editors import BASELINES, Chosen, Spec, TrainingFree, choose, read, refuse_twins
from trainers.processes import tie_to

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Specs:
    """What a backbone and editors are built from, in any process.

    Args:
        backbone: by default that of the first exported editor.
        editors: as `--editor` of trainers.evaluate.
        baselines: names of `trainers.editors.BASELINES`, which come before them.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
        trust_remote_code: of exported editors, see `modules.export.load_editor`.
    """

    backbone: BackboneConfig | None
    editors: tuple[Spec, ...]
    baselines: tuple[str, ...] = ()
    device: str = "auto"
    trust_remote_code: bool = False


def wanted_of(specs: Specs) -> list[TrainingFree | Path]:
    """The editors read but not built, and everything checked that needs no model.

    Raises:
        ValueError: for an unknown baseline or editor, two of one name, where there is nothing to take a backbone from,
            and for a device that is not there.
    """
    wrong = sorted(set(specs.baselines) - set(BASELINES))
    if wrong:
        raise ValueError(f"unknown baseline {wrong[0]!r}; there are: {', '.join(BASELINES)}")
    wanted = read(specs.editors)
    if specs.backbone is None and not any(isinstance(one, Path) for one in wanted):
        raise ValueError("nothing to evaluate on: give --editor DIR of an exported editor, or --backbone.source")
    refuse_twins([*specs.baselines, *(one.name if isinstance(one, TrainingFree) else str(one) for one in wanted)])
    device_named(specs.device)
    return wanted


def build(specs: Specs, device: str | None = None) -> tuple[Backbone, list[Chosen]]:
    """The backbone, and baselines and editors in the order given.

    Args:
        device: in place of that of `specs`.

    Raises:
        ValueError: as `wanted_of` and `trainers.editors.choose` do.
    """
    wanted = wanted_of(specs)
    place = device_named(device or specs.device)
    exported = {one: load_editor(one, specs.trust_remote_code) for one in wanted if isinstance(one, Path)}
    model = load_backbone(specs.backbone) if specs.backbone else next(iter(exported.values())).reader
    if isinstance(model, WithoutAdapters):  # only its own editor passes its adapters by
        model = load_backbone(model.config, model.tokenizer)
    for folder, editor in exported.items():
        if (own := editor.reader) is not model and _size(own) != _size(model):
            raise ValueError(
                f"--editor {folder} was trained on {own.config.source}, and backbone.source is {model.config.source}: "
                f"give --backbone null, or --backbone.source {own.config.source}"
            )
    model.model.to(place)  # type: ignore[arg-type]
    for editor in exported.values():
        editor.to(place)
    baselines = [Chosen(BASELINES[name](), {"baseline": name}) for name in specs.baselines]
    return model, baselines + choose(wanted, model, exported)


def _size(backbone: Backbone) -> tuple[Any, ...]:
    """What no editor can look past."""
    return backbone.model.config.model_type, len(backbone.layers), backbone.hidden_size


def device_named(name: str) -> torch.device:
    """A device by what a user writes.

    Raises:
        ValueError: for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is none: give cpu, cuda, cuda:1 or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def nth_device(n: int, wanted: str = "auto") -> str:
    """The device of the n-th worker process: what is wanted, or with auto a GPU of its own while there are any."""
    if wanted != "auto":
        return wanted
    count = torch.cuda.device_count()
    return f"cuda:{n % count}" if count else "cpu"


_mine: dict[str, Any] = {}


def prepare(specs: Specs, device: str, threads: int) -> None:
    """Of a new worker process: build everything on its device.

    It ends with the process that started it: nothing would tell it that one was killed, and it would hold its memory,
    a GPU's too, for ever.
    """
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        tie_to(parent.pid)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(threads)
    if (place := torch.device(device)).type == "cuda":
        torch.cuda.set_device(place)  # what names no device of its own must not begin a context on the first one
    backbone, editors = build(specs, device)
    _mine.update(backbone=backbone, editors={c.editor.name: c.editor for c in editors})


def built() -> tuple[Backbone, dict[str, Editor]]:
    """What `prepare` built in this process."""
    return _mine["backbone"], _mine["editors"]


def spread(
    work: Callable[[Item], Any],
    items: Sequence[Item],
    specs: Specs,
    workers: int,
    spent: Callable[[Any], bool] = lambda _: False,
) -> Iterator[tuple[Item, Any | None]]:
    """(item, what `work` gave) as they end, by so many processes, each of which builds `specs`, see `nth_device`.

    A process that is killed, as for want of memory, loses the item that it was at, whose result is None; another one
    takes its place. One that cannot even build leaves its item to the others.

    Args:
        work: a module's function, or a partial of one; `built` gives it backbone and editors.
        spent: by what `work` gave, whether its process can go on no more: another one takes its place.

    Raises:
        ValueError: where no process is left that can build.
    """
    context = multiprocessing.get_context("spawn")  # what has used CUDA must not be forked
    threads = max(1, _cores() // workers)
    waiting, idle = deque(items), deque(range(workers))
    pools: dict[int, tuple[ProcessPoolExecutor, Future[None]]] = {}  # of one process each: it breaks for itself alone
    running: dict[Future[Any], tuple[int, Item]] = {}
    with ExitStack() as stack:

        def submit(n: int, item: Item) -> Future[Any]:
            if n not in pools:
                pool = ProcessPoolExecutor(1, context, prepare, (specs, nth_device(n, specs.device), threads))
                pools[n] = stack.enter_context(pool), pool.submit(_nothing)
            return pools[n][0].submit(work, item)

        while waiting or running:
            while waiting and idle:
                n, item = idle.popleft(), waiting.popleft()
                try:
                    future = submit(n, item)
                except BrokenProcessPool:  # killed while it had nothing to do
                    del pools[n]
                    future = submit(n, item)
                running[future] = n, item
            if not running:
                raise ValueError(
                    "no worker process can load the model and build the editors; the reason stands above, or it is "
                    "that memory runs out: set benchmark.workers to 1"
                )
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                n, item = running.pop(future)
                found = None
                try:
                    found = future.result()
                except BrokenProcessPool:
                    _, start = pools.pop(n)
                    if start.exception() is not None:
                        log.warning("worker process %d cannot be built (out of memory?); the others go on", n)
                        waiting.appendleft(item)
                        continue
                if found is not None and spent(found):
                    _end(pools.pop(n)[0])
                idle.append(n)
                yield item, found


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool's only process at once, and wait until it has let go of its GPU's memory."""
    with suppress(BrokenProcessPool):
        pool.submit(os._exit, 1).result()


def _cores() -> int:
    """Those that this process may use, which are fewer than the machine's in many a job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> None:
    """The first thing that a process does once it is built."""
