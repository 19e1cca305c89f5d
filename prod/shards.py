"""Caption, score, embed and filter img2dataset's tars: BLIP's CapFilt, on one machine or on a Ray cluster.

    pip install -r requirements-scale.txt
    python prod/shards.py 'cc3m/{00000..00331}.tar' --out output/cc3m --caption output/demo/pretrain/last.pth \\
      --retrieval output/demo/pretrain/last.pth --min_itm 0.5
    python pretrain_dlip.py data.train=output/cc3m/filtered ...

SOURCE is what pretrain_dlip.py takes as data.train: a pattern, a folder of tars, several of them joined by `::`,
`s3://` and other addresses, `pipe:COMMAND`. OUT holds, for every shard:

    captions/NAME.parquet                                      every sample: key, url, caption; the new caption_dlip
                                                               with log_probability_dlip (lists); cosine and itm of the
                                                               caption, cosine_dlip and itm_dlip of the new ones;
                                                               error, where the image cannot be read
    img_emb/img_emb_NAME.npy, text_emb/text_emb_NAME.npy,      embeddings of the readable images and their captions in
    metadata/metadata_NAME.parquet                             clip-retrieval's layout, float16
    filtered/NAME.tar, filtered/NAME_stats.json                with --min_itm or --min_cosine: the pairs that pass

`--caption` alone writes captions; `--retrieval` alone scores and embeds. A shard is written whole or not at all, its
`captions/NAME.parquet` last; the same command goes on with the shards that lack theirs. The exit code is 1 if a shard
could not be read.

Without RAY_ADDRESS, Ray runs on this machine alone and listens to nobody else. A cluster needs this repository, its
packages and OUT at the same paths on every node.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from configs.rules import Number, whole
from data.distributed import progress
from data.folders import locked
from data.shards import list_shards
from data.tars import TAR
from models.engine.launch import setup_process
from models.weights.checkpoint import fingerprint
from prod import DLIPProd
from prod.capfilt import ShardWorker
from prod.options import generate_options, generate_settings, net_options
from utils import ROOT, TEMPORARY, atomic_write, clean_exit, interrupting, logger, make_output_dir, shorten

LEFTOVERS = ('*/*.attempts', f'*/*{TEMPORARY}')  # names of what killed workers leave


def named(urls: list[str]) -> dict[str, str]:
    """Shards by the names of their outputs: a file's without folder and ending.

    Raises:
        ValueError: two have the same.
    """
    names: dict[str, str] = {}
    for url in urls:
        mark = [None, *TAR.finditer(url)][-1]
        name = re.sub(r'[^\w.-]+', '_', (url[:mark.start()] if mark else url).rpartition('/')[2])[-100:]
        if name in names:
            raise ValueError(f'two shards have the name {name}, {shorten(Path(names[name]))} and {shorten(Path(url))}: '
                             f'process them one by one, each with an --out of its own')
        names[name] = url
    return names


def is_done(out: Path, name: str, url: str) -> bool:
    """Whether a shard was written whole.

    Raises:
        ValueError: its outputs are another shard's.
    """
    path = out / 'captions' / f'{name}.parquet'
    try:
        made_of = os.fsdecode((pq.read_schema(path).metadata or {}).get(b'shard', b'another file'))
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    if made_of != url:
        raise ValueError(f'{path} was made of {shorten(Path(made_of))}, not of {shorten(Path(url))}: name another '
                         f'--out')
    return True


def prepared(options: argparse.Namespace) -> Path:
    """OUT, made, with the settings in it; checks the checkpoints on the way.

    Raises:
        ValueError: it holds what was made with other settings.
    """
    out, beside = Path(options.out), Path(options.out) / 'settings.json'
    settings = options.generation | {'precision': options.precision, 'min_itm': options.min_itm,
                                     'min_cosine': options.min_cosine, 'keep': options.keep}
    for task, weight in options.weights.items():
        net = DLIPProd(task, weight)
        settings[task] = fingerprint(net.net)
        if task == 'caption':
            net.generate(Image.new('L', (9, 9)), **options.generation)  # a bad setting ends it here
            settings = net.generation | {'prompt': net.prompt} | settings
    with suppress(FileNotFoundError):
        if beside.read_text(encoding='utf-8') != json.dumps(settings, indent=1):
            raise ValueError(f'{out} holds what was made with other settings ({beside}): name another --out')
    for folder in ('captions', *(('img_emb', 'text_emb', 'metadata') if options.retrieval else ()),
                   *(('filtered',) if options.filtering else ())):
        make_output_dir(out / folder)
    sweep(out)
    with atomic_write(beside) as file:
        json.dump(settings, file, indent=1)
    return out


def sweep(out: Path) -> None:
    """Delete what killed workers left in OUT, which no other run writes to."""
    for leftover in chain.from_iterable(map(out.glob, LEFTOVERS)):
        leftover.unlink()


def started_ray(cpus: int | None):
    """Ray, connected to RAY_ADDRESS or started on this machine, where it listens on the loopback alone.

    Args:
        cpus: that it shall count on this machine; None: as many as there are.
    """
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    os.environ.setdefault('RAY_BACKEND_LOG_LEVEL', 'fatal')
    os.environ.setdefault('RAY_enable_output_error_log_if_still_retry', '0')
    local = not os.environ.get('RAY_ADDRESS')
    if local:
        os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'  # on Linux, too, its addresses are then 127.0.0.1
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError('prod/shards.py needs Ray: pip install -r requirements-scale.txt') from None
    alone = {'address': 'local', 'include_dashboard': False, 'num_cpus': cpus, 'object_store_memory': 2 ** 27}
    ray.init(logging_level='ERROR', log_to_driver=False, runtime_env={'env_vars': {'PYTHONPATH': str(ROOT)}},
             **alone if local else {})
    for name in ('ray', 'ray.data'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray


def reports(shards: dict[str, str], options: argparse.Namespace, device: str) -> Iterator[dict]:
    """What Ray's actors say of each shard, as they finish it."""
    ray = started_ray(options.workers and options.workers * options.cores)
    try:
        has = ray.cluster_resources()
        gpus = options.gpus if device.startswith('cuda') or device == 'auto' and has.get('GPU') else 0
        options.served['device'] = 'cuda' if gpus else 'cpu' if device == 'auto' else device
        workers = options.workers or int(min(has['CPU'] // options.cores, has.get('GPU', 0) / gpus if gpus else np.inf))
        if not workers:
            raise ValueError(f'no worker of {options.cores} cores and {gpus:g} GPUs fits on the machines that Ray has')
        rows = ray.data.from_items([{'name': name, 'url': os.fsencode(url)} for name, url in shards.items()],
                                   override_num_blocks=len(shards))
        rows = rows.map_batches(ShardWorker, fn_constructor_args=(options,), batch_size=1, num_cpus=options.cores,
                                num_gpus=gpus, compute=ray.data.ActorPoolStrategy(
                                    min_size=1, max_size=workers, initial_size=min(workers, len(shards)),
                                    max_tasks_in_flight_per_actor=1))
        with interrupting():  # Ray has taken SIGTERM
            yield from (json.loads(row['report']) for row in rows.iter_rows())
    finally:
        ray.shutdown()


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options, and what `ShardWorker` needs beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='the tars, as pretrain_dlip.py takes them')
    parser.add_argument('--out', required=True, help='folder of the outputs; goes on with what they lack')
    parser.add_argument('--caption', metavar='WEIGHT', help='a captioner: anything that DLIPProd takes')
    parser.add_argument('--retrieval', metavar='WEIGHT', help='a retriever, maybe the same checkpoint')
    net_options(parser)
    parser.add_argument('--batch_size', type=whole(1), default=32, help='images at once (default: %(default)s)')
    parser.add_argument('--min_itm', type=Number(0, 1), help='filter: least matching probability of a pair')
    parser.add_argument('--min_cosine', type=Number(-1, 1), help='filter: least cosine of a pair')
    parser.add_argument('--keep', choices=('all', 'best', 'web'), default='all', help='of the texts that pass: all, '
                        'each with its image, the best, or only those of the web (default: %(default)s)')
    parser.add_argument('--workers', type=whole(1), help='at once (default: as many as Ray has room for)')
    parser.add_argument('--cores', type=whole(1), default=1, help='of a worker, which decodes on as many threads '
                        '(default: %(default)s)')
    parser.add_argument('--gpus', type=Number(0, 1024, above=True), default=1.0, help='of a worker on GPUs; a share is '
                        'possible (default: %(default)s)')
    generate_options(parser)
    args = parser.parse_args(argv)
    args.weights = {task: weight for task in ('caption', 'retrieval') if (weight := getattr(args, task))}
    args.filtering = args.min_itm is not None or args.min_cosine is not None
    args.min_itm, args.min_cosine = args.min_itm or 0.0, -1.0 if args.min_cosine is None else args.min_cosine
    if not args.weights or args.filtering and not args.retrieval:
        parser.error('--retrieval is needed for a filter' if args.weights else '--caption or --retrieval is needed')
    args.served = {'precision': args.precision, 'backend': args.backend, 'memory': args.memory}
    args.folder = os.getcwd()
    args.generation = generate_settings(args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a shard could not be read."""
    args = parsed(argv)
    setup_process('cpu')
    shards = named(list_shards(args.source, 'SOURCE'))
    with locked(make_output_dir(args.out)):
        out = prepared(args)
        left = {name: url for name, url in shards.items() if not is_done(out, name, url)}
        logger.info('%d shards, %d of them done already', len(shards), len(shards) - len(left))
        total, lost, started = Counter(), {}, time.monotonic()
        for report in progress(reports(left, args, args.device), len(left), 'shards') if left else ():
            name = report.pop('name')
            if 'stop' in report:
                raise (RuntimeError if report['fault'] else ValueError)(report['stop'].removeprefix('error: '))
            if 'failed' in report:
                lost[name] = report['failed']
                continue
            if not is_done(out, name, shards[name]):
                raise ValueError(f'{name} was written, but is not in {out}: it must be a folder that all nodes share')
            for note in report.pop('notes'):
                logger.warning('%s %s', shards[name], note)
            total.update(report)
        sweep(out)
    for name, problem in lost.items():
        logger.warning('%s is left for the next run: %s', shards[name], problem)
    logger.info('%s: %d shards new, %d images (%.0f a second), %d samples without one, %d pairs kept', out,
                len(left) - len(lost), total['images'], total['images'] / (time.monotonic() - started), total['bad'],
                total['kept'])
    return int(bool(lost))


if __name__ == '__main__':
    from prod import shards  # by its name, by which Ray's workers import it
    with clean_exit():
        sys.exit(shards.main())
