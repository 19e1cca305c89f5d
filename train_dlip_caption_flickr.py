"""Finetune a pre-trained student for captioning on Flickr30K (LM, optionally distilled and CIDEr-optimised).

    python train_dlip_caption_flickr.py --config configs/demo/caption_flickr.yaml
    python -m torch.distributed.run --nproc_per_node=8 train_dlip_caption_flickr.py

Each epoch is evaluated on the validation images. The best epoch by CIDEr (ties: by the validation loss) is kept in
OUTPUT_DIR/best.pth and finally measured on the test images, beside the teacher, in OUTPUT_DIR/table.md (unless
`--no_test`). With `scst.epochs`, self-critical training follows as a run of its own in OUTPUT_DIR/scst. Relaunching
the same command resumes.
"""

if __name__ == '__main__':  # before the slow imports
    from utils import end_at_once
    end_at_once()

import argparse
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from data.datasets import AnnotatedTrain, AnnotatedWhole, Captioned, ImageTextEval
from data.distributed import barrier, is_main, rank, seed_everything, to_device
from data.transforms import TrainTransform, normalise
from eval.caption import evaluate_captions
from eval.cider import CiderReward
from eval.table import finetune_table
from eval.validation import HeldOut, first_captions, validation
from models.distill.batch import to_batch
from models.distill.start import build_objective
from models.distill.teacher_cache import store_teacher, with_cache
from models.distill.teacher_captions import teacher_captions
from models.engine.dry_run import dry_run
from models.engine.optim import set_learning_rate
from models.engine.run_state import RunState
from models.engine.self_critical import SelfCritical
from models.engine.setup import build_nets, epoch_loader, script_run
from models.engine.stopping import STOP
from models.generation import generate
from models.tokenizer import DEC
from models.weights.build import build_student
from models.weights.checkpoint import load_model
from utils import atomic_write, clean_exit, logger, shorten


def main(argv: list[str] | None = None) -> None:
    with script_run(__doc__, 'configs/caption_flickr.yaml', 'output/caption_flickr', argv, tests=True) as frame:
        finetune(*frame)


def finetune(args: argparse.Namespace, config: dict, device: torch.device, output_dir: Path) -> None:
    model, data, train, scst = config['model'], config['data'], config['train'], config['scst']
    if data['teacher_captions'] and config['teacher']['cache']:
        raise ValueError('teacher.cache holds answers about the references alone: set data.teacher_captions to 0, or '
                         'teacher.cache to null')

    # data
    transform = TrainTransform(model['image_size'], data['min_scale'], data['randaugment'], data['image_memory'])
    dataset = AnnotatedTrain(data['root'], transform, data['max_words'], args.seed, data['split'],
                             data['teacher_captions'])
    images = AnnotatedWhole(data['root'], model['image_size'], data['max_words'], data['split'])
    held_out = {split: ImageTextEval.from_config(data, split, model['image_size']) for split in ('val', 'test')}
    pairs = first_captions(held_out['val'], data['max_words'])

    # student, optional teacher or its stored targets, losses
    tokenizer, student, teacher = build_nets(config, 'caption')
    prompt_length = tokenizer([data['prompt']], data['max_tokens'], DEC)[0].shape[1] - 1  # without [SEP]
    if prompt_length > data['max_tokens'] - 2:
        raise ValueError(f'data.prompt {shorten(data["prompt"])} leaves no token for a caption: raise data.max_tokens, '
                         f'{data["max_tokens"]}')
    # settings that evaluation cannot work with are refused now, not after the first epoch
    generate(student.eval(), tokenizer, torch.zeros(1, 3, model['image_size'], model['image_size']), data['prompt'],
             **{key: value for key, value in config['eval'].items() if key != 'batch_size'})
    if args.store_teacher is not None:
        return store_teacher(config, teacher, dataset, tokenizer, args.seed, device, args.store_teacher, data['prompt'])
    dataset, source = with_cache(config, teacher, dataset, tokenizer, args.seed, data['prompt'])
    objective = build_objective(config, student, tokenizer, source, teacher, prompt_length)

    # optimizer and everything else that is saved and resumed
    run = RunState(objective, tokenizer, config, output_dir, device, args.seed, len(dataset))
    generation = {'prompt': data['prompt'], 'workers': data['num_workers'], **config['eval']}
    if args.dry_run:
        return dry_run(run, epoch_loader(run, dataset), train_step)
    if data['teacher_captions'] and not teacher:
        logger.info('teacher.weights is null: data.teacher_captions is off')
    elif data['teacher_captions']:
        dataset.teacher_captions = teacher_captions(teacher, tokenizer, images, output_dir / 'teacher_captions.jsonl',
                                                    device=device, **generation)
    fit(run, train_step, dataset, held_out['val'], pairs, generation)
    barrier()

    # self-critical stage: from the best of the epochs before it, without dropout
    if scst['epochs']:
        if not train['epochs']:  # the stage starts from model.init, which it has to beat
            found, _ = evaluate_captions(student.eval(), tokenizer, held_out['val'], device=device, **generation)
            run.keep_best(found['CIDEr'], math.inf)
        start, folder = output_dir / 'before_scst.pth', output_dir / 'scst'
        if is_main() and not start.exists():
            copy(output_dir / 'best.pth', start)
        barrier()
        student = build_student(model | {'init': str(start), 'dropout': 0.0}, tokenizer, 'caption')
        objective = SelfCritical(student, tokenizer, CiderReward(images.references), scst['samples'], data['prompt'],
                                 config['eval']['max_length'])
        stage = config | {'optim': config['optim'] | {'lr': scst['lr']}, 'train': train | {'epochs': scst['epochs']}}
        last = RunState(objective, tokenizer, stage, folder, device, args.seed, len(images))
        last.best = max(last.best, run.best)
        fit(last, self_critical_step, images, held_out['val'], pairs, generation)
        if is_main() and (folder / 'best.pth').exists():
            copy(folder / 'best.pth', output_dir / 'best.pth')
        barrier()

    if args.no_test:
        return
    best, _, _ = load_model(output_dir / 'best.pth', device)
    test, _ = evaluate_captions(best, tokenizer, held_out['test'], device=device, **generation)
    run.log.finish(test)
    blip = {}
    if teacher is not None and teacher.text_decoder is None:
        logger.info('the teacher has no text decoder: BLIP has no column in the table')
    elif teacher is not None:
        blip, _ = evaluate_captions(teacher.to(device), tokenizer, held_out['test'], device=device, **generation)
    finetune_table(output_dir, {f'test_{name}': value for name, value in blip.items()})


def fit(run: RunState, train_step: Callable[[RunState, list[dict]], dict], dataset: Captioned, val: ImageTextEval,
        pairs: HeldOut, generation: dict) -> None:
    """Train to the last epoch; after each one caption the validation images and keep the best by CIDEr."""
    data, train, student = run.config['data'], run.config['train'], run.student
    while run.epoch < train['epochs']:
        run.model.train()
        with run.updates(epoch_loader(run, dataset)) as updates:
            for batches in updates:
                losses = train_step(run, batches)
                run.step_done(batches, losses)
                if run.is_due(train['log_every']):
                    run.log_interval()
                if run.epoch_done or run.is_due(train['save_every']):
                    run.save()
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
        run.end_epoch(found, [(Path(record['image']), record['caption']) for record in records[:8]])


def train_step(run: RunState, loaded: list[dict]) -> dict[str, torch.Tensor]:
    """One optimizer step on its accumulated batches -> mean losses and gradient norm."""
    config, objective, optimizer, losses = run.config, run.objective, run.optimizer, {}
    set_learning_rate(optimizer, run.step, run.steps_per_epoch, config['train']['epochs'], config['optim'])
    seed_everything(run.seed, run.batches_done, rank())
    data = config['data']
    batches = [to_batch(batch, run.tokenizer, data['max_tokens'], run.device, data['prompt']) for batch in loaded]
    update, batches = objective.prepare(batches)
    while batches:
        if len(batches) < len(loaded):
            run.leave_if_stopped()
        with run.exchange_gradients(now=len(batches) == 1):  # with the last batch's
            with run.autocast():
                terms = run.model(batches.pop(0), update)  # pop: frees the teacher's answers before backward
            (terms['loss'] / len(loaded)).backward()
        for name, value in terms.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / len(loaded)
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), config['optim']['clip_grad'] or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**losses, 'grad_norm': norm}


def self_critical_step(run: RunState, loaded: list[dict]) -> dict[str, torch.Tensor]:
    """One optimizer step on captions that the student samples -> mean loss and reward, gradient norm."""
    config, optimizer, losses = run.config, run.optimizer, {}
    set_learning_rate(optimizer, run.step, run.steps_per_epoch, config['train']['epochs'], config['optim'])
    seed_everything(run.seed, run.batches_done, rank())
    for number, batch in enumerate(loaded, 1):
        if number > 1:
            run.leave_if_stopped()
        images = normalise(to_device(batch['image'], run.device))
        with run.exchange_gradients(now=number == len(loaded)):
            with run.autocast():
                terms = run.model(images, batch['id'])
            (terms['loss'] / len(loaded)).backward()
        for name, value in terms.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / len(loaded)
    norm = torch.nn.utils.clip_grad_norm_(run.objective.parameters(), config['optim']['clip_grad'] or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**losses, 'grad_norm': norm}


def copy(source: Path, target: Path) -> None:
    with open(source, 'rb') as theirs, atomic_write(target, 'wb') as file:
        shutil.copyfileobj(theirs, file)


if __name__ == '__main__':
    with clean_exit(), STOP.ends():
        main()
