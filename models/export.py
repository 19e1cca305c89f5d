"""Write the net of a training checkpoint, in float16 and without optimizer and queues, for handing on.

    python -m models.export output/demo/teacher/last.pth data/demo_teacher.pth --metrics output/demo/teacher/table.json
"""

import argparse
import json
from pathlib import Path

import torch

from models.checkpoint import load_model, save_checkpoint
from utils import clean_exit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path)
    parser.add_argument('--metrics', type=Path, help='JSON of an evaluation, to travel with the weights')
    args = parser.parse_args(argv)
    model, tokenizer, info = load_model(args.source)
    metrics = json.loads(args.metrics.read_text(encoding='utf-8')) if args.metrics else info.get('metrics')
    # the word embedding is stored once: torch.save keeps shared tensors shared, and half() shares them again
    save_checkpoint(args.target, model.to(torch.float16), tokenizer, info['config'], seed=info.get('seed'),
                    metrics=metrics)
    print(f'{args.target}: {args.target.stat().st_size / 2 ** 20:.1f} MiB')


if __name__ == '__main__':
    with clean_exit():
        main()
