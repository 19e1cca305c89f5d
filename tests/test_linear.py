"""Float32 products through oneDNN, which AMD's CPUs get."""

import pytest
import torch
from torch import nn

from models import linear
from models.linear import Linear, all_of, pad, spread, unpad, unpadded


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


def test_texts_without_padding_and_back():
    """Gathered both ways, as are the gradients: the padding is 0, or a token whose gradient is dropped."""
    lengths, width = [3, 1, 4], 4
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    texts, x = unpadded(mask, lengths), torch.randn(3, width, 5, requires_grad=True)
    tokens = unpad(x, texts)
    assert torch.equal(tokens, x[mask.bool()])
    tokens.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() * mask[..., None])
    rows = tokens.detach().requires_grad_()
    for back in (pad, spread):
        rows.grad = None
        out = back(rows, texts)
        assert torch.equal(out[mask.bool()], rows) and (back is spread or not out[~mask.bool()].any())
        out.sum().backward()
        assert torch.equal(rows.grad, torch.ones_like(rows))


def test_one_product_equals_several(monkeypatch):
    torch.manual_seed(0)
    maps, x = [Linear(6, 4) for _ in range(3)], torch.randn(9, 5, 6)
    apart = all_of(maps, x)
    monkeypatch.setattr(linear, 'on_cpu', lambda _: False)
    assert linear.joins(x, maps) and not linear.joins(x[:2, :1], maps)  # of few rows, weights would move more
    for ours, theirs in zip(all_of(maps, x), apart, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
