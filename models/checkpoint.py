"""Checkpoints: one file holds weights, architecture, vocabulary, config and the state of the run.

Loading is strict: a key that is skipped is named here, everything else must match. Every read is
`weights_only`, so that nothing in a file can run code.
"""

import os
import pickle
from pathlib import Path
from urllib.parse import urlparse

import torch

from models.blip import BLIP, BLIPConfig
from models.originals import VOCABULARY, infer_config
from models.tokenizer import Tokenizer
from models.vit import resample_positions
from utils import atomic_write, barrier, is_main, read_yaml

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
    table = read_yaml(sizes or Path(__file__).parent.parent / 'configs' / 'sizes.yaml')
    if size not in table:
        raise ValueError(f'unknown model size {size!r}: configs/sizes.yaml has {", ".join(table)}')
    return BLIPConfig(image_size=image_size, vocab_size=vocab_size, task=task, **table[size])


def local_file(source: str | os.PathLike) -> Path:
    """The path of a file; of a URL its copy in torch.hub's cache, downloaded when absent (once per machine).

    Raises:
        FileNotFoundError: no such file, or the download failed (a part of a file is never kept).
    """
    if not str(source).startswith(('http://', 'https://')):
        if not Path(source).is_file():
            raise FileNotFoundError(f'no checkpoint {source}')
        return Path(source)
    path = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(str(source)).path).name
    if not path.is_file() and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(str(source), str(path), progress=is_main())
        except OSError as error:
            raise FileNotFoundError(f'cannot download {source} ({error}): fetch it on another machine and give its '
                                    f'path') from None
    barrier()
    return path


def read_checkpoint(source: str | os.PathLike) -> dict:
    """Read a `.pth` file, of a path or URL, onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, no torch file, no weights inside, or a pickle that would need code.
    """
    path = local_file(source)
    try:
        return read_file(path)
    except ValueError:
        if path != Path(source):
            path.unlink(missing_ok=True)  # the next run downloads it again
        raise


def read_file(path: Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f'{path} is not a plain checkpoint: it is damaged or holds objects that need code to load, '
                         f'which is refused ({str(error).splitlines()[0][:120]})') from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f'{path} is not a readable checkpoint, it may be truncated '
                         f'({str(error).splitlines()[0][:120]}): download or train it again') from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict):
        raise ValueError(f'{path} holds no weights: expected a dictionary with the key "model"')
    return checkpoint


def load_weights(model: BLIP, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict key for key and shape for shape; position embeddings are resampled to the image size.

    Raises:
        ValueError: naming the missing, unexpected and misshaped keys, or those that hold NaN.
    """
    other_task = TASK_PARTS.get(model.config.task, ())
    weights = {key: value for key, value in weights.items()
               if not key.startswith(SKIPPED_PREFIXES) and key not in SKIPPED_KEYS
               and not key.endswith(SKIPPED_SUFFIXES) and not key.startswith(other_task)}
    own = model.state_dict()
    position = 'visual_encoder.pos_embed'
    if position in weights:
        weights[position] = resample_positions(weights[position].float(), own[position])
    if 'temp' in own:
        weights.setdefault('temp', own['temp'])  # BLIP's matching checkpoints carry no temperature
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f'{key} {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the net'
              for key in own.keys() & weights.keys() if weights[key].shape != own[key].shape]
    problems = [f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
                for what, keys in (('missing', missing), ('unexpected', unexpected), ('misshaped', sorted(shapes)))
                if keys]
    if problems:
        raise ValueError(f'{source} does not fit a {model.config.task!r} net of this size: {"; ".join(problems)}. '
                         f'Check model.size, model.image_size and which checkpoint this is.')
    broken = [key for key, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f'{source} holds NaN or infinite numbers ({", ".join(broken[:3])}): the training that wrote '
                         f'it diverged, use an earlier one')
    model.load_state_dict(weights)


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
        task: build only the parts of this task ('retrieval' or 'caption'); default: all that the file holds.
        tokenizer: the vocabulary of an original file, which carries none (see `Tokenizer.from_pretrained`).

    Returns:
        (net in eval mode and float32 on `device`, its tokenizer, everything else in the file).

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, of another kind, or lacks the task's parts.
    """
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path)
    if checkpoint.pop('architecture', None):
        words = Tokenizer(checkpoint.pop('vocab'))
    else:
        checkpoint.pop('config', None)  # of another code: nothing of it is ours
        words = Tokenizer.from_pretrained(tokenizer)
        if len(words) != config.vocab_size:
            raise ValueError(f'{path} has a vocabulary of {config.vocab_size} tokens, the tokenizer {tokenizer} has '
                             f'{len(words)}: give the one it was trained with')
    if task and config.task not in ('pretrain', task):
        raise ValueError(f'{path} is a {config.task} checkpoint: it cannot serve {task}')
    model = BLIP(BLIPConfig(**{**config.to_dict(), 'task': task or config.task}))
    load_weights(model, checkpoint.pop('model'), str(path))
    return model.eval().to(device), words, checkpoint
