"""Targets of training pairs on disk: sharded, memory-mapped, checksummed.

    FOLDER/manifest.json           what they are targets of, their fields, and of every shard its size and checksum
    FOLDER/epoch0-00000.targets    SHARD pairs: a table of one row a pair, then the bytes of each pair

The fields of a pair lie one after another; the shapes of some depend on its number of tokens T. Its row in the table
has the BLAKE2 digest of its bytes, and the manifest the SHA-256 of the table: whatever is read is verified as it is
read, so that a run need not read hundreds of gigabytes before it starts.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils import atomic_write

SHARD = 8192  # pairs
ROW = np.dtype([('offset', '<u8'), ('digest', '<u8'), ('id', '<i8'), ('tokens', '<i8')])
LOWEST = float(np.finfo(np.float16).min)  # log-probability of what is impossible, in float16
MANIFEST = {'made_of', 'architecture', 'temperature', 'epochs', 'pairs', 'shard', 'fields', 'shards'}  # its keys

# Name -> (dtype, shape), where a side may be 'T' or 'T-1'.
Fields = dict[str, tuple[str, list[int | str]]]


class Place(NamedTuple):
    """A shard: pairs `first` to `first + pairs` of an epoch."""

    name: str
    epoch: int
    first: int
    pairs: int


def places(manifest: dict) -> list[Place]:
    """All shards that a manifest promises."""
    size, total = manifest['shard'], manifest['pairs']
    return [Place(f'epoch{epoch}-{first // size:05d}.targets', epoch, first, min(size, total - first))
            for epoch in range(manifest['epochs']) for first in range(0, total, size)]


def sides(shape: list[int | str], tokens: int) -> tuple[int, ...]:
    return tuple({'T': tokens, 'T-1': tokens - 1}.get(side, side) for side in shape)


def digest(data: bytes | np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')


class ShardWriter:
    """Writes the pairs of a shard one by one to an open file, and the table when all are there.

    Attributes:
        table: [pairs] of `ROW`.
    """

    def __init__(self, file, pairs: int, fields: Fields):
        self.file, self.fields = file, fields
        self.table, self.done, self.end = np.zeros(pairs, ROW), 0, pairs * ROW.itemsize
        file.write(self.table.tobytes())

    def add(self, number: int, tokens: int, values: dict[str, np.ndarray]) -> None:
        """Args:
            number: the pair's id.
            values: the fields, padded to any number of tokens.
        """
        parts = [values[name][tuple(map(slice, sides(shape, tokens)))].astype(dtype).tobytes()
                 for name, (dtype, shape) in self.fields.items()]
        data = b''.join(parts)
        self.file.write(data)
        self.table[self.done] = self.end, digest(data), number, tokens
        self.done, self.end = self.done + 1, self.end + len(data)
        if self.done == len(self.table):
            self.file.seek(0)
            self.file.write(self.table.tobytes())


class Shard:
    """A shard's file, memory-mapped.

    Raises:
        ValueError: it is not as long as its table says, or its table is not the one of the manifest.
    """

    def __init__(self, path: Path, pairs: int, fields: Fields, entry: dict | None = None):
        self.path, self.fields = path, fields
        size, head = path.stat().st_size, pairs * ROW.itemsize
        if size < head or entry and size != entry['bytes']:
            raise self.damaged(f'it has {size} bytes')
        # Unlike numpy's and python's maps, torch's keep no file open: there may be more shards than a process may open.
        self.data = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
        self.table = self.data[:head].view(ROW)
        self.ends = np.append(self.table['offset'][1:], np.uint64(size))
        self.entry = {'bytes': size, 'sha256': hashlib.sha256(self.data[:head]).hexdigest()}
        if entry and entry != self.entry:
            raise self.damaged('its table has another checksum')

    def damaged(self, how: str) -> ValueError:
        return ValueError(f'{self.path} is damaged: {how}. Delete it and store the targets again (--store_teacher); '
                          f'the other shards are kept')

    def __getitem__(self, row: int) -> tuple[int, dict[str, np.ndarray]]:
        """(id, fields) of a pair; its 'tokens' are one of them.

        Raises:
            ValueError: its bytes are not those that were written.
        """
        start, end, entry = int(self.table['offset'][row]), int(self.ends[row]), self.table[row]
        data = self.data[start:end]
        if start > end or end > len(self.data) or digest(data) != int(entry['digest']):
            raise self.damaged(f'pair {row} of {len(self.table)} has another checksum')
        tokens, values, place = int(entry['tokens']), {}, 0
        for name, (dtype, shape) in self.fields.items():
            shape = sides(shape, tokens)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            values[name] = data[place:place + size].view(dtype).reshape(shape)
            place += size
        return int(entry['id']), {'tokens': np.int64(tokens), **values}


class TargetStore:
    """A folder of targets, of whose shards each process opens those it reads.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its writing did not come to an end.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest is None:
            raise FileNotFoundError(f'no stored targets in {folder}: write them with --store_teacher EPOCHS')
        self.epochs, self.places = self.manifest['epochs'], places(self.manifest)
        if any(place.name not in self.manifest['shards'] for place in self.places):
            raise ValueError(f'{folder} is not complete: launch the command with --store_teacher again, it goes on '
                             f'where it stopped')
        self.shard = lru_cache(maxsize=None)(self._open)

    def __getstate__(self) -> dict:
        return {'folder': self.folder}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state['folder'])

    def _open(self, number: int) -> Shard:
        place = self.places[number]
        if not (self.folder / place.name).exists():
            raise FileNotFoundError(f'{self.folder / place.name} is missing: store the targets again (--store_teacher)')
        return Shard(self.folder / place.name, place.pairs, self.manifest['fields'],
                     self.manifest['shards'][place.name])

    def __call__(self, epoch: int, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """(id, fields) of pair `index` as it was in an epoch below `epochs`; its 'tokens' are one of them."""
        number, row = divmod(index, self.manifest['shard'])
        return self.shard(epoch * len(self.places) // self.epochs + number)[row]


class WithTargets(torch.utils.data.Dataset):
    """A dataset of training pairs whose items carry their stored 'targets'.

    Its epochs repeat those that were stored, with their crops: epoch e is stored epoch e modulo their number.
    """

    def __init__(self, dataset, store: TargetStore):
        self.dataset, self.store = dataset, store
        self.pair, self.examples = dataset.pair, dataset.examples

    @property
    def epoch(self) -> int:
        return self.dataset.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.dataset.epoch = epoch % self.store.epochs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """Raises:
            ValueError: another pair stands here now than when the targets were stored, or they are damaged.
        """
        item, (number, targets) = self.dataset[index], self.store(self.epoch, index)
        if number != item['id']:
            raise ValueError(f'pair {index} has stored targets of another pair: an image was broken when they were '
                             f'stored, or is now ({item["bad"] or "none now"}). Store the targets again')
        return item | {'targets': targets}


def pad_targets(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack the fields of pairs, padded to the largest of each side: maps with `LOWEST`, others with 0."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        shape = np.max([value.shape for value in values], axis=0).astype(int) if values[0].ndim else ()
        dtype = np.int32 if values[0].dtype == np.uint16 else values[0].dtype  # torch does little with uint16
        rows = np.full((len(values), *shape), LOWEST if name.endswith('_map') else 0, dtype)
        for row, value in enumerate(values):
            rows[row, *map(slice, value.shape)] = value
        batch[name] = torch.from_numpy(rows)
    return batch


def read_manifest(folder: Path) -> dict | None:
    """None where there is none.

    Raises:
        ValueError: it is none.
    """
    path = folder / 'manifest.json'
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        if missing := MANIFEST - manifest.keys():
            raise ValueError(f'without {min(missing)}')
        return manifest
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is damaged ({error}): delete it and store the targets again '
                         f'(--store_teacher)') from None


def write_manifest(folder: Path, manifest: dict) -> None:
    with atomic_write(folder / 'manifest.json') as file:
        json.dump(manifest, file, indent=1)


def whole(path: Path, pairs: int, fields: Fields) -> dict | None:
    """A shard's entry for the manifest, or None where it is missing or damaged."""
    try:
        shard = Shard(path, pairs, fields)
        for row in range(pairs):
            shard[row]
    except (ValueError, FileNotFoundError):
        return None
    return shard.entry
