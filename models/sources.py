"""Where weights come from: a path, a URL or the Hugging Face hub; torch or safetensors files, memory-mapped.

Every torch file is read `weights_only`, so that nothing in it can run code.
"""

import os
import pickle
import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils import barrier, is_main, shorten

WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')  # of a folder or repository, the better one first
SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')


def is_url(source: str | os.PathLike) -> bool:
    return str(source).startswith(('http://', 'https://'))


def names_a_file(source: str | os.PathLike) -> bool:
    """Whether a source is one file (there or not) rather than a folder or a name on the hub."""
    return is_url(source) or Path(source).suffix in SUFFIXES or Path(source).is_file()


def local_file(source: str | os.PathLike) -> Path:
    """The path of a file; of a URL its copy in torch.hub's cache, downloaded when absent (once per machine).

    A checksum in the name, by torch.hub's convention (`deit_small_patch16_224-cd65a155.pth`), is checked.

    Raises:
        FileNotFoundError: no such file, or the download failed (a part of a file is never kept).
    """
    if not is_url(source):
        if not Path(source).is_file():
            raise FileNotFoundError(f'no checkpoint {source}')
        return Path(source)
    path = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(str(source)).path).name
    if not path.is_file() and downloads():
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = re.search(r'-([a-f0-9]{8,})\.', path.name)
        try:
            torch.hub.download_url_to_file(str(source), str(path), checksum and checksum[1], progress=is_main())
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f'cannot download {source} ({error}): fetch it on another machine and give its '
                                    f'path') from None
    barrier()
    return path


def find_file(source: str | os.PathLike, *names: str) -> Path:
    """The first of `names` that is in a folder, or in a repository of the hub.

    Raises:
        FileNotFoundError: neither has one of them; one message, which says what to do.
    """
    if not Path(source).is_dir():
        return hub_file(str(source), *names)
    for name in names:
        if (Path(source) / name).is_file():
            return Path(source) / name
    raise FileNotFoundError(f'the folder {source} has no {" or ".join(names)}')


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
            f'{repository}`, copy the folder that it prints, and give its path instead of the name')
    return path


def downloads() -> bool:
    """Whether this process downloads for its machine; the others wait for it."""
    return int(os.environ.get('LOCAL_RANK', 0)) == 0


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
            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and zipped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = f'needs the code of {wanted[1]}' if wanted else 'is damaged or needs code'
        raise ValueError(f'{path} {reason} to be read, which is refused: whoever made it can save its state_dict '
                         f'alone') from None
    except (RuntimeError, EOFError, OSError, KeyError, SafetensorError) as error:
        raise ValueError(f'{path} is not a readable checkpoint, it may be truncated '
                         f'({str(error).splitlines()[0][:120]}): download or train it again') from None
