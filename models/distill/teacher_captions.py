"""Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the teacher's beam captions of the training
images, generated once, to train on beside the references. They teach a student to caption greedily about as it would
by beam search."""

from pathlib import Path

import torch

from data.captions import is_empty
from data.datasets import AnnotatedWhole
from data.distributed import gather_objects, is_main, progress, rank, world_size
from data.json_lines import JsonLines
from data.loader import collate, load
from data.transforms import normalise
from models.blip import BLIP
from models.generation import generate
from models.tokenizer import Tokenizer
from models.weights.checkpoint import fingerprint
from utils import logger


def teacher_captions(teacher: BLIP, tokenizer: Tokenizer, dataset: AnnotatedWhole, file: Path, *,
                     device: torch.device | str = 'cpu', prompt: str, batch_size: int, workers: int,
                     **settings) -> dict[str, str]:
    """The teacher's caption of each training image by path, kept in a file that a later call goes on with.

    Launched on several processes, each captions its share of every block and the main one appends it. An image that
    cannot be read has no caption. The file's first line says by whom and how the captions were made.

    Args:
        file: JSON lines, {"image": ..., "caption": ...} or null.
        settings: of `generate` (num_beams, max_length, min_length).

    Raises:
        ValueError: the file's captions are another teacher's, or were generated with other settings.
    """
    made_by = {'teacher': fingerprint(teacher), 'image_size': teacher.config.image_size, 'prompt': prompt, **settings}
    lines = JsonLines(file)
    done = gather_objects(read_captions(lines, made_by))[0]
    names = [dataset.pair(i)[0] for i in range(len(dataset))]
    left = [i for i, name in enumerate(names) if name not in done]
    logger.info('%s: %d of %d images have a caption of the teacher', file, len(names) - len(left), len(names))
    if is_main() and not done:
        lines.replace([made_by])
    block = batch_size * world_size()
    mine = [left[start + rank():start + block:world_size()] for start in range(0, len(left), block)]
    batches = load(dataset, workers, list, batch_sampler=mine)
    for indices, items in zip(progress(mine, desc='teacher captions'), batches, strict=True):
        said = {}
        if items:
            images = normalise(collate(items)['image'].to(device))
            texts = generate(teacher, tokenizer, images, prompt, **settings)
            # an image that cannot be read is replaced by another one
            said = {names[i]: text if item['id'] == i else None
                    for i, item, text in zip(indices, items, texts, strict=True)}
        said = {name: text for part in gather_objects(said) for name, text in part.items()}
        if is_main():
            lines.append({'image': name, 'caption': text} for name, text in said.items())
        done |= said
    return {name: text for name, text in done.items() if text and not is_empty(text)}


def read_captions(lines: JsonLines, made_by: dict) -> dict[str, str | None]:
    """What a file holds so far."""
    header, *records = list(lines.read()) or [made_by]
    different = [name for name, value in made_by.items() if header.get(name) != value]
    if different:
        raise ValueError(f'{lines.path} was made with another {" and ".join(different)}: delete it, so that the '
                         f'teacher captions the images again, or choose another --output_dir')
    return {record['image']: record['caption'] for record in records}
