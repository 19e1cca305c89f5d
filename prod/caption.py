"""Caption every image of a folder, and of the folders in it, into a file of JSON lines.

    python -m prod.caption output/demo/data/flickr30k/flickr30k-images --weight output/demo/caption/best.pth \\
      --out output/captions.jsonl

Each line is {"path": ..., "caption": ...}, or {"path": ..., "error": ...} for a file that cannot be read; the exit code
is 1 if there is one. Launched again, it captions what has no caption yet, the failed files among them. The settings
are kept in OUT.settings.json; with others it starts over if `--overwrite` says so. A file name that is not UTF-8 is
written with JSON escapes: Python's `json.loads` gives back the path as `os.listdir` spells it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == '__main__':  # run by its path, a script finds its own folder first on the path of modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from configs.rules import whole
from data.json_lines import JsonLines
from models.weights.checkpoint import fingerprint
from prod import DLIPProd
from prod.images import find_pictures, read_image
from prod.options import net_options, net_settings, output_file
from utils import atomic_write, clean_exit, logger, progress


def captioned(lines: JsonLines, settings: dict) -> set[str]:
    """The real paths of the files that have a caption, however the folder was spelled; errors are dropped from the
    file, to be tried again.

    Raises:
        ValueError: the file holds something else, or captions made with other settings.
    """
    beside = settings_file(lines.path)
    try:
        records = list(lines.read())
        done = [{'path': record['path'], 'caption': record['caption']} for record in records if 'error' not in record]
    except (ValueError, KeyError):
        raise ValueError(f'{lines.path} is there and holds something else than captions: name another --out') from None
    if records:
        try:
            written = json.loads(beside.read_text(encoding='utf-8'))
            other = [f'{name} {written.get(name)}, now {value}' for name, value in settings.items()
                     if written.get(name) != value]
        except (OSError, ValueError, AttributeError):
            other = [f'unknown settings, as {beside} is not there']
        if other:
            raise ValueError(f'{lines.path} was made with other settings ({"; ".join(other)}): start over with '
                             f'--overwrite, or name another --out')
    if len(done) < len(records):
        lines.replace(done)
    with atomic_write(beside) as file:
        json.dump(settings, file, indent=1)
    return {os.path.realpath(record['path']) for record in done}


def settings_file(out: Path) -> Path:
    return out.with_name(f'{out.name}.settings.json')


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a file could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--weight', required=True, help='a captioner: anything that DLIPProd takes')
    parser.add_argument('--out', type=output_file, required=True, help='file of JSON lines; goes on where it ends')
    parser.add_argument('--overwrite', action='store_true', help='start the file over')
    net_options(parser)
    parser.add_argument('--batch_size', type=whole(1), default=32, help='default: %(default)s')
    parser.add_argument('--num_beams', type=whole(1), help="default: the checkpoint's own, or 3")
    args = parser.parse_args(argv)
    served = net_settings(args)
    paths, lines = find_pictures(args.folder), JsonLines(args.out)
    with lines.writing():
        captioner = DLIPProd('caption', args.weight, **served)
        settings = captioner.generation | {'prompt': captioner.prompt, 'precision': args.precision,
                                           'weights': fingerprint(captioner.net)}
        if args.num_beams is not None:
            settings['num_beams'] = args.num_beams
        if args.overwrite:
            lines.replace([])
        done, errors = captioned(lines, settings), {}
        left = [path for path in paths if os.path.realpath(path) not in done]
        logger.info('%d images, %d of them captioned already', len(paths), len(paths) - len(left))

        def opened(path: str):
            try:
                return read_image(path, path, False, args.memory)
            except ValueError as error:
                errors[path] = str(error)

        for start in progress(range(0, len(left), args.batch_size), desc='captions'):
            batch = left[start:start + args.batch_size]
            said = captioner.generate(map(opened, batch), batch_size=args.batch_size, num_beams=args.num_beams,
                                      on_error='skip')  # opens them one at a time
            lines.append({'path': path, 'error': errors[path]} if path in errors else {'path': path, 'caption': text}
                         for path, text in zip(batch, said, strict=True))
    logger.info('%s: %d captions new, %d files that cannot be read', args.out, len(left) - len(errors), len(errors))
    return int(bool(errors))


if __name__ == '__main__':
    with clean_exit():
        sys.exit(main())
