"""Training on cases of several edits and on queries with related hops is what an editor would do with all of them."""

from collections.abc import Callable

import pytest
import torch

from datamodules.readers import read
from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig
from modules.hypernetwork.batch import EditQueries
from modules.trained.mend import MEND, MendConfig

CASE = EditRecord(
    "case",
    (EditRequest("Zoe lives in", "Japan", "Zoe"), EditRequest("Japan's capital is", "Lima", "Japan")),
    multi_hop=(Query("The capital of Zoe's home:", ("Lima",)),),
)


@pytest.mark.parametrize("hops", [True, False])
def test_losses_are_those_of_the_editor_with_all_edits_and_hops(
    tiny_config: Callable[..., BackboneConfig], hops: bool
) -> None:
    generated = read("facts_uniedit", split="val", cities_per_country=1)
    chosen = [r for r in generated if any(q.hops for q in r.portability.get("multi_hop", ()))][:3]
    kept = [EditRecord(r.id, r.requests, portability={"mh": r.portability["multi_hop"][:1]}) for r in chosen]
    queries = EditQueries(rates={"portability": 0.5, "multi_hop": 0.5}, locality=0, hops=hops)
    module = MEND(tiny_config(), mend=MendConfig(rank=8, edit_lr=0.02), queries=queries)
    module.configure_model()
    module.calibrate([*kept, CASE])
    batch = module.collator()([Slot(r, i, i) for i, r in enumerate([*kept, CASE])])
    assert len(batch.edits) == (3 + 3 if hops else 3) + 2
    wanted, unedited = [], []
    for record in [*kept, CASE]:
        (query,) = [*(q for qs in record.portability.values() for q in qs), *record.multi_hop]
        requests = [*record.requests, *(query.hops if hops else ())]
        with module.editor().edit(module.deltas.backbone, requests) as edited:
            wanted.append(-edited.score([query.prompt], [query.target])[0].log_probs.mean())
        with module.editor().edit(module.deltas.backbone, []) as plain:
            unedited.append(-plain.score([query.prompt], [query.target])[0].log_probs.mean())
    with torch.no_grad():
        loss = module.losses(batch)["edit"]
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), atol=1e-4, rtol=1e-4)
    assert abs(float(loss - torch.stack(unedited).mean())) > 0.01  # or the edits would not matter
