"""General ability: what a model can do besides what it was edited for, before and after edits.

rte, nq_open, samsum, sst2     EAC's four tasks (Xu et al. 2025, appendix C.4)
mmlu                           multiple choice, five shots
squad                          EAC's prompt for questions about a passage, on passages that can be had
lm_eval                        any task of lm-eval, by `name` (the extra `lm-eval`)
"""

from modules.ability.lm_eval_task import LmEval
from modules.ability.mmlu import Mmlu
from modules.ability.nq_open import NqOpen
from modules.ability.rte import Rte
from modules.ability.samsum import Samsum
from modules.ability.squad import Squad
from modules.ability.sst2 import Sst2
from modules.ability.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Rte, NqOpen, Samsum, Sst2, Mmlu, Squad)}
TASKS["lm_eval"] = LmEval
DEFAULT = ("rte", "nq_open", "samsum", "sst2", "mmlu")
