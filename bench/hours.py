"""Hours of the original's pre-training, 5 million pairs times 20 epochs, at the rate that was measured on one GPU.

    python -m bench.hours

A step of several GPUs is one GPU's and then the exchange of its gradients by NVLink, though DDP exchanges most of them
while the backward pass runs. Loading is taken to keep up.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse

from bench.figures import read
from utils import ROOT, clean_exit

PAIRS, EPOCHS = 5e6, 20  # of the original's pre-training
NVLINK = 300e9  # bytes a second that an H100 can send to others


def hours(batch: int, seconds: float, gradients: float, gpus: int) -> float:
    """Of the whole run.

    Args:
        batch, seconds: of one GPU's step.
        gradients: bytes of the trained parameters' gradients.
    """
    exchange = 2 * (gpus - 1) / gpus * gradients / NVLINK  # of a ring all-reduce
    return PAIRS * EPOCHS / (gpus * batch) * (seconds + exchange) / 3600


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    run = next(run for run in read(ROOT / 'bench/train_step.json') if 'H100' in run['machine'])
    title, rows = next(item for item in run['tables'].items() if item[0].startswith('The script itself'))
    rate = {row['what']: float(row['value']) for row in rows}
    sent = next(float(row['MB sent by a process']) for other in read(ROOT / 'bench/traffic.json')
                for row in other['tables'].get('What 4 processes exchange', ())
                if row['exchange'].startswith('all_reduce'))
    print(f'The whole run on GPUs such as {run["machine"]} ({title})\n\n| GPUs | pairs/s | hours |\n|---:|---:|---:|')
    for gpus in (1, 4, 8):
        found = hours(288, 288 / rate['pairs/s'], sent * 1e6 / 1.5, gpus)
        print(f'| {gpus} | {PAIRS * EPOCHS / found / 3600:.0f} | {found:.1f} |')


if __name__ == '__main__':
    with clean_exit():
        main()
