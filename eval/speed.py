"""Speed and size of checkpoints side by side: medians of interleaved runs at batch 1, FLOPs counted, not typed in.

    python -m eval.speed --checkpoint output/pretrain/last.pth --teacher output/teacher/last.pth --device cpu

A checkpoint is timed in what it can do: a retrieval checkpoint embeds, a caption checkpoint captions, a pre-training
one does both. Captions are 20 new tokens long whatever the model says, so that the models do the same work. The
runs of all checkpoints alternate, so that a busy machine slows all of them alike. With --output_dir the table is
also written to speed.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.common import hardware, tokenizer_option, write_json
from models.blip import BLIP
from models.build import count_parameters
from models.checkpoint import load_model
from models.generation import PROMPT, generate_ids
from models.linear import FLOPS
from models.tokenizer import DEC, Tokenizer
from utils import clean_exit, logger, make_output_dir, progress, setup_process

NEW_TOKENS = 20
TEXT_TOKENS = 30


def workloads(model: BLIP, tokenizer: Tokenizer) -> dict[str, Callable]:
    """Name -> function without arguments, for everything that a net can do, on one random picture or text."""
    generator = torch.Generator().manual_seed(0)
    side, room = model.config.image_size, model.config.max_positions
    image = torch.randn(1, 3, side, side, generator=generator).to(model.device)
    ids = torch.randint(len(tokenizer), (1, min(TEXT_TOKENS, room)), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    prompt = tokenizer([PROMPT], NEW_TOKENS, DEC)[0][0, :-1]
    length = min(len(prompt) + NEW_TOKENS, room)
    work: dict[str, Callable] = {}
    if model.text_encoder is not None:
        work['image embedding'] = lambda: model.image_feat(model.encode_image(image))
        work['text embedding'] = lambda: model.text_feat(ids, mask)
        work['match image + text'] = lambda: model.match_logits(
            ids, mask, model.project_image(model.encode_image(image)))
    if model.text_decoder is not None:
        def caption(beams: int) -> torch.Tensor:
            return generate_ids(model, model.encode_image(image), prompt, tokenizer.sep_id, tokenizer.pad_id,
                                num_beams=beams, min_length=length, max_length=length)
        work['greedy caption'] = lambda: caption(1)
        work['beam-3 caption'] = lambda: caption(3)
    return work


@torch.inference_mode()
def median_ms(work: dict[str, Callable], device: torch.device | str = 'cpu', rounds: int = 20) -> dict[str, float]:
    """Median wall-clock milliseconds of each function; they run in turn, after two rounds of warm-up."""
    wait = torch.cuda.synchronize if torch.device(device).type == 'cuda' else lambda: None
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in progress(range(-2, rounds), desc='timing'):
        for name, function in work.items():
            wait()
            started = time.perf_counter()
            function()
            wait()
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def gflops(function: Callable) -> float:
    """Floating-point operations of a call in 1e9 (2 per multiply-add; matrix products, convolutions, attention)."""
    # attention as plain products: torch < 2.13 does not count its fused CPU kernel
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops() / 1e9


def compare(nets: dict[str, tuple[BLIP, Tokenizer]], device: torch.device | str = 'cpu', rounds: int = 20
            ) -> list[dict]:
    """One row per workload: GFLOPs and median ms of each net, and, for two nets, the ratio first / second."""
    work = {name: workloads(*net) for name, net in nets.items()}
    labels = {what: None for functions in work.values() for what in functions}
    times = median_ms({(name, what): function for name, functions in work.items()
                       for what, function in functions.items()}, device, rounds)
    rows = [{'': 'parameters (M)', **{name: count_parameters(model) / 1e6 for name, (model, _) in nets.items()}}]
    rows += [{'': f'{what} (GFLOPs)', **{name: gflops(work[name][what]) for name in nets if what in work[name]}}
             for what in labels]
    rows += [{'': f'{what} (ms)', **{name: times[name, what] for name in nets if what in work[name]}}
             for what in labels]
    if len(nets) == 2:
        first, second = nets
        for row in rows:
            if first in row and second in row:
                row['ratio'] = row[first] / row[second]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='the student')
    parser.add_argument('--teacher', help='another checkpoint to stand beside it')
    parser.add_argument('--rounds', type=int, default=20, help='timed runs of each workload (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--output_dir')
    tokenizer_option(parser)
    args = parser.parse_args(argv)
    device = setup_process(args.device)
    output_dir = make_output_dir(args.output_dir) if args.output_dir else None
    paths = {'teacher': args.teacher, 'student': args.checkpoint} if args.teacher else {'student': args.checkpoint}
    nets = {name: load_model(path, device, tokenizer=args.tokenizer)[:2] for name, path in paths.items()}
    rows = compare(nets, device, args.rounds)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [''.join(f'{column:>12}' if column else f'{"":<28}' for column in columns)]
    for row in rows:
        cells = [f'{row[column]:>12.3f}' if column in row else f'{"-":>12}' for column in columns[1:]]
        lines.append(f'{row[""]:<28}' + ''.join(cells))
    sizes = ', '.join(f'{name} {model.config.image_size} px' for name, (model, _) in nets.items())
    setting = f'batch 1, float32, {sizes}, {hardware(device)}, medians of {args.rounds} interleaved runs'
    logger.info('%s\n%s', setting, '\n'.join(lines))
    if output_dir:
        write_json(output_dir / 'speed.json', {'setting': setting, 'checkpoints': paths, 'rows': rows})


if __name__ == '__main__':
    with clean_exit():
        main()
