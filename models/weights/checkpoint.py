"""Checkpoints: one file holds weights, architecture, vocabulary, config and the state of the run.

Loading is strict: a key that is skipped is named here, everything else must match.
"""

import hashlib
import json
import os
import re
from dataclasses import replace

import torch

from configs import read_size
from models.blip import BLIP, TEMPERATURE, BLIPConfig
from models.tokenizer import Tokenizer
from models.vit import resample_positions
from models.weights.checks import check_numbers, check_tensors
from models.weights.originals import VOCABULARY, described_config, infer_config
from models.weights.sources import find_file, load_tokenizer, names_a_file, read_file
from models.weights.transformers_format import read_folder
from utils import atomic_write, shorten, shown

FORMAT = 'dlip-1'
SECTIONS = ('data', 'eval', 'model', 'teacher')  # of a config, that are read of a checkpoint's
# What original BLIP and dlip-v2 files hold beside the net: momentum encoders, queues, fixed position indices, and
# dlip-v2's `vl_proj`, which never got a gradient.
SKIPPED_PREFIXES = ('visual_encoder_m.', 'vision_proj_m.', 'text_encoder_m.', 'text_proj_m.', 'vl_proj.')
SKIPPED_KEYS = ('image_queue', 'text_queue', 'idx_queue', 'queue_ptr', 'ptr_queue')
SKIPPED_SUFFIXES = ('embeddings.position_ids',)
# Parts that a net of another task does not have.
TASK_PARTS = {'retrieval': ('text_decoder.',),
              'caption': ('text_encoder.', 'vision_proj.', 'text_proj.', 'itm_head.', 'temp')}


def architecture(size: str, image_size: int, vocab_size: int, task: str = 'pretrain') -> BLIPConfig:
    """The architecture of a named size (`configs.read_size`) at a resolution."""
    return BLIPConfig(image_size=image_size, vocab_size=vocab_size, task=task, **read_size(size))


def read_checkpoint(source: str | os.PathLike, mmap: bool = True) -> dict:
    """Read what a path, URL, folder or name on the Hugging Face hub holds, onto the CPU.

    A file of bare weights (.safetensors or .bin) is one of the transformers layout: config.json must lie beside it.

    Args:
        mmap: map a torch file instead of copying it: parts that are not used (momentum encoders, optimizer) are never
            read. While its tensors are in use the file may be replaced or deleted, but not overwritten in place.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: truncated, no torch file, no weights inside, a pickle that would need code, or a part of it is of
            the wrong kind.
    """
    if not os.fspath(source).strip():
        raise ValueError('the name of the checkpoint is empty: give a file, URL, folder or name on the hub')
    if not names_a_file(source):
        checkpoint = read_folder(source)
    else:
        checkpoint = read_file(source, mmap)
        if isinstance(checkpoint, dict) and checkpoint and 'model' not in checkpoint and \
                all(isinstance(weight, torch.Tensor) for weight in checkpoint.values()):
            if re.search(r'-of-(?!00001\.)\d{5}\.\w+$', str(source)):
                raise ValueError(f'{source} is one of several files of weights: give their folder')
            try:
                find_file(source, 'config.json')
            except FileNotFoundError:
                raise ValueError(f'{source} holds no weights that can be used: they are bare tensors '
                                 f'({", ".join(list(checkpoint)[:3])}), and beside it is no config.json that says of '
                                 f'which net') from None
            checkpoint = read_folder(source, checkpoint)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict):
            keys = list(checkpoint)[:3] if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise ValueError(f'{source} holds no weights: expected a dictionary with the key "model", got '
                             f'{str(keys)[:200]}')
    check_tensors(checkpoint['model'], source)
    if 'architecture' in checkpoint:
        check_parts(checkpoint, source)
        return with_current_names(checkpoint)
    return {key: checkpoint[key] for key in ('model', 'config') if key in checkpoint}  # what we know of another code's


def with_current_names(checkpoint: dict) -> dict:
    """A checkpoint of ours whose learned projections are called as they are now; earlier versions called them maps."""
    def current(name: str) -> str:
        name = re.sub(r'^(token|fused|decoder)_map\.', r'\1_proj.', name)
        return re.sub(r'^(hidden\.\w+)\.maps\.', r'\1.projs.', name)

    if isinstance(checkpoint.get('objective'), dict):
        checkpoint['objective'] = {current(name): value for name, value in checkpoint['objective'].items()}
    if isinstance(checkpoint.get('trained'), list):
        checkpoint['trained'] = [current(name) for name in checkpoint['trained']]
    return checkpoint


def check_parts(checkpoint: dict, source: str | os.PathLike) -> None:
    """Check the kind of everything beside the weights of a checkpoint of ours.

    Raises:
        ValueError: naming the part.
    """
    if checkpoint.get('format', FORMAT) != FORMAT:
        raise ValueError(f'{source} is of the format {str(checkpoint["format"])[:40]!r}, this version of DLIP reads '
                         f'{FORMAT!r}: use the version that wrote it')
    vocab = checkpoint.get('vocab')
    if vocab is not None and not (isinstance(vocab, list) and all(isinstance(token, str) for token in vocab)):
        raise ValueError(f'the vocabulary of {source} is no list of words')
    config = checkpoint.get('config')
    parts = {name: checkpoint.get(name) for name in ('config', 'metrics')}
    parts |= {f'config.{name}': config.get(name) for name in SECTIONS} if isinstance(config, dict) else {}
    for name, part in parts.items():
        if part is not None and not isinstance(part, dict):
            raise ValueError(f'{name} in {source} is {type(part).__name__}, not a mapping')
        try:  # as an export will
            json.dumps(part, ensure_ascii=False, sort_keys=True).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f'{name} in {source} holds what is no plain value ({shorten(error, 120)})') from None


def build(config: BLIPConfig, weights: dict[str, torch.Tensor], source: str | os.PathLike, copy: bool = True) -> BLIP:
    """The frozen-for-use net of an architecture and its weights, in eval mode.

    Args:
        source: where the weights come from. Those of a file may be mapped: what is overwritten in place changes, or
            ends the process by SIGBUS. A file outside the caches (of the hub and of URLs), which are only ever added
            to, is therefore copied.
        copy: False takes float32 weights as they are.

    Raises:
        ValueError: they do not fit (see `load_weights`).
    """
    try:
        with torch.device('meta'):
            model = BLIP(config).float()  # whatever torch's default dtype is
    except ValueError as error:
        raise ValueError(f'{source} cannot be loaded: {error}') from None
    load_weights(model, weights, source, copy and os.path.exists(source))
    return model.eval()


def tied_names(model: BLIP) -> list[list[str]]:
    """The groups of names that one parameter goes by."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


@torch.no_grad()
def load_weights(model: BLIP, weights: dict[str, torch.Tensor], source: str | os.PathLike, copy: bool = False) -> None:
    """Load a state dict key for key and shape for shape; position embeddings are resampled to the image size.

    Of a parameter with several names (the tied word embedding) a file may hold one; several must agree. A net on the
    meta device takes the tensors themselves, as float32, or with `copy` their copies; any other copies them.

    Raises:
        ValueError: naming the missing, unexpected, misshaped and untied keys, or those with unusable numbers.
    """
    other_task = TASK_PARTS.get(model.config.task, ())
    weights = {key: weight for key, weight in weights.items()
               if not key.startswith(SKIPPED_PREFIXES) and key not in SKIPPED_KEYS
               and not key.endswith(SKIPPED_SUFFIXES) and not key.startswith(other_task)}
    check_numbers(weights, source)
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
    problems = [f'{len(keys)} {what} '
                f'({", ".join(shown(key[:200]) for key in keys[:3])}{", ..." if len(keys) > 3 else ""})'
                for what, keys in (('missing', missing), ('unexpected', unexpected), ('misshaped', sorted(shapes)),
                                   ('untied', untied))
                if keys]
    if problems:
        raise ValueError(f'{source} does not fit a {model.config.task!r} net of this size: {"; ".join(problems)}. '
                         f'Check model.size, model.image_size and which checkpoint this is.')
    if 'temp' in own and not float(weights['temp']) > 0:
        raise ValueError(f'{source} holds no usable net: its temperature is {float(weights["temp"]):g}')
    if on_meta:
        taken = {id(weight): weight.detach().to(torch.float32, copy=copy, memory_format=torch.contiguous_format)
                 for weight in weights.values()}  # tied ones once
        weights = {key: taken[id(weight)] for key, weight in weights.items()}
    model.load_state_dict(weights, assign=on_meta)
    if on_meta and model.text_decoder is not None:
        model.text_decoder.tie_head()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.dtype == b.dtype and torch.equal(a, b))


def fingerprint(model: BLIP) -> str:
    """A hash of a net's architecture and weights: equal for equal nets, wherever their file lies."""
    digest = hashlib.sha1(repr(sorted(model.config.to_dict().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, model: BLIP, tokenizer: Tokenizer, config: dict, **state) -> None:
    """Write weights, architecture, vocabulary, config and `state` (plain values and tensors) atomically.

    Raises:
        FloatingPointError: a number is NaN or infinite; nothing is written.
    """
    content = {'model': model.state_dict(), **state}
    bad = not_finite(content)
    if bad:
        raise FloatingPointError(f'{bad[0]} is not finite ({len(bad)} tensors in all): {path} is not written. '
                                 f'Lower optim.lr, set optim.clip_grad, or use precision fp32.')
    with atomic_write(path, 'wb') as file:
        torch.save({'format': FORMAT, **content, 'architecture': model.config.to_dict(), 'vocab': tokenizer.vocab,
                    'config': config}, file)


def not_finite(state, name: str = '') -> list[str]:
    """The dotted names of the tensors in nested containers that hold a NaN or an infinity."""
    if isinstance(state, torch.Tensor):
        return [] if state.isfinite().all() else [name]
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return [bad for key, value in items for bad in not_finite(value, f'{name}.{key}' if name else str(key))]


def stored_config(checkpoint: dict, path: str | os.PathLike) -> BLIPConfig:
    """The architecture of a checkpoint's net: as written in our files, read from the tensors of original ones.

    Raises:
        ValueError: it is impossible, or the tensors are of another.
    """
    try:
        if 'architecture' in checkpoint:
            return described_config(checkpoint['architecture'], checkpoint['model'])
        return infer_config(checkpoint['model'], checkpoint.get('config'))
    except ValueError as error:
        raise ValueError(f'{path} cannot be loaded: {error}') from None


def load_model(path: str | os.PathLike, device: str | torch.device = 'cpu', task: str | None = None,
               tokenizer: str | os.PathLike = VOCABULARY) -> tuple[BLIP, Tokenizer, dict]:
    """Rebuild the net of a checkpoint: from the file alone, or of a file of the original BLIP or dlip-v2.

    Args:
        path: a file, a URL, a folder of the transformers layout, or the name of one on the Hugging Face hub.
        task: build only the parts of this task ('retrieval' or 'caption'); default: all that the file holds.
        tokenizer: the vocabulary of a file that carries none, as the original ones (see `load_tokenizer`).

    Returns:
        (net in eval mode and float32 on `device`, its tokenizer, everything else in the file).

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, of another kind, or lacks the task's parts.
    """
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path)
    if checkpoint.pop('architecture', None) is None:
        checkpoint.pop('config', None)  # of another code: nothing of it is ours
    vocab = checkpoint.pop('vocab', None)
    try:
        words = load_tokenizer(tokenizer) if vocab is None else Tokenizer(vocab)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{path} carries no vocabulary, and there is {error}') from None
    except ValueError as error:
        raise ValueError(f'the vocabulary of {path}: {error}') from None
    if len(words) != config.vocab_size:
        whose = f'the tokenizer {tokenizer}' if vocab is None else 'its own tokenizer'
        raise ValueError(f'{path} has a vocabulary of {config.vocab_size} tokens, {whose} has {len(words)}: give the '
                         f'one it was trained with')
    if task and config.task not in ('pretrain', task):
        raise ValueError(f'{path} is a {config.task} checkpoint: it cannot serve {task}')
    model = build(replace(config, task=task or config.task), checkpoint.pop('model'), path,
                  copy=torch.device(device).type == 'cpu')  # a GPU's are copied anyway
    return model.to(device), words, checkpoint
