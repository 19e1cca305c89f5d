"""One pre-training step of the real size beside the original's algorithm, as ratios.

    python -m bench.train_step                                # CPU, batch 8
    python -m bench.train_step --device cuda --batch 288      # bf16 and torch.compile on our side

Teacher BLIP-Base, student ViT-S + BERT-Small, 224 px, 30 tokens, queue 57600, the original's loss terms, random
weights and pictures. The reference is written here from transformers' BLIP modules (float32, eager attention) as
dlip-v2 trains: keys and values of the image projected anew in every pass, matching in two passes, logits over the
vocabulary at every position, the negatives picked row by row with `.item()`, the momentum twin updated parameter by
parameter. Both sides take turns on the same batch; medians of whole steps (forward, backward, clipping, AdamW, twin),
then where ours spends its time; the data's part is that of one loader without workers: JPEGs of 640 x 480 decoded and
augmented, captions made tokens, both brought to the device.
"""

import argparse
import copy
import io
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlipTextConfig, BlipTextLMHeadModel, BlipTextModel, BlipVisionConfig, BlipVisionModel

from bench.data_throughput import photograph
from data.datasets import first_readable
from data.transforms import normalise, train_transform
from models import losses
from models.blip import BLIP, BLIPConfig
from models.checkpoint import architecture
from models.logs import memory_used
from models.momentum import MomentumQueue
from models.objective import Objective
from models.optim import parameter_groups
from models.tokenizer import Tokenizer
from models.update import with_start
from utils import ROOT, clean_exit, progress, read_yaml

CLS, ENC, DEC, VOCABULARY, TOKENS = 101, 30523, 30522, 30524, 30
ORIGINAL_TERMS = ('ita', 'itm', 'lm', 'image_tokens', 'image_feat', 'text_feat', 'fused_feat', 'decoder_feat',
                  'ita_soft', 'lm_logits', 'self_attn', 'cross_attn', 'decoder_self_attn')


def data(batch: int, image_size: int, device: str) -> Callable:
    """A function that makes a batch of JPEGs and captions, as the loader and the run do."""
    files = [photograph(seed, 75) for seed in range(batch)]
    transform, tokenizer = train_transform(image_size, 0.2, True), Tokenizer.from_pretrained(ROOT / 'tests/vocab.txt')

    def make() -> None:
        items = [first_readable([(io.BytesIO(file), 'two dogs run after a red ball on the beach', i)], transform, 30, i)
                 for i, file in enumerate(files)]
        ids, mask = tokenizer([item['caption'] for item in items], TOKENS)
        images = torch.stack([item['image'] for item in items]).to(device, non_blocking=True)
        normalise(images), ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
    return make


def random_batch(batch: int, image_size: int, device: str) -> tuple[torch.Tensor, ...]:
    """images, ids, mask and sample ids; captions of 8 to 30 tokens."""
    images = torch.randn(batch, 3, image_size, image_size)
    lengths = torch.linspace(8, TOKENS, batch).long()
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (batch, TOKENS)) * mask
    return tuple(x.to(device) for x in (images, ids, mask, torch.arange(batch)))


# ---------------------------------------------------------------- the original's algorithm

class Reference(nn.Module):
    """A BLIP from transformers' modules, encoder and decoder tied as the original ties them."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        text = BlipTextConfig(vocab_size=config.vocab_size, hidden_size=config.text_width,
                              intermediate_size=config.text_ffn, num_hidden_layers=config.text_depth,
                              num_attention_heads=config.text_heads, encoder_hidden_size=config.vision_width,
                              hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
                              projection_dim=config.embed_dim, bos_token_id=DEC, sep_token_id=102)
        text._attn_implementation = 'eager'
        vision = BlipVisionConfig(hidden_size=config.vision_width, intermediate_size=4 * config.vision_width,
                                  num_hidden_layers=config.vision_depth, num_attention_heads=config.vision_heads,
                                  image_size=config.image_size, patch_size=config.patch_size)
        self.vision = BlipVisionModel(vision)
        self.encoder = BlipTextModel(text, add_pooling_layer=False)
        self.decoder = BlipTextLMHeadModel(text)
        for ours, theirs in zip(self.decoder.bert.encoder.layer, self.encoder.encoder.layer, strict=True):
            ours.crossattention, ours.intermediate, ours.output = (
                theirs.crossattention, theirs.intermediate, theirs.output)
        self.decoder.bert.embeddings = self.encoder.embeddings
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_width, config.embed_dim)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def features(self, tokens, ids, mask):
        hidden = self.encoder(ids, mask).last_hidden_state
        return (F.normalize(self.vision_proj(tokens[:, 0]), dim=-1), F.normalize(self.text_proj(hidden[:, 0]), dim=-1))


class ReferenceStep:
    """dlip-v2's `forward`, with the losses of models/losses.py, so that both sides compute the same terms."""

    def __init__(self, student: Reference, teacher: Reference, queue_size: int, weights: dict[str, float], lr: float,
                 device: str):
        self.student, self.teacher = student.to(device).train(), teacher.to(device).eval().requires_grad_(False)
        self.twin = copy.deepcopy(student).eval().requires_grad_(False)
        wide, narrow = teacher.vision_proj.in_features, student.vision_proj.in_features
        text = teacher.text_proj.in_features, student.text_proj.in_features
        self.maps = nn.ModuleDict({'token': nn.Linear(narrow, wide), 'fused': nn.Linear(text[1], text[0]),
                                   'decoder': nn.Linear(text[1], text[0])}).to(device)
        self.weights = weights
        self.queues = {name: F.normalize(torch.randn(256, queue_size, device=device), dim=0)
                       for name in ('image', 'text', 'teacher image', 'teacher text')}
        self.ids = torch.full((queue_size,), losses.IGNORE, device=device)
        self.pointer = 0
        parameters = [*student.parameters(), *self.maps.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)

    def __call__(self, images, ids, mask, sample_ids) -> None:
        student, teacher, out, batch = self.student, self.teacher, {}, len(ids)
        ids = with_start(ids, CLS)
        tokens = student.vision(images).last_hidden_state
        image, text = student.features(tokens, ids, mask)
        with torch.no_grad():
            for ours, theirs in zip(self.twin.parameters(), student.parameters(), strict=True):
                ours.data = ours.data * 0.995 + theirs.data * 0.005
            image_m, text_m = self.twin.features(self.twin.vision(images).last_hidden_state, ids, mask)
            teacher_tokens = teacher.vision(images).last_hidden_state
            teacher_image, teacher_text = teacher.features(teacher_tokens, ids, mask)
        new = {'image': image_m, 'text': text_m, 'teacher image': teacher_image, 'teacher text': teacher_text}
        every = {name: torch.cat([new[name].T, queue], 1).T for name, queue in self.queues.items()}
        targets = losses.positives(sample_ids, torch.cat([sample_ids, self.ids]))
        out['ita'] = losses.ita_loss(image, text, image_m, text_m, every['image'], every['text'], student.temp, targets,
                                     0.4)
        out['ita_soft'] = losses.soft_ita_loss(image, text, every['image'], every['text'], student.temp, teacher_image,
                                               teacher_text, every['teacher image'], every['teacher text'],
                                               teacher.temp)
        out['image_tokens'] = losses.cosine_loss(self.maps['token'](tokens), teacher_tokens)
        out['image_feat'] = losses.cosine_loss(image, teacher_image)
        out['text_feat'] = losses.cosine_loss(text, teacher_text)
        rows = (self.pointer + torch.arange(batch, device=ids.device)) % len(self.ids)
        for name, queue in self.queues.items():
            queue[:, rows] = new[name].T
        self.ids[rows] = sample_ids
        self.pointer += batch

        ids = with_start(ids, ENC)  # matching: the pairs, and the teacher's pass over them
        fused = student.encoder(ids, mask, encoder_hidden_states=tokens, output_attentions=True)
        with torch.no_grad():
            target = teacher.encoder(ids, mask, encoder_hidden_states=teacher_tokens, output_attentions=True)
            to_text = (image @ text_m.T / student.temp).softmax(1).fill_diagonal_(0) + 1e-4
            to_image = (text @ image_m.T / student.temp).softmax(1).fill_diagonal_(0) + 1e-4
        images_negative, ids_negative, mask_negative = [], [], []
        for row in range(batch):
            images_negative.append(tokens[torch.multinomial(to_image[row], 1).item()])
            chosen = torch.multinomial(to_text[row], 1).item()
            ids_negative.append(ids[chosen])
            mask_negative.append(mask[chosen])
        negative = student.encoder(torch.cat([ids, torch.stack(ids_negative)]),
                                   torch.cat([mask, torch.stack(mask_negative)]),
                                   encoder_hidden_states=torch.cat([torch.stack(images_negative), tokens]))
        out['itm'] = losses.itm_loss(student.itm_head(torch.cat([fused.last_hidden_state[:, 0],
                                                                 negative.last_hidden_state[:, 0]])))
        out['fused_feat'] = losses.cosine_loss(self.maps['fused'](fused.last_hidden_state[:, 0]),
                                               target.last_hidden_state[:, 0])
        for name, maps in (('self_attn', 'attentions'), ('cross_attn', 'cross_attentions')):
            ours, theirs = (getattr(result, maps)[-1].clamp_min(1e-9).log() for result in (fused, target))
            out[name] = losses.attention_kl_loss(ours, theirs, mask)

        ids = with_start(ids, DEC)  # captions
        labels = ids.masked_fill(mask == 0, losses.IGNORE)
        passes = {'encoder_hidden_states': tokens, 'output_attentions': True, 'output_hidden_states': True,
                  'is_decoder': True, 'use_cache': False}
        said = student.decoder(ids, mask, **passes)
        with torch.no_grad():
            wanted = teacher.decoder(ids, mask, **passes | {'encoder_hidden_states': teacher_tokens})
        valid = labels[:, 1:] != losses.IGNORE
        out['lm'] = losses.lm_loss(said.logits[:, :-1], labels[:, 1:])
        out['lm_logits'] = losses.logit_kl_loss(said.logits[:, :-1][valid], wanted.logits[:, :-1][valid])
        out['decoder_feat'] = losses.cosine_loss(self.maps['decoder'](said.hidden_states[-1][:, :-1]),
                                                 wanted.hidden_states[-1][:, :-1], valid)
        ours, theirs = (result.attentions[-1].clamp_min(1e-9).log() for result in (said, wanted))
        out['decoder_self_attn'] = losses.attention_kl_loss(ours, theirs, mask)
        sum(self.weights[name] * value for name, value in out.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---------------------------------------------------------------- ours

class OurStep:
    """The step of models/training.py, its parts timed.

    Args:
        precision: 'fp32' or 'bf16' (autocast).
    """

    def __init__(self, student: BLIP, teacher: BLIP, queue_size: int, weights: dict[str, float], lr: float,
                 device: str, precision: str, compiled: bool):
        momentum = MomentumQueue(student, queue_size, 0.995, teacher.config.embed_dim)
        self.objective = Objective(student, weights, (CLS, ENC, DEC), momentum, teacher).to(device).train()
        self.objective.teacher.to(device)
        self.device, self.precision, self.number = device, precision, 0
        self.optimizer = torch.optim.AdamW(parameter_groups(self.objective, 0.05), lr=lr, fused=True)
        if compiled:
            for net in (student, teacher):
                net.compile_towers()

    def forward(self, batch) -> torch.Tensor:
        self.number += 1
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == 'bf16'):
            return self.objective(*batch, 0.4, self.number)['loss']

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, *batch) -> None:
        self.forward(batch).backward()
        self.update()
        self.objective.momentum.update(self.objective.student)

    def split(self, batch, make_batch: Callable, synchronise: Callable, rounds: int) -> dict[str, float]:
        """Median seconds of each part of the step; the teacher's share of forward by running it alone, with pads."""
        times: dict[str, list[float]] = {}

        def timed(name: str, function: Callable):
            synchronise()
            started = time.perf_counter()
            result = function()
            synchronise()
            times.setdefault(name, []).append(time.perf_counter() - started)
            return result

        for _ in range(rounds):
            timed('data, beside the step', make_batch)
            loss = timed('forward', lambda: self.forward(batch))
            timed('backward', loss.backward)
            timed('clipping and AdamW', self.update)
            timed('momentum twin', lambda: self.objective.momentum.update(self.objective.student))
            timed('  of forward: teacher', lambda: self.teacher_alone(*batch))
        parts = {name: statistics.median(values) for name, values in times.items()}
        parts['  of forward: student and twin'] = parts['forward'] - parts['  of forward: teacher']
        return parts

    @torch.no_grad()
    def teacher_alone(self, images, ids, mask, sample_ids) -> None:
        teacher = self.objective.teacher
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == 'bf16'):
            tokens = teacher.encode_image(images)
            teacher.text_feat(ids, mask)
            kv = teacher.project_image(tokens)
            teacher.text_encoder(ids, mask, image_kv=kv, want_maps=True)
            hidden = teacher.text_decoder.bert(ids, mask, causal=True, image_kv=kv, want_maps=True).hidden
            teacher.text_decoder.logits(hidden[:, :-1][mask[:, 1:].bool()])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--batch', type=int, default=8, help='default: %(default)s')
    parser.add_argument('--image_size', type=int, default=224, help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5, help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--precisions', nargs='+', choices=('fp32', 'bf16'), default=['fp32', 'bf16'],
                        help='of our side; bf16 is slow where the CPU has no such arithmetic')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    synchronise = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    if args.device == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
    config = read_yaml('configs/pretrain.yaml')
    weights, queue = dict.fromkeys(ORIGINAL_TERMS, 1.0), config['ita']['queue_size']
    sizes = {name: architecture(name, args.image_size, VOCABULARY) for name in ('base', 'small')}
    batch = random_batch(args.batch, args.image_size, args.device)
    shared = (queue, weights, config['optim']['lr'], args.device)
    steps = {'original, fp32': ReferenceStep(Reference(sizes['small']), Reference(sizes['base']), *shared)}
    for precision in args.precisions:
        nets = BLIP(sizes['small']), BLIP(sizes['base']).eval()
        steps[f'DLIP, {precision}'] = OurStep(*nets, *shared, precision, compiled=args.device == 'cuda')
    times = {name: [] for name in steps}
    for number in progress(range(args.rounds + 1), desc='rounds'):
        for name, step in steps.items():
            synchronise()
            started = time.perf_counter()
            step(*batch)
            synchronise()
            if number:
                times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    print(f'{args.image_size} px, batch {args.batch}, {args.device}\n')
    print('| step | ms | pairs/s | times the original |\n|---|---:|---:|---:|')
    for name, value in seconds.items():
        print(f'| {name} | {1000 * value:.0f} | {args.batch / value:.2f} | {seconds["original, fp32"] / value:.2f} |')
    print(f'\n| part of a step (ms) | {" | ".join(args.precisions)} |\n|---|{"---:|" * len(args.precisions)}')
    make_batch = data(args.batch, args.image_size, args.device)
    parts = [steps[f'DLIP, {precision}'].split(batch, make_batch, synchronise, args.rounds)
             for precision in args.precisions]
    for name in parts[0]:
        print(f'| {name} | {" | ".join(f"{1000 * times[name]:.0f}" for times in parts)} |')
    print(f'\nMost memory of the process, all sides at once: {memory_used(torch.device(args.device)):.1f} GiB')


if __name__ == '__main__':
    with clean_exit():
        main()
