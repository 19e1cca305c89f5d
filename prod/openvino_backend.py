"""A net run by OpenVINO: on CPUs faster than PyTorch, and in bfloat16 with float32 at the seams (optional package).

Each of the functions that inference calls is traced and compiled at its first use, which takes a second or two.
"""

import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from models.blip import BLIP
from models.text import KVCache

HINTS = {'fp32': 'f32', 'bf16': 'bf16', 'int8': 'bf16'}


@cache
def core():
    """OpenVINO's one Core of this process, which is never freed.

    Its CPU plugin moves the thread's alternate signal stack into memory of its own. When two are freed in the order in
    which they were made, that stack is left in memory that is gone, and the next signal (an interrupted notebook, a
    child that ends) kills python.

    Raises:
        ImportError: openvino is not installed.
    """
    sys.modules.setdefault('openvino_telemetry', None)  # it would report each use to Google Analytics
    try:
        import openvino
    except ImportError:
        raise ImportError('backend openvino needs the package: pip install openvino') from None
    return openvino.Core()


class TracedCache:
    """A cache [layers, 2, R, heads, T, D], or None, that comes in as an input; what is new goes out."""

    def __init__(self, past: torch.Tensor | None):
        self.past, self.length, self.fresh = past, 0 if past is None else past.shape[4], []

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.fresh.append(torch.stack([k, v]))
        if self.past is None:
            return k, v
        return torch.cat([self.past[layer, 0], k], 2), torch.cat([self.past[layer, 1], v], 2)


class OpenVINOBLIP:
    """The methods of a BLIP that inference uses, on the CPU.

    Args:
        model: a float32 net on the CPU; its weights are shared, and no longer ask for gradients.
        precision: 'fp32' or 'bf16' (of the arithmetic inside; inputs and outputs are float32), or 'int8': bf16 with
            all matrices in 8 bits.

    Raises:
        ImportError: openvino is not installed.
        ValueError: the net is not on the CPU.
    """

    def __init__(self, model: BLIP, precision: str = 'fp32'):
        if model.device.type != 'cpu':
            raise ValueError(f'the openvino backend runs on a CPU, the net is on {model.device}')
        self._core, self._compiled = core(), {}
        import openvino
        self.model, self.config, self.device = model.requires_grad_(False), model.config, model.device
        self.text_encoder, self.text_decoder = model.text_encoder, model.text_decoder
        self._openvino = openvino
        self._precision, self._bf16 = precision, openvino.Type.bf16
        self._kv_type = torch.float32 if precision == 'fp32' else torch.bfloat16  # they are read again at every step
        self._lock, self._of_thread = threading.Lock(), threading.local()  # a request serves one thread at a time
        self._settings = {'INFERENCE_PRECISION_HINT': HINTS[precision], 'PERFORMANCE_HINT': 'LATENCY',
                          'INFERENCE_NUM_THREADS': torch.get_num_threads(),
                          # threads of processes side by side would all be pinned to the first cores
                          'ENABLE_CPU_PINNING': torch.get_num_threads() >= os.cpu_count()}

    def _run(self, name: str, function: Callable, *inputs: torch.Tensor,
             example: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Run the compiled form of a function, which is traced once with `example` inputs (their sizes do not bind)."""
        with self._lock:
            if name not in self._compiled:
                self._compiled[name] = self._compile(function, example)
        requests = vars(self._of_thread)
        if name not in requests:
            requests[name] = self._compiled[name].create_infer_request()
        tensors = [self._shared(x.detach().contiguous()) for x in inputs]
        request = requests[name]
        outputs = request.infer(tensors, share_outputs=False).values()
        return [torch.from_numpy(output.view(np.int16)).view(torch.bfloat16) if port.get_element_type() == self._bf16
                else torch.from_numpy(output) for output, port in zip(outputs, request.model_outputs, strict=True)]

    def _shared(self, x: torch.Tensor):
        """The same memory as a tensor of OpenVINO; numpy, which lies between, has no bfloat16."""
        if x.dtype == torch.bfloat16:
            return self._openvino.Tensor(x.view(torch.int16).numpy(), list(x.shape), self._bf16)
        return self._openvino.Tensor(x.numpy(), shared_memory=True)

    def _compile(self, function: Callable, example: tuple[torch.Tensor, ...]):
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter('ignore')  # torch's tracer warns of every size that it follows
            graph = self._openvino.convert_model(torch.jit.trace(lambda *inputs: function(*inputs), example,
                                                                 check_trace=False))
        if self._precision == 'int8':
            compress_weights(graph)
        return self._core.compile_model(graph, 'CPU', self._settings)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        example = torch.zeros(2, *images.shape[1:], dtype=torch.float32)
        return self._run('image', self.model.visual_encoder, images, example=(example,))[0]

    def image_feat(self, image_tokens: torch.Tensor) -> torch.Tensor:
        return self.model.image_feat(image_tokens)

    def project_image(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """All layers' keys and values in one tensor [layers, 2, images, heads, N, D], float32 or bfloat16."""
        def project(tokens):
            return torch.stack([torch.stack(pair) for pair in self.model.project_image(tokens)]).to(self._kv_type)
        example = torch.zeros(2, *image_tokens.shape[1:], dtype=torch.float32)
        return self._run('keys and values', project, image_tokens, example=(example,))[0]

    def text_feat(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        example = torch.ones(2, 9, dtype=torch.int64)
        return self._run('text', self.model.text_feat, ids, mask, example=(example, example))[0]

    def match_logits(self, ids: torch.Tensor, mask: torch.Tensor, image_kv: torch.Tensor) -> torch.Tensor:
        return self._run('match', lambda ids, mask, kv: self.model.match_logits(ids, mask, kv.float()),
                         ids, mask, image_kv, example=self._pairs(image_kv))[0]

    def caption_logits(self, ids: torch.Tensor, mask: torch.Tensor, image_kv: torch.Tensor) -> torch.Tensor:
        return self._run('caption', lambda ids, mask, kv: self.model.caption_logits(ids, mask, kv.float()),
                         ids, mask, image_kv, example=self._pairs(image_kv))[0]

    def _pairs(self, image_kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Six texts of nine tokens, and two images."""
        ids = torch.ones(6, 9, dtype=torch.int64)
        return ids, ids, torch.zeros(*image_kv.shape[:2], 2, *image_kv.shape[3:], dtype=self._kv_type)

    def next_logits(self, ids: torch.Tensor, image_kv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        layers, _, _, heads, _, width = image_kv.shape

        def step(ids, kv, past):
            seen = TracedCache(past)
            hidden = self.model.text_decoder.bert(ids, causal=True, image_kv=kv.float(), cache=seen).hidden
            return self.model.text_decoder.logits(hidden[:, -1]), torch.stack(seen.fresh)

        if cache.store is None:
            cache.store = torch.empty(layers, 2, len(ids), heads, cache.capacity, width, dtype=torch.float32)
        example = (torch.ones(6, 4, dtype=torch.int64), torch.zeros(layers, 2, 2, heads, 9, width, dtype=self._kv_type),
                   torch.zeros(layers, 2, 6, heads, 5, width, dtype=torch.float32))
        logits, fresh = self._run('step', step, ids, image_kv, cache.store[..., :cache.length, :], example=example)
        end = cache.length + ids.shape[1]
        cache.store[..., cache.length:end, :] = fresh
        cache.length = end
        return logits


def compress_weights(graph) -> None:
    """Hold the matrices that activations are multiplied with in 8 bits, with a scale and a zero point a row.

    The CPU reads the bytes and widens them on the way: a decode step of one row is as long as its weights are large.
    """
    from openvino import opset13 as op
    for node in graph.get_ordered_ops():
        if node.get_type_name() != 'MatMul' or node.input_value(1).get_node().get_type_name() != 'Constant':
            continue
        constant = node.input_value(1).get_node()
        weight = constant.data
        if weight.ndim != 2:
            continue
        axis = 1 if node.get_attributes()['transpose_b'] else 0  # of the input channels
        low, high = weight.min(axis, keepdims=True).clip(max=0), weight.max(axis, keepdims=True).clip(min=0)
        scale = np.maximum((high - low) / 255, np.finfo(np.float32).tiny).astype(np.float32)
        zero = np.rint(-low / scale)
        levels = (np.rint(weight / scale) + zero).clip(0, 255)
        widened = op.subtract(op.convert(op.constant(levels.astype(np.uint8)), 'f32'),
                              op.convert(op.constant(zero.astype(np.uint8)), 'f32'))
        node.input(1).replace_source_output(op.multiply(widened, op.constant(scale)).output(0))
