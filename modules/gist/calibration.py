"""Where selection starts: statistics of a few hundred training records, taken once before training.

B rows, T tokens, N edits, d hidden width.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.records import EditRecord
from datamodules.tokens import encode, pad, pad_id
from modules.gist.matcher import GistMatcher
from modules.gist.model import GistModel


def calibrate(model: GistModel, records: Sequence[EditRecord], seed: int, steps: int = 200, pool: int = 64) -> None:
    """Set what selection starts from.

    `hidden`: whiten the matcher on the records' texts, then fit its map and threshold on their cached states for
    `steps` steps: pools of `pool` records, each query to find its own edit, and none where it is out of scope. This
    needs forward passes of the lowest layers only. `qk` with zero_key `mean_query`: the mean query of these texts.

    Raises:
        ValueError: where there are no records.
    """
    if not records:
        raise ValueError("calibration needs training records, got none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.matcher is not None:
            _fit(model.matcher, _states(model, records), random.Random(seed), steps, pool)
        if len(model.selectors) and model.config.zero_key == "mean_query":
            _mean_queries(model, [text for r in records for text in _texts(r)])


class _Case:
    """One record's states: of its edit, of queries in scope, and of queries out of scope with their text."""

    def __init__(self, record: EditRecord, states: list[Tensor]) -> None:
        inside, outside = _inside(record), _outside(record)
        self.subject = record.request.subject
        self.edit, *rest = states
        self.inside = rest[: len(inside)]
        self.outside = list(zip(outside, rest[len(inside) :], strict=True))


def _inside(record: EditRecord) -> list[str]:
    """What the first edit decides: its own prompt and, where it is the only one, two rephrases."""
    rephrases = record.rephrases[:2] if record.single else ()
    prompts = [record.request.prompt, *(q.prompt for q in rephrases)]
    return [p for p in prompts if p.strip()] or [record.request.statement]


def _outside(record: EditRecord) -> list[str]:
    """Two queries of each kind at most, so that no kind is missing."""
    return [q.prompt for qs in record.locality.values() for q in qs[:2] if q.prompt.strip()]


def _texts(record: EditRecord) -> list[str]:
    return [record.request.statement, *_inside(record), *_outside(record)]


@torch.no_grad()
def _states(model: GistModel, records: Sequence[EditRecord], batch: int = 64) -> list[_Case]:
    """The matcher's view of every text: the input of its layer, taken by a hook that stops the pass there."""
    tokenizer = model.backbone.tokenizer
    texts = [(t, model.config.bos or not i) for r in records for i, t in enumerate(_texts(r))]  # the first is the edit
    rows = [encode(tokenizer, "", t, bos=bos).ids for t, bos in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    states: dict[int, Tensor] = {}
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        ids, mask = pad([rows[i] for i in part], pad_id(tokenizer))
        seen = _input_of_layer(model, ids.to(model.backbone.device), mask.to(model.backbone.device))
        for i, state, keep in zip(part, seen, mask.bool(), strict=True):
            states[i] = state[keep.to(state.device)].float()
    cases, at = [], 0
    for record in records:
        count = len(_texts(record))
        cases.append(_Case(record, [states[i] for i in range(at, at + count)]))
        at += count
    return cases


class _Enough(Exception):
    """The layer that was asked for has been reached."""


def _input_of_layer(model: GistModel, ids: Tensor, mask: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = model.backbone.layers[model.match_layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.language_model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return caught[0]


def _fit(matcher: GistMatcher, cases: list[_Case], draw: random.Random, steps: int, pool: int) -> None:
    matcher.whiten(torch.cat([s for c in cases[:300] for s in [c.edit, *c.inside, *(s for _, s in c.outside)]]))
    wanted = {id(p): p.requires_grad for p in matcher.parameters()}
    matcher.requires_grad_(True)
    optimizer = torch.optim.Adam(
        [
            {"params": [matcher.map, matcher.emphasis], "lr": 3e-4},
            {"params": [matcher.log_scale, matcher.threshold], "lr": 3e-3},
        ]
    )
    for _ in range(steps):
        logp, golden = _ask(matcher, draw.sample(cases, min(pool, len(cases))), draw)
        loss = F.nll_loss(logp, golden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    matcher.zero_grad()
    for p in matcher.parameters():
        p.requires_grad_(wanted[id(p)])


def _ask(matcher: GistMatcher, cases: list[_Case], draw: random.Random) -> tuple[Tensor, Tensor]:
    """One query in scope and, where there is a zero-gist to choose, one out of it for each case: log-probabilities
    [B, N + 1] at the last token, and the right choice [B], N where it is none."""
    address, _ = matcher(*_stack([c.edit for c in cases]))
    queries: list[Tensor] = []
    golden: list[int] = []
    subjects = {c.subject for c in cases if c.subject}
    for i, case in enumerate(cases):
        queries.append(draw.choice(case.inside))
        golden.append(i)
        free = [s for text, s in case.outside if not any(x in text for x in subjects - {case.subject})]
        if free and matcher.zero_gist:
            queries.append(draw.choice(free))
            golden.append(len(cases))
    states, mask = _stack(queries)
    logp, _ = matcher(states, mask, address)
    return logp[torch.arange(len(queries)), mask.sum(1) - 1], torch.tensor(golden, device=logp.device)


def _stack(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad states of several lengths: [B, T, d] and their mask [B, T]."""
    padded = nn.utils.rnn.pad_sequence(list(states), batch_first=True)
    lengths = torch.tensor([len(s) for s in states], device=padded.device)
    return padded, (torch.arange(padded.shape[1], device=padded.device)[None] < lengths[:, None]).long()


@torch.no_grad()
def _mean_queries(model: GistModel, texts: Sequence[str]) -> None:
    """Set each layer's zero key to its mean query, over tokens and over the heads that share a key.

    Queries of a layer have much in common, so this key's logit is above what a gist's key gets by chance: reading
    starts at "nothing" (untrained SmolLM2 with 100 gists keeps 98% of its own predictions; with a normal key 12%).
    """
    tokenizer = model.backbone.tokenizer
    ids, mask = pad([encode(tokenizer, "", t, bos=model.config.bos).ids for t in texts[:64]], pad_id(tokenizer))
    ids, mask = ids.to(model.backbone.device), mask.to(model.backbone.device)
    pool = model.compress(ids[:4], mask[:4])
    collected: dict[int, Tensor] = {}

    def collect(layer: int):
        def hook(_: nn.Module, args: tuple) -> None:
            query = args[0].transpose(1, 2)[mask.bool()]  # [tokens, H, D]
            collected[layer] = query.float().mean(0).unflatten(0, (model.backbone.key_value_heads, -1)).mean(1)

        return hook

    handles = [s.register_forward_pre_hook(collect(int(i))) for i, s in model.selectors.items()]
    try:
        model(ids, mask, pool)
    finally:
        for handle in handles:
            handle.remove()
    for i, selector in model.selectors.items():
        selector.zero_key.copy_(collected[int(i)])  # type: ignore[union-attr]
