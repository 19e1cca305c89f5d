"""What a user waits for: imports, loading and the first captions, in a fresh process each time.

    python -m bench.first_call

transformers' BLIP-Base and DLIP's student at 384 px, random weights in a folder of safetensors, one picture, greedy, 20
new tokens forced; the sides take turns, medians of seconds. Files are in the page cache.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image

from bench.common import fresh, in_turns
from bench.inference import SERVED
from configs.rules import whole
from eval.table import markdown
from models.blip import BLIP
from models.tokenizer import Tokenizer
from models.weights.checkpoint import architecture
from models.weights.transformers_format import write_folder
from utils import ROOT, clean_exit

DLIP = """
from prod import DLIPProd
lap()
dlip = DLIPProd('caption', source, precision={!r}, backend={!r})
lap()
def caption():
    dlip.generate(picture, num_beams=1, min_length=24, max_length=24)
"""
TRANSFORMERS = """
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessor, logging
logging.disable_progress_bar()
lap()
model, tokenizer = BlipForConditionalGeneration.from_pretrained(source), AutoTokenizer.from_pretrained(source)
processor = BlipImageProcessor()
lap()
def caption():
    pixels = processor(picture, return_tensors='pt')['pixel_values']
    ids = tokenizer('a picture of', return_tensors='pt').input_ids
    model.generate(pixels, ids, min_new_tokens=20, max_new_tokens=20, do_sample=False)
"""
CHILD = """
import json, sys, time
times = [time.perf_counter()]
def lap():
    times.append(time.perf_counter())
import torch
torch.set_num_threads(2)
from PIL import Image
source, picture = sys.argv[1], Image.open(sys.argv[2])
{}
for _ in range(3):
    caption()
    lap()
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=whole(1), default=3, help='default: %(default)s')
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(ROOT / 'tests' / 'vocab.txt')
    with tempfile.TemporaryDirectory() as place:
        folders = {size: Path(place) / size for size in ('base', 'small')}
        for size, folder in folders.items():
            write_folder(folder, BLIP(architecture(size, 384, len(tokenizer), 'caption')), tokenizer, {})
        picture = Path(place) / 'picture.jpg'
        Image.effect_noise((640, 480), 80).convert('RGB').save(picture)
        sides = {'transformers base': (TRANSFORMERS, folders['base'])}
        sides |= {f'DLIP {precision} {backend}': (DLIP.format(precision, backend), folders['small'])
                  for precision, backend in SERVED}
        times = in_turns({side: partial(fresh, CHILD.format(code), folder, picture)
                          for side, (code, folder) in sides.items()}, args.rounds)
    columns = [f'{name} (s)' for name in ('imports', 'load', 'first caption', 'second', 'third', 'all of it')]
    print(markdown([{'side': side} | {name: f'{value:.2f}' for name, value in
                                      zip(columns, [*medians, sum(medians)], strict=True)}
                    for side, medians in times.items()]))


if __name__ == '__main__':
    with clean_exit():
        main()
