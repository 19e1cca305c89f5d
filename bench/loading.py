"""Load time and peak memory of a BLIP-Base captioner (224M parameters), ours beside transformers' `from_pretrained`.

    python -m bench.loading

Writes random weights of the real size once per format: the original `.pth`, the same with a momentum encoder and an
optimizer beside the net (what a training checkpoint holds), and a folder of safetensors. Each load is a fresh process;
the sides take turns, medians are printed. transformers maps the file and reads a weight at its first use, ours checks
every weight for NaN, so the time until all weights have been read is given too. Memory is the largest resident set,
mapped file pages included, with that of the imports alone beside it (Linux).
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from bench.common import fresh, in_turns
from configs.rules import whole
from eval.table import markdown
from models.blip import BLIP
from models.tokenizer import Tokenizer
from models.weights.checkpoint import architecture
from models.weights.transformers_format import write_folder
from utils import ROOT, clean_exit

OURS = """
from models.weights.checkpoint import load_model
from transformers import BlipConfig  # a folder's config.json is read by it: an import, as on the other side
start()
model = load_model(source, tokenizer='tests/vocab.txt')[0]
"""
THEIRS = """
from transformers import BlipForConditionalGeneration, logging
logging.disable_progress_bar()
start()
model = BlipForConditionalGeneration.from_pretrained(source).eval()
"""
# Seconds to load, seconds until all weights were read, MiB after the imports, MiB at most.
CHILD = """
import json, re, sys, time
import torch
source, started = sys.argv[1], []
def peak():
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
def start():
    started.append((time.perf_counter(), peak()))
{}
loaded = time.perf_counter() - started[0][0]
total = sum(float(weight.sum()) for weight in model.parameters())  # as its first use would, read every weight
print(json.dumps([loaded, time.perf_counter() - started[0][0], started[0][1], peak()]))
"""


def write_sources(folder: Path) -> dict[str, Path]:
    tokenizer = Tokenizer.from_file(ROOT / 'tests' / 'vocab.txt')
    model = BLIP(architecture('base', 384, len(tokenizer), 'caption'))
    weights = model.state_dict()
    sources = {'folder': folder / 'folder', 'original .pth': folder / 'caption.pth',
               'training .pth': folder / 'training.pth'}
    write_folder(sources['folder'], model, tokenizer, {})
    torch.save({'model': weights}, sources['original .pth'])
    average = {f'visual_encoder_m.{name}': weight.clone() for name, weight in model.visual_encoder.state_dict().items()}
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.save({'model': weights | average, 'optimizer': {'exp_avg': state}}, sources['training .pth'])
    return sources


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=whole(1), default=5, help='loads of each kind (default: %(default)s)')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        sources = write_sources(Path(place))
        sides = {'transformers, folder': (THEIRS, sources['folder']),
                 **{f'DLIP, {name}': (OURS, source) for name, source in sources.items()}}
        sizes = {name: sum(file.stat().st_size for file in ([source] if source.is_file() else source.iterdir()))
                 for name, (_, source) in sides.items()}
        medians = in_turns({name: partial(fresh, CHILD.format(code), source) for name, (code, source) in sides.items()},
                           args.rounds)
    reference = medians['transformers, folder']
    print(markdown([{'load': name, 'file (MiB)': f'{sizes[name] / 2 ** 20:.0f}', 'load (s)': f'{seconds:.2f}',
                     'its ratio': f'{seconds / reference[0]:.2f}', 'until read (s)': f'{read:.2f}',
                     'ratio of that': f'{read / reference[1]:.2f}', 'imports (MiB)': f'{before:.0f}',
                     'peak (MiB)': f'{peak:.0f}', 'ratio of peaks': f'{peak / reference[3]:.2f}'}
                    for name, (seconds, read, before, peak) in medians.items()]))
    print(f'\nMedians of {args.rounds} loads each, files in the page cache.')


if __name__ == '__main__':
    with clean_exit():
        main()
