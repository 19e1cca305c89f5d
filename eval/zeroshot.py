"""Zero-shot classification of any folder of images: sub-folders are classes, named by their folders.

    python -m eval.zeroshot --checkpoint output/pretrain/last.pth --root my_images
    python -m torch.distributed.run --nproc_per_node=4 -m eval.zeroshot --checkpoint ... --root my_images

`my_images/golden_retriever/*.jpg` are images of a "golden retriever". An image is taken for the class whose texts
are nearest; the texts of a class are its name in the prompts of `--templates`, a file with one a line, '{}' standing
for the name. Prints the accuracy and the worst classes with what they are taken for, and writes
OUTPUT_DIR/zeroshot.json and zeroshot.html.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import os
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from configs.rules import whole
from data.datasets import clean_caption
from data.distributed import gather_objects, is_main
from data.images import open_image
from data.scan import is_hidden, list_images
from data.transforms import EvalTransform
from eval.common import checkpoint_parser, image_batches, shard, spread, write_json
from eval.metrics import recall_at_k
from eval.page import caption_card, grid, section, table, write_page
from eval.table import markdown
from models.blip import BLIP
from models.engine.launch import setup_process
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_model
from utils import clean_exit, logger, make_output_dir, shorten, shown

TEMPLATES = ('{}', 'a {}', 'a photo of a {}', 'a picture of a {}', 'a close-up of a {}', 'a photo of the {}')
MAX_TOKENS = 35  # of a prompt
WORST, SHOWN = 20, 60  # classes of the table, images of the page


def read_templates(path: str | Path) -> list[str]:
    """The lines of a file.

    Raises:
        ValueError: the file cannot be read, there is none, or one does not hold '{}' once.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f'--templates {shorten(Path(path))} is no text file in UTF-8 that can be read: '
                         f'{getattr(error, "strerror", None) or shorten(error)}') from None
    templates = [line.strip() for line in lines if line.strip()]
    wrong = [line for line in templates if line.count('{}') != 1]
    if wrong or not templates:
        raise ValueError(f"{path} must hold one prompt a line, each with '{{}}' once for the class, "
                         f"got {shorten(wrong[:1])}")
    return templates


class ClassFolders(Dataset):
    """The images of a folder per class; item i is (float32 [3, S, S], class). Hidden and system files and
    folders are left out.

    Attributes:
        classes: names of the folders, in order.
        samples: (path, class) of each image.

    Raises:
        FileNotFoundError: no such folder, no class, or one without an image.
    """

    def __init__(self, root: str | os.PathLike, image_size: int):
        if not os.path.isdir(root):
            raise FileNotFoundError(f'no folder {shorten(Path(root))}: --root is a folder with a sub-folder of images '
                                    f'for each class')
        with os.scandir(root) as entries:
            self.classes = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
        found = [list_images(os.path.join(root, name)) for name in self.classes]
        empty = [name for name, paths in zip(self.classes, found, strict=True) if not paths]
        if empty or not found:
            raise FileNotFoundError(f'{shorten(Path(root))} holds no class with images'
                                    if not found else f'no image in the class {", ".join(map(shown, empty[:3]))} of '
                                    f'{shorten(Path(root))}: take it away, or add images')
        self.samples = [(path, label) for label, paths in enumerate(found) for path in paths]
        self.transform = EvalTransform(image_size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(open_image(path)), label


@torch.inference_mode()
def class_feats(model: BLIP, tokenizer: Tokenizer, names: list[str], templates: list[str] = TEMPLATES) -> torch.Tensor:
    """Unit-norm [classes, embed_dim]: of each class the mean of its prompts' embeddings."""
    feats, length = [], min(MAX_TOKENS, model.config.max_positions)
    for template in templates:
        prompts = [clean_caption(template.replace('{}', name.replace('_', ' ')), MAX_TOKENS) for name in names]
        for start in range(0, len(prompts), 256):
            ids, mask = tokenizer(prompts[start:start + 256], length)
            feats.append(model.text_feat(ids.to(model.device), mask.to(model.device)).cpu())
    return F.normalize(torch.cat(feats).unflatten(0, (len(templates), -1)).mean(0), dim=-1)


@torch.inference_mode()
def class_scores(model: BLIP, tokenizer: Tokenizer, dataset: ClassFolders, templates: list[str] = TEMPLATES, *,
                 batch_size: int = 64, workers: int = 0) -> torch.Tensor:
    """Cosines [images, classes]. Launched on several processes, each embeds its share and all
    get the result."""
    feats = [torch.empty(0, model.config.embed_dim)]
    for images, _ in image_batches(dataset, shard(len(dataset)), batch_size, workers, 'images'):
        feats.append(model.image_feat(model.encode_image(images.to(model.device))).cpu())
    return torch.cat(gather_objects(torch.cat(feats))) @ class_feats(model, tokenizer, dataset.classes, templates).T


def zeroshot_metrics(scores: torch.Tensor, labels: list[int], names: list[str]) -> tuple[dict, list[dict]]:
    """Accuracy of cosines [images, classes].

    Returns:
        ({'top1', where there are more than 5 classes 'top5', and 'class_mean', the mean of the classes' top1, in %},
        per class, worst first: {'class', 'images', 'top1', 'taken_for': [[class, images], ...], most first}).
    """
    ks = (1, 5) if len(names) > 5 else (1,)
    metrics = {f'top{k}': value for k, value in zip(ks, recall_at_k(scores, [[i] for i in labels], ks), strict=True)}
    guesses = scores.max(1).indices.tolist()
    classes = []
    for i, name in enumerate(names):
        said = Counter(guess for guess, label in zip(guesses, labels, strict=True) if label == i)
        count = said.total()
        taken_for = [[names[guess], times] for guess, times in said.most_common() if guess != i]
        classes.append({'class': name, 'images': count, 'top1': 100 * said[i] / count, 'taken_for': taken_for})
    metrics['class_mean'] = sum(row['top1'] for row in classes) / len(classes)
    return metrics, sorted(classes, key=lambda row: row['top1'])


def main(argv: list[str] | None = None) -> None:
    parser = checkpoint_parser(__doc__)
    parser.add_argument('--root', required=True, type=Path, help='folder with a sub-folder of images for each class')
    parser.add_argument('--templates', metavar='FILE', help=f"prompts, one a line (default: {', '.join(TEMPLATES)})")
    parser.add_argument('--batch_size', default=64, type=whole(1), help='default: %(default)s')
    parser.add_argument('--workers', default=0, type=whole(0, 1024),
                        help='processes that load images (default: %(default)s)')
    args = parser.parse_args(argv)
    templates = read_templates(args.templates) if args.templates else list(TEMPLATES)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)
    model, tokenizer, _ = load_model(args.checkpoint, device, 'retrieval', args.tokenizer)
    dataset = ClassFolders(args.root, model.config.image_size)
    scores = class_scores(model, tokenizer, dataset, templates, batch_size=args.batch_size, workers=args.workers)
    if not is_main():
        return
    metrics, classes = zeroshot_metrics(scores, [label for _, label in dataset.samples], dataset.classes)
    best, guesses = scores.max(1)
    images = [{'image': path, 'class': dataset.classes[label], 'predicted': dataset.classes[guess], 'score': score}
              for (path, label), guess, score in zip(dataset.samples, guesses.tolist(), best.tolist(), strict=True)]
    write_json(output_dir / 'zeroshot.json', {
        'checkpoint': args.checkpoint, 'root': str(args.root), 'templates': templates, **metrics, 'classes': classes,
        'images': images})
    accuracy = [{'': key, '%': f'{value:.1f}'} for key, value in metrics.items()]
    accuracy.append({'': 'chance', '%': f'{100 / len(classes):.1f}'})
    rows = [{'class': row['class'], 'images': str(row['images']), 'top-1 %': f'{row["top1"]:.1f}',
             'taken for': ', '.join(f'{name} ({count})' for name, count in row['taken_for'][:3])} for row in classes]
    cards = [caption_card(Path(image['image']), [(image['class'], image['predicted'],
                                                  image['class'] == image['predicted'])])
             for image in (images[i] for i in spread(len(images), SHOWN))]
    setting = f'{len(images)} images of {len(classes)} classes, {len(templates)} prompts each'
    write_page(output_dir / 'zeroshot.html', f'Zero-shot classification of {args.root}',
               [section('Accuracy', table(accuracy), setting), section('Classes, the worst first', table(rows)),
                section('Images', grid(cards), 'Evenly spaced; above its class, below what it was taken for.')],
               args.checkpoint)
    logger.info('%s: %s\n\n%s\n%s', args.checkpoint, setting, markdown(accuracy), markdown(rows[:WORST]))
    logger.info('wrote %s.json and .html', output_dir / 'zeroshot')


if __name__ == '__main__':
    with clean_exit():
        main()
