"""What a setting does to the demo's student: pre-train it once per variant and compare on validation scenes.

    make demo    # once, for the data
    python -m bench.ablation --variant '' --variant loss.image_tokens=0 --variant model.init_vision=null

Each variant is the demo's pre-training with those settings overridden; it is measured right after pre-training, with
no finetune. Recalls are by the embeddings alone and with the best 10 re-ranked by matching. A variant whose output is
there already is not trained again. Prints a Markdown table, also written to OUTPUT_DIR/ablation.md.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from data.datasets import ImageTextEval
from data.transforms import eval_transform
from eval.caption import evaluate_captions
from eval.report import markdown
from eval.retrieval import evaluate_retrieval
from models.checkpoint import load_model
from models.logs import read_log
from utils import ROOT, atomic_write, clean_exit, load_config, make_output_dir

CONFIGS = ROOT / 'configs'


def train(overrides: list[str], folder: Path) -> float:
    """Pre-train a variant on two processes; returns the minutes it took (0 when it was there)."""
    started = time.perf_counter()
    if not (folder / 'done').exists():
        command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'pretrain_dlip.py', '--config',
                   'configs/demo/pretrain.yaml', '--output_dir', str(folder), *overrides]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        (folder / 'done').write_text(f'{(time.perf_counter() - started) / 60:.1f}')
    return float((folder / 'done').read_text())


def measure(folder: Path) -> dict[str, str]:
    """Validation figures of a pre-trained student."""
    retrieval = load_config(CONFIGS / 'demo/retrieval_flickr.yaml', 'configs/retrieval_flickr.yaml')
    caption = load_config(CONFIGS / 'demo/caption_flickr.yaml', 'configs/caption_flickr.yaml')
    model, tokenizer, _ = load_model(folder / 'last.pth')
    data = retrieval['data']
    dataset = ImageTextEval(data['root'], 'val', eval_transform(model.config.image_size), data['max_words'],
                            data['split'])
    row = {}
    for k_test, label in ((0, ''), (10, ' re-ranked')):
        scores = evaluate_retrieval(model, tokenizer, dataset, max_tokens=data['max_tokens'],
                                    **retrieval['eval'] | {'k_test': k_test})
        row |= {f'{way} R@1{label}': f'{scores[f"{way}_r1"]:.1f}' for way in ('txt', 'img')}
    said, _ = evaluate_captions(model, tokenizer, dataset, prompt=caption['data']['prompt'], **caption['eval'])
    last = read_log(folder / 'log.txt')[-1]
    return row | {'CIDEr': f'{said["CIDEr"]:.1f}', 'exact %': f'{said["exact"]:.1f}',
                  'LM loss': f'{last["train_loss_lm"]:.3f}'}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--variant', action='append', required=True, metavar="'KEY=VALUE ...'",
                        help="settings to override, '' for none; give it once per variant")
    parser.add_argument('--shared', nargs='*', default=[], metavar='KEY=VALUE', help='overridden in every variant')
    parser.add_argument('--output_dir', default='output/ablation', help='default: %(default)s')
    args = parser.parse_args(argv)
    output_dir, rows = make_output_dir(args.output_dir), []
    for variant in args.variant:
        overrides = [*args.shared, *variant.split()]
        folder = make_output_dir(output_dir / ('_'.join(overrides).replace('/', '-') or 'demo'))
        minutes = train(overrides, folder)
        rows.append({'variant': variant or 'the demo', **measure(folder), 'minutes': f'{minutes:.1f}'})
        with atomic_write(output_dir / 'ablation.md') as file:
            file.write(markdown(rows))
        print(markdown(rows), flush=True)


if __name__ == '__main__':
    with clean_exit():
        main()
