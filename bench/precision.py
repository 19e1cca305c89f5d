"""What each precision and backend of DLIPProd does to trained nets: the demo's teacher and student (after `make demo`).

    python -m bench.precision

1,000 held-out pictures: share of captions equal to those of float32 in torch, share that are right in every word
(beam search of width 3), and recall@1 by the cosines alone, where small differences of embeddings show most.
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

from bench.inference import SERVED
from data.scene_captions import slots_match
from data.scenes import Scene
from eval.metrics import recall_at_k
from prod import DLIPProd
from utils import clean_exit, progress

CHECKPOINTS = {'teacher, 7.8M': ('data/demo_teacher.pth', 'data/demo_teacher.pth'),
               'student': ('output/demo/caption/best.pth', 'output/demo/retrieval/best.pth')}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('output/demo/data/flickr30k'), help='default: %(default)s')
    args = parser.parse_args(argv)
    drawn = json.loads((args.data / 'scenes.json').read_text())
    scenes = {name: Scene.from_dict(state) for name, state in drawn.items()}
    rows = json.loads((args.data / 'flickr30k_test.json').read_text())
    pictures = [str(args.data / row['image']) for row in rows]
    texts = [text for row in rows for text in row['caption']]
    right = [range(5 * i, 5 * i + 5) for i in range(len(rows))]
    print('| net | side | captions as float32 | exact captions | txt R@1 | img R@1 |')
    print('|---|---|---:|---:|---:|---:|')
    for net, (captioner, retriever) in CHECKPOINTS.items():
        reference = None
        for precision, backend in progress(SERVED, desc=net):
            served = {'precision': precision, 'backend': backend}
            said = DLIPProd('caption', captioner, **served).generate(pictures, min_length=5)
            reference = reference or said
            finder = DLIPProd('retrieval', retriever, **served)
            cosines = finder.get_image_feat(pictures) @ finder.get_text_feat(texts).T
            exact = [slots_match(text, scenes[Path(path).name]) for text, path in zip(said, pictures, strict=True)]
            same = [a == b for a, b in zip(said, reference, strict=True)]
            recall = (recall_at_k(cosines, right, (1,))[0],
                      recall_at_k(cosines.T, [[i // 5] for i in range(len(texts))], (1,))[0])
            print(f'| {net} | {precision} {backend} | {sum(same) / len(same):.1%} | {sum(exact) / len(exact):.1%} | '
                  f'{recall[0]:.1f} | {recall[1]:.1f} |', flush=True)


if __name__ == '__main__':
    with clean_exit():
        main()
