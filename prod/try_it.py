"""Caption images and compare them with their captions: DLIPProd from the command line.

    python -m prod.try_it --caption output/demo/caption/best.pth --retrieval output/demo/retrieval/best.pth IMAGE ...
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse

from prod import DLIPProd
from prod.options import net_options, net_settings
from utils import clean_exit, shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--caption', required=True, help='caption checkpoint')
    parser.add_argument('--retrieval', required=True, help='retrieval checkpoint')
    net_options(parser)
    parser.add_argument('images', nargs='+')
    args = parser.parse_args(argv)
    served = net_settings(args)
    captioner = DLIPProd('caption', args.caption, **served)
    retriever = DLIPProd('retrieval', args.retrieval, **served)
    captions = captioner.generate(args.images)
    similarity, match = retriever.similarity(args.images, captions), retriever.match(args.images, captions)
    print(f'image features {tuple(retriever.get_image_feat(args.images).shape)}, '
          f'text features {tuple(retriever.get_text_feat(captions).shape)}')
    for i, (image, text) in enumerate(zip(args.images, captions, strict=True)):
        print(f'{shown(image)}\n  {text}\n  similarity {similarity[i, i]:.3f}, '
              f'probability of a match {match[i, i]:.3f}')


if __name__ == '__main__':
    with clean_exit():
        main()
