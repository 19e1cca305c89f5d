"""What `python prod/export.py --format onnx` wrote, run by onnxruntime (an optional package) on the CPU."""

import json
import os
import threading
from pathlib import Path

import torch

from models.blip import BLIPConfig
from models.text import KVCache
from models.tokenizer import Tokenizer
from utils import shorten

FORMAT = 'dlip-onnx-1'


class ONNXBLIP:
    """The methods of a BLIP that inference calls, each of them a graph of a folder.

    Args:
        folder: of `prod.onnx_export.export_onnx`.

    Attributes:
        tokenizer: of the folder.
        info: `config` and `metrics` of the run that made the net, `precision` and `fingerprint`.

    Raises:
        FileNotFoundError, ValueError: no such folder, or a damaged one.
        ImportError: onnxruntime is not installed.
    """

    device = torch.device('cpu')

    def __init__(self, folder: str | os.PathLike):
        try:
            import onnxruntime
        except ImportError:
            raise ImportError('backend onnx needs the package: pip install onnxruntime') from None
        self._onnxruntime, self.folder = onnxruntime, Path(folder)
        path = self.folder / 'config.json'
        if not path.is_file():
            raise FileNotFoundError(f'{shorten(self.folder)} is no folder of ONNX graphs: write one by python '
                                    f'prod/export.py SOURCE FOLDER --format onnx')
        try:
            self.info = json.loads(path.read_text(encoding='utf-8'))
            if self.info.get('format') != FORMAT:
                raise ValueError(f'its format is not {FORMAT}')
            self.config = BLIPConfig(**self.info['architecture'])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f'{path} describes no ONNX graphs of this version ({shorten(error, 120)}): write them by '
                             f'python prod/export.py SOURCE FOLDER --format onnx') from None
        self.tokenizer = Tokenizer.from_file(self.folder / 'vocab.txt')
        self.text_encoder = self.config.task != 'caption' or None  # whether the net has them
        self.text_decoder = self.config.task != 'retrieval' or None
        self._sessions, self._lock = {}, threading.Lock()

    def _run(self, name: str, **inputs: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of a graph, which is loaded at its first use."""
        key = os.getpid(), name  # a forked process has none of the threads that its parent's sessions run on
        with self._lock:
            if key not in self._sessions:
                options = self._onnxruntime.SessionOptions()
                options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
                try:
                    self._sessions[key] = self._onnxruntime.InferenceSession(
                        str(self.folder / f'{name}.onnx'), options, providers=['CPUExecutionProvider'])
                except Exception as error:  # of the library's own kinds
                    raise ValueError(f'{self.folder / name}.onnx cannot be loaded: {shorten(error, 200)}') from None
        outputs = self._sessions[key].run(None, {name: x.detach().contiguous().numpy() for name, x in inputs.items()})
        return [torch.from_numpy(output) for output in outputs]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self._run('image_encoder', images=images.float())[0]

    def image_feat(self, image_tokens: torch.Tensor) -> torch.Tensor:
        return self._run('image_feature', tokens=image_tokens)[0]

    def project_image(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """All layers' keys and values in one tensor [layers, 2, images, heads, N, D]."""
        return self._run('keys_values', tokens=image_tokens)[0]

    def text_feat(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._run('text_encoder', ids=ids, mask=mask)[0]

    def match_logits(self, ids: torch.Tensor, mask: torch.Tensor, image_kv: torch.Tensor) -> torch.Tensor:
        return self._run('matching', ids=ids, mask=mask, keys_values=image_kv)[0]

    def caption_logits(self, ids: torch.Tensor, mask: torch.Tensor, image_kv: torch.Tensor) -> torch.Tensor:
        return self._run('prefill', ids=ids, keys_values=image_kv)[0][:, :-1]  # pads come after what they could change

    def next_logits(self, ids: torch.Tensor, image_kv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if cache.store is None:
            logits, fresh = self._run('prefill', ids=ids, keys_values=image_kv)
            cache.store = fresh.new_empty(*fresh.shape[:4], cache.capacity, fresh.shape[5])
        else:
            logits, fresh = self._run('step', ids=ids, keys_values=image_kv, past=cache.store[..., :cache.length, :])
        end = cache.length + ids.shape[1]
        cache.store[..., cache.length:end, :] = fresh
        cache.length = end
        return logits[:, -1]
