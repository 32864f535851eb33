"""Training does not notice its callbacks."""

import torch
from callback_runs import fit

from trainers.callbacks.common import untouched


def test_a_run_does_not_notice_its_callbacks(run, tmp_path, cache):
    plain = fit(tmp_path, cache, [], run.selection)
    ours, theirs = run.module.state_dict(), plain.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(run.generators[0], plain.generators[0])
    assert run.generators[1] == plain.generators[1]
    modes = [{n: m.training for n, m in r.module.named_modules()} for r in (run, plain)]
    assert modes[0] == modes[1]


def test_untouched_restores_modes_and_generators():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    with untouched(module):
        module.train()
        assert not (torch.rand(1) * torch.ones(1, requires_grad=True)).requires_grad
    assert [m.training for m in module] == [True, False]
    assert torch.equal(torch.rand(1), wanted)
