"""The precisions and backends that a net can be served in."""

import copy
from functools import cache

import torch

from models.blip import BLIP
from models.openvino_backend import OpenVINOBLIP
from utils import logger, shorten

PRECISIONS, BACKENDS = ('fp32', 'bf16', 'int8'), ('torch', 'openvino')


@cache
def has_bf16(device_type: str) -> bool:
    """Whether a device has instructions for bfloat16, which is slower than float32 where it is emulated."""
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type != 'cpu' or bool(torch.backends.mkldnn.is_available()
                                        and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """What 'fp32' or 'bf16' computes in on a device: float32, which is said, where bfloat16 would be emulated.

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


def for_inference(model: BLIP, precision: str = 'fp32', backend: str = 'torch') -> BLIP | OpenVINOBLIP:
    """A net at a precision, run by a backend. In bf16 all arithmetic is bfloat16, where the device has it; int8 is
    bf16 with all matrices in 8 bits. Embeddings and logits come in float32 all the same.

    Raises:
        ValueError: no such precision or backend, not together, or not on the net's device.
        ImportError: backend openvino without its package.
    """
    for what, value, choices in (('precision', precision, PRECISIONS), ('backend', backend, BACKENDS)):
        if value not in choices:
            raise ValueError(f'unknown {what} {shorten(value)}: choose one of {", ".join(choices)}')
    if precision == 'int8' and backend != 'openvino':
        raise ValueError("precision 'int8' needs backend='openvino'")
    if backend == 'openvino':
        return OpenVINOBLIP(model, precision)
    dtype = arithmetic(precision, model.device)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
