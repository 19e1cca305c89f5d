"""Linear layers of all towers, their number format, and texts without padding.

float32 on AMD's CPUs goes through oneDNN: MKL, with which torch multiplies float32 matrices, keeps its AVX-512 code for
Intel's CPUs. On an AMD EPYC it does half of what oneDNN does, which torch carries too (for convolutions and bfloat16,
and for what its compiler generates). All private operators of torch are called here.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.distributed import to_device
from utils import logger, shorten


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster on this machine than torch's default."""
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
        """Turn every nn.Linear inside another library's module into this class; its parameters stay."""
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = cls


def on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu'


def joins(x: torch.Tensor, maps: list[nn.Linear]) -> bool:
    """Whether one product of x [..., K] is faster than one for each of `maps`: where reading x again takes more memory
    traffic than to put their weights together. On a CPU, traffic is not what products wait for."""
    return not on_cpu(x) and x.numel() > x.shape[-1] * sum(linear.out_features for linear in maps)


def all_of(maps: list[nn.Linear], x: torch.Tensor) -> list[torch.Tensor]:
    """x [..., K] through several linear maps of one width -> [..., N] each."""
    if not joins(x, maps):
        return [linear(x) for linear in maps]
    weight, bias = (torch.cat([getattr(linear, name) for linear in maps]) for name in ('weight', 'bias'))
    return F.linear(x, weight, bias).unflatten(-1, (len(maps), -1)).unbind(-2)


# For torch's FlopCounterMode, which does not know the operation.
FLOPS = {torch.ops.mkldnn._linear_pointwise:
         lambda x, weight, *_, out_shape=None, **__: 2 * math.prod(x) * weight[0]} if prefers_onednn() else {}


# ---------------------------------------------------------------- number formats

@cache
def has_bf16(device_type: str) -> bool:
    """Whether a device computes in bfloat16 natively; emulated, it is slower than float32."""
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type != 'cpu' or bool(torch.backends.mkldnn.is_available()
                                        and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of 'fp32' or 'bf16' on a device: float32, with a warning, where bfloat16 would be emulated.

    Raises:
        ValueError: neither of the two.
    """
    if precision not in ('fp32', 'bf16'):
        raise ValueError(f'unknown precision {shorten(precision)}: choose one of fp32, bf16')
    if precision == 'bf16' and has_bf16(device.type):
        return torch.bfloat16
    if precision == 'bf16':
        logger.warning('precision bf16: this %s has no bfloat16 arithmetic and would be slower by it, so float32 it is',
                       'CPU' if device.type == 'cpu' else 'GPU')
    return torch.float32


# ---------------------------------------------------------------- texts without padding

class Unpadded(NamedTuple):
    """The mask [R, T] of right-padded texts, the positions [M] of their tokens in the flattened R * T, and for each of
    those the number [R * T] of its token among the M; the padding of a text has that of the text's last token.

    If given instead of a mask, token-wise layers skip the padding. The states returned are padded with zeros.
    """

    mask: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


def unpadded(mask: torch.Tensor, lengths: list[int]) -> Unpadded:
    """The mask [R, T] of texts of these lengths and their tokens' positions. The host knows the lengths, so nothing
    waits for the device."""
    count, column = np.array(lengths)[:, None], np.arange(mask.shape[1])
    rows = np.flatnonzero(column < count)
    places = np.cumsum(count)[:, None] - count + np.minimum(column, count - 1)
    mask = mask.contiguous()  # of a part of a wider one, layers would compile another form
    return Unpadded(mask, *(to_device(torch.from_numpy(numbers.ravel()), mask.device) for numbers in (rows, places)))


class Unpad(torch.autograd.Function):
    """`unpad`, both of whose directions gather rows: indexing alone would scatter the gradient with atomic sums."""

    @staticmethod
    def forward(ctx, x, mask, rows, places):
        ctx.save_for_backward(mask, places)
        return x.flatten(0, 1)[rows]

    @staticmethod
    def backward(ctx, grad):
        mask, places = ctx.saved_tensors
        return torch.where(mask.bool()[..., None], grad[places].unflatten(0, mask.shape), 0), None, None, None


class Spread(torch.autograd.Function):
    """`spread`: the gradient of the padding is dropped."""

    @staticmethod
    def forward(ctx, x, mask, rows, places):
        ctx.save_for_backward(rows)
        return x[places].unflatten(0, mask.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, = ctx.saved_tensors
        return grad.flatten(0, 1)[rows], None, None, None


def unpad(x: torch.Tensor, texts: Unpadded | None) -> torch.Tensor:
    """[R, T, width] -> [M, width]"""
    return x if texts is None else Unpad.apply(x, *texts)


def spread(x: torch.Tensor, texts: Unpadded | None) -> torch.Tensor:
    """[M, width] -> [R, T, width] for attention, which masks the padding or drops what it gives: it repeats a token."""
    return x if texts is None else Spread.apply(x, *texts)


def pad(x: torch.Tensor, texts: Unpadded | None) -> torch.Tensor:
    """[M, width] -> [R, T, width], the padding 0"""
    return x if texts is None else torch.where(texts.mask.bool()[..., None], spread(x, texts), 0)
