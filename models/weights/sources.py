"""Where weights and vocabularies come from: a path, a URL or the Hugging Face hub; torch or safetensors files,
memory-mapped.

Every torch file is read `weights_only`, so that nothing in it can run code.
"""

import io
import json
import os
import pickle
import posixpath
import re
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load, load_file

from data.distributed import barrier, local_rank, progress
from models.tokenizer import Tokenizer
from models.weights.checks import check_tensors
from utils import atomic_write, shorten

INDEX = '.index.json'  # of weights that are split over several files
# Of a folder or repository, the better one first.
WEIGHT_FILES = tuple(f'{name}{end}' for name in ('model.safetensors', 'pytorch_model.bin') for end in ('', INDEX))
VOCABULARY_FILES = ('vocab.txt', 'tokenizer.json')
SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')
TIMEOUT = 60  # seconds that a server may say nothing


def is_url(source: str | os.PathLike) -> bool:
    return str(source).startswith(('http://', 'https://'))


def names_a_file(source: str | os.PathLike) -> bool:
    """Whether a source is one file (there or not) rather than a folder or a name on the hub."""
    path = Path(source)
    return is_url(source) or os.path.isfile(source) or (path.suffix in SUFFIXES and not os.path.isdir(source))


def local_file(source: str | os.PathLike) -> Path:
    """The path of a file; of a URL its copy in torch.hub's cache, downloaded when absent (once per machine).

    The copy is named by a hash of the whole URL: files of one name at two addresses are two files.

    Raises:
        FileNotFoundError: no such file, or the download failed.
    """
    if not is_url(source):
        if not os.path.isfile(source):
            raise FileNotFoundError(f'no checkpoint {shorten(Path(source))}')
        return Path(source)
    url = str(source)
    name = re.sub(r'[^\w.-]', '_', unquote(url_name(url)))[-80:]
    digest = sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / 'checkpoints' / f'{digest}-{name}'
    if not path.is_file() and downloads():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(url, path)
        except (OSError, HTTPException, ValueError) as error:
            raise FileNotFoundError(f'cannot download {url} ({error}): fetch it on another machine and give its '
                                    f'path') from None
    barrier()
    return path


def url_name(url: str) -> str:
    """The last part of a URL's path."""
    return posixpath.basename(urlsplit(url).path)


def download(url: str, path: Path) -> None:
    """Fetch a file: whole, or not at all. Processes that fetch the same one do not disturb each other.

    A checksum in the name, by torch.hub's convention (`deit_small_patch16_224-cd65a155.pth`), is checked.

    Raises:
        OSError, HTTPException, ValueError: no answer, a bad address, too few bytes, or another checksum.
    """
    checksum, digest = re.search(r'-([a-f0-9]{8,})\.', url_name(url)), sha256()
    with atomic_write(path, 'wb') as file, \
            urlopen(Request(url, headers={'User-Agent': 'dlip'}), timeout=TIMEOUT) as answer, \
            progress(None, answer.length, url_name(url)) as bar:
        while chunk := answer.read(2 ** 20):
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
        if answer.length:
            raise OSError(f'the connection ended {answer.length} bytes early')
        if checksum and not digest.hexdigest().startswith(checksum[1]):
            raise OSError(f'its checksum is {digest.hexdigest()[:8]}, its name says {checksum[1]}')


def find_file(source: str | os.PathLike, *names: str) -> Path:
    """The first of `names` that is in a folder, in a repository of the hub, or beside a file or URL.

    Raises:
        FileNotFoundError: there is none; one message, which says what to do.
    """
    if is_url(source):
        parts = urlsplit(str(source))
        for name in names:
            try:
                return local_file(urlunsplit(parts._replace(path=posixpath.join(posixpath.dirname(parts.path), name))))
            except FileNotFoundError as error:
                missing = error
        raise missing
    folder = Path(source).parent if names_a_file(source) else Path(source)
    if not os.path.isdir(folder):
        return hub_file(str(source), *names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f'the folder {folder} has no {" or ".join(names)}')


def hub_file(repository: str, *names: str) -> Path:
    """The first of `names` in a repository of the hub: the cached copy, else downloaded (once per machine)."""
    from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def cached() -> Path | None:
        paths = (try_to_load_from_cache(repository, name) for name in names)
        return next((Path(path) for path in paths if isinstance(path, str)), None)

    try:
        if cached() is None and downloads():
            # asked first, since without a network the hub's client would retry for half a minute a file
            get_session().head(constants.ENDPOINT, timeout=10)
            for name in names:
                try:
                    hf_hub_download(repository, name)
                    break
                except LocalEntryNotFoundError:
                    raise
                except EntryNotFoundError:
                    continue
        barrier()
        path, reason = cached(), f'it has no {" or ".join(names)}'
    except Exception as error:  # the hub's client is httpx or httpx2, by its version
        path, reason = None, str(error).strip().splitlines()[0][:120]
    if path is None:
        raise FileNotFoundError(
            f'cannot get {shorten(repository)}: there is no such file or folder here, it is not in the cache of the '
            f'Hugging Face hub, and the hub did not supply it ({reason}). Where there is a network run `hf download '
            f'{shorten(Path(repository))}`, copy the folder that it prints, and give its path instead of the name')
    return path


def downloads() -> bool:
    """Whether this process downloads for its machine; the others wait for it."""
    return local_rank() == 0


def read_file(source: str | os.PathLike, mmap: bool = True):
    """The content of one file or URL (see `read_tensors`); an index of weights is followed to the files that it names.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is unreadable; of a URL the copy is deleted, so that the next run downloads it again.
    """
    path = local_file(source)
    try:
        return read_parts(source, path) if path.name.endswith(INDEX) else read_tensors(path, mmap)
    except ValueError:
        if is_url(source):
            path.unlink(missing_ok=True)
        raise


def read_weights(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict of a file, URL, folder or repository of the hub.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is unreadable, or no state dict.
    """
    if names_a_file(source):
        weights = read_file(source)
        weights = weights.get('model', weights) if isinstance(weights, dict) else weights  # as DeiT's own files
    else:
        path = find_file(source, *WEIGHT_FILES)
        weights = read_parts(source, path) if path.name.endswith(INDEX) else read_tensors(path)
    check_tensors(weights, source)
    return weights


def read_parts(source: str | os.PathLike, index: Path) -> dict[str, torch.Tensor]:
    """The weights of the files that an index names, which lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError('it names files of other folders')
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{index} is no index of weights ({shorten(error, 120)})') from None
    weights = {}
    for name in names:
        part = read_tensors(find_file(source, name))
        if not isinstance(part, dict):
            raise ValueError(f'{name}, which {index} names, holds no weights')
        weights |= part
    return weights


def is_utf8(path: Path) -> bool:
    """Whether a path is UTF-8, which torch and safetensors need to map a file."""
    return str(path).encode(errors='replace') == os.fsencode(path)


def read_tensors(path: Path, mmap: bool = True) -> dict:
    """The content of a torch or safetensors file on the CPU, mapped rather than copied where the format allows.

    The format is told by the first bytes, whatever the file is called.

    Raises:
        ValueError: truncated, of no such format, or a pickle that would need code.
    """
    with open(path, 'rb') as file:
        start = file.read(16)
    zipped = start.startswith(b'PK\x03\x04')  # torch < 1.6 wrote a plain pickle, which cannot be mapped
    if not (zipped or start.startswith(b'\x80') or start[8:9] == b'{'):
        what = f'another kind of file, which starts with {start}' if start else 'empty'
        raise ValueError(f'{path} holds no weights, it is {what}: download or copy it again')
    try:
        if not zipped and start[8:9] == b'{':
            return load_file(path) if is_utf8(path) else load(path.read_bytes())
        if not is_utf8(path):
            return torch.load(io.BytesIO(path.read_bytes()), map_location='cpu', weights_only=True)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and zipped)
    except MemoryError:
        raise  # the machine's fault
    except pickle.UnpicklingError as error:
        wanted = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = f'needs the code of {wanted[1]}' if wanted else 'is damaged or needs code'
        raise ValueError(f'{path} {reason} to be read, which is refused: whoever made it can save its state_dict '
                         f'alone') from None
    except Exception as error:  # torch's reader trusts the file: what a damaged one raises has no common kind
        raise ValueError(f'{path} is not a readable checkpoint, it may be truncated '
                         f'({(str(error).splitlines() or [type(error).__name__])[0][:120]}): download or train it '
                         f'again') from None


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Read a `vocab.txt`, a folder that holds one, or a tokenizer of the Hugging Face hub by name.

    Raises:
        FileNotFoundError: neither a local vocabulary nor reachable or cached on the hub.
        ValueError: the file is damaged, or no vocabulary of a BERT.
    """
    if not os.path.isfile(name_or_path):
        try:
            name_or_path = find_file(name_or_path, *VOCABULARY_FILES)
        except FileNotFoundError as error:
            raise FileNotFoundError(f'no vocabulary {shorten(str(name_or_path), 400)}: {error}, or a '
                                    f'vocab.txt') from None
    return Tokenizer.from_file(Path(name_or_path))
