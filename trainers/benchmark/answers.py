"""Answers side by side in one HTML file: a question a row, an editor a column. Nothing is fetched when it is opened."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from modules.metrics import exact_match
from trainers.benchmark.groups import Group, Result, apart, group_of
from trainers.written import write_text

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #222; font-weight: 600; }
td { border-bottom: 1px solid #ddd; max-width: 22rem; overflow-wrap: anywhere; }
tr.first td { border-top: 2px solid #999; }
.right { background: #d9ead9; } .same { color: #777; } .kind { color: #666; white-space: nowrap; }
input { font: inherit; padding: .3rem .5rem; width: 24rem; max-width: 100%; }
.key span { padding: 0 .4rem; margin-right: .6rem; }
"""
# rows are hidden that do not contain what is typed
SCRIPT = """
document.getElementById('find').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase();
  for (const row of document.querySelectorAll('tbody tr'))
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
"""


def write_answers(results: Sequence[Result], file: Path) -> None:
    """A section for each data set and run, in the grid's order; what no cell kept answers of is left out."""
    groups: dict[tuple[str, Group], list[Result]] = {}
    for result in results:
        if result.get("answers"):
            title = f"{result['dataset']}, {result['mode']}, {'/'.join(map(str, result['edits']))} edits"
            groups.setdefault((title, group_of(result, result["edits"][-1])), []).append(result)
    sections = [
        _section(title + apart(group, (other for name, other in groups if name == title)), members)
        for (title, group), members in groups.items()
    ]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Answers of edited models</title><style>{STYLE}</style></head><body>
<h1>Answers of edited models</h1>
<p class="key"><span class="right">begins with what is wanted</span><span class="same">as the unedited model</span></p>
<p>After the last edit of each run; greedy, cut after a few words. For locality the wanted answer is the one before.</p>
<input id="find" placeholder="show rows that contain ..." aria-label="filter">
{"".join(sections)}
<script>{SCRIPT}</script></body></html>
"""
    write_text(file, page)


def _section(title: str, members: Sequence[Result]) -> str:
    editors = [r["editor"] for r in members]
    after = {(r["editor"], a["record"], a["kind"], a["prompt"]): a["after"] for r in members for a in r["answers"]}
    asked = {(a["record"], a["kind"], a["prompt"]): a for r in members for a in r["answers"]}
    rows, last = [], None
    for (record, kind, prompt), answer in asked.items():
        texts = [after.get((editor, record, kind, prompt)) for editor in editors]
        cells = "".join(_cell(text, answer["gold"], answer["before"], kind) for text in texts)
        first = ' class="first"' if record != last else ""
        rows.append(
            f'<tr{first}><td class="kind">{escape(kind)}</td><td>{escape(prompt)}</td><td>{escape(answer["gold"])}</td>'
            f"<td>{escape(answer['before'])}</td>{cells}</tr>"
        )
        last = record
    heads = "".join(f"<th>{escape(h)}</th>" for h in ("", "question", "wanted", "unedited", *editors))
    return f"<h2>{escape(title)}</h2><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>\n"


def _cell(text: str | None, gold: str, before: str, kind: str) -> str:
    if text is None:
        return "<td></td>"
    same = text == before
    right = same if kind.startswith("locality/") else exact_match(text, [gold])
    classes = " ".join(name for name, on in (("right", right), ("same", same)) if on)
    return f'<td class="{classes}">{escape(text)}</td>' if classes else f"<td>{escape(text)}</td>"
