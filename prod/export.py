"""Hand a trained net on, without optimizer and queues: as one `.pth`, or as a folder for the Hugging Face hub.

    python -m prod.export output/caption_flickr/best.pth save/dlip-caption
    python -m prod.export output/pretrain/last.pth save/dlip-caption --task caption # of a net that does both
    python -m prod.export output/demo/teacher/all/last.pth data/demo_teacher.pth --half

SOURCE is anything that DLIPProd takes, so that BLIP's and dlip-v2's original files are converted too.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from signals import end_at_once
    end_at_once()

import argparse
import json
from pathlib import Path

import torch

from configs.rules import output_path
from eval.common import tokenizer_option
from models.weights.checkpoint import load_model, save_checkpoint
from models.weights.transformers_format import write_folder
from utils import clean_exit, make_output_dir, shorten


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='file, URL, folder or name on the hub')
    parser.add_argument('target', type=output_path, help='a .pth, or a folder to be made')
    parser.add_argument('--task', choices=('caption', 'retrieval'), help='only the parts of this task (default: all)')
    parser.add_argument('--half', action='store_true', help='float16 (default: float32)')
    parser.add_argument('--metrics', type=Path, help='JSON of an evaluation, to travel with the weights')
    tokenizer_option(parser)
    args = parser.parse_args(argv)
    try:
        metrics = {'metrics': json.loads(args.metrics.read_text(encoding='utf-8'))} if args.metrics else {}
    except (OSError, ValueError) as error:
        raise ValueError(f'--metrics {shorten(args.metrics)} is no JSON file that can be read: '
                         f'{getattr(error, "strerror", None) or shorten(error)}') from None
    make_output_dir(args.target.parent, 'TARGET')
    model, tokenizer, info = load_model(args.source, task=args.task, tokenizer=args.tokenizer)
    info |= metrics
    if args.half:
        model = model.to(torch.float16)
    if args.target.suffix == '.pth':
        save_checkpoint(args.target, model, tokenizer, info.get('config', {}), metrics=info.get('metrics'))
        size = args.target.stat().st_size
    else:
        write_folder(args.target, model, tokenizer, info)
        size = sum(file.stat().st_size for file in args.target.iterdir() if file.is_file())
    print(f'{args.target}: a {model.config.task} net, {size / 2 ** 20:.1f} MiB')


if __name__ == '__main__':
    with clean_exit():
        main()
