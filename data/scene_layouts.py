"""Write rendered scenes to disk in the layouts of the real sources, so that nothing downstream is special.

    python -m data.scene_layouts --out output/demo/data

OUT/cc3m, mscoco, sbu      img2dataset `files` shards: 00000/000000000.{jpg,json,txt}, 00000.parquet, 00000_stats.json
OUT/vgo                    VG_100K/*.jpg and region_descriptions.json, as Visual Genome
OUT/flickr30k              flickr30k-images/*.jpg, Karpathy's dataset_flickr30k.json, BLIP's flickr30k_{split}.json,
                           and scenes.json, from which the evaluation scores captions exactly
OUT/vocab.txt              WordPiece vocabulary of the captions
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import json
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.rules import SHARE, output_path, whole
from data.captions import PROMPT
from data.distributed import progress
from data.scene_captions import captions, vocabulary
from data.scenes import KINDS, Scene, render, sample_split
from utils import WORKERS, as_worker, atomic_write, clean_exit, make_output_dir, shorten

SHARES = {'cc3m': 0.45, 'mscoco': 0.35, 'sbu': 0.17, 'vgo': 0.03}
SHARD = 1000  # samples a shard
FAILED = 0.04  # share of downloads that failed, as they do: a parquet row without files
REGION = (512, 384)  # pixels of a Visual Genome image: its whole area passes the 20% rule, its corner does not
QUALITY = 92


def write_image(scene: Scene, path: Path, seed: int, size: tuple[int, int] | None = None) -> None:
    image = render(scene, random.Random(seed))
    if size:
        image = image.resize(size)
    image.save(path, quality=QUALITY)


def write_shard(job: tuple[Path, int, list[Scene], int, float]) -> int:
    """One img2dataset shard; returns the images written."""
    folder, number, scenes, seed, prompted = job
    rng = random.Random(seed)
    shard = folder / f'{number:05d}'
    shard.mkdir(parents=True)
    rows = []
    for i, scene in enumerate(scenes):
        key, text = f'{number:05d}{i:04d}', rng.choice(captions(scene))
        if prompted and rng.random() < prompted:
            text = PROMPT + text
        failed = rng.random() < FAILED
        row = {'caption': text, 'url': f'scene://{folder.name}/{key}', 'key': key,
               'status': 'failed_to_download' if failed else 'success',
               'error_message': 'HTTP Error 404: Not Found' if failed else None,
               'width': None if failed else 128, 'height': None if failed else 128,
               'original_width': None if failed else 128, 'original_height': None if failed else 128,
               'exif': None if failed else '{}', 'sha256': None}
        rows.append(row)
        if not failed:
            write_image(scene, shard / f'{key}.jpg', rng.getrandbits(32))
            (shard / f'{key}.txt').write_text(text)
            (shard / f'{key}.json').write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist(rows), folder / f'{number:05d}.parquet')
    good = sum(row['status'] == 'success' for row in rows)
    (folder / f'{number:05d}_stats.json').write_text(json.dumps(
        {'count': len(rows), 'successes': good, 'failed_to_download': len(rows) - good, 'failed_to_resize': 0}))
    return len(scenes)


def write_visual_genome(job: tuple[Path, list[Scene], int]) -> int:
    """Images with three regions each: the whole, a corner that is too small, and a phrase that is too short."""
    folder, scenes, seed = job
    rng = random.Random(seed)
    (folder / 'VG_100K').mkdir(parents=True)
    entries = []
    for i, scene in enumerate(scenes, start=1):
        write_image(scene, folder / 'VG_100K' / f'{i}.jpg', rng.getrandbits(32), REGION)
        whole = {'x': 0, 'y': 0, 'width': REGION[0], 'height': REGION[1]}
        phrases = [(rng.choice(captions(scene)), whole),
                   ('the upper left corner of it', {**whole, 'width': 90, 'height': 90}),
                   (f'{scene.background} background', whole)]
        entries.append({'id': i, 'regions': [{'region_id': 10 * i + j, 'image_id': i, 'phrase': phrase, **box}
                                             for j, (phrase, box) in enumerate(phrases)]})
    (folder / 'region_descriptions.json').write_text(json.dumps(entries))
    return len(scenes)


def write_flickr_images(job: tuple[Path, list[tuple[str, Scene]], int]) -> int:
    folder, named, seed = job
    rng = random.Random(seed)
    for name, scene in named:
        write_image(scene, folder / name, rng.getrandbits(32))
    return len(named)


def write_flickr_annotation(folder: Path, splits: dict[str, list[tuple[str, Scene]]]) -> None:
    karpathy, scenes, sentence = [], {}, 0
    for split, named in splits.items():
        records = []
        for name, scene in named:
            texts, number = captions(scene), len(karpathy)
            sentences = [{'raw': text, 'tokens': text.replace(',', '').split(), 'imgid': number, 'sentid': sentence + i}
                         for i, text in enumerate(texts)]
            karpathy.append({'filename': name, 'split': split, 'imgid': number, 'sentences': sentences,
                             'sentids': [s['sentid'] for s in sentences]})
            sentence += len(texts)
            image = f'flickr30k-images/{name}'
            records += [{'image': image, 'caption': text, 'image_id': name.removesuffix('.jpg')} for text in texts] \
                if split == 'train' else [{'image': image, 'caption': texts}]
            scenes[name] = scene.to_dict()
        (folder / f'flickr30k_{split}.json').write_text(json.dumps(records))
    (folder / 'dataset_flickr30k.json').write_text(json.dumps({'images': karpathy, 'dataset': 'flickr30k'}))
    (folder / 'scenes.json').write_text(json.dumps(scenes))


def build(out: Path, pretrain: int, flickr: dict[str, int], kinds: dict[str, float], prompted: float, seed: int,
          workers: int) -> None:
    """Render everything into `out`, which must hold none of it."""
    jobs: list[tuple] = []
    rng = random.Random(seed)
    for source, share in SHARES.items():
        scenes = sample_split('train', round(pretrain * share), rng.getrandbits(32), False, kinds)
        if source == 'vgo':
            jobs.append((write_visual_genome, (out / source, scenes, rng.getrandbits(32))))
            continue
        for number, start in enumerate(range(0, len(scenes), SHARD)):
            jobs.append((write_shard, (out / source, number, scenes[start:start + SHARD], rng.getrandbits(32),
                                       prompted)))
    folder = out / 'flickr30k'
    (folder / 'flickr30k-images').mkdir(parents=True)
    splits = {}
    for split, count in flickr.items():
        scenes = sample_split(split, count, rng.getrandbits(32), split != 'train', kinds)
        splits[split] = [(f'{split}{i:06d}.jpg', scene) for i, scene in enumerate(scenes)]
        for start in range(0, count, SHARD):
            jobs.append((write_flickr_images, (folder / 'flickr30k-images', splits[split][start:start + SHARD],
                                               rng.getrandbits(32))))
    write_flickr_annotation(folder, splits)
    (out / 'vocab.txt').write_text('\n'.join(vocabulary()) + '\n')
    bar = progress(None, total=pretrain + sum(flickr.values()), desc='rendering scenes')
    with ProcessPoolExecutor(workers, WORKERS, as_worker) as pool:
        for done in [pool.submit(function, job) for function, job in jobs]:
            bar.update(done.result())
    bar.close()


def kind_share(text: str) -> tuple[str, float]:
    """An argparse type: KIND=SHARE."""
    kind, _, share = text.partition('=')
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f'the kinds of scene are {", ".join(KINDS)}, got {shorten(kind)}')
    return kind, SHARE(share)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, type=output_path)
    parser.add_argument('--pretrain', type=whole(0), default=12000, help='images of the four pre-training sources')
    parser.add_argument('--flickr_train', type=whole(0), default=2000)
    parser.add_argument('--flickr_val', type=whole(0), default=200)
    parser.add_argument('--flickr_test', type=whole(0), default=1000)
    parser.add_argument('--kinds', nargs='+', metavar='KIND=SHARE', type=kind_share, default=list(KINDS.items()),
                        help='shares of the kinds of scene (default: %(default)s)')
    parser.add_argument('--prompted', type=SHARE, default=0.0, metavar='SHARE',
                        help=f"share of the downloads whose caption begins '{PROMPT}' (default: none)")
    parser.add_argument('--seed', type=whole(0, 2 ** 32 - 1), default=0)
    parser.add_argument('--workers', type=whole(1, 1024), default=2)
    args = parser.parse_args(argv)
    flickr = {'train': args.flickr_train, 'val': args.flickr_val, 'test': args.flickr_test}
    kinds = dict(args.kinds)
    if not any(kinds.values()):
        parser.error('argument --kinds: all shares are 0')
    made = {'pretrain': args.pretrain, 'flickr30k': flickr, 'kinds': kinds, 'prompted': args.prompted,
            'seed': args.seed}
    marker = args.out / 'scenes_made.json'  # says whose folder it is from the start, and what is in it at the end
    if marker.exists():
        if json.loads(marker.read_text()) == made:
            print(f'{args.out} holds this set already')
            return
    elif args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f'{args.out} holds files that are not a scene set: choose another --out')
    make_output_dir(args.out, '--out')
    with atomic_write(marker) as file:
        json.dump({'unfinished': made}, file)
    for folder in (*SHARES, 'flickr30k'):  # only what a build writes: anything else in there is the user's
        shutil.rmtree(args.out / folder, ignore_errors=True)
    build(args.out, args.pretrain, flickr, kinds, args.prompted, args.seed, args.workers)
    with atomic_write(marker) as file:
        json.dump(made, file)
    print(f'{args.pretrain} images for pre-training and {sum(flickr.values())} for Flickr30K in {args.out}')


if __name__ == '__main__':
    with clean_exit():
        main()
