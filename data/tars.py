"""A shard, which is a tar in a file or from a command, as samples of an image and its caption."""

import io
import json
import os
import re
import signal
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen, set_options

from data.captions import storable
from data.folders import open_regular
from utils import logger

MOST = 10 ** 9  # images of a shard
IMAGES = ('jpg', 'jpeg', 'png', 'webp')
TAR = re.compile(r'\.(tar(\.(gz|bz2|xz))?|tgz)(?![\w.])', re.IGNORECASE)
SCHEME = re.compile(r'[a-z][a-z0-9+-]+:', re.IGNORECASE)  # of two letters or more: C: is a drive
NAME = re.compile(r'((?:.*/)?[^/.]+)\.([^/]+)', re.DOTALL)  # webdataset's key and suffix; none of a hidden file


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A local file, or the output of a command (`pipe:COMMAND`, or webdataset's for an address).

    Raises:
        OSError: in place of an error in the block, where the command has failed: says how.
    """
    if not SCHEME.match(url):
        with open_regular(url) as file:
            yield file
        return
    with tempfile.TemporaryFile() as said:
        stream = Pipe(url[len('pipe:'):], mode='rb', shell=True, stderr=said) if url.startswith('pipe:') else gopen(url)
        set_options(stream, ignore_errors=True)  # webdataset's would come from a destructor, with a traceback
        try:
            yield stream
            while stream.read(2 ** 20):  # the padding of a tar
                pass
        except Exception:
            failed = failure(stream, said)
            if failed:
                raise OSError(failed) from None
            raise
        else:
            if failed := failure(stream, said):
                raise OSError(failed)
        finally:
            stream.close()


def one_line_of(error: Exception) -> str:
    return ' '.join(str(error).split())[:200]


def failure(stream: BinaryIO, said: BinaryIO) -> str:
    """What a command has failed of; '' if it has not, or because nobody read on."""
    stream.close()
    code = stream.proc.returncode if isinstance(stream, Pipe) else 0
    if code in (0, -signal.SIGPIPE, 128 + signal.SIGPIPE):
        return ''
    said.seek(0)
    lines = said.read().decode(errors='replace').split('\n')
    return f'the command failed (exit code {code}) {" ".join(filter(None, map(str.strip, lines)))[:200]}'.strip()


def open_tar(file: BinaryIO, stream: bool) -> tarfile.TarFile:
    """Args: stream: it cannot be read again from its start, as is done where the first header is broken."""
    try:
        return tarfile.open(fileobj=file, mode='r|*' if stream else 'r:*')
    except tarfile.ReadError:
        if not stream:
            file.seek(0)
            with suppress(tarfile.ReadError):
                tar = tarfile.open(fileobj=file, mode='r:', ignore_zeros=True)
                if tar.firstmember:
                    return tar
        raise


def members(url: str) -> Iterator[tuple[str, str, BinaryIO]]:
    """(key, suffix in lower case, content) of the files in a shard; each must be read before the next.

    By webdataset's rule the key ends at the first dot of the file name. Hidden files (macOS's `._NAME`), folders and
    links are passed over.
    """
    with opened(url) as file, open_tar(file, bool(SCHEME.match(url))) as tar:
        tar.ignore_zeros = True  # a broken header costs one file, and tars that were joined are read to the end
        for member in tar:
            tar.members = []  # would grow
            name = NAME.fullmatch(member.name)
            if name and member.isreg():
                yield name[1], name[2].lower(), tar.extractfile(member)


def image_suffix(suffixes: Iterable[str]) -> str | None:
    """The suffix of a sample's image: `jpg` and its like, else the first that ends in one (`0001.jpg`)."""
    return min((suffix for suffix in suffixes if suffix.rpartition('.')[2] in IMAGES),
               key=lambda suffix: '.' in suffix, default=None)


def count_images(url: str) -> int:
    """Samples with an image in a shard, from img2dataset's _stats.json beside it or, without one, from the tar itself.

    Raises:
        ValueError: neither can be read.
    """
    *_, mark = [None, *TAR.finditer(url)]
    if mark:
        quiet = ' 2>/dev/null' if url.startswith('pipe:') and os.name == 'posix' else ''  # often there is none
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError), \
                opened(f'{url[:mark.start()]}_stats.json{url[mark.end():]}{quiet}') as file:
            successes = int(json.loads(file.read())['successes'])
            if 0 <= successes < MOST:
                return successes
    count = more = 0
    try:
        with closing(members(url)) as files:
            for _, sample in groupby(files, itemgetter(0)):
                images = sum(suffix.rpartition('.')[2] in IMAGES for _, suffix, _ in sample)
                count, more = count + (images > 0), more + max(0, images - 1)
    except Exception as error:  # whatever files, commands, decompressors and tars raise
        if not count:
            raise ValueError(f'{url} cannot be read as a tar: {one_line_of(error)}. Download it again or leave it out '
                             f'of data.train') from None
        logger.warning('%s breaks off after %d images: %s', url, count, one_line_of(error))
    if more:
        logger.warning('%s: %d images are left out: their names are those of others up to the first dot, and a sample '
                       'has one image', url, more)
    return count


def read_samples(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {suffix: content} of its image, text and record) of a shard's samples, in their order.

    Raises:
        Exception: whatever is met in a damaged shard, after the samples before the damage.
    """
    with closing(members(url)) as files:
        for key, sample in groupby(files, itemgetter(0)):
            yield key, {suffix: file.read() for _, suffix, file in sample
                        if suffix.rpartition('.')[2] in (*IMAGES, 'txt', 'json')}


def read_shard(url: str) -> Iterator[tuple[io.BytesIO, str]]:
    """(encoded image, raw caption) of a shard's samples that have an image, in their order.

    Raises: see `read_samples`.
    """
    with closing(read_samples(url)) as samples:
        for key, parts in samples:
            suffix = image_suffix(parts)
            if suffix:
                image = io.BytesIO(parts[suffix])
                image.name = f'{url}/{key}.{suffix}'
                yield image, caption_of(parts, suffix)


def caption_of(parts: dict[str, bytes], image: str) -> str:
    """The text of a sample, else the caption of its record: those of the image's own name first (`0001.txt`).

    Args:
        image: the suffix of its image.
    """
    def find(kind: str) -> bytes | None:
        names = [f'{image.rpartition(".")[0]}.{kind}', kind, *(name for name in parts if name.endswith(f'.{kind}'))]
        return next((parts[name] for name in names if name in parts), None)
    if (text := find('txt')) is not None:
        return text.decode('utf-8-sig', errors='replace')
    with suppress(TypeError, ValueError, AttributeError, RecursionError):
        return storable(json.loads(find('json')).get('caption') or '')
    return ''
