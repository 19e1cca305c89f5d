"""Search the pictures of a folder, and of the folders in it, by texts or by a picture.

    python -m prod.search output/demo/data/flickr30k/flickr30k-images "a red star" "a heart above a circle" \\
      --weight output/demo/retrieval/best.pth --index output/index --sheet output/hits.png

The first run embeds every picture into the index, later ones only what is new. A query that is a picture file is
searched by its content. `--rerank 20` compares the 20 nearest again by matching: slower and better, for texts.
"""

import argparse
from pathlib import Path

from configs.rules import whole
from eval.sheet import Sheet
from prod import DLIPProd
from utils import clean_exit, setup_process


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('queries', nargs='+', metavar='QUERY', help='a text, or the path of a picture')
    parser.add_argument('--weight', required=True, help='a retriever: anything that DLIPProd takes')
    parser.add_argument('--index', required=True, help='folder of the index; made when absent')
    parser.add_argument('--k', type=whole(1), default=5, help='hits a query (default: %(default)s)')
    parser.add_argument('--rerank', type=whole(0), default=0, help='nearest ones to compare again (default: none)')
    parser.add_argument('--sheet', type=Path, metavar='PNG', help='draw the hits')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--precision', default='fp32', help='fp32, bf16 or int8 (default: %(default)s)')
    parser.add_argument('--backend', default='torch', help='torch or openvino (default: %(default)s)')
    args = parser.parse_args(argv)
    device = setup_process(args.device)
    retriever = DLIPProd('retrieval', args.weight, str(device), precision=args.precision,
                         backend=args.backend)
    index = retriever.index(args.folder, args.index)
    rows = []
    for query in args.queries:
        asked = Path(query) if Path(query).is_file() else query
        hits = retriever.search(asked, index, args.k, rerank=args.rerank)
        print(f'\n{query}')
        for path, score in hits:
            print(f'  {score:6.3f}  {path}')
        title = asked.name if isinstance(asked, Path) else query
        rows.append((title, [(Path(path), score, False) for path, score in hits]))
    if args.sheet:
        sheet = Sheet()
        sheet.heading('Pictures found', f'{len(index)} pictures in {args.index}')
        sheet.queries(rows)
        sheet.save(args.sheet)
        print(f'\n{args.sheet}')


if __name__ == '__main__':
    with clean_exit():
        main()
