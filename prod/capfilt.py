"""One shard through BLIP's CapFilt: its images captioned, the texts scored, pairs embedded and filtered.

`prod/shards.py` runs it over many.
"""

import argparse
import io
import json
import os
import tarfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data.captions import clean_caption, is_empty, storable
from data.distributed import to_device
from data.images import is_machines, open_image
from data.tars import SCHEME, caption_of, image_suffix, one_line_of, read_samples
from models.engine.launch import setup_process
from models.tokenizer import ENC
from prod import DLIPProd
from prod.batches import Prepared
from prod.caption_files import listed
from utils import atomic_write, explanation, shorten

ATTEMPTS = 4  # at a shard whose worker dies: it may be the shard that kills it
TEXT, SCORE = pa.string(), pa.float32()
CAPTIONS = pa.schema({'key': TEXT, 'url': TEXT, 'caption': TEXT, 'caption_dlip': pa.list_(TEXT),
                      'log_probability_dlip': pa.list_(SCORE), 'cosine': SCORE, 'itm': SCORE,
                      'cosine_dlip': pa.list_(SCORE), 'itm_dlip': pa.list_(SCORE), 'error': TEXT})
METADATA = pa.schema({'image_path': TEXT, 'caption': TEXT, 'url': TEXT})


@dataclass
class Sample:
    """A sample of a shard, with what the nets make of it.

    Attributes:
        parts: {suffix: content}, as `read_samples` gives them.
        pixels: {image size: [3, S, S]}; none where the image cannot be read.
        captions, log_probability: new ones, with the mean of their tokens.
        cosine, itm: of the web text and of each new caption; None for a text without a word.
    """

    key: str
    parts: dict[str, bytes]
    web: str
    error: str | None = None
    pixels: dict[int, torch.Tensor] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    log_probability: list[float] = field(default_factory=list)
    cosine: list[float | None] = field(default_factory=lambda: [None])
    itm: list[float | None] = field(default_factory=lambda: [None])

    @cached_property
    def record(self) -> dict:
        """What img2dataset says of it; {} if that cannot be read."""
        try:
            return dict(json.loads(self.parts['json']))
        except (KeyError, TypeError, ValueError, RecursionError):
            return {}

    def row(self) -> dict:
        """Of `CAPTIONS`."""
        url = self.record.get('url')
        return {'key': self.key.encode('utf-8', 'backslashreplace').decode(), 'caption': storable(self.web),
                'url': storable(url) if isinstance(url, str) else None, 'error': self.error,
                'caption_dlip': self.captions, 'log_probability_dlip': self.log_probability, 'cosine': self.cosine[0],
                'itm': self.itm[0], 'cosine_dlip': self.cosine[1:], 'itm_dlip': self.itm[1:]}


class Unreadable(Exception):
    """A shard of which nothing can be read, now at least."""


def ahead(items: Iterator) -> Iterator:
    """The items, each made by another thread while the one before is worked on."""
    with closing(items), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item


class ShardWorker:
    """Ray's actor: holds the nets, and makes the outputs of one shard after another.

    Args:
        options: of the command line; `folder` is the one that it was given in, `served` DLIPProd's arguments.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options

    @cached_property
    def nets(self) -> dict[str, DLIPProd]:
        """Task -> net; one checkpoint for both is loaded once."""
        setup_process(self.options.served['device'])
        torch.set_num_threads(self.options.cores)
        load = cache(partial(DLIPProd, None, **self.options.served))
        return {task: load(weight) for task, weight in self.options.weights.items()}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """A batch of one shard -> its report as JSON: what was written, or why not."""
        os.chdir(self.options.folder)
        name, url = batch['name'][0], os.fsdecode(batch['url'][0])
        try:
            with self.attempt(name):
                report = self.write(url, name)
        except Unreadable as error:
            report = {'failed': str(error)}
        except Exception as error:  # by value: Ray would try again what the next shards will meet as well
            line = explanation(error)
            report = {'stop': line or traceback.format_exc(), 'fault': line is None}
        return {'report': [json.dumps({'name': name} | report)]}

    @contextmanager
    def attempt(self, name: str):
        """A block that Ray starts again whenever its process dies, without end: `ATTEMPTS` times are enough.

        Raises:
            Unreadable: it has been that often.
        """
        count = Path(self.options.out) / 'captions' / f'{name}.attempts'
        with open(count, 'ab') as file:
            file.write(b'.')
        try:
            if count.stat().st_size > ATTEMPTS:
                raise Unreadable(f'{ATTEMPTS} workers died at it')
            yield
        finally:
            count.unlink(missing_ok=True)

    # ------------------------------------------------------------ reading

    def read(self, url: str, notes: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """`read_samples`, to the end or to where a damaged shard breaks off, which is noted."""
        count = 0
        try:
            with closing(read_samples(url)) as samples:
                for sample in samples:
                    count += 1
                    if sample[1]:  # not only files of other kinds
                        yield sample
        except Exception as error:  # whatever files, commands, decompressors and tars raise
            if is_machines(error):
                raise
            if not count or isinstance(error, OSError) and (error.errno or SCHEME.match(url)):
                raise Unreadable(one_line_of(error)) from None
            notes.append(f'breaks off after {count} samples: {one_line_of(error)}')

    def batches(self, url: str, notes: list[str]) -> Iterator[list[Sample]]:
        with closing(self.read(url, notes)) as samples, ThreadPoolExecutor(self.options.cores) as pool:
            while rows := list(islice(samples, self.options.batch_size)):
                yield list(pool.map(self.decoded, rows))

    def decoded(self, sample: tuple[str, dict[str, bytes]]) -> Sample:
        key, parts = sample
        suffix = image_suffix(parts)
        sample = Sample(key, parts, caption_of(parts, suffix or ''))
        try:
            if suffix is None:
                raise ValueError('no image')
            image = open_image(io.BytesIO(parts[suffix]), self.options.served['memory'], f'{key}.{suffix}')
            sample.pixels = {net.model.config.image_size: net.transform(image) for net in self.nets.values()}
        except ValueError as error:
            sample.error = shorten(error)
        return sample

    # ------------------------------------------------------------ the nets

    def assess(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Fill in captions and scores of readable samples -> embeddings [N, D] of images and web texts, if wanted."""
        def pixels(net: DLIPProd) -> torch.Tensor:
            return torch.stack([sample.pixels[net.model.config.image_size] for sample in samples])

        if net := self.nets.get('caption'):
            said = net.generate(Prepared(pixels(net)), scores=True, batch_size=self.options.batch_size,
                                **self.options.generation)
            for sample, own in zip(samples, said, strict=True):
                sample.captions, sample.log_probability = map(list, zip(*listed(own), strict=True))
        if net := self.nets.get('retrieval'):
            texts = [[clean_caption(text, net.max_tokens) for text in (storable(sample.web), *sample.captions)]
                     for sample in samples]
            image_feat, text_feat, cosine, itm = scores(net, to_device(pixels(net), net.device), texts)
            for sample, own, *values in zip(samples, texts, cosine.tolist(), itm.tolist(), strict=True):
                sample.cosine, sample.itm = ([None if is_empty(text) else score for text, score in
                                              zip(own, row, strict=True)] for row in values)
            return image_feat, text_feat[:, 0]

    # ------------------------------------------------------------ writing

    def kept(self, sample: Sample) -> list[int]:
        """Which texts of a sample pass (0: the web's), as `--keep` chooses among them."""
        passing = [i for i, (cosine, itm) in enumerate(zip(sample.cosine, sample.itm, strict=True))
                   if itm is not None and cosine >= self.options.min_cosine and itm >= self.options.min_itm]
        if self.options.keep == 'web':
            return [i for i in passing if i == 0]
        return sorted(passing, key=lambda i: -sample.itm[i])[:1 if self.options.keep == 'best' else None]

    def write(self, url: str, name: str) -> dict:
        """Make the outputs of a shard -> {'images', 'bad', 'kept', 'notes'}."""
        out, rows, metadata, notes, embeddings, kept = Path(self.options.out), [], [], [], [], 0
        with ExitStack() as files:
            if self.options.filtering:
                tar = files.enter_context(tarfile.open(mode='w', fileobj=files.enter_context(
                    atomic_write(out / 'filtered' / f'{name}.tar', 'wb'))))
            for batch in ahead(self.batches(url, notes)):
                readable = [sample for sample in batch if sample.error is None]
                made = self.assess(readable) if readable else None
                if made:
                    embeddings.append([x.half().numpy() for x in made])
                if self.options.filtering:
                    for sample in readable:
                        for number, i in enumerate(self.kept(sample)):
                            add(tar, sample, i, number)
                            kept += 1
                rows += [sample.row() for sample in batch]
        bad = [row for row in rows if row['error'] is not None]
        if bad:
            notes.append(f'{len(bad)} samples without a readable image, for example {bad[0]["error"]}')
        if embeddings:
            for kind, parts in zip(('img_emb', 'text_emb'), zip(*embeddings, strict=True), strict=True):
                with atomic_write(out / kind / f'{kind}_{name}.npy', 'wb') as file:
                    np.save(file, np.concatenate(parts))
            metadata = [row | {'image_path': row['key']} for row in rows if row['error'] is None]
            with atomic_write(out / 'metadata' / f'metadata_{name}.parquet', 'wb') as file:
                pq.write_table(pa.Table.from_pylist(metadata, METADATA), file)
        if self.options.filtering:
            with atomic_write(out / 'filtered' / f'{name}_stats.json') as file:
                json.dump({'count': len(rows), 'successes': kept}, file)
        with atomic_write(out / 'captions' / f'{name}.parquet', 'wb') as file:
            pq.write_table(pa.Table.from_pylist(rows, CAPTIONS.with_metadata({'shard': os.fsencode(url)})), file)
        return {'images': len(rows) - len(bad), 'bad': len(bad), 'kept': kept, 'notes': notes}


@torch.inference_mode()
def scores(net: DLIPProd, pixels: torch.Tensor, texts: list[list[str]]) -> tuple[torch.Tensor, ...]:
    """N images [N, 3, S, S], each with M texts of its own -> image embeddings [N, D], text embeddings [N, M, D],
    cosines and matching probabilities [N, M]; the images are encoded once."""
    tokens, flat = net.model.encode_image(pixels), [text for own in texts for text in own]
    image_feat = net.model.image_feat(tokens).float().cpu()
    text_feat = net.get_text_feat(flat).unflatten(0, (len(texts), -1))
    ids, mask = (x.to(net.device) for x in net.tokenizer(flat, net.max_tokens, ENC))
    itm = net.model.match_logits(ids, mask, net.model.project_image(tokens)).float().softmax(-1)[:, 1].cpu()
    return image_feat, text_feat, (image_feat[:, None] * text_feat).sum(-1), itm.unflatten(0, (len(texts), -1))


def add(tar: tarfile.TarFile, sample: Sample, i: int, number: int) -> None:
    """Write text `i` of a sample with its image, as the `number`th pair that it gives."""
    suffix, text = image_suffix(sample.parts), [sample.web, *sample.captions][i]
    record = sample.record | {'caption': text, 'source': 'dlip' if i else 'web', 'cosine': sample.cosine[i],
                              'itm': sample.itm[i]}
    for kind, content in ((suffix.rpartition('.')[2], sample.parts[suffix]), ('json', json.dumps(record).encode()),
                          ('txt', text.encode('utf-8', 'replace'))):
        member = tarfile.TarInfo(f'{sample.key}{f"-{number}" if number else ""}.{kind}')
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
