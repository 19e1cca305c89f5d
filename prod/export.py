"""Hand a trained net on, without optimizer and queues: as one `.pth`, as a folder for the Hugging Face hub, or as ONNX.

    python -m prod.export output/caption_flickr/best.pth save/dlip-caption
    python -m prod.export output/pretrain/last.pth save/dlip-caption --task caption # of a net that does both
    python -m prod.export output/demo/teacher/all/last.pth data/demo_teacher.pth --precision fp16
    python -m prod.export output/pretrain/last.pth save/dlip-onnx --format onnx --precision int8

SOURCE is anything that DLIPProd takes, so that BLIP's and dlip-v2's original files are converted too. `--format onnx`
needs the packages onnx and onnxruntime. Its folder holds a graph for each part of the net (prod/onnx_export.py says
which) over one file of weights, config.json and the tokenizer; `DLIPProd(..., backend='onnx')` serves it.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import json
from pathlib import Path

import torch

from configs.rules import output_path
from eval.common import tokenizer_option
from models.weights.checkpoint import load_model, save_checkpoint
from models.weights.transformers_format import write_folder
from prod.onnx_export import PRECISIONS, export_onnx
from utils import clean_exit, make_output_dir, shorten


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='file, URL, folder or name on the hub')
    parser.add_argument('target', type=output_path, help='a .pth, or a folder to be made')
    parser.add_argument('--task', choices=('caption', 'retrieval'), help='only the parts of this task (default: all)')
    parser.add_argument('--format', choices=('torch', 'onnx'), default='torch', help='torch: a .pth or a folder of the '
                        'transformers layout, by the ending of TARGET (default: %(default)s)')
    parser.add_argument('--precision', choices=PRECISIONS, default='fp32', help='of the weights; int8 needs --format '
                        'onnx (default: %(default)s)')
    parser.add_argument('--half', dest='precision', action='store_const', const='fp16', help='--precision fp16')
    parser.add_argument('--metrics', type=Path, help='JSON of an evaluation, to travel with the weights')
    tokenizer_option(parser)
    args = parser.parse_args(argv)
    if args.precision == 'int8' and args.format != 'onnx':
        raise ValueError('--precision int8 needs --format onnx')
    try:
        metrics = {'metrics': json.loads(args.metrics.read_text(encoding='utf-8'))} if args.metrics else {}
    except (OSError, ValueError) as error:
        raise ValueError(f'--metrics {shorten(args.metrics)} is no JSON file that can be read: '
                         f'{getattr(error, "strerror", None) or shorten(error)}') from None
    make_output_dir(args.target.parent, 'TARGET')
    model, tokenizer, info = load_model(args.source, task=args.task, tokenizer=args.tokenizer)
    info |= metrics
    if args.format == 'onnx':
        export_onnx(args.target, model, tokenizer, info, args.precision)
    else:
        if args.precision == 'fp16':
            model = model.to(torch.float16)
        if args.target.suffix == '.pth':
            save_checkpoint(args.target, model, tokenizer, info.get('config', {}), metrics=info.get('metrics'))
        else:
            write_folder(args.target, model, tokenizer, info)
    files = args.target.iterdir() if args.target.is_dir() else [args.target]
    size = sum(file.stat().st_size for file in files if file.is_file())
    print(f'{args.target}: a {model.config.task} net, {size / 2 ** 20:.1f} MiB')


if __name__ == '__main__':
    with clean_exit():
        main()
