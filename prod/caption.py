"""Caption every picture of a folder, and of the folders in it, into a file of JSON lines.

    python -m prod.caption output/demo/data/flickr30k/flickr30k-images --weight output/demo/caption/best.pth \\
      --out output/captions.jsonl

Each line is {"path": ..., "caption": ...}, or {"path": ..., "error": ...} for a file that cannot be read. Launched
again, it goes on after the last whole line.
"""

import argparse
import json
import os
from pathlib import Path

from configs.rules import whole
from prod import DLIPProd
from prod.images import find_pictures, read_image
from utils import clean_exit, logger, make_output_dir, progress, setup_process


def whole_lines(out: Path) -> set[str]:
    """The paths that are in the file already; what follows the last line break is cut off."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    end = content.rfind(b'\n') + 1
    if end < len(content):
        os.truncate(out, end)
    try:
        return {json.loads(line)['path'] for line in content[:end].splitlines()}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{out} is there and holds something else than captions: name another --out') from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--weight', required=True, help='a captioner: anything that DLIPProd takes')
    parser.add_argument('--out', type=Path, required=True, help='file of JSON lines; goes on where it ends')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--precision', default='fp32', help='fp32, bf16 or int8 (default: %(default)s)')
    parser.add_argument('--backend', default='torch', help='torch or openvino (default: %(default)s)')
    parser.add_argument('--batch_size', type=whole(1), default=32, help='default: %(default)s')
    parser.add_argument('--num_beams', type=whole(1), help="default: the checkpoint's own, or 3")
    args = parser.parse_args(argv)
    device = setup_process(args.device)
    pictures = find_pictures(args.folder)
    make_output_dir(args.out.parent)
    done = whole_lines(args.out)
    captioner = DLIPProd('caption', args.weight, str(device), precision=args.precision,
                         backend=args.backend)
    left = [path for path in pictures if path not in done]
    logger.info('%d pictures, %d of them captioned already', len(pictures), len(pictures) - len(left))
    failed = 0
    with open(args.out, 'a', encoding='utf-8') as file:
        for start in progress(range(0, len(left), args.batch_size), desc='captions'):
            batch, images, lines = left[start:start + args.batch_size], [], {}
            for path in batch:
                try:
                    images.append(read_image(path, path))
                except ValueError as error:
                    lines[path] = {'path': path, 'error': str(error)}
                    failed += 1
            read = [path for path in batch if path not in lines]
            said = captioner.generate(images, batch_size=args.batch_size, num_beams=args.num_beams) if images else []
            lines |= {path: {'path': path, 'caption': text} for path, text in zip(read, said, strict=True)}
            file.write(''.join(f'{json.dumps(lines[path], ensure_ascii=False)}\n' for path in batch))
            file.flush()
    logger.info('%s: %d captions new, %d files that cannot be read', args.out, len(left) - failed, failed)


if __name__ == '__main__':
    with clean_exit():
        main()
