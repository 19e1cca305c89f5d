"""Finetune a pre-trained student for image-text retrieval on Flickr30K (ITA + ITM, optionally distilled).

    python train_dlip_retrieval_flickr.py --config configs/demo/retrieval_flickr.yaml
    python -m torch.distributed.run --nproc_per_node=8 train_dlip_retrieval_flickr.py

Each epoch is evaluated on the validation images. The best epoch by mean recall (ties: by the validation loss) is kept
in OUTPUT_DIR/best.pth and finally measured on the test images, beside the teacher, in OUTPUT_DIR/table.md (unless
`--no_test`). Relaunching the same command resumes.
"""

if __name__ == '__main__':  # before the slow imports
    from utils import end_at_once
    end_at_once()

import argparse
import math
from pathlib import Path

import torch

from data.datasets import AnnotatedTrain, ImageTextEval
from data.distributed import barrier, rank, seed_everything
from data.transforms import TrainTransform
from eval.retrieval import evaluate_retrieval
from eval.table import finetune_table
from eval.validation import first_captions, validation
from models.distill.batch import to_batch
from models.distill.start import build_objective
from models.distill.teacher_cache import store_teacher, with_cache
from models.engine.dry_run import dry_run
from models.engine.optim import ramp, set_learning_rate
from models.engine.run_state import RunState
from models.engine.setup import build_nets, epoch_loader, script_run
from models.engine.stopping import STOP
from models.weights.checkpoint import load_model
from utils import clean_exit, logger


def main(argv: list[str] | None = None) -> None:
    with script_run(__doc__, 'configs/retrieval_flickr.yaml', 'output/retrieval_flickr', argv, tests=True) as frame:
        finetune(*frame)


def finetune(args: argparse.Namespace, config: dict, device: torch.device, output_dir: Path) -> None:
    model, data, train = config['model'], config['data'], config['train']

    # data
    transform = TrainTransform(model['image_size'], data['min_scale'], data['randaugment'], data['image_memory'])
    dataset = AnnotatedTrain(data['root'], transform, data['max_words'], args.seed, data['split'])
    held_out = {split: ImageTextEval.from_config(data, split, model['image_size']) for split in ('val', 'test')}
    pairs = first_captions(held_out['val'], data['max_words'])

    # student, optional teacher or its stored targets, momentum encoder and queues, losses
    tokenizer, student, teacher = build_nets(config, 'retrieval')
    if args.store_teacher is not None:
        return store_teacher(config, teacher, dataset, tokenizer, args.seed, device, args.store_teacher)
    dataset, source = with_cache(config, teacher, dataset, tokenizer, args.seed)
    objective = build_objective(config, student, tokenizer, source, teacher)

    # optimizer and everything else that is saved and resumed
    run = RunState(objective, tokenizer, config, output_dir, device, args.seed, len(dataset))
    settings = {'max_tokens': data['max_tokens'], 'workers': data['num_workers'], **config['eval']}
    if args.dry_run:
        return dry_run(run, epoch_loader(run, dataset), train_step)

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
        val = validation(student.eval(), tokenizer, pairs, max_tokens=data['max_tokens'], workers=data['num_workers'])
        val |= evaluate_retrieval(student, tokenizer, held_out['val'], device=device, **settings)
        logger.info('epoch %d val  txt R@1 %.2f  img R@1 %.2f  mean recall %.2f  loss %.3f', run.epoch, val['txt_r1'],
                    val['img_r1'], val['r_mean'], val['loss'])
        run.keep_best(val['r_mean'], val['loss'], metrics=val)
        run.end_epoch(val)
    barrier()
    if args.no_test:
        return
    best, _, _ = load_model(output_dir / 'best.pth', device)
    run.log.finish(evaluate_retrieval(best, tokenizer, held_out['test'], device=device, **settings))
    blip = {}
    if teacher is not None and teacher.text_encoder is None:
        logger.info('the teacher has no text encoder: BLIP has no column in the table')
    elif teacher is not None:
        blip = evaluate_retrieval(teacher.to(device), tokenizer, held_out['test'], device=device, **settings)
    finetune_table(output_dir, {f'test_{name}': value for name, value in blip.items()})


def train_step(run: RunState, loaded: list[dict]) -> dict[str, torch.Tensor]:
    """One optimizer step on its accumulated batches -> mean losses, gradient norm and temperature."""
    config, objective, optimizer, losses = run.config, run.objective, run.optimizer, {}
    set_learning_rate(optimizer, run.step, run.steps_per_epoch, config['train']['epochs'], config['optim'])
    alpha = ramp(run.step, run.steps_per_epoch, config['ita']['alpha'], config['ita']['alpha_ramp_epochs'])
    seed_everything(run.seed, run.batches_done, rank())
    batches = [to_batch(batch, run.tokenizer, config['data']['max_tokens'], run.device) for batch in loaded]
    with run.autocast():  # momentum encoder and teacher first, on all batches
        update, batches = objective.prepare(batches, alpha, run.seed * 1_000_003 + run.batches_done)
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
    objective.momentum.update(run.student)
    objective.momentum.enqueue(update.ids, **update.own())  # last: a batch in its own queue would be its own negative
    return {**losses, 'grad_norm': norm, 'temp': run.student.temp.data.clamp_(0.001, 0.5).clone()}


if __name__ == '__main__':
    with clean_exit(), STOP.ends():
        main()
