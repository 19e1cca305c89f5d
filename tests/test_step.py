"""A training step on an accelerator: it queues its work without waiting, and compiles to the same numbers."""

from dataclasses import replace

import pytest
import torch
from conftest import NANO

from configs import load_config
from models.blip import BLIP, BLIPConfig
from models.distill.batch import Batch
from models.distill.objective import Objective
from models.distill.terms import TERMS
from models.momentum import MomentumQueue

pytestmark = pytest.mark.slow

LENGTHS = [5, 12, 3, 9]


def objective(names=TERMS, depth: int = 2, dropout: float = 0.0) -> Objective:
    """Against a wider and deeper teacher."""
    sizes = NANO | {'vocab_size': 40, 'dropout': dropout, 'vision_depth': depth, 'text_depth': depth}
    student = BLIP(BLIPConfig(**sizes))
    teacher = BLIP(BLIPConfig(**sizes | {'vision_width': 48, 'vision_depth': depth + 1}))
    momentum = MomentumQueue(student, 10, 0.9, teacher.config.embed_dim)
    return Objective(student, dict.fromkeys(names, 1.0), (1, 2, 3), momentum, teacher, prompt_length=2).train()


def micro_batch(device: str) -> Batch:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, 40, mask.shape) * mask
    return Batch(*(x.to(device) for x in (torch.randn(4, 3, 32, 32), ids, mask, torch.arange(4))), LENGTHS)


def test_a_step_reads_nothing_off_the_device():
    """On the meta device a tensor has no values: what would wait for a GPU to say them is an error."""
    with torch.device('meta'):
        terms = objective(dropout=0.1)
    batches = [micro_batch('meta') for _ in range(2)]
    update, batches = terms.prepare(batches, alpha=0.4)
    for batch in batches:
        out = terms(batch, update)
        assert out.keys() == {*TERMS, 'acc_i2t', 'acc_t2i', 'loss'}
        out['loss'].backward()
    with pytest.raises(RuntimeError, match='meta'):
        out['loss'].item()


def test_compiled_towers_compute_the_same():
    """Losses and gradients of every pass, with texts of a second length; as graphs that torch runs itself, since to
    translate them takes minutes.
    """
    torch.manual_seed(0)
    names = ('image_tokens', 'ita', 'itm', 'lm', 'lm_logits')
    plain, compiled = objective(names, 1), objective(names, 1)  # a layer takes seconds to trace
    compiled.load_state_dict(plain.state_dict())
    compiled.teacher.load_state_dict(plain.teacher.state_dict())
    compiled.momentum.load_state_dict(plain.momentum.state_dict())
    compiled.compile_parts(backend='aot_eager', fullgraph=True)
    first = micro_batch('cpu')
    short = replace(first, ids=first.ids[:, :10].contiguous(), mask=first.mask[:, :10].contiguous(),
                    lengths=[min(length, 10) for length in LENGTHS])
    for batch in (first, short):
        found = []
        for terms in (plain, compiled):
            terms.zero_grad()
            update, [prepared] = terms.prepare([batch], alpha=0.4)
            out = terms(prepared, update)
            out['loss'].backward()
            found.append(({name: value.item() for name, value in out.items()},
                          [p.grad for p in terms.student.parameters()]))
        (want, gradients), (got, others) = found
        assert got == pytest.approx(want, abs=1e-5) and want.keys() == {*names, 'acc_i2t', 'acc_t2i', 'loss'}
        for a, b in zip(gradients, others, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_run_compiles_few_forms_whole():
    """Of pre-training's own terms, no layer breaks into several graphs, and texts of any length share a form."""
    torch.manual_seed(0)
    forms, weights = [], load_config('configs/pretrain.yaml', 'configs/pretrain.yaml')['loss']
    terms = objective([name for name, weight in weights.items() if weight])
    terms.compile_parts(fullgraph=True, backend=lambda graph, _: forms.append(graph) or graph)
    for width in (12, 10, 7, 8):
        lengths = [min(length, width) for length in LENGTHS]
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(4, 40, mask.shape) * mask
        batch = Batch(torch.randn(4, 3, 32, 32), ids, mask, torch.arange(4), lengths)
        with torch.autocast('cpu', torch.bfloat16):
            update, [prepared] = terms.prepare([batch])
            terms(prepared, update)['loss'].backward()
    assert 6 < len(forms) <= 12
