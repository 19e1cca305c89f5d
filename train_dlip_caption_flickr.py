"""Finetune a pre-trained student for captioning on Flickr30K (LM, optionally distilled and CIDEr-optimised).

    python train_dlip_caption_flickr.py --config configs/demo/caption_flickr.yaml
    python -m torch.distributed.run --nproc_per_node=8 train_dlip_caption_flickr.py

Each epoch is evaluated on the validation images; the best by CIDEr (where it ties, by the validation loss) is kept in
OUTPUT_DIR/best.pth and measured on the test images at the end, with the teacher beside it in OUTPUT_DIR/table.md
(`--no_test`: it is not).
With `scst.epochs` self-critical training follows, a run of its own in OUTPUT_DIR/scst. Relaunching the same command
resumes.
"""

if __name__ == '__main__':  # before the slow imports
    from signals import end_at_once
    end_at_once()

import argparse
import math
import shutil
from pathlib import Path

import torch

from configs import script_arguments
from data.datasets import AnnotatedTrain, AnnotatedWhole, Captioned, ImageTextEval
from data.folders import run_folder
from data.loader import make_loader
from data.transforms import eval_transform, train_transform
from eval.caption import evaluate_captions
from eval.cider import CiderReward
from eval.table import finetune_table
from eval.validation import HeldOut, first_captions, validation
from models.distill.objective import Objective
from models.distill.start import init_maps, loss_weights
from models.distill.teacher_cache import store_teacher, with_cache
from models.distill.teacher_captions import teacher_captions
from models.engine.dry_run import rehearse
from models.engine.launch import setup_process
from models.engine.self_critical import SelfCritical
from models.engine.stopping import STOP
from models.engine.training import Run
from models.generation import generate
from models.tokenizer import DEC
from models.weights.build import at_resolution, build_student, build_teacher
from models.weights.checkpoint import load_model
from models.weights.sources import load_tokenizer
from utils import atomic_write, barrier, clean_exit, is_main, logger, rank, seed_everything, shorten, world_size


def main(argv: list[str] | None = None) -> None:
    args, config = script_arguments(__doc__, 'configs/caption_flickr.yaml', 'output/caption_flickr', argv, tests=True)
    STOP.listen()
    device = setup_process(args.device)
    stages = ['scst'] if config['scst']['epochs'] else []
    with run_folder(args, *stages) as output_dir:
        finetune(args, config, device, output_dir)


def finetune(args: argparse.Namespace, config: dict, device: torch.device, output_dir: Path) -> None:
    seed_everything(args.seed)
    model, data, train, scst = config['model'], config['data'], config['train'], config['scst']
    if data['teacher_captions'] and config['teacher']['cache']:
        raise ValueError('teacher.cache holds answers about the references alone: set data.teacher_captions to 0, or '
                         'teacher.cache to null')

    # data
    transform = train_transform(model['image_size'], data['min_scale'], data['randaugment'], data['image_memory'])
    dataset = AnnotatedTrain(data['root'], transform, data['max_words'], args.seed, data['split'],
                             data['teacher_captions'])
    pictures = AnnotatedWhole(data['root'], model['image_size'], data['max_words'], data['split'])
    held_out = {split: ImageTextEval(data['root'], split, eval_transform(model['image_size'], data['image_memory']),
                                     data['max_words'], data['split'])
                for split in ('val', 'test')}
    pairs = first_captions(held_out['val'], data['max_words'])

    # student and optional teacher
    tokenizer = load_tokenizer(config['tokenizer'])
    prompt_length = tokenizer([data['prompt']], data['max_tokens'], DEC)[0].shape[1] - 1  # without [SEP]
    if prompt_length > data['max_tokens'] - 2:
        raise ValueError(f'data.prompt {shorten(data["prompt"])} leaves no token for a caption: raise data.max_tokens, '
                         f'{data["max_tokens"]}')
    teacher = build_teacher(config, tokenizer, 'caption')
    teacher = teacher and at_resolution(teacher, model['image_size'])
    student = build_student(model, tokenizer, 'caption', teacher)
    # What the evaluation cannot do with these settings is said now, not after the first epoch.
    generate(student.eval(), tokenizer, torch.zeros(1, 3, model['image_size'], model['image_size']), data['prompt'],
             **{key: value for key, value in config['eval'].items() if key != 'batch_size'})
    if args.store_teacher is not None:
        return store_teacher(config, teacher, dataset, tokenizer, args.seed, device, args.store_teacher, data['prompt'])
    dataset, source = with_cache(config, teacher, dataset, tokenizer, args.seed, data['prompt'])
    objective = Objective(student, loss_weights(config['loss'], source),
                          (tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id), teacher=source,
                          prompt_length=prompt_length, hidden_layers=config['hidden_layers'])
    init_maps(objective, model, teacher)

    # run
    run = Run(objective, tokenizer, config, output_dir, device, args.seed, len(dataset))
    logger.info('%d captions, %d processes x batch %d, %d batches x %d epochs', len(dataset), world_size(),
                train['batch_size'], run.steps_per_epoch, train['epochs'])
    generation = {'prompt': data['prompt'], 'workers': data['num_workers'], **config['eval']}
    if args.dry_run:
        return rehearse(run, batches(run, dataset), data['max_tokens'], data['prompt'])
    if data['teacher_captions'] and not teacher:
        logger.info('teacher.weights is null: data.teacher_captions is off')
    elif data['teacher_captions']:
        dataset.teacher_captions = teacher_captions(teacher, tokenizer, pictures, output_dir / 'teacher_captions.jsonl',
                                                    device=device, **generation)
    fit(run, dataset, held_out['val'], pairs, generation)
    barrier()

    # self-critical stage: from the best of the epochs before it, without dropout
    if scst['epochs']:
        if not train['epochs']:  # nothing was trained before: the stage starts from model.init, and has to beat it
            found, _ = evaluate_captions(student.eval(), tokenizer, held_out['val'], device=device, **generation)
            run.keep_best(found['CIDEr'], math.inf)
        start, folder = output_dir / 'before_scst.pth', output_dir / 'scst'
        if is_main() and not start.exists():
            copy(output_dir / 'best.pth', start)
        barrier()
        student = build_student(model | {'init': str(start), 'dropout': 0.0}, tokenizer, 'caption')
        objective = SelfCritical(student, tokenizer, CiderReward(pictures.references), scst['samples'], data['prompt'],
                                 config['eval']['max_length'])
        stage = config | {'optim': config['optim'] | {'lr': scst['lr']}, 'train': train | {'epochs': scst['epochs']}}
        last = Run(objective, tokenizer, stage, folder, device, args.seed, len(pictures))
        last.best = max(last.best, run.best)
        logger.info('self-critical stage: %d pictures, %d captions of each, %d batches x %d epochs', len(pictures),
                    scst['samples'], last.steps_per_epoch, scst['epochs'])
        fit(last, pictures, held_out['val'], pairs, generation)
        if is_main() and (folder / 'best.pth').exists():
            copy(folder / 'best.pth', output_dir / 'best.pth')
        barrier()

    if args.no_test:
        return
    best, _, _ = load_model(output_dir / 'best.pth', device)
    test, _ = evaluate_captions(best, tokenizer, held_out['test'], device=device, **generation)
    run.finish({f'test_{name}': value for name, value in test.items()})
    blip = {}
    if teacher is not None and teacher.text_decoder is None:
        logger.info('the teacher has no text decoder: BLIP has no column in the table')
    elif teacher is not None:
        blip, _ = evaluate_captions(teacher.to(device), tokenizer, held_out['test'], device=device, **generation)
    finetune_table(output_dir, {f'test_{name}': value for name, value in blip.items()})


def batches(run: Run, dataset: Captioned):
    """The rest of the epoch that the run is in."""
    config = run.config
    return make_loader(dataset, config['train']['batch_size'], seed=run.seed, epoch=run.epoch, start_step=run.batch,
                       workers=config['data']['num_workers'], rank=rank(), world_size=world_size())


def fit(run: Run, dataset: Captioned, val: ImageTextEval, pairs: HeldOut, generation: dict) -> None:
    """Train to the last epoch; after each one caption the validation images and keep the best by CIDEr."""
    data, student = run.config['data'], run.student
    while run.epoch < run.config['train']['epochs']:
        stats = run.train_one_epoch(batches(run, dataset), data['max_tokens'], data['prompt'])
        found, records = evaluate_captions(student.eval(), run.tokenizer, val, device=run.device, **generation)
        found |= validation(student, run.tokenizer, pairs, max_tokens=data['max_tokens'], prompt=data['prompt'],
                            workers=data['num_workers'])
        if generation['num_beams'] > 1:
            greedy, _ = evaluate_captions(student, run.tokenizer, val, device=run.device,
                                          **generation | {'num_beams': 1})
            found['greedy_CIDEr'] = greedy['CIDEr']
        logger.info('epoch %d val  CIDEr %.2f (greedy %.2f)  BLEU-4 %.2f  loss %.3f', run.epoch, found['CIDEr'],
                    found.get('greedy_CIDEr', found['CIDEr']), found['Bleu_4'], found['loss'])
        run.keep_best(found['CIDEr'], found['loss'], metrics=found)
        run.end_epoch(stats | {f'val_{name}': value for name, value in found.items()},
                      [(Path(record['image']), record['caption']) for record in records[:8]])


def copy(source: Path, target: Path) -> None:
    with open(source, 'rb') as theirs, atomic_write(target, 'wb') as file:
        shutil.copyfileobj(theirs, file)


if __name__ == '__main__':
    with clean_exit(), STOP.ends():
        main()
