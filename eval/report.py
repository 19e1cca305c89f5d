"""Teacher and student side by side: one table, one page of pictures, one contact sheet.

    python -m eval.report --teacher output/teacher/last.pth --retrieval output/retrieval_flickr/best.pth \\
        --caption output/caption_flickr/best.pth

Evaluates every net on the test pictures with the settings of the two finetune configs, prints the table and writes
OUTPUT_DIR/table.json, table.md, report.html and contact_sheet.png. The teacher's file serves both tasks (a
pre-training checkpoint); `--plain_retrieval` and `--plain_caption` add a student that was trained without a teacher.
"""

import argparse
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.datasets import ImageTextEval
from data.transforms import eval_transform
from eval.caption import evaluate_captions
from eval.common import hardware, tokenizer_option, write_json
from eval.metrics import retrieval_metrics
from eval.page import caption_card, figure, grid, picture_hits, section, table, write_page
from eval.retrieval import retrieval_scores, top_pictures
from eval.sheet import Sheet
from eval.speed import median_ms
from models.blip import BLIP
from models.build import count_parameters
from models.checkpoint import load_model
from models.generation import generate
from models.tokenizer import Tokenizer
from utils import atomic_write, clean_exit, load_config, logger, make_output_dir, setup_process

TEACHER, PLAIN, STUDENT = 'teacher', 'student, no teacher', 'student, distilled'
RETRIEVAL_CONFIG, CAPTION_CONFIG = 'configs/retrieval_flickr.yaml', 'configs/caption_flickr.yaml'
TIMED_PICTURES = 20
COLUMNS = {'parameters (M)': '{:.2f}', 'txt R@1': '{:.1f}', 'txt R@5': '{:.1f}', 'txt R@10': '{:.1f}',
           'img R@1': '{:.1f}', 'img R@5': '{:.1f}', 'img R@10': '{:.1f}', 'CIDEr': '{:.1f}', 'exact %': '{:.1f}',
           'ms/caption': '{:.1f}', 'ms/image': '{:.1f}'}


@dataclass
class Net:
    """A retrieval and a caption net that are one row of the table, and what was measured of them."""

    retrieval: BLIP
    caption: BLIP
    tokenizer: Tokenizer
    scores_t2i: torch.Tensor
    records: list[dict]
    row: dict[str, float | str]


def dataset_for(model: BLIP, data: dict) -> ImageTextEval:
    return ImageTextEval(data['root'], 'test', eval_transform(model.config.image_size), data['max_words'],
                         data['split'])


def evaluate(name: str, retrieval_path: str, caption_path: str, configs: tuple[dict, dict],
             device: torch.device, vocabulary: str) -> Net:
    """Retrieval and captions of the test split."""
    logger.info('evaluating: %s', name)
    retrieval, tokenizer, _ = load_model(retrieval_path, device, 'retrieval', vocabulary)
    caption, caption_tokenizer, _ = load_model(caption_path, device, 'caption', vocabulary)
    for_retrieval, for_caption = configs
    dataset = dataset_for(retrieval, for_retrieval['data'])
    i2t, t2i = retrieval_scores(retrieval, tokenizer, dataset, device=device,
                                max_tokens=for_retrieval['data']['max_tokens'],
                                workers=for_retrieval['data']['workers'], **for_retrieval['eval'])
    recalls = retrieval_metrics(i2t, t2i, dataset.image_to_texts, dataset.text_to_image)
    said, records = evaluate_captions(caption, caption_tokenizer, dataset_for(caption, for_caption['data']),
                                      device=device, prompt=for_caption['data']['prompt'],
                                      workers=for_caption['data']['workers'], **for_caption['eval'])
    with torch.device('meta'):  # the whole net: the parts of both tasks, what they share counted once
        parameters = count_parameters(BLIP(replace(retrieval.config, task='pretrain')))
    row = {'model': name, 'parameters (M)': parameters / 1e6,
           **{f'{way} R@{k}': recalls[f'{way}_r{k}'] for way in ('txt', 'img') for k in (1, 5, 10)},
           'CIDEr': said['CIDEr'], **({'exact %': said['exact']} if 'exact' in said else {}),
           'tokenizer': said['tokenizer']}
    return Net(retrieval, caption, caption_tokenizer, t2i, records, row)


def add_times(nets: list[Net], configs: tuple[dict, dict], device: torch.device) -> None:
    """Median milliseconds per caption and per image embedding, one picture at a time, all nets in turn."""
    work = {}
    settings = {key: value for key, value in configs[1]['eval'].items() if key != 'batch_size'}
    for net in nets:
        def captioner(net=net):
            images = itertools.cycle(some_pictures(net.caption, configs[1]['data']))
            return lambda: generate(net.caption, net.tokenizer, next(images), configs[1]['data']['prompt'], **settings)

        def embedder(net=net):
            images = itertools.cycle(some_pictures(net.retrieval, configs[0]['data']))
            return lambda: net.retrieval.image_feat(net.retrieval.encode_image(next(images)))
        work |= {(net.row['model'], 'ms/caption'): captioner(), (net.row['model'], 'ms/image'): embedder()}
    for (name, what), value in median_ms(work, device, TIMED_PICTURES).items():
        next(net for net in nets if net.row['model'] == name).row[what] = value


def some_pictures(model: BLIP, data: dict) -> list[torch.Tensor]:
    """The first test pictures, each [1, 3, S, S] on the net's device."""
    dataset = dataset_for(model, data)
    return [dataset[i][None].to(model.device) for i in range(min(TIMED_PICTURES, len(dataset)))]


# ---------------------------------------------------------------- the table

def shares(rows: list[dict]) -> list[dict]:
    """Per later row its numbers in per cent of the first row's, the teacher's (None where that is 0)."""
    return [{'model': row['model'], **{key: 100 * row[key] / rows[0][key] if rows[0][key] else None
                                       for key in COLUMNS if key in row}} for row in rows[1:]]


def comparison(rows: list[dict]) -> list[dict[str, str]]:
    """Formatted rows: the teacher, then each student followed by its share of the teacher."""
    out = []
    for row, share in zip(rows, [None, *shares(rows)], strict=True):
        out.append({'model': row['model'], **{key: COLUMNS[key].format(row[key]) for key in COLUMNS if key in row}})
        if share:
            out.append({'model': '  share of the teacher', **{
                key: '-' if share[key] is None else f'{share[key]:.0f}%' for key in COLUMNS if key in share}})
    return out


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table with aligned columns, fit for a terminal too."""
    keys = list(rows[0])
    widths = [max(len(key), *(len(row[key]) for row in rows)) for key in keys]

    def line(cells):
        return '| ' + ' | '.join(cell.rjust(width) if i else cell.ljust(width)
                                 for i, (cell, width) in enumerate(zip(cells, widths, strict=True))) + ' |'
    rule = '|' + '|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths)) + '|'
    return '\n'.join([line(keys), rule, *(line(row.values()) for row in rows)]) + '\n'


# ---------------------------------------------------------------- the pictures

def spread(total: int, count: int) -> list[int]:
    """`count` indices evenly over 0..total - 1: what is shown is not hand-picked."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def caption_cards(teacher: Net, student: Net, count: int) -> list[tuple[Path, list[tuple], list[str]]]:
    cards = []
    for i in spread(len(student.records), count):
        pair = (('student', student.records[i]), ('teacher', teacher.records[i]))
        cards.append((Path(student.records[i]['image']),
                      [(who, record['caption'], record.get('right')) for who, record in pair],
                      student.records[i]['references']))
    return cards


def text_queries(net: Net, data: dict, count: int = 5) -> list[tuple[str, list[tuple[Path, float, bool]]]]:
    """Captions, each of another picture and another of its phrasings, with their top pictures."""
    dataset = dataset_for(net.retrieval, data)
    texts = [dataset.image_to_texts[image][i % len(dataset.image_to_texts[image])]
             for i, image in enumerate(spread(len(dataset), count))]
    return [(dataset.texts[text], top_pictures(dataset, net.scores_t2i, text)) for text in texts]


def write_report(output_dir: Path, rows: list[dict[str, str]], setting: str, cards: list[tuple],
                 queries: list[tuple], curves: list[Path]) -> None:
    """Write report.html and contact_sheet.png."""
    title = 'DLIP: a distilled student beside its teacher'
    marks = 'Evenly spaced held-out pictures.' + (
        ' Green: the whole scene is right; red: something is wrong.' if cards[0][1][0][2] is not None else '')
    asked = 'Captions of held-out pictures as queries; the picture that the caption was written for is framed.'
    sections = [section('Quality and speed', table(rows), setting),
                section('Captions', grid([caption_card(*card) for card in cards]), marks),
                section('Pictures for a text', ''.join(picture_hits(*query) for query in queries), asked)]
    sections += [section(f'Training: {png.parent.name}', figure(png)) for png in curves]
    write_page(output_dir / 'report.html', title, sections)
    sheet = Sheet()
    sheet.heading(title, setting, 30)
    sheet.table(rows)
    sheet.heading('Captions', marks)
    sheet.captions([card[:2] for card in cards[::2]])
    sheet.heading('Pictures for a text', asked)
    sheet.queries(queries)
    for png in curves:
        sheet.heading(f'Training: {png.parent.name}')
        sheet.figure(png)
    sheet.save(output_dir / 'contact_sheet.png')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--teacher', required=True, help='checkpoint that can do both tasks')
    parser.add_argument('--retrieval', required=True, help="the student's retrieval checkpoint")
    parser.add_argument('--caption', required=True, help="the student's caption checkpoint")
    parser.add_argument('--plain_retrieval', help='retrieval checkpoint of a student without a teacher')
    parser.add_argument('--plain_caption', help='caption checkpoint of a student without a teacher')
    parser.add_argument('--retrieval_config', default=RETRIEVAL_CONFIG, help='default: %(default)s')
    parser.add_argument('--caption_config', default=CAPTION_CONFIG, help='default: %(default)s')
    parser.add_argument('--curves', nargs='*', default=[], type=Path, metavar='PNG', help='loss curves to include')
    tokenizer_option(parser)
    parser.add_argument('--output_dir', default='output/report', help='default: %(default)s')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    args = parser.parse_args(argv)
    if bool(args.plain_retrieval) != bool(args.plain_caption):
        raise ValueError('--plain_retrieval and --plain_caption make one row of the table: give both or none')
    missing = [str(path) for path in args.curves if not path.is_file()]
    if missing:
        raise FileNotFoundError(f'no curves at {", ".join(missing)}: check --curves')
    configs = load_config(args.retrieval_config, RETRIEVAL_CONFIG), load_config(args.caption_config, CAPTION_CONFIG)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)

    paths = {TEACHER: (args.teacher, args.teacher)}
    if args.plain_retrieval:
        paths[PLAIN] = args.plain_retrieval, args.plain_caption
    paths[STUDENT] = args.retrieval, args.caption
    nets = [evaluate(name, *pair, configs, device, args.tokenizer) for name, pair in paths.items()]
    add_times(nets, configs, device)

    teacher, student = nets[0], nets[-1]
    setting = (f'{len(student.records)} held-out pictures, {len(student.scores_t2i)} captions. Recalls with the '
               f'{configs[0]["eval"]["k_test"]} best re-ranked by matching; captions by beam search of width '
               f'{configs[1]["eval"]["num_beams"]}, split into words by the {teacher.row["tokenizer"]} tokenizer; '
               f'times are medians for one picture on {hardware(device)}.')
    numbers = [net.row for net in nets]
    rows = comparison(numbers)
    text = markdown(rows)
    with atomic_write(output_dir / 'table.md') as file:
        file.write(f'{text}\n{setting}\n')
    write_json(output_dir / 'table.json', {'setting': setting, 'rows': numbers, 'share_of_teacher': shares(numbers),
                                           'checkpoints': paths})
    write_report(output_dir, rows, setting, caption_cards(teacher, student, 24),
                 text_queries(student, configs[0]['data']), args.curves)
    print(f'\n{text}\n{setting}\n')
    logger.info('wrote %s, contact_sheet.png, table.md and table.json', output_dir / 'report.html')


if __name__ == '__main__':
    with clean_exit():
        main()
