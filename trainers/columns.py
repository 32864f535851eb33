"""What tables show: metrics under their titles, in the order of their columns, and a legend for each protocol."""

from datamodules.readers.uniedit import GENERALITY, LOCALITY
from modules.counterfact import COUNTERFACT
from modules.fluency import CONSISTENCY, FLUENCY
from modules.zsre import ZSRE

# metric, title, short title where the exact matches stand beside it
COLUMNS = (
    ("reliability/token_accuracy", "Reliability", "Rel."),
    ("generality/token_accuracy", "Generality", "Gen."),
    ("locality/token_agreement", "Locality", "Loc."),
    ("portability/token_accuracy", "Portability", "Port."),
    ("multi_hop/token_accuracy_max", "Multi-hop", "Hops"),
    ("reliability/exact_match", "Rel. EM", "Rel. EM"),
    ("generality/exact_match", "Gen. EM", "Gen. EM"),
    ("locality/exact_match", "Loc. EM", "Loc. EM"),
    ("portability/exact_match", "Port. EM", "Port. EM"),
    ("multi_hop/exact_match", "Hops EM", "Hops EM"),
    ("generality/uniedit_top_5", "Generality", "Gen."),
    ("locality/uniedit_top_5", "Locality", "Loc."),
    ("portability/uniedit_top_5", "Portability", "Port."),
    ("multi_hop/uniedit_top_5", "Multi-hop", "Hops"),
    ("reliability/mquake_edit_wise", "Edit-wise", ""),
    ("single_hop/mquake_instance_wise", "Instance-wise", ""),
    ("multi_hop/mquake_accuracy", "Multi-hop answers", ""),
    ("portability/dune_accuracy", "Accuracy", ""),
    ("portability/dune_stereotyped", "Stereotyped", ""),
    ("locality/dune_agreement", "Agreement", ""),
    ("locality/dune_accuracy", "Locality accuracy", ""),
    *((name, name.removeprefix("counterfact/"), "") for name in COUNTERFACT.definitions),
    (FLUENCY, "GE", ""),
    (CONSISTENCY, "RS", ""),
    *((name, name.removeprefix("zsre/").capitalize(), "") for name in ZSRE.definitions),
)
# by appendix J of DistillMIKE the magnitudes are no measure of quality; of stereotyped answers fewer are better; texts
# are to stay as fluent as the unedited model's
UNRANKED = ("portability/dune_stereotyped", "counterfact/EM", "counterfact/PM", "counterfact/NM", FLUENCY)
# facts of a run that stand beside the metrics of the published protocols: key, title, digits
COSTS = (("answer_seconds_per_query", "Seconds", 3), ("context_tokens", "Context", 1))
CRITERIA = (  # a table of its own
    *((f"generality/{name}/uniedit_top_5", name) for name in GENERALITY),
    *((f"locality/{name}/uniedit_top_5", name) for name in LOCALITY if name not in GENERALITY),
)
LEGEND = (
    "Percent, means over records; pool: records edited at once. Teacher-forced token accuracy; locality: agreement "
    "with the unedited model; multi-hop: best question and alias."
)
UNIEDIT_LEGEND = (
    "Percent, means over records; pool: records edited at once. UniEdit's protocol: reliability is teacher-forced "
    "token accuracy; generality counts target tokens in the top 5, with unknown hops edited in (Rep rephrase, MH "
    "multi-hop, RR relation reversal, SER same entity, SA and OA subject and object alias); locality the unedited "
    "model's tokens in the top 5 (SS, RS, OS subject, relation, object specificity, 1-NF 1-N forgotten)."
)
COUNTERFACT_LEGEND = (
    "Percent, means over records; pool: records edited at once. CounterFact's protocol: ES, PS and NS are the share of "
    "prompts, rephrases and neighbours at which the wanted target is the likelier of two, EM, PM and NM by how much, S "
    "the harmonic mean of ES, PS and NS."
)
FLUENCY_LEGEND = (
    " GE: entropy of the bigrams and trigrams of greedy texts, in hundredths of bits; what repeats itself is low, the "
    "unedited model's is what to keep."
)
CONSISTENCY_LEGEND = " RS: TF-IDF cosine of these texts and of reference texts about the new target."
NO_REFERENCES = " RS was not measured: no --references (ROME's attribute_snippets.json) were given."
ZSRE_LEGEND = (
    "Percent, means over records; pool: records edited at once. zsRE's protocol: teacher-forced token accuracy at the "
    "edits' questions, their rephrasings, and unrelated questions with their gold answers; score: the harmonic mean."
)
MQUAKE_LEGEND = (
    "Percent, means over cases; pool: cases edited at once. MQuAKE's protocol: whole greedy answers, to the edits' own "
    "prompts, to all facts of the chain, and to any of three multi-hop questions after demonstrations; multi-hop: "
    "InComeS's token accuracy of the best question and alias."
)
DUNE_LEGEND = (
    "Percent, means over records; pool: records edited at once. DUNE's protocol: the letter, number, yes or no, "
    "or name read out of a greedy answer; stereotyped: fewer is better; agreement: with the unedited model's answers."
)
COSTS_LEGEND = " Seconds: of answering, a query (in batches); context: tokens that the method puts before a query."
EXACT_LEGEND = " EM: exact match of the greedy answer."
