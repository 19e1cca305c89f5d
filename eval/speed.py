"""Speed and size of checkpoints side by side: medians of interleaved runs at batch 1, FLOPs counted, not typed in.

    python -m eval.speed --checkpoint output/pretrain/last.pth --teacher output/teacher/last.pth --device cpu

A checkpoint is timed in what it can do: a retrieval checkpoint embeds, a caption checkpoint captions (greedily and by
the beams of the config), a pre-training one does both. Captions are 20 new tokens long whatever the model says, so that
the models do the same work. The runs of all checkpoints alternate, so that a busy machine slows all of them alike.
Prints the table and writes OUTPUT_DIR/speed.json and speed.html.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs import load_config
from configs.rules import whole
from data.captions import PROMPT
from data.distributed import is_main, progress
from eval.common import checkpoint_parser, compared, hardware, write_json
from eval.page import section, table, write_page
from eval.table import markdown, number
from models.blip import BLIP
from models.engine.launch import setup_process
from models.generation import generate_ids
from models.linear import FLOPS
from models.tokenizer import DEC, Tokenizer
from models.weights.build import count_parameters
from models.weights.checkpoint import load_model
from utils import clean_exit, logger, make_output_dir

CONFIG = 'configs/caption_flickr.yaml'
NEW_TOKENS = 20
TEXT_TOKENS = 30


def caption_work(num_beams: int) -> str:
    return f'beam-{num_beams} caption' if num_beams > 1 else 'greedy caption'


def workloads(model: BLIP, tokenizer: Tokenizer, num_beams: int = 3, prompt: str = PROMPT) -> dict[str, Callable]:
    """Name -> function without arguments, for everything that a net can do, on one random image or text."""
    generator = torch.Generator().manual_seed(0)
    side, room = model.config.image_size, model.config.max_positions
    image = torch.randn(1, 3, side, side, generator=generator).to(model.device)
    ids = torch.randint(len(tokenizer), (1, min(TEXT_TOKENS, room)), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    start = tokenizer([prompt], room, DEC)[0][0, :-1]
    length = min(len(start) + NEW_TOKENS, room)
    work: dict[str, Callable] = {}
    if model.text_encoder is not None:
        work['image embedding'] = lambda: model.image_feat(model.encode_image(image))
        work['text embedding'] = lambda: model.text_feat(ids, mask)
        work['match image + text'] = lambda: model.match_logits(
            ids, mask, model.project_image(model.encode_image(image)))
    if model.text_decoder is not None:
        def caption(beams: int) -> torch.Tensor:
            return generate_ids(model, model.encode_image(image), start, tokenizer.sep_id, tokenizer.pad_id,
                                num_beams=beams, min_length=length, max_length=length)
        for beams in (1, num_beams):
            work[caption_work(beams)] = lambda beams=beams: caption(beams)
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


def costs(nets: dict[str, dict[str, tuple[BLIP, Tokenizer]]], device: torch.device | str = 'cpu', num_beams: int = 3,
          prompt: str = PROMPT, rounds: int = 20) -> dict[str, dict[str, float]]:
    """What eval/table.py shows of the cost of nets.

    Args:
        nets: name -> {'image': the net that embeds images, 'caption': the one that captions them}, or one of these.

    Returns:
        name -> parameters_M (of both nets' parts, what they share counted once) and, for each kind of work, its
        GFLOPs and median ms at batch 1: image_gflops, image_ms, caption_gflops, caption_ms.
    """
    label = {'image': 'image embedding', 'caption': caption_work(num_beams)}
    work = {(name, kind): workloads(*net, num_beams, prompt)[label[kind]]
            for name, pair in nets.items() for kind, net in pair.items()}
    out = {name: {'parameters_M': parameters([model for model, _ in pair.values()]) / 1e6}
           for name, pair in nets.items()}
    for (name, kind), ms in median_ms(work, device, rounds).items():
        out[name] |= {f'{kind}_gflops': gflops(work[name, kind]), f'{kind}_ms': ms}
    return out


def parameters(models: list[BLIP]) -> int:
    """Parameters of a net, or of a retrieval and a caption net in one, as in pre-training."""
    if len(models) == 1:
        return count_parameters(models[0])
    with torch.device('meta'):
        return count_parameters(BLIP(replace(models[0].config, task='pretrain')))


def compare(nets: dict[str, tuple[BLIP, Tokenizer]], device: torch.device | str = 'cpu', num_beams: int = 3,
            prompt: str = PROMPT, rounds: int = 20) -> list[dict]:
    """One row per workload: GFLOPs and median ms of each net, and, for two nets, the ratio first / second."""
    work = {name: workloads(*net, num_beams, prompt) for name, net in nets.items()}
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
    parser = checkpoint_parser(__doc__)
    parser.add_argument('--config', default=CONFIG, help='YAML file with beams and prompt (default: %(default)s)')
    parser.add_argument('--teacher', metavar='CHECKPOINT', help='another checkpoint to stand beside it')
    parser.add_argument('--rounds', type=whole(1), default=20,
                        help='timed runs of each workload (default: %(default)s)')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='override a setting, e.g. eval.num_beams=5')
    args = parser.parse_args(argv)
    config = load_config(args.config, CONFIG, args.overrides)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)
    if not is_main():
        return
    nets = {name: load_model(path, device, tokenizer=args.tokenizer)[:2] for name, path in compared(args).items()}
    rows = compare(nets, device, config['eval']['num_beams'], config['data']['prompt'], args.rounds)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [{key: row[key] if key == '' else number(row.get(key), 3) for key in columns} for row in rows]
    sizes = ', '.join(f'{name} {model.config.image_size} px' for name, (model, _) in nets.items())
    setting = f'batch 1, float32, {sizes}, {hardware(device)}, medians of {args.rounds} interleaved runs'
    logger.info('%s\n\n%s', setting, markdown(cells))
    write_json(output_dir / 'speed.json', {'setting': setting, 'checkpoints': compared(args), 'rows': rows})
    write_page(output_dir / 'speed.html', 'Speed and size', [section(setting, table(cells))], args.checkpoint)
    logger.info('wrote %s.json and .html', output_dir / 'speed')


if __name__ == '__main__':
    with clean_exit():
        main()
