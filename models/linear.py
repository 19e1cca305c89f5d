"""Linear maps of all towers: torch's, except that float32 on AMD's CPUs goes through oneDNN.

MKL, with which torch multiplies float32 matrices, keeps its AVX-512 code for Intel's CPUs. On an AMD EPYC it does half
of what oneDNN does, which torch carries too (for convolutions and bfloat16, and for what its compiler generates).
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@cache
def prefers_onednn() -> bool:
    """Whether this machine's float32 products are faster by oneDNN than by torch's own choice."""
    try:
        cpu = Path('/proc/cpuinfo').read_text()
    except OSError:
        return False
    return 'AuthenticAMD' in cpu and 'avx512f' in cpu and torch.backends.mkl.is_available() \
        and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K] (any strides) -> x @ weight.T + bias [..., N] by oneDNN"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class OneDNNLinear(torch.autograd.Function):
    """`product` with gradients, which are two more of them."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (product(grad.contiguous(), weight.t()) if ctx.needs_input_grad[0] else None,
                product(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None,
                rows.sum(0) if ctx.needs_input_grad[2] else None)


class Linear(nn.Linear):
    """nn.Linear, which it equals up to float32 rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu') \
                or not (x.device.type == 'cpu' and x.dtype == self.weight.dtype == torch.float32 and prefers_onednn()) \
                or x.ndim < 2 or not x.numel():
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)

    @classmethod
    def take_over(cls, module: nn.Module) -> None:
        """Turn every nn.Linear inside a module of another library into this one; its parameters stay."""
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = cls


# For torch's FlopCounterMode, which does not know the operation.
FLOPS = {torch.ops.mkldnn._linear_pointwise:
         lambda x, weight, *_, out_shape=None, **__: 2 * math.prod(x) * weight[0]} if prefers_onednn() else {}
