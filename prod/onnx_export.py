"""A net as ONNX: a folder of graphs, one for each of the BLIP methods that inference calls, over one file of weights.

Needs the package onnx, and onnxruntime for int8. The operators are those of opset 17, which onnxruntime-web has too.
"""

import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.json_lines import JsonLines
from data.transforms import MEAN, STD
from models.blip import BLIP
from models.tokenizer import Tokenizer
from models.weights.checkpoint import fingerprint
from prod.onnx_backend import FORMAT
from prod.openvino_backend import TracedCache
from utils import atomic_write, make_output_dir, replacing

OPSET, WEIGHTS = 17, 'weights.bin'
PRECISIONS = ('fp32', 'fp16', 'int8')
SMALL = 1024  # bytes up to which a tensor stays in its graph
PAGE = 4096  # bytes to which tensors are aligned, so that they can be mapped


class Graph(torch.nn.Module):
    """A function of a net's inputs.

    Args:
        inputs: name -> (example, names of its sizes; `_`: as in the example).
        outputs: name -> names of its sizes.
    """

    def __init__(self, model: BLIP, function: Callable, inputs: dict[str, tuple[torch.Tensor, str]],
                 outputs: dict[str, str]):
        super().__init__()
        self.model, self.function, self.inputs, self.outputs = model, function, inputs, outputs
        self.train(model.training)  # torch's exporter leaves a net in the mode that its outermost module had

    def forward(self, *inputs):
        return self.function(*inputs)

    def traced(self):
        """The graph as an onnx.ModelProto."""
        import onnx
        sizes = {name: names for name, (_, names) in self.inputs.items()} | self.outputs
        axes = {name: {i: size for i, size in enumerate(names.split()) if size != '_'} for name, names in sizes.items()}
        file = io.BytesIO()
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter('ignore')  # of the sizes that the tracer follows
            # Not by torch's newer exporter, which takes many times as long.
            torch.onnx.export(self, tuple(example for example, _ in self.inputs.values()), file, dynamo=False,
                              input_names=list(self.inputs), output_names=list(self.outputs), dynamic_axes=axes,
                              opset_version=OPSET)
        return onnx.load_from_string(file.getvalue())


def graphs(model: BLIP) -> dict[str, Graph]:
    """Name -> graph, of what a net has. Where there are more rows than images, the rows of an image stand side by side.

    `prefill` reads the first tokens of captions, `step` one more: both give the logits of the next ones, and the keys
    and values of the self-attention at the tokens that they read, which the next `step` takes after the earlier ones.
    """
    config = model.config
    layers, heads = config.text_depth, config.text_heads
    tokens, width = (config.image_size // config.patch_size) ** 2 + 1, config.text_width // config.text_heads
    images = torch.zeros(2, 3, config.image_size, config.image_size)
    kv = torch.zeros(layers, 2, 2, heads, tokens, width), '_ _ images _ _ _'
    ids = mask = torch.ones(6, min(5, config.max_positions), dtype=torch.int64)
    past = torch.zeros(layers, 2, 6, heads, min(3, config.max_positions - 1), width)
    encoded = torch.zeros(2, tokens, config.vision_width)

    def project(tokens):
        return torch.stack([torch.stack(pair) for pair in model.project_image(tokens)])

    def decode(ids, kv, past=None):
        seen = TracedCache(past)
        hidden = model.text_decoder.bert(ids, causal=True, image_kv=kv, cache=seen).hidden
        logits = model.text_decoder.logits(hidden.flatten(0, 1))  # as a matrix, so that the embedding serves as it is
        return logits.unflatten(0, ids.shape), torch.stack(seen.fresh)

    texts = {'ids': (ids, 'rows length'), 'mask': (mask, 'rows length')}
    found = {
        'image_encoder': (model.encode_image, {'images': (images, 'images _ _ _')}, {'tokens': 'images _ _'}),
        'keys_values': (project, {'tokens': (encoded, 'images _ _')}, {'keys_values': '_ _ images _ _ _'})}
    if model.text_encoder is not None:
        found |= {
            'image_feature': (model.image_feat, {'tokens': (encoded, 'images _ _')}, {'feature': 'images _'}),
            'text_encoder': (model.text_feat, texts, {'feature': 'rows _'}),
            'matching': (model.match_logits, texts | {'keys_values': kv}, {'logits': 'rows _'})}
    if model.text_decoder is not None:
        said = {'logits': 'rows length _', 'fresh': '_ _ rows _ length _'}
        found |= {
            'prefill': (decode, {'ids': texts['ids'], 'keys_values': kv}, said),
            'step': (decode, {'ids': (ids[:, :1], 'rows _'), 'keys_values': kv, 'past': (past, '_ _ rows _ past _')},
                     {'logits': 'rows _ _', 'fresh': '_ _ rows _ _ _'})}
    return {name: Graph(model, *parts) for name, parts in found.items()}


def export_onnx(folder: str | os.PathLike, model: BLIP, tokenizer: Tokenizer, info: dict,
                precision: str = 'fp32') -> None:
    """Write a folder that `DLIPProd(FOLDER, backend='onnx')` serves: graphs, weights, config.json and tokenizer.

    Args:
        model: a float32 net on the CPU.
        info: `config`, `metrics` of the run that made it.
        precision: 'fp32'; 'fp16': weights of 16 bits, which are widened as a graph is loaded; 'int8': matrices of 8
            bits, whose products are taken in 8 bits too (onnxruntime's dynamic quantisation).

    Raises:
        ImportError: onnx, or for int8 onnxruntime, is not installed.
        PermissionError, ValueError: the folder cannot be written, or another process is writing it.
    """
    try:
        import onnx  # noqa: F401
        if precision == 'int8':
            import onnxruntime.quantization  # noqa: F401
    except ImportError:
        raise ImportError('the format onnx needs two packages: pip install onnx onnxruntime') from None
    with JsonLines(os.path.normpath(folder)).writing():
        write_graphs(make_output_dir(folder), model, tokenizer, info, precision)


def write_graphs(folder: Path, model: BLIP, tokenizer: Tokenizer, info: dict, precision: str) -> None:
    (folder / 'config.json').unlink(missing_ok=True)  # a folder without it is none, until all is written
    change = {'fp32': lambda graph: graph, 'fp16': halved, 'int8': quantised}[precision]
    made = {name: change(graph.traced()) for name, graph in graphs(model).items()}
    with replacing(folder / WEIGHTS) as part, open(part, 'wb') as file:
        places = {}
        for graph in made.values():
            move_weights(graph, file, places)
    for name, graph in made.items():
        with atomic_write(folder / f'{name}.onnx', 'wb') as file:
            file.write(graph.SerializeToString())
    tokenizer.save(folder)
    exact = fingerprint(model)
    description = {'format': FORMAT, 'precision': precision, 'architecture': model.config.to_dict(),
                   'fingerprint': exact if precision == 'fp32' else f'{exact}-{precision}',
                   'image': {'mean': MEAN, 'std': STD},
                   **{key: info[key] for key in ('config', 'metrics') if info.get(key)}}
    with atomic_write(folder / 'config.json') as file:
        json.dump(description, file, indent=2)


def move_weights(graph, file, places: dict[bytes, tuple[int, int]]) -> None:
    """Write a graph's large tensors to a file, each content once, and let the graph say where they are."""
    from onnx import TensorProto, external_data_helper, numpy_helper
    for tensor in graph.graph.initializer:
        data = np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes()
        if len(data) < SMALL:
            continue
        key = hashlib.sha1(data).digest()
        if key not in places:
            file.write(bytes(-file.tell() % PAGE))
            places[key] = file.tell(), len(data)
            file.write(data)
        tensor.raw_data = data  # the helper below wants it there
        external_data_helper.set_external_data(tensor, WEIGHTS, *places[key])
        for field in ('raw_data', 'float_data', 'int32_data', 'int64_data'):
            tensor.ClearField(field)
        assert tensor.data_location == TensorProto.EXTERNAL


def halved(graph):
    """A graph whose large tensors are float16, widened before their use."""
    from onnx import TensorProto, helper, numpy_helper
    for tensor in list(graph.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.nbytes >= SMALL:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f'{name}_half'))
            graph.graph.node.insert(0, helper.make_node('Cast', [f'{name}_half'], [name], to=TensorProto.FLOAT))
    return graph


def quantised(graph):
    """A graph that multiplies with matrices of 8 bits."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == 'Gemm' and sum(node.input[1] in other.input for other in graph.graph.node) > 1:
            # The quantiser turns the matrix in place, and with it the word embedding that it is.
            graph.graph.initializer.add().CopyFrom(tensors[node.input[1]])
            graph.graph.initializer[-1].name = node.input[1] = f'{node.name}_matrix'
    level = logging.root.level
    with tempfile.TemporaryDirectory() as place:
        logging.root.setLevel(logging.ERROR)  # it advises a step that is of no use here
        try:
            quantize_dynamic(graph, f'{place}/graph.onnx', op_types_to_quantize=['MatMul', 'Gather', 'Gemm'],
                             per_channel=True, weight_type=QuantType.QUInt8)
        finally:
            logging.root.setLevel(level)
        return onnx.load(f'{place}/graph.onnx')
