"""Run the cells of a benchmark that are not there yet, by one process or several, and write what all of them say.

out/cells/<data set>/<run>/<editor>.json   one cell, with per-record results in EasyEdit's shape (files.py)
out/results.csv                            every metric of every cell, a line each
out/tables.md, out/tables.tex              as in papers: editors down, metrics across
out/figures/*.png                          over the number of edits; generality against locality; time and memory
out/answers.html                           answers side by side; opens without a server
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.files import hashes
from datamodules.records import EditRecord
from datamodules.sources import described, load
from modules.backbone import Backbone
from trainers.benchmark.answers import write_answers
from trainers.benchmark.crew import Crew
from trainers.benchmark.figures import write_figures
from trainers.benchmark.files import Files
from trainers.benchmark.grid import Benchmark, Cell, matching, refuse_one_place, spans
from trainers.benchmark.settings import differences, of_other_settings
from trainers.benchmark.tables import write_csv, write_tables
from trainers.editors import Chosen
from trainers.made_of import of_model
from trainers.provenance import command_line
from trainers.records import drawn, meeting_conditions
from trainers.result_cache import code
from trainers.workers import Specs


def records_of(benchmark: Benchmark, seed: int) -> tuple[dict[str, list[EditRecord]], dict[str, dict[str, Any]]]:
    """The records of each data set, as many as the largest run needs, and where they come from: what can be wrong with
    data, before a model is loaded.

    Args:
        seed: draws them.

    Raises:
        ValueError: where a data set has fewer records than a run needs, or they do not fit its protocol.
    """
    found, origins = {}, {}
    for name, dataset in benchmark.datasets.items():
        every = load(dataset.data)
        if len(every) < benchmark.most():
            raise ValueError(
                f"benchmark.datasets.{name} has {len(every)} records, a run needs {benchmark.most()}: lower its edits"
            )
        found[name] = drawn(every.records, len(every), benchmark.most(), seed, dataset.queries_per_kind)
        dataset.judging.check(found[name])
        origins[name] = {"data": described(dataset.data), "records_available": len(every)}
    return found, origins


def run_benchmark(
    benchmark: Benchmark,
    records: Mapping[str, Sequence[EditRecord]],
    origins: Mapping[str, Mapping[str, Any]],
    specs: Specs,
    backbone: Backbone,
    editors: Sequence[Chosen],
    seed: int = 0,
    batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run what is not finished yet; write tables, figures and answers of everything.

    A finished cell is kept whatever code computed it, and says by which (`trainers.result_cache.code`). A cell that
    fails, or whose process is killed, is named with the reason, the others go on, and the next call tries it again;
    until then it keeps the numbers of edits that it reached (`trainers.benchmark.files`). Several commands may run
    parts of one grid at once: a cell that another one has finished meanwhile is passed over.

    Args:
        records, origins: of each data set, see `records_of`.
        specs: what worker processes build backbone and editors from.
        backbone, editors: the same, in this process.
        seed: that drew the records; of the bootstrap.

    Returns:
        The results of all cells, in the grid's order; of one that was not run, what it is of.

    Raises:
        ValueError: where the file of a cell that is to be run is a finished one of another setting, or two editors'
            files would be one. Nothing is run or written then.
    """
    console = console or Console()
    out, now = Path(benchmark.out), code()
    files = Files(out, now, command_line(), origins)
    cells = list(plan(benchmark, records, backbone, editors, seed, batch_size))
    refuse_one_place(cells)
    chosen = matching(cells, benchmark.only)
    done = _finished(cells, chosen, files, backbone, console)
    left = [cell for cell in chosen if cell not in done]
    if done:
        console.print(f"{len(done)} of {len(cells)} cells are finished in {out}", highlight=False)
        if others := sum(by != now for by in done.values()):
            console.print(
                f"{others} of them were computed by other code than today's and are kept; to compute one anew, remove "
                f"its file in {out / 'cells'}",
                style="yellow",
                highlight=False,
            )
    crew = Crew(specs, backbone, editors, files, workers=benchmark.workers, answers=benchmark.answers)
    crew.run(left, console)
    # read again: other commands may have finished cells of this grid meanwhile
    results = [{**files.about(cell, backbone), **(files.read(cell) or {})} for cell in cells]
    write_csv(results, out / "results.csv")
    write_tables(results, out)
    write_figures(results, out / "figures")
    write_answers(results, out / "answers.html")
    console.print(f"written to {out}: results.csv, tables.md, tables.tex, figures, answers.html", highlight=False)
    return results


def _finished(
    cells: Sequence[Cell], chosen: Sequence[Cell], files: Files, backbone: Backbone, console: Console
) -> dict[Cell, Any]:
    """The cells that are finished, and by what code.

    Those of another setting are told of where they are not to be run: their files stay, and no table has them.

    Raises:
        ValueError: where one that is to be run would take such a file's place.
    """
    done, refused, passed = {}, {}, {}
    for cell in cells:
        found = files.there(cell)
        if found is None or "error" in found:  # what is not finished is run anew, whatever it is of
            continue
        if cell.holds(found):
            done[cell] = found.get("code")
            continue
        wanted = json.loads(json.dumps(files.about(cell, backbone)))
        (refused if cell in chosen else passed)[cell.place] = differences(found, wanted)
    if refused:
        raise ValueError(
            f"{of_other_settings(refused, files.out)}. Give another benchmark.out, remove the files to compute them "
            "anew, or leave them out by benchmark.only"
        )
    if passed:
        told = f"{of_other_settings(passed, files.out)}; not to be run, so left as found, and in no table"
        console.print(told, style="yellow", highlight=False, markup=False)
    return done


def plan(
    benchmark: Benchmark,
    records: Mapping[str, Sequence[EditRecord]],
    backbone: Backbone,
    editors: Sequence[Chosen],
    seed: int,
    batch_size: int,
) -> Iterator[Cell]:
    """All cells. Runs of fewer edits take the first ones of those with more."""
    model = of_model(backbone)
    files = {chosen.editor.name: hashes(chosen.facts) for chosen in editors}
    for name, dataset in benchmark.datasets.items():
        judged_by = hashes(dataset.judging.told())
        asked = meeting_conditions(backbone, list(records[name]), batch_size)
        about = {"seed": seed, "weights": model["weights"], **dataset.judging.told()}
        if any(record.multi_hop for record in asked):
            about["contradicted"] = "not asked"  # results of before this rule are of other questions
        for run in benchmark.runs:
            for count, edits in spans(run):
                for chosen in editors:
                    if run.mode in ("sequential", "consecutive") and chosen.editor.own_edit_only:
                        continue  # an upper bound that is given each record's own edit has nothing to go on from
                    yield Cell(
                        name,
                        chosen.editor.name,
                        run.mode,
                        edits,
                        run.steps,
                        asked[:count],
                        chosen.facts,
                        about,
                        dataset.judging,
                        run.asked,
                        dataset.queries_per_kind,
                        files[chosen.editor.name] | judged_by,
                        model["overrides"],
                        batch_size,
                    )
