"""The memory-mapped index of an `all.json`: what training reads, so that no process holds the pairs in its memory."""

import hashlib
import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa

from data.captions import is_empty, storable
from data.distributed import progress
from data.folders import sweep
from data.json_list import read_json_list
from utils import atomic_write, logger

SCHEMA = pa.schema({'image_root': pa.binary(), 'caption': pa.string(), 'id': pa.int64()})
COLUMNS = tuple(SCHEMA.names)
VERSION = 2  # of what an index holds
BATCH = 20_000  # pairs written at a time


def read_index(index: Path) -> pa.Table:
    """The table of an index: its columns point into the mapped file, nothing is copied."""
    return pa.ipc.open_file(pa.memory_map(str(index))).read_all()


def made_from(index: Path) -> bytes | None:
    """What the index says of the file it was built from; None where there is no index or it is broken."""
    try:
        return (read_index(index).schema.metadata or {}).get(b'made_from')
    except (OSError, pa.ArrowInvalid):
        return None


def image_id(path: bytes) -> int:
    """The id of an image: 63 bits of its path's hash, so that no table of paths is needed. Of five million images, two
    share one with a probability of a millionth."""
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest()) >> 1


def build_index(source: Path) -> Path:
    """The Arrow file with the pairs of `all.json` that have an image and a caption; rebuilt when all.json changed.

    Its `id` is the image's, the same for all pairs of one path (`image_id`), and not that of all.json. It lies beside
    all.json, or in the temporary folder when that one cannot be written. all.json is read in pieces: memory does not
    grow with it.

    Raises:
        ValueError: not a list of {"caption", "image_root", "id"}; names the line.
    """
    stat = source.stat()
    stamp = f'version {VERSION}, {stat.st_size} bytes, {stat.st_mtime_ns} ns'.encode()
    private = hashlib.sha1(f'{Path.home()} {source.resolve()}'.encode()).hexdigest()[:16]  # of this user and file
    beside = source.with_name(f'{source.name}.arrow')
    places = beside, Path(tempfile.gettempdir()) / f'dlip-{private}.arrow'
    for index in places:
        if made_from(index) == stamp:
            return index
    schema = SCHEMA.with_metadata({'made_from': stamp})
    index = places[not os.access(source.parent, os.W_OK)]
    sweep(index)
    records, dropped = iter(progress(read_json_list(source), desc=f'indexing {source.name}')), Counter()
    try:
        with atomic_write(index, 'wb') as file, pa.ipc.new_file(file, schema) as writer:
            while batch := list(itertools.islice(records, BATCH)):
                pairs = [pair for line, record in batch if (pair := as_pair(record, source, line, dropped))]
                columns = zip(*pairs, strict=True) if pairs else [()] * len(COLUMNS)
                writer.write_batch(pa.record_batch(list(map(list, columns)), schema=schema))
    except ValueError as error:
        raise ValueError(f'{error}. Write all.json with json_dataset.py') from None
    for reason, count in dropped.items():
        logger.info('%s: %d pairs without %s are left out', source, count, reason)
    return index


def as_pair(record, source: Path, line: int, dropped: Counter) -> tuple[bytes, str, int] | None:
    """(path, caption, id) of a record, or None, and why."""
    try:
        caption, path = record['caption'], record['image_root']
        caption = '' if caption is None or caption != caption else storable(caption)  # NaN is not itself
        path = os.fsencode(path or '')
    except UnicodeEncodeError:  # half an emoji: no file has that name
        path = b''
    except (KeyError, TypeError, AttributeError) as error:
        what = f'no {error}' if isinstance(error, KeyError) else str(error)[:80]
        raise ValueError(f'{source}, line {line}: no item of a list of {{"caption", "image_root", "id"}}: {what} in '
                         f'{str(record)[:60]!r}') from None
    reason = 'an image' if not path else 'a caption' if is_empty(caption) else None
    if reason:
        dropped[reason] += 1
        return None
    return path, caption, image_id(path)
