"""Teacher and student side by side: one table, one page of images, one contact sheet.

    python -m eval.report --teacher save/model_base_retrieval_flickr.pth save/model_base_caption_capfilt_large.pth \\
        --retrieval output/retrieval_flickr/best.pth --caption output/caption_flickr/best.pth --meteor

Evaluates every net on the test images with the settings of the two finetune configs, prints the table and writes
OUTPUT_DIR/table.json, table.md, report.html and contact_sheet.png. The teacher is one checkpoint that serves both tasks
(a pre-training one) or two; `--plain_retrieval` and `--plain_caption` add a student that was trained without a teacher.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from configs import load_config
from data.datasets import ImageTextEval
from data.distributed import is_main
from eval.caption import evaluate_captions
from eval.common import hardware, machine_options, spread, write_json
from eval.metrics import retrieval_metrics
from eval.page import caption_card, figure, grid, image_hits, section, table, write_page
from eval.retrieval import retrieval_scores, top_images
from eval.sheet import Sheet
from eval.speed import NEW_TOKENS, costs
from eval.table import markdown, shares, side_by_side
from models.blip import BLIP
from models.engine.launch import setup_process
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_model
from utils import atomic_write, clean_exit, logger, make_output_dir

TEACHER, PLAIN, STUDENT = 'teacher', 'undistilled', 'student'
RETRIEVAL_CONFIG, CAPTION_CONFIG = 'configs/retrieval_flickr.yaml', 'configs/caption_flickr.yaml'


@dataclass
class Net:
    """A retrieval and a caption net that are one column of the table, and what was measured of them."""

    retrieval: tuple[BLIP, Tokenizer]
    caption: tuple[BLIP, Tokenizer]
    scores_t2i: torch.Tensor
    records: list[dict]
    figures: dict[str, float | str]


def evaluate(name: str, for_each: tuple[tuple[BLIP, Tokenizer], tuple[BLIP, Tokenizer]], configs: tuple[dict, dict],
             device: torch.device, **scores) -> Net:
    """Retrieval and captions of the test split.

    Args:
        for_each: (net, tokenizer) of retrieval and of captions.
        scores: the slow ones of `evaluate_captions`.
    """
    logger.info('evaluating: %s', name)
    (retrieval, tokenizer), (caption, caption_tokenizer) = for_each
    for_retrieval, for_caption = configs
    dataset = ImageTextEval.from_config(for_retrieval['data'], 'test', retrieval.config.image_size)
    i2t, t2i = retrieval_scores(retrieval, tokenizer, dataset, device=device,
                                max_tokens=for_retrieval['data']['max_tokens'],
                                workers=for_retrieval['data']['num_workers'], **for_retrieval['eval'])
    recalls = retrieval_metrics(i2t, t2i, dataset.image_to_texts, dataset.text_to_image)
    captioned = ImageTextEval.from_config(for_caption['data'], 'test', caption.config.image_size)
    said, records = evaluate_captions(caption, caption_tokenizer, captioned, device=device,
                                      prompt=for_caption['data']['prompt'],
                                      workers=for_caption['data']['num_workers'], **scores, **for_caption['eval'])
    return Net((retrieval, tokenizer), (caption, caption_tokenizer), t2i, records, {**recalls, **said})


# ---------------------------------------------------------------- the images

def caption_cards(teacher: Net, student: Net, count: int) -> list[tuple[Path, list[tuple], list[str]]]:
    cards = []
    for i in spread(len(student.records), count):
        pair = (('student', student.records[i]), ('teacher', teacher.records[i]))
        cards.append((Path(student.records[i]['image']),
                      [(who, record['caption'], record.get('right')) for who, record in pair],
                      student.records[i]['references']))
    return cards


def text_queries(net: Net, data: dict, count: int = 5) -> list[tuple[str, list[tuple[Path, float, bool]]]]:
    """Captions, each of another image and another of its phrasings, with their top images."""
    dataset = ImageTextEval.from_config(data, 'test', net.retrieval[0].config.image_size)
    texts = [dataset.image_to_texts[image][i % len(dataset.image_to_texts[image])]
             for i, image in enumerate(spread(len(dataset), count))]
    return [(dataset.texts[text], top_images(dataset, net.scores_t2i, text)) for text in texts]


def write_report(output_dir: Path, rows: list[dict[str, str]], setting: str, cards: list[tuple],
                 queries: list[tuple], curves: list[Path]) -> None:
    """Write report.html and contact_sheet.png."""
    title = 'DLIP: a distilled student beside its teacher'
    marks = 'Evenly spaced held-out images.' + (
        ' Green: the whole scene is right; red: something is wrong.' if cards[0][1][0][2] is not None else '')
    asked = 'Captions of held-out images as queries; the image that the caption was written for is framed.'
    sections = [section('Quality and cost', table(rows), setting),
                section('Captions', grid([caption_card(*card) for card in cards]), marks),
                section('Images for a text', ''.join(image_hits(*query) for query in queries), asked)]
    sections += [section(f'Training: {png.parent.name}', figure(png)) for png in curves]
    write_page(output_dir / 'report.html', title, sections)
    sheet = Sheet()
    sheet.heading(title, setting, 30)
    sheet.table(rows)
    sheet.heading('Captions', marks)
    sheet.captions([card[:2] for card in cards[::2]])
    sheet.heading('Images for a text', asked)
    sheet.queries(queries)
    for png in curves:
        sheet.heading(f'Training: {png.parent.name}')
        sheet.figure(png)
    sheet.save(output_dir / 'contact_sheet.png')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--teacher', required=True, nargs='+', metavar='CHECKPOINT',
                        help='checkpoint that can do both tasks, or one for retrieval and one for captions')
    parser.add_argument('--retrieval', required=True, help="the student's retrieval checkpoint")
    parser.add_argument('--caption', required=True, help="the student's caption checkpoint")
    parser.add_argument('--plain_retrieval', help='retrieval checkpoint of a student without a teacher')
    parser.add_argument('--plain_caption', help='caption checkpoint of a student without a teacher')
    parser.add_argument('--retrieval_config', default=RETRIEVAL_CONFIG, help='default: %(default)s')
    parser.add_argument('--caption_config', default=CAPTION_CONFIG, help='default: %(default)s')
    parser.add_argument('--curves', nargs='*', default=[], type=Path, metavar='PNG', help='loss curves to include')
    parser.add_argument('--meteor', action='store_true', help='METEOR too (Java, 25 s per 1,000 images and net)')
    parser.add_argument('--spice', action='store_true', help='SPICE too (Java, 8 GB of memory, a download)')
    machine_options(parser, 'output/report')
    args = parser.parse_args(argv)
    if len(args.teacher) > 2:
        raise ValueError(f'--teacher is one checkpoint, or one for retrieval and one for captions: got {args.teacher}')
    if bool(args.plain_retrieval) != bool(args.plain_caption):
        raise ValueError('--plain_retrieval and --plain_caption make one row of the table: give both or none')
    missing = [str(path) for path in args.curves if not path.is_file()]
    if missing:
        raise FileNotFoundError(f'no curves at {", ".join(missing)}: check --curves')
    configs = load_config(args.retrieval_config, RETRIEVAL_CONFIG), load_config(args.caption_config, CAPTION_CONFIG)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)

    paths = {TEACHER: (args.teacher[0], args.teacher[-1])}
    if args.plain_retrieval:
        paths[PLAIN] = args.plain_retrieval, args.plain_caption
    paths[STUDENT] = args.retrieval, args.caption
    loaded = {name: tuple(load_model(path, device, task, args.tokenizer)[:2]
                          for path, task in zip(pair, ('retrieval', 'caption'), strict=True))
              for name, pair in paths.items()}  # all at once: a bad one ends it before hours of work
    nets = {name: evaluate(name, pair, configs, device, meteor=args.meteor, spice=args.spice)
            for name, pair in loaded.items()}
    if not is_main():
        return
    k_test, num_beams = configs[0]['eval']['k_test'], configs[1]['eval']['num_beams']
    pairs = {name: {'image': net.retrieval, 'caption': net.caption} for name, net in nets.items()}
    for name, cost in costs(pairs, device, num_beams, configs[1]['data']['prompt']).items():
        nets[name].figures |= cost

    teacher, student = nets[TEACHER], nets[STUDENT]
    setting = (f'{len(student.records)} held-out images, {len(student.scores_t2i)} captions. Recalls with the '
               f'{k_test} best re-ranked by matching; captions by beam search of width {num_beams}, split into words '
               f'by the {teacher.figures["tokenizer"]} tokenizer. GFLOPs and ms are of one image, embedded or '
               f'captioned in {NEW_TOKENS} tokens; ms are medians on {hardware(device)}.')
    numbers = {name: net.figures for name, net in nets.items()}
    rows = side_by_side(numbers)
    text = markdown(rows)
    with atomic_write(output_dir / 'table.md') as file:
        file.write(f'{text}\n{setting}\n')
    write_json(output_dir / 'table.json', {
        'setting': setting, 'nets': numbers, 'checkpoints': paths, 'share_of_teacher': {
            name: shares(teacher.figures, figures) for name, figures in numbers.items() if name != TEACHER}})
    write_report(output_dir, rows, setting, caption_cards(teacher, student, 24),
                 text_queries(student, configs[0]['data']), args.curves)
    print(f'\n{text}\n{setting}\n')
    logger.info('wrote %s, contact_sheet.png, table.md and table.json', output_dir / 'report.html')


if __name__ == '__main__':
    with clean_exit():
        main()
