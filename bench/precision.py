"""What each precision and backend of DLIPProd does to trained nets: the demo's teacher and student (after `make demo`).

    python -m bench.precision

1,000 held-out images: share of captions equal to those of float32 in torch, share that are right in every word (beam
search of width 3), and recall@1 by the cosines alone, where small differences of embeddings show most. Then the size of
the folders that `prod/export.py --format onnx` writes, of nets with random weights that do both tasks at 224 px, which
`--sizes` prints alone.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import tempfile
from pathlib import Path

from bench.inference import SERVED
from data.distributed import progress
from data.scene_captions import slots_match
from data.scenes import Scene
from eval.metrics import recall_at_k
from models.blip import BLIP
from models.tokenizer import Tokenizer
from models.weights.checkpoint import architecture, load_model
from prod import DLIPProd
from prod.onnx_export import PRECISIONS, export_onnx
from utils import ROOT, clean_exit

CHECKPOINTS = {'teacher, 7.8M': ('data/demo_teacher.pth',) * 2,
               'student': ('output/demo/caption/best.pth', 'output/demo/retrieval/best.pth')}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('output/demo/data/flickr30k'), help='default: %(default)s')
    parser.add_argument('--sizes', action='store_true', help='print the sizes of the folders alone')
    args = parser.parse_args(argv)
    if not args.sizes:
        compare(args.data)
    print('| net | parameters (M) | ONNX precision | MB |\n|---|---:|---|---:|')
    tokenizer = Tokenizer.from_file(ROOT / 'tests' / 'vocab.txt')
    for name in ('small', 'small_ffn1536'):
        net = BLIP(architecture(name, 224, len(tokenizer))).eval()
        parameters = sum(weight.numel() for weight in net.parameters()) / 1e6
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                export_onnx(folder, net, tokenizer, {}, precision)
                size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
            print(f'| {name} | {parameters:.1f} | {precision} | {size:.1f} |', flush=True)


def compare(data: Path) -> None:
    """Print what each side makes of the images of a rendered set."""
    drawn = json.loads((data / 'scenes.json').read_text())
    scenes = {name: Scene.from_dict(state) for name, state in drawn.items()}
    rows = json.loads((data / 'flickr30k_test.json').read_text())
    pictures = [str(data / row['image']) for row in rows]
    texts = [text for row in rows for text in row['caption']]
    right = [range(5 * i, 5 * i + 5) for i in range(len(rows))]
    print('| net | side | captions as float32 | exact captions | txt R@1 | img R@1 |')
    print('|---|---|---:|---:|---:|---:|')
    for net, (captioner, retriever) in CHECKPOINTS.items():
        if not Path(captioner).exists() or not Path(retriever).exists():
            continue
        reference = None
        for precision, backend in progress([*SERVED, *((precision, 'onnx') for precision in PRECISIONS)], desc=net):
            with tempfile.TemporaryDirectory() as place:
                nets = {'caption': captioner, 'retrieval': retriever}
                for task, source in nets.items() if backend == 'onnx' else ():
                    export_onnx(f'{place}/{task}', *load_model(source, task=task), precision)
                    nets[task] = f'{place}/{task}'
                served = [DLIPProd(task, source, precision=precision, backend=backend) for task, source in nets.items()]
                said = served[0].generate(pictures, min_length=5)
                images, described = served[1].get_image_feat(pictures), served[1].get_text_feat(texts)
            reference, cosines = reference or said, images @ described.T
            exact = [slots_match(text, scenes[Path(path).name]) for text, path in zip(said, pictures, strict=True)]
            same = [a == b for a, b in zip(said, reference, strict=True)]
            recall = (recall_at_k(cosines, right, (1,))[0],
                      recall_at_k(cosines.T, [[i // 5] for i in range(len(texts))], (1,))[0])
            print(f'| {net} | {precision} {backend} | {sum(same) / len(same):.1%} | {sum(exact) / len(exact):.1%} | '
                  f'{recall[0]:.1f} | {recall[1]:.1f} |', flush=True)


if __name__ == '__main__':
    with clean_exit():
        main()
