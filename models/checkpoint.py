"""Checkpoints: one file holds weights, architecture, vocabulary, config and the state of the run.

Loading is strict: a key that is skipped is named here, everything else must match.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from configs import read_size
from models.blip import BLIP, TEMPERATURE, BLIPConfig
from models.originals import VOCABULARY, infer_config
from models.sources import is_url, local_file, names_a_file, read_tensors
from models.tokenizer import Tokenizer
from models.transformers_format import read_folder
from models.vit import resample_positions
from utils import atomic_write

FORMAT = 'dlip-1'
# What original BLIP and dlip-v2 files hold beside the net: momentum twins, queues, fixed position indices, and
# dlip-v2's `vl_proj`, which never got a gradient.
SKIPPED_PREFIXES = ('visual_encoder_m.', 'vision_proj_m.', 'text_encoder_m.', 'text_proj_m.', 'vl_proj.')
SKIPPED_KEYS = ('image_queue', 'text_queue', 'idx_queue', 'queue_ptr', 'ptr_queue')
SKIPPED_SUFFIXES = ('embeddings.position_ids',)
# Parts that a net of another task does not have.
TASK_PARTS = {'retrieval': ('text_decoder.',),
              'caption': ('text_encoder.', 'vision_proj.', 'text_proj.', 'itm_head.', 'temp')}


def architecture(size: str, image_size: int, vocab_size: int, task: str = 'pretrain',
                 sizes: str | os.PathLike | None = None) -> BLIPConfig:
    """The architecture of a named size of `configs/sizes.yaml` at a resolution."""
    return BLIPConfig(image_size=image_size, vocab_size=vocab_size, task=task, **read_size(size, path=sizes))


def read_checkpoint(source: str | os.PathLike, mmap: bool = True) -> dict:
    """Read what a path, URL, folder or name on the Hugging Face hub holds, onto the CPU.

    Args:
        mmap: map a torch file instead of copying it: parts that are not used (momentum twins, optimizer) are never
            read. The file may be replaced or deleted meanwhile, but not overwritten in place.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: truncated, no torch file, no weights inside, or a pickle that would need code.
    """
    if Path(source).suffix == '.safetensors':
        source = Path(source).parent  # its sizes are in the config.json beside it
    if not names_a_file(source):
        return read_folder(source)
    path = local_file(source)
    try:
        checkpoint = read_tensors(path, mmap)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict):
            keys = list(checkpoint)[:3] if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise ValueError(f'{path} holds no weights: expected a dictionary with the key "model", got {keys}')
    except ValueError:
        if is_url(source):
            path.unlink(missing_ok=True)  # the next run downloads it again
        raise
    return checkpoint


def build(config: BLIPConfig, weights: dict[str, torch.Tensor], source: str) -> BLIP:
    """The frozen-for-use net of an architecture and its weights, in eval mode, without a copy of the weights.

    Raises:
        ValueError: they do not fit (see `load_weights`).
    """
    with torch.device('meta'):
        model = BLIP(config).float()  # whatever torch's default dtype is
    load_weights(model, weights, source)
    return model.eval()


def tied_names(model: BLIP) -> list[list[str]]:
    """The groups of names that one parameter goes by."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def load_weights(model: BLIP, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict key for key and shape for shape; position embeddings are resampled to the image size.

    Of a parameter with several names (the tied word embedding) a file may hold one; several must agree. A net on the
    meta device takes the tensors themselves, any other copies them.

    Raises:
        ValueError: naming the missing, unexpected, misshaped and untied keys, or those that hold NaN.
    """
    other_task = TASK_PARTS.get(model.config.task, ())
    weights = {key: value for key, value in weights.items()
               if not key.startswith(SKIPPED_PREFIXES) and key not in SKIPPED_KEYS
               and not key.endswith(SKIPPED_SUFFIXES) and not key.startswith(other_task)}
    own, on_meta = model.state_dict(), model.device.type == 'meta'
    untied = []
    for names in tied_names(model):
        first, *others = [name for name in names if name in weights] or [None]
        if first:
            untied += [name for name in others if not same(weights[name], weights[first])]
            weights |= dict.fromkeys(names, weights[first])
    position = 'visual_encoder.pos_embed'
    if position in weights:
        weights[position] = resample_positions(weights[position].float(), own[position])
    if 'temp' in own:
        weights.setdefault('temp', torch.tensor(TEMPERATURE))  # BLIP's matching checkpoints carry no temperature
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f'{key} {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the net'
              for key in own.keys() & weights.keys() if weights[key].shape != own[key].shape]
    problems = [f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
                for what, keys in (('missing', missing), ('unexpected', unexpected), ('misshaped', sorted(shapes)),
                                   ('untied', untied))
                if keys]
    if problems:
        raise ValueError(f'{source} does not fit a {model.config.task!r} net of this size: {"; ".join(problems)}. '
                         f'Check model.size, model.image_size and which checkpoint this is.')
    weights = {key: weight.to(own[key].dtype) for key, weight in weights.items()}
    broken = [key for key, weight in weights.items() if not weight.sum().isfinite()]
    if broken:
        raise ValueError(f'{source} holds NaN or infinite numbers ({", ".join(broken[:3])}): the training that wrote '
                         f'it diverged, use an earlier one')
    model.load_state_dict(weights, assign=on_meta)
    if on_meta and model.text_decoder is not None:
        model.text_decoder.tie_head()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def fingerprint(model: BLIP) -> str:
    """A hash of a net's architecture and weights: equal for equal nets, wherever their file lies."""
    digest = hashlib.sha1(repr(sorted(model.config.to_dict().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, model: BLIP, tokenizer: Tokenizer, config: dict, **state) -> None:
    """Write weights, architecture, vocabulary, config and `state` (plain values and tensors) atomically."""
    with atomic_write(path, 'wb') as file:
        torch.save({'format': FORMAT, 'model': model.state_dict(), 'architecture': model.config.to_dict(),
                    'vocab': tokenizer.vocab, 'config': config, **state}, file)


def stored_config(checkpoint: dict, path: str | os.PathLike) -> BLIPConfig:
    """The architecture of a checkpoint's net: as written in our files, read from the tensors of original ones."""
    if 'architecture' in checkpoint:
        return BLIPConfig(**checkpoint['architecture'])
    try:
        return infer_config(checkpoint['model'], checkpoint.get('config'))
    except ValueError as error:
        raise ValueError(f'{path} cannot be loaded: {error}') from None


def load_model(path: str | os.PathLike, device: str | torch.device = 'cpu', task: str | None = None,
               tokenizer: str | os.PathLike = VOCABULARY) -> tuple[BLIP, Tokenizer, dict]:
    """Rebuild the net of a checkpoint: from the file alone, or of a file of the original BLIP or dlip-v2.

    Args:
        path: a file, a URL, a folder of the transformers layout, or the name of one on the Hugging Face hub.
        task: build only the parts of this task ('retrieval' or 'caption'); default: all that the file holds.
        tokenizer: the vocabulary of a file that carries none, as the original ones (see `Tokenizer.from_pretrained`).

    Returns:
        (net in eval mode and float32 on `device`, its tokenizer, everything else in the file).

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, of another kind, or lacks the task's parts.
    """
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path)
    if not checkpoint.pop('architecture', None):
        checkpoint.pop('config', None)  # of another code: nothing of it is ours
    vocab = checkpoint.pop('vocab', None)
    words = Tokenizer(vocab) if vocab else Tokenizer.from_pretrained(tokenizer)
    if len(words) != config.vocab_size:
        raise ValueError(f'{path} has a vocabulary of {config.vocab_size} tokens, {"its own" if vocab else "the"} '
                         f'tokenizer {"" if vocab else tokenizer} has {len(words)}: give the one it was trained with')
    if task and config.task not in ('pretrain', task):
        raise ValueError(f'{path} is a {config.task} checkpoint: it cannot serve {task}')
    model = build(replace(config, task=task or config.task), checkpoint.pop('model'), str(path))
    return model.to(device), words, checkpoint
