"""What was downloaded, as pairs of caption and image: shards of img2dataset and the regions of Visual Genome.

Everything is read in parts (a shard; some thousand images of Visual Genome), which know nothing of each other.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.util import hash_array

from data.captions import one_line
from data.folders import read_regular
from data.json_list import read_json_list
from data.text_columns import one_lines, quoted, text_column
from utils import shorten

IMAGES = ('.jpg', '.jpeg', '.png', '.webp')
REQUIRED, TEXTS = {'key', 'caption', 'status'}, ('key', 'caption', 'url')
SIZES = ('width', 'height', 'original_width', 'original_height')
MIN_WORDS, MIN_AREA = 5, 0.2 * 800 * 600  # Visual Genome regions: more than 4 words, more than 20% of 800 x 600
GENOME_IMAGES = 2000  # of Visual Genome in a part
NONE = pa.array([], pa.string())


@dataclass
class Part:
    """The usable pairs of a part, and what became of the others.

    Attributes:
        records: JSON of each pair up to its id.
        identity: uint64 [N]; equal for the same caption of the same address (img2dataset) or image (Visual Genome).
        words: int [N], words of the captions.
        sides: int [N, 2], shorter side of the image as stored and as published, in pixels; 0: not recorded.
        dropped: count per reason.
        failed: url and caption of the failed downloads; failed_identity: uint64, as above.
        note: what the user should know.
    """

    records: pa.StringArray
    identity: np.ndarray
    words: np.ndarray
    sides: np.ndarray
    dropped: Counter
    failed: dict[str, pa.StringArray]
    failed_identity: np.ndarray
    note: str = ''


def identities(addresses: pa.StringArray, captions: pa.StringArray) -> np.ndarray:
    """uint64 [N] of the pairs, the same in every process."""
    pairs = pc.binary_join_element_wise(addresses, captions, '\n')
    return hash_array(pairs.to_numpy(zero_copy_only=False), categorize=False)


def make_part(captions: pa.StringArray, images: pa.StringArray, addresses: pa.StringArray, dropped: Counter,
              sides: np.ndarray | None = None, failed: tuple[pa.StringArray, pa.StringArray] = (NONE, NONE),
              note: str = '') -> Part:
    """Args: addresses: what of a pair is compared, beside the caption, to find duplicates; failed: url, caption."""
    records = pc.binary_join_element_wise('{"caption": "', quoted(captions), '", "image_root": "', quoted(images),
                                          '", "id": ', '')
    return Part(records, identities(addresses, captions), 1 + pc.count_substring(captions, ' ').to_numpy(),
                np.zeros((len(captions), 2), int) if sides is None else sides, dropped,
                dict(zip(('url', 'caption'), failed, strict=True)), identities(*failed), note)


def find_shards(folder: Path) -> list[Path]:
    """Shard folders (00000, ...) of a source; first those of the folders in it (`cc3m/cc3m`, a second try).

    Raises:
        ValueError: there are none, or they are tar files.
    """
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() or entry.suffix == '.tar')
    inside = [entry for entry in entries if entry.is_dir() and not entry.name.isdigit()]
    places = [*(deeper for entry in inside for deeper in sorted(entry.iterdir())
                if deeper.is_dir() and not deeper.name.isdigit()), *inside, folder]
    shards = [shard for place in places for shard in sorted(place.iterdir()) if shard.name.isdigit() and shard.is_dir()]
    if shards:
        return shards
    tars = next((place for place in places if any(place.glob('*.tar'))), None)
    if tars:
        raise ValueError(f'{tars} holds webdataset shards (.tar): pre-training reads them without all.json, by '
                         f'data.train={tars}; leave {folder.name} out with --sources')
    raise ValueError(f'{folder} holds no img2dataset shards (00000, 00001, ...): download with --output_format files '
                     f'into it')


def read_shard(shard: Path) -> Part:
    """A shard folder: its `<shard>.parquet` (status 'success'), or without a whole one each image's .json or .txt.

    Raises:
        ValueError: a parquet file without captions, named.
    """
    dropped, note = Counter(), ''
    try:
        files = set(os.listdir(shard))
    except OSError as error:
        files, note = set(), f'{shard} cannot be read ({error.strerror}): its images are missing'
    key, ending = os.path.splitext(min((name for name in files if name.endswith(IMAGES)), default=''))
    try:
        table = read_parquet(shard.with_suffix('.parquet'), len(key))
    except FileNotFoundError:
        table = read_side_files(shard, files, dropped)
    except (pa.ArrowException, OSError) as error:
        table = read_side_files(shard, files, dropped)
        note = f'{shard}.parquet is broken ({str(error)[:60]}): the .json and .txt files of {shard.name} were read'
    prefix = f'{shard}{os.sep}'
    names = pc.binary_join_element_wise(table['key'].fill_null(''), ending, '')  # all have the same
    captions, urls = one_lines(table['caption']), table['url'].fill_null('')
    there = np.fromiter(map(files.__contains__, names.to_pylist()), bool, len(names))
    said, known = (pc.binary_length(texts).to_numpy() > 0 for texts in (captions, urls))
    success = table['success']
    kept = success & there & said
    dropped += {'failed download': int((~success).sum()), 'missing file': int((success & ~there).sum()),
                'empty caption': int((success & there & ~said).sum())}
    sides = np.stack([np.minimum(table[a], table[b])[kept] for a, b in (SIZES[:2], SIZES[2:])], 1)
    kept, again = pa.array(kept), pa.array(~success & known)  # without an address it cannot be tried again
    images = pc.binary_join_element_wise(prefix, names.filter(kept), '')
    addresses = pc.if_else(pa.array(known).filter(kept), urls.filter(kept), images)
    return make_part(captions.filter(kept), images, addresses, dropped, sides,
                     (urls.filter(again), captions.filter(again)), note)


def read_parquet(path: Path, key_length: int) -> dict[str, pa.StringArray | np.ndarray]:
    """The columns by name, whatever the writer made of their types.

    Args: key_length: of the keys, should they be numbers, which have lost their leading zeros.
    """
    if path.exists() and not path.is_file():
        raise OSError('it is no regular file')
    file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    there = set(file.schema_arrow.names)
    if not there >= REQUIRED:
        raise ValueError(f'{path} has no column {", ".join(sorted(REQUIRED - there))}: download the shard again '
                         f'as data/README.md says, or remove it to read the .json and .txt files')
    twice = [name for name in there if file.schema_arrow.names.count(name) > 1]
    if twice:
        raise ValueError(f'{path} has the column {shorten(twice[0])} twice: remove it to read the .json and .txt files')
    table = file.read([name for name in (*TEXTS, 'status', *SIZES) if name in there], use_threads=False)
    table.validate(full=True)  # a damaged file may hold texts that are not UTF-8
    columns = {name: plain(table[name]) if name in there else pa.nulls(len(table))
               for name in (*TEXTS, 'status', *SIZES)}
    if pa.types.is_floating(columns['key'].type):
        columns['key'] = pa.array([int(key) if key is not None and key == key else None
                                   for key in columns['key'].to_pylist()], pa.int64())
    if pa.types.is_integer(columns['key'].type):
        columns['key'] = pc.utf8_lpad(columns['key'].cast(pa.string()), key_length, '0')
    texts = {name: texts_of(columns[name]) for name in TEXTS}
    success = pc.equal(texts_of(columns['status']), 'success').fill_null(False).to_numpy(zero_copy_only=False)
    return texts | {'success': success} | {name: sizes_of(columns[name]) for name in SIZES}


def plain(column: pa.ChunkedArray) -> pa.Array:
    column = column.combine_chunks()
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def texts_of(column: pa.Array) -> pa.StringArray:
    """Null for what is no text: numbers, and the NaN that a missing caption becomes."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([value and value.decode('utf-8', 'ignore') for value in column.to_pylist()], pa.string())
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or 'string_view' in str(kind)
    return column.cast(pa.string()) if is_text else pa.nulls(len(column), pa.string())


def sizes_of(column: pa.Array) -> np.ndarray:
    """int64 [N]; 0 where there is no number."""
    try:
        values = column.cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False)
    except pa.ArrowException:
        return np.zeros(len(column), int)
    return np.nan_to_num(values, nan=0, posinf=0, neginf=0).clip(0, 2 ** 31).astype(int)


def read_side_files(shard: Path, files: set[str], dropped: Counter) -> dict[str, pa.StringArray | np.ndarray]:
    """The .json or .txt file of each image; a broken one costs its pair, and is counted."""
    rows = []
    for key in sorted(os.path.splitext(name)[0] for name in files if name.endswith(IMAGES)):
        row = {}
        try:
            if f'{key}.json' in files:
                row = dict(json.loads(read_regular(shard / f'{key}.json').decode('utf-8-sig')))
            elif f'{key}.txt' in files:
                row['caption'] = read_regular(shard / f'{key}.txt').decode('utf-8-sig', errors='replace')
        except (OSError, ValueError, TypeError, RecursionError):  # the download was killed while it wrote, for example
            dropped['broken record'] += 1
            continue
        rows.append(row | {'key': key})
    columns = {name: text_column([row.get(name) for row in rows]) for name in TEXTS}
    columns['success'] = np.ones(len(rows), bool)
    return columns | {name: np.array([size(row.get(name)) for row in rows], int) for name in SIZES}


def size(value) -> int:
    """0 for what is no number, or none of an image's."""
    return int(value) if isinstance(value, int | float) and 0 < value < 2 ** 31 else 0


def read_visual_genome(folder: Path) -> Iterator[Part]:
    """Regions long and large enough, as the caption of their whole image (the original's rule).

    Raises:
        FileNotFoundError, ValueError: region_descriptions.json is missing or broken.
    """
    path = folder / 'region_descriptions.json'
    if not path.is_file():
        raise FileNotFoundError(f'no {path}: unpack region_descriptions.json.zip of Visual Genome there')
    files = {entry.name: entry.path for part in ('VG_100K_2', 'VG_100K') if (folder / part).is_dir()
             for entry in os.scandir(folder / part)}
    images, line = read_json_list(path), None
    try:
        while batch := list(islice(images, GENOME_IMAGES)):
            captions, named, dropped = [], [], Counter()
            for item in batch:
                line, image = item
                file = files.get(f'{image["id"]}.jpg')
                for region in image['regions']:
                    caption = one_line(region['phrase'])
                    reason = ('missing file' if file is None else
                              'short phrase' if caption.count(' ') < MIN_WORDS - 1 else
                              'small region' if region['width'] * region['height'] <= MIN_AREA else None)
                    if reason:
                        dropped[reason] += 1
                    else:
                        captions.append(caption)
                        named.append(file)
            named = pa.array(named, pa.string())
            yield make_part(pa.array(captions, pa.string()), named, named, dropped)
    except (KeyError, TypeError, AttributeError) as error:
        what = f'no {error}' if isinstance(error, KeyError) else str(error)[:80]
        raise ValueError(f'{path}, line {line}: not Visual Genome\'s list of images with regions ({what}): unpack '
                         f'region_descriptions.json.zip again') from None
    except ValueError as error:
        raise ValueError(f'{error}: unpack region_descriptions.json.zip again') from None
