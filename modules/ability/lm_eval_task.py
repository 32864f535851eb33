"""Any task of lm-eval (the Language Model Evaluation Harness, Gao et al. 2021) as a task of general ability.

Questions, prompts, solved examples, answers' filters and metrics are lm-eval's own, so a figure is the one that
`lm_eval.simple_evaluate` gives on the same questions; intervals and changes are this project's. Every model is put the
same requests: they are made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modules.ability.lm_eval_files import harmless, loaded, needs_lm_eval
from modules.ability.task import Answer, Example, Task
from modules.asked import Asked
from modules.editor import Edited, Editor
from modules.remembering import MemoryEditor
from modules.serac.editor import SeracEditor
from modules.training_free.grace import GRACE
from modules.training_free.mello import MeLLo

RESAMPLES = 200  # of a metric that is no mean
SHARES = ("f1", "matthews_corrcoef", "brier_score")  # of those, the ones in percent


@dataclass
class LmEval(Task):
    """A task or group of lm-eval.

    Args:
        name: lm-eval's; results are filed under lm_eval/NAME. A group (`mmlu`) is all questions of its tasks.
        include: a folder of task files of one's own, found as other tasks' files are.
        shots: solved questions before each, in place of the task's own number.
        metric: the one in the table; by default the first of the task's list.
        trust_remote_code: run the Python that files of `include` name, metrics from the hub, and programs that the
            model writes. Off unless you set it.

    Raises:
        ValueError: where lm-eval is not installed, or for a negative number of shots.
    """

    name: str  # type: ignore[misc]  # others have one name, this one many
    include: str | None = None
    shots: int | None = None
    metric: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        needs_lm_eval()
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"lm_eval: shots must not be negative, got {self.shots}")
        from lm_eval import __version__  # type: ignore

        self.version = __version__
        self._asked, self.name = self.name, f"lm_eval/{self.name}"
        self._tasks: dict[str, Any] = {}
        self._requests: dict[str, list[Any]] = {}  # by example

    @property
    def main(self) -> str:  # type: ignore[override]
        return f"{self.name}/{self.metric or next(iter(self._metrics), '')}"

    @property
    def new_tokens(self) -> int:  # type: ignore[override]
        """The most that any question's answer may be written in."""
        from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore

        from modules.ability.lm_eval_model import NEW_TOKENS

        asked = (r.args[1] for some in self._requests.values() for r in some if r.request_type == "generate_until")
        options: list[Any] = [normalize_gen_kwargs(given, NEW_TOKENS) for given in asked]
        return max((given["max_gen_toks"] for given in options), default=0)

    @property
    def percent(self) -> bool:  # type: ignore[override]
        """Whether the main metric is a share: perplexities, bits and BLEU are not."""
        metric = self.main.removeprefix(f"{self.name}/")
        return self._metrics.get(metric) in (None, *SHARES)

    @property
    def protocols(self) -> dict[str, str]:
        about = ", ".join(f"{n} (version {t.VERSION}, {t.config.num_fewshot} shots)" for n, t in self._tasks.items())
        return {
            f"{self.name}/{metric}": f"The metric {metric} of lm-eval {self.version}, "
            f"{f'{how} over' if how else 'the mean over'} questions of {about}."
            for metric, how in self._metrics.items()
        }

    @property
    def _metrics(self) -> dict[str, str | None]:
        """Metric -> how its values are put together, None for the mean. One that a filter precedes: metric,filter."""
        found: dict[str, str | None] = {}
        for task in self._tasks.values():
            for metric, how in task.aggregation().items():
                name = how.__name__ if hasattr(how, "__name__") else str(how)
                for each in task._filters:
                    found[_labelled(metric, each.name)] = None if name == "mean" else name
        return found

    def check(self, editor: Editor) -> None:
        """See `Task.check`."""
        kinds = {request.request_type for some in self._requests.values() for request in some}
        if isinstance(editor, MeLLo):
            raise ValueError(
                f"{editor.name} works one question through, hop by hop, and writes its own answer: lm-eval's prompts, "
                f"with solved questions in them, and its continuations are not for it; leave out {self.name}"
            )
        if "loglikelihood_rolling" in kinds and isinstance(editor, (MemoryEditor, SeracEditor, GRACE)):
            raise ValueError(f"{editor.name} goes by the prompt, and {self.name} scores whole texts without any")

    def examples(self) -> list[Example]:
        with harmless(self.trust_remote_code):
            self._tasks = loaded(self._asked, self.include, self.shots, self.trust_remote_code)
            self._requests = {}
            found = [example for name, task in self._tasks.items() for example in self._of(name, task)]
        pooled = [metric for metric, how in self._metrics.items() if how]
        if len(self._tasks) > 1 and pooled:
            raise ValueError(f"{self.name}: {pooled[0]} is no mean over questions; name the group's tasks one by one")
        if self.metric and self.metric not in self._metrics:
            raise ValueError(f"{self.name}: no metric {self.metric!r}; there are: {', '.join(self._metrics)}")
        return found

    def _of(self, name: str, task: Any) -> list[Example]:
        task.build_all_requests()
        by_doc: dict[int, list[Any]] = {}
        for request in task.instances:
            by_doc.setdefault(request.doc_id, []).append(request)
        found = []
        for number, requests in by_doc.items():
            for request in requests:
                request.arguments = _asked(request.args, task.doc_to_text(request.doc))
            self._requests[f"{name}/{number}"] = sorted(requests, key=lambda request: request.idx)
            found.append(_example(f"{name}/{number}", task, self._requests[f"{name}/{number}"]))
        return found

    def answers(self, edited: Edited, examples: Sequence[Example], batch_size: int) -> list[Answer]:
        from modules.ability.lm_eval_model import EditedLM

        model = EditedLM(edited, batch_size)
        asked = [(i, request) for i, example in enumerate(examples) for request in self._requests[example.id]]
        found: list[list[Any]] = [[] for _ in examples]
        for kind in dict.fromkeys(request.request_type for _, request in asked):
            some = [(i, request) for i, request in asked if request.request_type == kind]
            for (i, _), response in zip(some, getattr(model, kind)([r for _, r in some]), strict=True):
                found[i].append(_plain(response))
        return [{"responses": responses} for responses in found]

    def judge(self, example: Example, answer: Answer) -> dict[str, Any]:
        """Values of a metric that is no mean stand in a list: they say nothing one by one."""
        requests = self._requests[example.id]
        task = self._tasks[example.id.rpartition("/")[0]]
        for request, response in zip(requests, answer["responses"], strict=True):
            given = tuple(response) if isinstance(response, list) else response
            request.resps = [given] * (request.repeats or 1)  # greedy: the same each time
        values: dict[str, Any] = {}
        with harmless(self.trust_remote_code):
            for each in task._filters:
                each.apply(requests)
                judged = task.process_results(requests[0].doc, [r.filtered_resps[each.name] for r in requests])
                values |= {_labelled(metric, each.name): _plain(value) for metric, value in judged.items()}
        return {f"{self.name}/{m}": [v] if self._metrics.get(m) else float(v) for m, v in values.items()}

    def aggregate(self, values: Sequence[Any], seed: int = 0) -> dict[str, dict[str, Any]]:
        """Means as other tasks', what is no mean by lm-eval's own function, its interval by resampled questions."""
        pooled = {f"{self.name}/{metric}" for metric, how in self._metrics.items() if how}
        found = super().aggregate([{m: v for m, v in one.items() if m not in pooled} for one in values], seed)
        task = next(iter(self._tasks.values()))
        for metric in sorted(pooled):
            items = [tuple(v) if isinstance(v, list) else v for one in values for v in one.get(metric, ())]
            if items:
                function = task.aggregation()[metric.removeprefix(f"{self.name}/").partition(",")[0]]
                draw = np.random.default_rng(seed)
                draws = (draw.integers(len(items), size=len(items)) for _ in range(RESAMPLES))
                low, high = np.quantile([function([items[i] for i in some]) for some in draws], (0.025, 0.975))
                value = float(function(items))
                found[metric] = {"value": value, "ci": [float(low), float(high)], "records": len(items)}
        if self.main not in found:
            there = ", ".join(m.removeprefix(f"{self.name}/") for m in found)
            raise ValueError(f"{self.main} was not measured; set `metric` to one of: {there}")
        return found


def _asked(arguments: tuple[Any, ...], question: Any) -> tuple[Any, ...]:
    """A request's arguments, its context told apart into solved questions and the one that is asked."""
    context, *rest = arguments
    if not rest or not isinstance(question, str) or not question.strip() or not context.endswith(question):
        return arguments
    shots = context.removesuffix(question)
    return (Asked(shots, question) if shots else context, *rest)


def _example(name: str, task: Any, requests: Sequence[Any]) -> Example:
    """What is shown of a question, and measured against the context window: its longest prompt, its continuations."""
    if requests[0].request_type == "loglikelihood_rolling":
        return Example(name, requests[0].args[0], ("-",))
    prompts = [request.args[0] for request in requests]
    target = task.doc_to_target(requests[0].doc)
    if requests[0].request_type == "generate_until":
        return Example(name, prompts[0], (str(target).strip() or "-",))
    written = [request.args[1] for request in requests]
    right = target if isinstance(target, list) else [target]
    if all(isinstance(i, int) and 0 <= i < len(written) for i in right):
        answers = tuple(written[i] for i in right)
    else:  # of a task with one continuation after several prompts, or without a choice
        answers = (written[0],) if len(set(written)) == 1 else (task.config.target_delimiter + str(target),)
    if not set(answers) <= set(written) or not all(answer.strip() for answer in answers):
        return Example(
            name, max((p + w for p, w in zip(prompts, written, strict=True)), key=len), (str(target) or "-",)
        )
    return Example(name, max(prompts, key=len), answers, tuple(dict.fromkeys(written)))


def _labelled(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _plain(value: Any) -> Any:
    """A metric's value as JSON holds it."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
