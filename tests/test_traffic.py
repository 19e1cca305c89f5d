"""What a pre-training step of the real size asks of a GPU, counted on fake tensors."""

from bench.traffic import GIB, count, fused
from configs import load_config


def test_a_step_asks_no_more_of_a_gpu_than_it_did():
    traffic = count(load_config('configs/pretrain.yaml', 'configs/pretrain.yaml'))
    total = traffic.total
    assert 33e12 < total.flops < 35e12  # the same work as ever
    assert total.bytes < 385e9 and total.kernels < 6000 and traffic.peak < 26 * GIB
    compiled = fused(traffic.log)
    assert compiled.bytes < 322e9 and compiled.kernels < 4500
