"""`teacher.cache`: a teacher's targets, computed once for each pair and crop (`--store_teacher EPOCHS`).

Since item i of epoch e is a function of (seed, e, i), a stored epoch's crops, mirrors and colours are drawn again
exactly when it is trained on, and the targets are those of the very pixels (dataset reinforcement: Faghri et al., 2023,
arXiv 2303.08983; stored logits: TinyViT, Wu et al., 2022, arXiv 2207.10666). A run of more epochs repeats the stored.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import torch

from data.datasets import Captioned
from data.distributed import barrier, gather_objects, is_main, progress, rank, to_device, world_size
from data.folders import locked
from data.index import COLUMNS
from data.loader import BadImages, collate, load
from data.target_store import (
    LOWEST,
    SHARD,
    Fields,
    Place,
    Shard,
    ShardWriter,
    TargetStore,
    WithTargets,
    places,
    read_manifest,
    whole,
    write_manifest,
)
from data.transforms import normalise
from models.blip import BLIP, BLIPConfig
from models.distill.batch import with_start
from models.distill.teacher import LiveTargets, StoredTeacher
from models.distill.terms import DECODER, FUSED, TEACHER_TERMS
from models.linear import arithmetic, unpadded
from models.tokenizer import Tokenizer
from models.weights.checkpoint import fingerprint
from utils import TEMPORARY, atomic_write, logger, make_output_dir

# The fields that a term reads.
READ_BY = {'image_tokens': ('image_tokens',), 'image_feat': ('image_feat', 'text_feat'),
           'text_feat': ('image_feat', 'text_feat'), 'ita_soft': ('image_feat', 'text_feat'),
           'itm_soft': ('itm_logits',), 'fused_feat': ('fused_hidden',), 'self_attn': ('self_map',),
           'cross_attn': ('cross_map',), 'lm_logits': ('lm_ids', 'lm_log_probs', 'lm_rest'),
           'decoder_feat': ('decoder_hidden',), 'decoder_self_attn': ('decoder_self_map',),
           'decoder_cross_attn': ('decoder_cross_map',)}


def stored_terms(loss: dict[str, float]) -> list[str]:
    """The teacher's terms that have a weight.

    Raises:
        ValueError: one of them cannot be stored.
    """
    terms = [term for term in TEACHER_TERMS if loss.get(term)]
    for term in terms:
        if term not in READ_BY:
            raise ValueError(f'loss.{term} needs the teacher itself: set it to 0, or teacher.cache: null')
    return terms


def fields_of(terms: list[str], net: BLIPConfig, top_k: int) -> Fields:
    image, heads = 1 + (net.image_size // net.patch_size) ** 2, net.text_heads
    half = {'image_feat': [net.embed_dim], 'text_feat': [net.embed_dim], 'itm_logits': [2],
            'fused_hidden': [net.text_width], 'lm_log_probs': ['T-1', top_k + 1],
            'decoder_hidden': ['T-1', net.text_width], 'image_tokens': [image, net.vision_width],
            'self_map': [heads, 'T', 'T'], 'cross_map': [heads, 'T', image],
            'decoder_self_map': [heads, 'T', 'T'], 'decoder_cross_map': [heads, 'T', image]}
    every = {name: ('float16', shape) for name, shape in half.items()}
    every['lm_rest'] = 'float32', ['T-1']
    every['lm_ids'] = ('uint16' if net.vocab_size <= 2 ** 16 else 'int32', ['T-1', top_k])
    wanted = {name for term in terms for name in READ_BY[term]}
    return {name: field for name, field in sorted(every.items()) if name in wanted}


@torch.no_grad()
def answers(teacher: BLIP, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, start_ids: tuple[int, int, int],
            terms: list[str], top_k: int) -> dict[str, torch.Tensor]:
    """What the terms need of the teacher, as `Objective` asks it: the fields of B pairs, padded to T tokens."""
    cls_id, enc_id, bos_id = start_ids
    targets, found, texts = LiveTargets(teacher, images), {}, unpadded(mask, mask.sum(1).tolist())

    def uses(*names: str) -> bool:
        return any(name in terms for name in names)

    if uses('image_tokens'):
        found['image_tokens'] = targets.image_tokens
    if uses('ita_soft', 'image_feat', 'text_feat'):
        found['image_feat'], found['text_feat'] = targets.features(with_start(ids, cls_id), texts)
    if uses(*FUSED):
        matched = targets.matching(with_start(ids, enc_id), texts, None, False, uses('self_attn', 'cross_attn'))
        found |= {'fused_hidden': matched.hidden, 'itm_logits': matched.logits, 'self_map': matched.self_map,
                  'cross_map': matched.cross_map}
    if uses(*DECODER):
        want_maps = uses('decoder_self_attn', 'decoder_cross_attn')
        decoded = targets.decoding(with_start(ids, bos_id), texts, want_maps)
        found |= {'decoder_hidden': decoded.hidden, 'decoder_self_map': decoded.self_map,
                  'decoder_cross_map': decoded.cross_map}
        if uses('lm_logits'):
            valid = mask[:, 1:].bool()
            classes = top_k_classes(teacher.text_decoder.logits(decoded.hidden[valid]).float(), top_k)
            for name, rows in zip(READ_BY['lm_logits'], classes, strict=True):
                found[name] = rows.new_zeros(*valid.shape, *rows.shape[1:])
                found[name][valid] = rows
    return {name: value.float().clamp(LOWEST, -LOWEST) if value.is_floating_point() else value
            for name, value in found.items() if value is not None}


def top_k_classes(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [M, V] -> ids [M, k], log-probabilities [M, k + 1] and rest [M] of `losses.top_k_kl_loss`"""
    log_probs = logits.log_softmax(1)
    top, ids = log_probs.topk(k)
    others = log_probs.scatter(1, ids, -torch.inf)
    rest = (others.exp() * log_probs).sum(1)
    return ids, torch.cat([top, others.logsumexp(1, keepdim=True)], 1), rest


# ---------------------------------------------------------------- what a cache is of

def made_of(config: dict, dataset: Captioned, tokenizer: Tokenizer, seed: int, prompt: str) -> dict:
    """Everything but the teacher that the targets depend on.

    Raises:
        ValueError: the dataset's items are not a function of (epoch, index).
    """
    if not isinstance(dataset, Captioned):
        raise ValueError('teacher.cache needs pairs that have a place: set data.train to an all.json (the samples of '
                         'tars come in another order with every number of processes), or teacher.cache to null')
    model, data = config['model'], config['data']
    pairs = pc.binary_join_element_wise(*(dataset.table[name].cast('string').cast('binary') for name in COLUMNS[1:]),
                                        dataset.table['image_root'], b'\t')
    hashed = hashlib.sha256()
    for chunk in pairs.iterchunks():
        hashed.update(b'\n'.join([*chunk.to_pylist(), b'']))
    return {'data': hashed.hexdigest(), 'vocabulary': hashlib.sha256('\n'.join(tokenizer.vocab).encode()).hexdigest(),
            'seed': seed, 'model.image_size': model['image_size'], 'prompt': prompt,
            **{f'data.{key}': data[key] for key in ('min_scale', 'randaugment', 'max_words', 'max_tokens')}}


def check(folder: Path, manifest: dict, now: dict) -> None:
    """Raises:
        ValueError: the targets in a folder are not those asked for; names what differs.
    """
    stored = manifest['made_of']
    differ = [f'{name} (stored {str(stored.get(name))[:12]}, now {str(value)[:12]})' for name, value in now.items()
              if stored.get(name) != value]
    if differ:
        raise ValueError(f'{folder} holds the targets of another {", ".join(differ)}: set that back, or store the '
                         f'targets in another folder (teacher.cache and --store_teacher)')


# ---------------------------------------------------------------- writing

def store_teacher(config: dict, teacher: BLIP | None, dataset: Captioned, tokenizer: Tokenizer, seed: int,
                  device: torch.device, epochs: int, prompt: str = '') -> None:
    """Write the targets of the first `epochs` epochs to `teacher.cache`; processes share the shards.

    Shards that an earlier call finished are kept.

    Raises:
        ValueError: no teacher or folder is named, another run writes to the folder or it holds other targets, the disk
            has no room, or too many images are broken.
    """
    settings = config['teacher']
    if teacher is None or settings['cache'] is None:
        raise ValueError('--store_teacher needs teacher.weights, and teacher.cache: the folder to write to')
    folder = make_output_dir(settings['cache'], 'teacher.cache')
    with locked(folder):
        write_targets(folder, config, teacher, dataset, tokenizer, seed, device, epochs, prompt)


def write_targets(folder: Path, config: dict, teacher: BLIP, dataset: Captioned, tokenizer: Tokenizer, seed: int,
                  device: torch.device, epochs: int, prompt: str) -> None:
    """What `store_teacher` does once the folder is its own."""
    settings = config['teacher']
    terms = stored_terms(config['loss'])
    top_k = min(settings.get('top_k', 0), len(tokenizer) - 1)
    fields = fields_of(terms, teacher.config, top_k)
    now = {'teacher': fingerprint(teacher), **made_of(config, dataset, tokenizer, seed, prompt)}
    manifest = read_manifest(folder)
    fresh = manifest is None
    if not fresh:
        check(folder, manifest, now | {'terms': terms, 'teacher.top_k': top_k})
        epochs = max(epochs, manifest['epochs'])
    barrier()  # all have read it
    manifest = {'made_of': now | {'terms': terms, 'teacher.top_k': top_k}, 'architecture': teacher.config.to_dict(),
                'temperature': teacher.temp.item() if teacher.text_encoder is not None else None, 'epochs': epochs,
                'pairs': len(dataset), 'shard': SHARD if fresh else manifest['shard'], 'fields': fields, 'shards': {}}
    if is_main():
        write_manifest(folder, manifest)
        for leftover in folder.glob('*.targets*' if fresh else f'*{TEMPORARY}'):
            leftover.unlink()
    barrier()

    own = places(manifest)[rank()::world_size()]
    entries = {place.name: entry for place in own if (entry := whole(folder / place.name, place.pairs, fields))}
    missing = [place for place in own if place.name not in entries]
    if entries:
        logger.info('%s: %d of %d shards of this process are there already', folder, len(entries), len(own))
    teacher.to(device)
    dtype, bad = arithmetic(config['train']['precision'], device), BadImages(config['data']['max_bad_fraction'], logger)
    starts = tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id

    def ask(batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bad.update(batch)
        ids, mask = tokenizer([prompt + caption for caption in batch['caption']], config['data']['max_tokens'])
        inputs = [to_device(x, device) for x in (batch['image'], ids, mask)]
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = answers(teacher, normalise(inputs[0]), *inputs[1:], starts, terms, top_k)
        return mask, {name: found[name].cpu() for name in fields}

    stream = batches(config, dataset, missing)
    others, tokens = 0.0, 0  # probability beyond the top k, summed over the tokens
    for place in missing:
        with atomic_write(folder / place.name, 'wb') as file:
            writer = ShardWriter(file, place.pairs, fields)
            while writer.done < place.pairs:
                batch = next(stream)
                mask, found = ask(batch)
                for row, (number, count) in enumerate(zip(batch['id'].tolist(), mask.sum(1).tolist(), strict=True)):
                    writer.add(number, count, {name: found[name][row].numpy() for name in fields})
                if 'lm_log_probs' in fields:
                    others += float(found['lm_log_probs'][..., -1].exp()[mask[:, 1:].bool()].sum())
                    tokens += int(mask[:, 1:].sum())
        shard = Shard(folder / place.name, place.pairs, fields)
        entries[place.name] = shard.entry
        need_room(folder, shard.entry['bytes'] / place.pairs * len(dataset) * epochs)
    bad.check()
    parts = gather_objects((entries, others, tokens))
    if is_main():
        for entries, *_ in parts:
            manifest['shards'] |= entries
        write_manifest(folder, manifest)
        size = sum(entry['bytes'] for entry in manifest['shards'].values())
        count = sum(part[2] for part in parts)
        logger.info('%s: targets of %d pairs x %d epochs, %.2f GiB, %.0f bytes a pair%s', folder, len(dataset), epochs,
                    size / 2 ** 30, size / len(dataset) / epochs,
                    f"; the {top_k} most probable tokens have {1 - sum(part[1] for part in parts) / count:.2%} of the "
                    f"teacher's probability" if count else '')
    barrier()


def batches(config: dict, dataset: Captioned, missing: list[Place]) -> Iterator[dict]:
    """The pairs of the shards in their order, in batches that end where a shard ends."""
    size = config['train']['batch_size']
    spans = {place: [range(first, min(first + size, place.first + place.pairs))
                     for first in range(place.first, place.first + place.pairs, size)] for place in missing}
    bar = progress(None, total=sum(map(len, spans.values())), desc="the teacher's targets")
    for epoch in sorted({place.epoch for place in missing}):
        dataset.epoch = epoch  # worker processes take it with the dataset when they start
        sampler = [span for place in missing if place.epoch == epoch for span in spans[place]]
        for batch in load(dataset, config['data']['num_workers'], collate, batch_sampler=sampler,
                          pin_memory=torch.cuda.is_available()):
            bar.update()
            yield batch
    bar.close()


def need_room(folder: Path, size: float) -> None:
    """Raises:
        ValueError: the disk will not hold targets of `size` bytes in all.
    """
    room = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob('*.targets*'))
    if room < size:
        raise ValueError(f'{folder} needs {size / 2 ** 30:.1f} GiB and the disk has {room / 2 ** 30:.1f}: make room, '
                         f'store fewer epochs, or set terms of many bytes to 0 (image_tokens, decoder_feat, attention '
                         f'maps); what is stored is kept')


# ---------------------------------------------------------------- reading

def with_cache(config: dict, teacher: BLIP | None, dataset: Captioned, tokenizer: Tokenizer, seed: int,
               prompt: str = '') -> tuple[Captioned | WithTargets, BLIP | StoredTeacher | None]:
    """(dataset, teacher) as they come; with `teacher.cache`, the dataset with targets and what stands for the net.

    Args:
        teacher: that the targets must be of; None (`teacher.weights: null`): whichever they are of.

    Raises:
        FileNotFoundError, ValueError: there are none, they are incomplete, damaged, of another teacher, data or
            transform, or lack what a weighted term needs.
    """
    folder = config['teacher']['cache']
    if folder is None:
        return dataset, teacher
    store = TargetStore(folder)
    now = {'teacher': fingerprint(teacher)} if teacher is not None else {}
    now |= made_of(config, dataset, tokenizer, seed, prompt)
    terms = stored_terms(config['loss'])
    for term in terms:
        if not set(READ_BY[term]) <= store.manifest['fields'].keys():
            raise ValueError(f'{folder} holds nothing for loss.{term}: store the targets again with a weight for it in '
                             f'another folder, or set loss.{term}: 0')
    if 'lm_logits' in terms:
        now['teacher.top_k'] = min(config['teacher']['top_k'], len(tokenizer) - 1)
    check(store.folder, store.manifest, now)
    logger.info('the teacher is not asked: its targets of %d epochs are in %s%s', store.epochs, folder,
                ', which repeat' if store.epochs < config['train']['epochs'] else '')
    return WithTargets(dataset, store), StoredTeacher(BLIPConfig(**store.manifest['architecture']),
                                                      store.manifest['temperature'])
