"""What a pre-training step of the real size asks of a GPU, counted on fake tensors."""

import pytest
from torch._inductor.sizevars import SizeVarAllocator

from bench.traffic import GIB, count
from configs import load_config

pytestmark = pytest.mark.slow


def test_a_step_asks_no_more_of_a_gpu_than_it_did():
    traffic = count(load_config('configs/pretrain.yaml', 'configs/pretrain.yaml'))
    total = traffic.total
    assert 34e12 < total.flops < 35e12  # the same work as ever
    assert total.bytes < 396e9 and total.kernels < 6000 and traffic.peak < 24 * GIB


@pytest.mark.skipif(not hasattr(SizeVarAllocator, 'optimization_hint'), reason='another inductor')
def test_compiled_layers_move_less():
    """Of the vision tower's distillation, which takes seconds; bench/traffic.json has all terms."""
    config = load_config('configs/pretrain.yaml', 'configs/pretrain.yaml')
    config['loss'] = {name: weight * (name in ('image_tokens', 'vision_hidden'))
                      for name, weight in config['loss'].items()}
    eager, compiled = count(config), count(config, compiled=True)
    assert compiled.total.flops == eager.total.flops and compiled.forms == 7
    assert compiled.total.bytes < 0.7 * eager.total.bytes and compiled.peak < eager.peak * 1.02
