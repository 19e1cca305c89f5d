"""The memory-mapped index of an `all.json`: what training reads, so that no process holds the pairs in its memory."""

import hashlib
import itertools
import os
import tempfile
from pathlib import Path

import pyarrow as pa

from data.captions import is_empty, storable
from data.json_list import read_json_list
from utils import atomic_write, logger, progress

COLUMNS = ('image_root', 'caption', 'id')
BATCH = 50_000  # pairs written at a time


def read_index(index: Path) -> pa.Table:
    """The table of an index: its columns point into the mapped file, nothing is copied."""
    return pa.ipc.open_file(pa.memory_map(str(index))).read_all()


def made_from(index: Path) -> bytes | None:
    """What the index says of the file it was built from; None where there is no index or it is broken."""
    try:
        return (read_index(index).schema.metadata or {}).get(b'made_from')
    except (OSError, pa.ArrowInvalid):
        return None


def build_index(source: Path) -> Path:
    """The Arrow file with the pairs of `all.json` that have a caption; rebuilt when all.json changed.

    It lies beside all.json, or in the temporary folder when that one cannot be written. all.json is read in pieces:
    memory does not grow with it.

    Raises:
        ValueError: not a list of {"caption", "image_root", "id"}.
    """
    stat = source.stat()
    stamp = f'{stat.st_size} bytes, {stat.st_mtime_ns} ns'.encode()
    private = hashlib.sha1(f'{Path.home()} {source.resolve()}'.encode()).hexdigest()[:16]  # of this user and file
    beside = source.with_name(f'{source.name}.arrow')
    places = beside, Path(tempfile.gettempdir()) / f'dlip-{private}.arrow'
    for index in places:
        if made_from(index) == stamp:
            return index
    schema = pa.schema({'image_root': pa.string(), 'caption': pa.string(), 'id': pa.int64()}, {'made_from': stamp})
    index = places[not os.access(source.parent, os.W_OK)]
    records, empty = iter(progress(read_json_list(source), desc=f'indexing {source.name}')), 0
    with atomic_write(index, 'wb') as file, pa.ipc.new_file(file, schema) as writer:
        try:
            while batch := list(itertools.islice(records, BATCH)):
                captions = [storable(record['caption']) for record in batch]
                kept = [i for i, caption in enumerate(captions) if not is_empty(caption)]
                empty += len(batch) - len(kept)
                columns = {'image_root': [batch[i]['image_root'] for i in kept], 'caption': [captions[i] for i in kept],
                           'id': [batch[i]['id'] for i in kept]}
                writer.write_batch(pa.record_batch(columns, schema=schema))
        except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise ValueError(f'{source} is not a list of {{"caption", "image_root", "id"}} ({error!r}): '
                             f'write it with json_dataset.py') from None
    if empty:
        logger.info('%s: %d pairs without a caption are left out', source, empty)
    return index
