"""Inference against what a user would run otherwise, as ratios: transformers' BLIP-Base, and dlip-v2's way to decode.

    python -m bench.inference --image_size 224 384 --batch 1 16

Random weights of the real sizes, 20 new tokens forced, all sides of a row interleaved in one process, medians. The
sides:

- transformers: `BlipForConditionalGeneration` / `BlipForImageTextRetrieval` base, float32, as loaded;
- original: DLIP's student decoded as dlip-v2 does, the image's keys and values projected again at every step and for
  every beam, with autograd on and torch's own linear layers;
- DLIP: this repository's student, at each precision and backend of DLIPProd, with its output error beside it; those of
  ONNX are exported first;
- DLIP, BLIP-Base: the weights of transformers' captioner in this repository's net, served in the same ways but ONNX.

At the end the image encoder's share of the fastest matrix product that this machine was seen to do, in either library:
how much of it is left to gain.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import atexit
import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs.rules import whole
from data.captions import PROMPT
from data.distributed import progress
from models.blip import BLIP
from models.generation import generate_ids, search
from models.generation.constraints import Constraints
from models.linear import FLOPS, Linear
from models.tokenizer import DEC, ENC, Tokenizer
from models.weights.checkpoint import architecture, load_model
from prod.onnx_backend import ONNXBLIP
from prod.onnx_export import export_onnx
from prod.openvino_backend import HINTS, core
from prod.precision import for_inference
from utils import ROOT, clean_exit

SERVED = (('fp32', 'torch'), ('bf16', 'torch'), ('fp32', 'openvino'), ('bf16', 'openvino'), ('int8', 'openvino'))
EXPORTED = ('fp32', 'int8')  # to ONNX
VOCAB = ROOT / 'tests' / 'vocab.txt'
NEW_TOKENS = 20
SIDE = 2048  # of the matrices whose product counts as this machine's peak
TEXT = 'two brown dogs run after a red ball on a long sandy beach while people watch'  # 18 tokens with its ends


class GrowingCache:
    """Self-attention keys and values that are concatenated at every step, as transformers' cache."""

    def __init__(self):
        self.length, self.kv = 0, {}

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        past = self.kv.get(layer, (k[:, :, :0], v[:, :, :0]))
        self.kv[layer] = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.kv[layer]

    def reorder(self, rows: torch.Tensor) -> None:
        self.kv = {layer: (k[rows], v[rows]) for layer, (k, v) in self.kv.items()}


class OriginalDecoder(search.Decoder):
    """dlip-v2's decoding: every step projects the image of every row again."""

    def __init__(self, model: BLIP, image_tokens: torch.Tensor, capacity: int, copies: int = 1):
        super().__init__(model, image_tokens, capacity, copies)
        self.image_tokens, self.cache = image_tokens, GrowingCache()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.image_tokens.repeat_interleave(len(ids) // len(self.image_tokens), 0)
        self.image_kv = self.model.project_image(rows)
        return super().logits(ids)

    def keep_images(self, keep: torch.Tensor) -> None:
        self.image_tokens = self.image_tokens[keep]


def with_plain_linear_layers(model: BLIP) -> BLIP:
    model = copy.deepcopy(model)
    for part in model.modules():
        if type(part) is Linear:
            part.__class__ = torch.nn.Linear
    return model


def our_work(model: BLIP, tokenizer: Tokenizer, images: torch.Tensor) -> dict[str, Callable]:
    """Workload -> function, on pictures [B, 3, S, S]."""
    prompt = tokenizer([PROMPT], NEW_TOKENS, DEC)[0][0, :-1]
    length = len(prompt) + NEW_TOKENS
    ids, mask = (x.to(images.device) for x in tokenizer([TEXT] * 64, 35))
    matched = tokenizer([TEXT] * 64, 35, ENC)[0].to(images.device)

    def caption(beams: int) -> torch.Tensor:
        return generate_ids(model, model.encode_image(images), prompt, tokenizer.sep_id, tokenizer.pad_id,
                            num_beams=beams, min_length=length, max_length=length)

    return {'greedy caption': lambda: caption(1), 'beam-3 caption': lambda: caption(3),
            'image embedding': lambda: model.image_feat(model.encode_image(images)),
            'text embedding x 64': lambda: model.text_feat(ids, mask),
            'match 64 texts, 1 image': lambda: model.match_logits(
                matched, mask, model.project_image(model.encode_image(images[:1])))}


def original_work(model: BLIP, tokenizer: Tokenizer, images: torch.Tensor) -> dict[str, Callable]:
    prompt = tokenizer([PROMPT], NEW_TOKENS, DEC)[0][0, :-1]
    length = len(prompt) + NEW_TOKENS
    constraints = Constraints(tokenizer.sep_id, min_length=length)

    def caption(beams: int) -> torch.Tensor:
        ours, search.Decoder = search.Decoder, OriginalDecoder
        try:
            with torch.inference_mode(False), torch.enable_grad():
                tokens = model.encode_image(images)
                if beams == 1:
                    return search.extend(model, tokens, prompt, tokenizer.pad_id, length, lambda x: x.argmax(-1),
                                             constraints)[0]
                return search.beam_search(model, tokens, prompt, tokenizer.pad_id, beams, length, 1.0,
                                              constraints)[0]
        finally:
            search.Decoder = ours

    return {'greedy caption': lambda: caption(1), 'beam-3 caption': lambda: caption(3)}


def transformers_work(captioner, retriever, tokenizer: Tokenizer, images: torch.Tensor) -> dict[str, Callable]:
    prompt = tokenizer([PROMPT], NEW_TOKENS, DEC)[0].to(images.device)
    ids, mask = (x.to(images.device) for x in tokenizer([TEXT] * 64, 35))
    matched = tokenizer([TEXT] * 64, 35, ENC)[0].to(images.device)

    def caption(beams: int) -> torch.Tensor:
        return captioner.generate(images, prompt.repeat(len(images), 1), num_beams=beams, do_sample=False,
                                  min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)

    def image_feat() -> torch.Tensor:
        return F.normalize(retriever.vision_proj(retriever.vision_model(images)[0][:, 0]), dim=-1)

    def text_feat() -> torch.Tensor:
        return F.normalize(retriever.text_proj(retriever.text_encoder(ids, mask)[0][:, 0]), dim=-1)

    def match() -> torch.Tensor:
        tokens = retriever.vision_model(images[:1])[0].expand(64, -1, -1)
        hidden = retriever.text_encoder(matched, mask, encoder_hidden_states=tokens)[0]
        return retriever.itm_head(hidden[:, 0])

    return {'greedy caption': lambda: caption(1), 'beam-3 caption': lambda: caption(3), 'image embedding': image_feat,
            'text embedding x 64': text_feat, 'match 64 texts, 1 image': match}


def transformers_base(image_size: int):
    """transformers' two classes at BLIP-Base's sizes, random weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval
    config = BlipConfig(text_config={'num_attention_heads': 12}, vision_config={'image_size': image_size})
    config.vision_config.initializer_range = 0.02
    return BlipForConditionalGeneration(config).eval(), BlipForImageTextRetrieval(config).eval()


@torch.inference_mode()
def medians(work: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each function, in turn, after one round of warm-up."""
    times = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def error(ours: Callable, exact: Callable) -> str:
    """Of features and scores the relative L2 error, of captions the share of equal tokens."""
    a, b = ours(), exact()
    if a.dtype == torch.int64:
        return f'{float((a == b).float().mean()):.0%} of tokens'
    return f'{float((a - b).norm() / b.norm()):.0e}'


def product(precision: str, backend: str) -> Callable:
    """A matrix product of 2 x SIDE^3 operations."""
    a, b = torch.randn(2, SIDE, SIDE)
    if backend == 'torch':
        a, b = (x.to(torch.float32 if precision == 'fp32' else torch.bfloat16) for x in (a, b))
        return lambda: a @ b
    import openvino
    graph = openvino.convert_model(torch.jit.trace(lambda x: x @ b, (a,), check_trace=False))
    settings = {'INFERENCE_PRECISION_HINT': HINTS[precision], 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    request = core().compile_model(graph, 'CPU', settings).create_infer_request()
    return lambda: request.infer([a.numpy()])


def exported(model: BLIP, tokenizer: Tokenizer, precision: str) -> ONNXBLIP:
    folder = Path(tempfile.mkdtemp(prefix='dlip-onnx'))
    atexit.register(shutil.rmtree, folder)  # its graphs are loaded as they are used
    export_onnx(folder, model, tokenizer, {}, precision)
    return ONNXBLIP(folder)


def report_peak(nets: dict[str, object], image_size: int, batch: int, rounds: int) -> None:
    """Print the image encoders' operations a second beside those of a large matrix product."""
    images = torch.randn(batch, 3, image_size, image_size)
    reference = nets['DLIP fp32 torch']
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, torch.no_grad():
        reference.encode_image(images)
    work = {f'{precision} {backend}': product(precision, backend) for precision, backend in SERVED[:-1]}
    work |= {side: partial(net.encode_image, images) for side, net in nets.items() if 'int8' not in side}
    seconds = medians(work, rounds)
    flops = counter.get_total_flops()
    print(f'\nImage encoder, {image_size} px, batch {batch}: {flops / batch / 1e9:.1f} GFLOPs a picture\n')
    print('| side | GFLOP/s | of the best product at this precision |')
    print('|---|---:|---:|')
    for side in nets:
        if side in seconds:
            precision = side.split()[1]
            peak = max(2 * SIDE ** 3 / seconds[f'{precision} {backend}'] for backend in ('torch', 'openvino'))
            rate = flops / seconds[side]
            print(f'| {side} | {rate / 1e9:.0f} | {rate / peak:.0%} of {peak / 1e9:.0f} |')


def served(net: BLIP) -> dict[str, BLIP]:
    """A net at each precision and backend."""
    return {f'DLIP {precision} {backend}': for_inference(net, precision, backend) for precision, backend in SERVED}


def same_weights(captioner) -> BLIP:
    """The net of a captioner of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        captioner.save_pretrained(folder)
        return load_model(folder, tokenizer=VOCAB)[0]


def compare(title: str, sides: dict[str, dict[str, Callable]], names: Iterable[str], rounds: int) -> None:
    """Print milliseconds and ratios of the workloads `names`, the sides in turn."""
    print(f'\n{title}\n')
    print('| workload | side | ms | times transformers | times the original | error |')
    print('|---|---|---:|---:|---:|---:|')
    for name in progress(names, desc=title):
        work = {side: functions[name] for side, functions in sides.items() if name in functions}
        seconds = medians(work, rounds)
        reference, original = seconds['transformers base'], seconds.get('student, original')
        for side, value in seconds.items():
            shown = error(work[side], work['DLIP fp32 torch']) if side.startswith('DLIP') else ''
            print(f'| {name} | {side} | {1000 * value:.0f} | {reference / value:.1f} | '
                  f'{f"{original / value:.1f}" if original else ""} | {shown} |', flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image_size', type=whole(1), nargs='+', default=[224, 384], help='default: 224 384')
    parser.add_argument('--batch', type=whole(1), nargs='+', default=[1, 16], help='pictures at once (default: 1 16)')
    parser.add_argument('--rounds', type=whole(1), default=7, help='default: %(default)s')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(VOCAB)
    for image_size in args.image_size:
        torch.manual_seed(0)
        theirs = transformers_base(image_size)
        student = BLIP(architecture('small', image_size, len(tokenizer))).eval()
        plain = with_plain_linear_layers(student)
        nets, base = served(student), served(same_weights(theirs[0]))
        nets |= {f'DLIP {precision} onnx': exported(student, tokenizer, precision) for precision in EXPORTED}
        for batch in args.batch:
            images = torch.randn(batch, 3, image_size, image_size)
            at = f'{image_size} px, batch {batch}, {args.threads} threads'
            reference = {'transformers base': transformers_work(*theirs, tokenizer, images)}
            compare(at, reference | {'student, original': original_work(plain, tokenizer, images)}
                    | {side: our_work(net, tokenizer, images) for side, net in nets.items()},
                    reference['transformers base'], args.rounds)
            compare(f'BLIP-Base, {at}',
                    reference | {side: our_work(net, tokenizer, images) for side, net in base.items()},
                    ('greedy caption', 'beam-3 caption'), args.rounds)
        for batch in args.batch:
            report_peak(nets, image_size, batch, args.rounds)


if __name__ == '__main__':
    with clean_exit():
        main()
