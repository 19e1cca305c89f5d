"""The image files of a folder and the folders in it."""

import os
from collections import Counter, deque
from functools import cache

from PIL import Image

from data.images import FORMATS, readers
from utils import logger, shorten

HEIF_ENDINGS = ('.heic', '.heif', '.hif', '.heics', '.heifs')
# what systems put beside one's own files, in lower case
SYSTEM = {'@eadir', '@recycle', '@tmp', '#recycle', '#snapshot', '__macosx', '$recycle.bin', 'lost+found',
          'system volume information', 'thumbs.db', 'ehthumbs.db', 'desktop.ini'}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or was put there by a system."""
    return name.startswith(('.', '~$')) or name.lower() in SYSTEM


@cache
def image_endings() -> set[str]:
    """The endings of the names of image files that can be read here, in lower case, with the dot."""
    readers()  # registers the formats
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS and kind in Image.OPEN
            } | {'.mpo'}


def list_images(folder: str | os.PathLike) -> list[str]:
    """The image files of a folder and the folders in it, by their names' endings, in order of their paths.

    Links are followed; what is reached by several ways is listed once, under the path without a link if there is one.
    What is passed over is counted in the log: hidden and system files, other endings, folders that cannot be read.

    Raises:
        FileNotFoundError: no such folder.
        PermissionError: the folder itself cannot be read.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f'no folder {shorten(os.fsdecode(folder), 400)}')
    os.scandir(folder).close()
    endings, others, unreadable, hidden = image_endings(), Counter(), [], 0
    found: dict[str, str] = {}  # real path -> path
    folders, linked, links, seen = deque([os.fsdecode(folder)]), deque(), [], set()
    while folders or linked:
        here = folders.popleft() if folders else linked.popleft()  # links last
        try:
            state, real = os.stat(here), os.path.realpath(here)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(here) as scanned:
                entries = list(scanned)
        except OSError as error:
            unreadable.append(f'{here!r} ({error.strerror})')
            continue
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            if is_hidden(entry.name):
                hidden += 1
            elif is_folder(entry):
                (linked if entry.is_symlink() else folders).append(entry.path)
            elif ending not in endings:
                others[ending or 'without ending'] += 1
            elif entry.is_symlink():
                links.append(entry.path)
            elif entry.is_file():
                found[os.path.join(real, entry.name)] = entry.path
            else:
                others[f'{ending} that are no regular files'] += 1
    for path in links:
        if os.path.isfile(path):
            found.setdefault(os.path.realpath(path), path)
        else:
            others['broken links'] += 1
    report(os.fsdecode(folder), hidden, others, unreadable)
    return sorted(found.values())


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def report(folder: str, hidden: int, others: Counter, unreadable: list[str]) -> None:
    """Log what a scan passed over."""
    if hidden or others:
        kinds = ', '.join(f'{count} {kind}' for kind, count in others.most_common(10))
        more = f' and {len(others) - 10} other kinds' if len(others) > 10 else ''
        logger.info('%s: passed over %d files that are no images%s and %d hidden or system files or folders', folder,
                    others.total(), f' ({kinds}{more})' if kinds else '', hidden)
    heif = sum(others[ending] for ending in HEIF_ENDINGS)
    if heif:
        logger.warning('%s: %d HEIC files are left out: reading them needs the package pillow-heif '
                       '(pip install pillow-heif)', folder, heif)
    if unreadable:
        logger.warning('%s: %d folders cannot be read and are left out, for example %s', folder, len(unreadable),
                       unreadable[0][:300])
