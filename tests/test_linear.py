"""Float32 products through oneDNN, which AMD's CPUs get."""

import pytest
import torch
from torch import nn

from models import linear
from models.linear import Linear


@pytest.mark.parametrize('shape', [(5,), (7, 5), (2, 7, 5), (0, 5), (3, 1, 5)])
@pytest.mark.parametrize('bias', [True, False])
def test_values_and_gradients_equal_torchs(monkeypatch, shape, bias):
    if not hasattr(torch.ops.mkldnn, '_linear_pointwise'):
        pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(linear, 'prefers_onednn', lambda: True)
    torch.manual_seed(0)
    theirs = nn.Linear(5, 9, bias=bias)
    ours = Linear(5, 9, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    results = []
    for net in (ours, theirs):
        inputs = x.clone().requires_grad_()
        out = net(inputs)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, inputs.grad, *(p.grad for p in net.parameters())])
        with torch.no_grad():
            assert torch.allclose(net(x), out, atol=1e-6)
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-4)


def test_modules_of_other_libraries_are_taken_over():
    theirs = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Bilinear(3, 3, 2))
    before = theirs[0].weight
    Linear.take_over(theirs)
    assert type(theirs[0]) is Linear and theirs[0].weight is before and type(theirs[2]) is nn.Bilinear
