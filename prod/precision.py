"""The precisions and backends that a net can be served in."""

import copy

import torch

from models.blip import BLIP
from models.linear import arithmetic
from prod.openvino_backend import OpenVINOBLIP
from utils import shorten

PRECISIONS, BACKENDS = ('fp32', 'bf16', 'int8'), ('torch', 'openvino')


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
