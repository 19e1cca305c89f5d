"""The precisions and backends that a net can be served in."""

import copy
import os

import torch

from models.blip import BLIP
from models.linear import arithmetic
from models.tokenizer import Tokenizer
from models.weights.checkpoint import fingerprint, load_model
from prod.onnx_backend import ONNXBLIP
from prod.openvino_backend import OpenVINOBLIP
from utils import shorten

PRECISIONS, BACKENDS = ('fp32', 'bf16', 'int8', 'fp16'), ('torch', 'openvino', 'onnx')


def served(weight: str | os.PathLike, device: torch.device, tokenizer: str | os.PathLike, precision: str,
           backend: str) -> tuple[BLIP | None, BLIP | OpenVINOBLIP | ONNXBLIP, Tokenizer, dict]:
    """(the net with its weights, if there is one; what runs it; its tokenizer; what else its file says) of a checkpoint
    or, for backend 'onnx', of a folder of graphs.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `DLIPProd`.
    """
    for what, value, choices in (('precision', precision, PRECISIONS), ('backend', backend, BACKENDS)):
        if value not in choices:
            raise ValueError(f'unknown {what} {shorten(value)}: choose one of {", ".join(choices)}')
    if backend != 'onnx':
        net, words, info = load_model(weight, device, tokenizer=tokenizer)
        return net, for_inference(net, precision, backend), words, info
    if device.type != 'cpu':
        raise ValueError(f'the onnx backend runs on a CPU, not on {device}')
    graphs = ONNXBLIP(weight)
    if precision not in ('fp32', graphs.info['precision']):
        raise ValueError(f'{weight} was exported with --precision {graphs.info["precision"]}, not {precision}')
    return None, graphs, graphs.tokenizer, graphs.info


def net_fingerprint(net: BLIP | None, info: dict) -> str:
    """`fingerprint` of what `served` returned."""
    return info['fingerprint'] if net is None else fingerprint(net)


def for_inference(model: BLIP, precision: str = 'fp32', backend: str = 'torch') -> BLIP | OpenVINOBLIP:
    """A net at a precision, run by a backend. In bf16 all arithmetic is bfloat16, where the device has it; int8 is
    bf16 with all matrices in 8 bits. Embeddings and logits come in float32 all the same.

    Raises:
        ValueError: no such precision by this backend, or not on the net's device.
        ImportError: backend openvino without its package.
    """
    if precision == 'int8' and backend != 'openvino':
        raise ValueError("precision 'int8' needs backend='openvino', or a folder exported with it and backend='onnx'")
    if precision == 'fp16':
        raise ValueError("precision 'fp16' needs a folder exported with it and backend='onnx'")
    if backend == 'openvino':
        return OpenVINOBLIP(model, precision)
    dtype = arithmetic(precision, model.device)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
