"""The precisions and backends that a net can be served in."""

import copy

import torch

from models.blip import BLIP
from models.openvino_backend import OpenVINOBLIP

PRECISIONS, BACKENDS = ('fp32', 'bf16', 'int8'), ('torch', 'openvino')


def for_inference(model: BLIP, precision: str = 'fp32', backend: str = 'torch') -> BLIP | OpenVINOBLIP:
    """A net at a precision, run by a backend. In bf16 all arithmetic is bfloat16 (fast on GPUs since Ampere and on CPUs
    with AVX-512 or AMX); int8 is bf16 with all matrices in 8 bits. Embeddings and logits come in float32 all the same.

    Raises:
        ValueError: no such precision or backend, not together, or not on the net's device.
        ImportError: backend openvino without its package.
    """
    for what, value, choices in (('precision', precision, PRECISIONS), ('backend', backend, BACKENDS)):
        if value not in choices:
            raise ValueError(f'unknown {what} {value!r}: choose one of {", ".join(choices)}')
    if precision == 'int8' and backend != 'openvino':
        raise ValueError("precision 'int8' needs backend='openvino'")
    if backend == 'openvino':
        return OpenVINOBLIP(model, precision)
    return model if precision == 'fp32' else copy.deepcopy(model).to(torch.bfloat16)
