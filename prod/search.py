"""Search the images of a folder, and of the folders in it, by texts or by an image.

    python -m prod.search output/demo/data/flickr30k/flickr30k-images "a red star" "a heart above a circle" \\
      --weight output/demo/retrieval/best.pth --index output/index --sheet output/hits.png

The first run embeds every image into the index; later ones bring it up to date: images that are new, changed or gone. A
query that is the path of a file is searched by its content. `--rerank 20` compares the 20 nearest again by matching:
slower and better, for texts; scores then are probabilities, so that `--min_score 0.5` leaves out what does not fit. A
path that is not plain text is printed as a JSON string. `--json` prints a line {"query", "hits": [{"path", "score"}]}
for each query instead.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import json
import os
from pathlib import Path

from configs.rules import Number, output_path, whole
from eval.sheet import Sheet
from prod import DLIPProd
from prod.options import log_to_stderr, net_options, net_settings, output_file
from utils import clean_exit, logger, make_output_dir, shown


def query_of(text: str) -> str | Path:
    """What a word of the command line asks for: the path of a file that is there, else a text.

    Raises:
        ValueError: it is empty, or the path of a folder.
    """
    if not text.strip():
        raise ValueError('a query is empty: give a text, or the path of an image')
    if os.path.isdir(text) and (os.sep in text or text in (os.curdir, os.pardir)):
        raise ValueError(f'the query {shown(text)} is a folder: give the path of an image in it, or a text')
    return Path(text) if os.path.isfile(text) else text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('queries', nargs='+', metavar='QUERY', help='a text, or the path of an image')
    parser.add_argument('--weight', required=True, help='a retriever: anything that DLIPProd takes')
    parser.add_argument('--index', type=output_path, required=True, help='folder of the index; made when absent')
    parser.add_argument('--k', type=whole(1), default=5, help='hits a query (default: %(default)s)')
    parser.add_argument('--rerank', type=whole(0), default=0, help='nearest ones to compare again (default: none)')
    parser.add_argument('--min_score', type=Number(-1, 1), metavar='S', help='leave out what scores less (default: '
                        'nothing)')
    parser.add_argument('--no_update', action='store_true', help='search the index as it is, without a look at the '
                        'folder')
    parser.add_argument('--json', action='store_true', help='print JSON lines')
    parser.add_argument('--sheet', type=output_file, metavar='PNG', help='draw the hits')
    net_options(parser)
    args = parser.parse_args(argv)
    served, queries = net_settings(args), [query_of(query) for query in args.queries]
    if args.sheet:
        make_output_dir(args.sheet.parent, '--sheet')
    if args.json:
        log_to_stderr()
    retriever = DLIPProd('retrieval', args.weight, **served)
    index = retriever.index(None if args.no_update else args.folder, args.index)
    rows = []
    for given, query in zip(args.queries, queries, strict=True):
        hits = retriever.search(query, index, args.k, rerank=args.rerank, min_score=args.min_score)
        if args.json:
            print(json.dumps({'query': given, 'hits': [{'path': path, 'score': score} for path, score in hits]}))
        else:
            print(f'\n{shown(query)}', *(f'  {score:6.3f}  {shown(path)}' for path, score in hits), sep='\n')
            if not hits:
                print('  nothing fits')
        title = query.name if isinstance(query, Path) else query
        rows.append((shown(title), [(Path(path), score, False) for path, score in hits]))
    if args.sheet:
        sheet = Sheet()
        sheet.heading('Images found', f'{len(index)} images in {shown(args.index)}')
        sheet.queries(rows)
        sheet.save(args.sheet)
        logger.info('drawn: %s', shown(args.sheet))


if __name__ == '__main__':
    with clean_exit():
        main()
