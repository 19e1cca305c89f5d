"""Caption every image of a folder, and of the folders in it: into one file, or into a text file beside each image.

    python -m prod.caption output/demo/data/flickr30k/flickr30k-images --weight output/demo/caption/best.pth \\
      --out output/captions.jsonl
    python -m prod.caption photos --weight W --sidecar --existing append
    find photos -name '*.jpg' | python -m prod.caption - --weight W --out - | jq .caption

The ending of --out chooses the format:

- .jsonl: a line {"path", "caption", "log_probability"} for each image, or {"path", "error"} for one that failed;
- .csv: the columns file_name, text (of an imagefolder's metadata.csv) and log_probability, a row for each caption;
- .parquet: the same columns.

log_probability is the mean of the caption's tokens: the lower, the more doubtful. A table is written from FILE.jsonl,
which grows beside it, once all images are through. The exit code is 1 if an image failed. Launched again, the same
command captions what has no caption yet, the failed images among them. The settings are kept in *.settings.json; with
others it starts over if `--overwrite` says so. A file name that is not UTF-8 is written with JSON escapes (Python's
`json.loads` gives back the path as `os.listdir` spells it), in CSV as the bytes it is, in parquet as a JSON string.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from configs.rules import whole
from data.distributed import progress
from data.json_lines import JsonLines, encoded
from prod import DLIPProd
from prod.caption_files import Captions, listed, shared_sidecars, sidecar, write_sidecar
from prod.images import find_images, is_excluded, read_image
from prod.options import generate_options, generate_settings, log_to_stderr, net_options, net_settings, output_file
from utils import clean_exit, logger, shorten


def given_images(source: str, exclude: list[str]) -> list[str]:
    """The images of a folder, or those that standard input names (`-`): one a line, or ended by NUL characters.

    Raises:
        FileNotFoundError: no such folder, or no image.
    """
    if source != '-':
        return find_images(source, exclude)
    said = sys.stdin.buffer.read() if sys.stdin is not None else b''
    names = said.split(b'\0') if b'\0' in said else [name.removesuffix(b'\r') for name in said.split(b'\n')]
    names = [os.fsdecode(name) for name in dict.fromkeys(names) if name]
    images = [name for name in names if not is_excluded(name, exclude)]
    if not images:
        raise FileNotFoundError(f'no path {"of an image that --exclude leaves " if names else ""}on standard input')
    return images


def captions_file(text: str) -> Path | str:
    """argparse's type of --out."""
    if text == '-':
        return text
    path = output_file(text)
    if path.suffix.lower() not in ('.jsonl', '.csv', '.parquet'):
        raise argparse.ArgumentTypeError(f'must end in .jsonl, .csv or .parquet, or be -, got {shorten(path)}')
    return path


def record(path: str, found: tuple | list | None, error: str | None) -> dict:
    """What --out says of an image: `found` by `generate`, or the error."""
    if error is not None:
        return {'path': path, 'error': error}
    captions, scores = zip(*listed(found), strict=True)
    if len(captions) == 1:
        return {'path': path, 'caption': captions[0], 'log_probability': scores[0]}
    return {'path': path, 'caption': captions, 'log_probability': scores}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if an image failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='- reads paths from standard input instead: lines, or ended by NUL characters')
    parser.add_argument('--weight', required=True, help='a captioner: anything that DLIPProd takes')
    parser.add_argument('--out', type=captions_file, metavar='FILE', help='.jsonl, .csv or .parquet; goes on where it '
                        'ends; - writes JSON lines to standard output')
    parser.add_argument('--overwrite', action='store_true', help='start --out over')
    parser.add_argument('--sidecar', action='store_true', help='write captions to IMAGE.txt beside each image')
    parser.add_argument('--existing', choices=('skip', 'overwrite', 'append'), default='skip', help='what becomes of '
                        'text files that are there; append adds captions that they lack (default: %(default)s)')
    parser.add_argument('--exclude', action='append', default=[], metavar='GLOB', help='leave out files and folders of '
                        'this name or path within the folder; may be repeated')
    parser.add_argument('--batch_size', type=whole(1), default=32, help='default: %(default)s')
    net_options(parser)
    generate_options(parser)
    args = parser.parse_args(argv)
    if args.out is None and not args.sidecar:
        parser.error('where to? Give --out FILE, --sidecar or both')
    served = net_settings(args)
    if args.out == '-':
        log_to_stderr()
    paths, errors = given_images(args.folder, args.exclude), {}
    captioner = DLIPProd('caption', args.weight, **served)
    options = generate_settings(args)
    captioner.generate(Image.new('L', (9, 9)), **options)  # a bad setting ends it before anything is written
    done = set()
    with ExitStack() as held:
        if args.sidecar:
            errors |= shared_sidecars(paths)
            if args.folder != '-':
                held.enter_context(JsonLines(Path(args.folder) / '.captions').writing())
            if args.existing == 'skip' and not args.out:
                done = {os.path.realpath(path) for path in paths if os.path.lexists(sidecar(path))}
        if isinstance(args.out, Path):
            captions = Captions(args.out)
            held.enter_context(captions.lines.writing())
            done = captions.resume(captioner.generation | options | {
                'prompt': captioner.prompt, 'precision': args.precision, 'weights': captioner.fingerprint},
                args.overwrite)
        left = [path for path in paths if path in errors or os.path.realpath(path) not in done]
        logger.info('%d images, %d of them captioned already', len(paths), len(paths) - len(left))

        def opened(path: str):
            try:
                if path not in errors:
                    return read_image(path, path, False, args.memory)
            except ValueError as error:
                errors[path] = str(error)

        for start in progress(range(0, len(left), args.batch_size), desc='captions'):
            batch = left[start:start + args.batch_size]
            said = captioner.generate(map(opened, batch), batch_size=args.batch_size, scores=True, on_error='skip',
                                      **options)  # opens them one at a time
            if args.sidecar:
                for path, found in zip(batch, said, strict=True):
                    if found is not None:
                        errors |= write_sidecar(path, [text for text, _ in listed(found)], args.existing)
            records = [record(path, found, errors.get(path)) for path, found in zip(batch, said, strict=True)]
            if args.out == '-':
                sys.stdout.write(''.join(encoded(each).decode() for each in records))
                sys.stdout.flush()
            elif args.out:
                captions.lines.append(records)
        if isinstance(args.out, Path):
            captions.finish()
    for path in left:
        if path in errors:
            logger.warning('no caption: %s', shorten(ValueError(errors[path]), 1000))
    failed = sum(path in errors for path in left)
    logger.info('%d captions new, %d images failed', len(left) - failed, failed)
    return int(failed > 0)


if __name__ == '__main__':
    with clean_exit():
        sys.exit(main())
