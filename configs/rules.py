"""What each setting may be: one rule a key, and the relations between keys. The same rules parse command lines."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from utils import shorten

LARGEST = 2 ** 31 - 1  # where nothing else bounds a number
NAME_BYTES = 210  # of one name in an output path: file systems allow 255, and temporary files have longer ones


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, or `above` low. An instance also serves as an argparse type."""

    low: float
    high: float = LARGEST
    whole: bool = False
    above: bool = False

    def __str__(self):
        kind = 'whole number' if self.whole else 'number'
        low, high = f'{self.low:.10g}', f'{self.high:.10g}'
        return f'a {kind} above {low} and at most {high}' if self.above else f'a {kind} from {low} to {high}'

    def read(self, value) -> int | float:
        """The value as int or float.

        Raises:
            ValueError: it is none, or out of range.
        """
        kinds = int if self.whole else (int, float)
        if (isinstance(value, bool) or not isinstance(value, kinds) or not self.low <= value <= self.high  # or NaN
                or (self.above and value == self.low)):
            raise ValueError(f'must be {self}')
        return value if self.whole else float(value)

    def __call__(self, text: str) -> int | float:
        try:
            return self.read((int if self.whole else float)(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f'must be {self}, got {shorten(text)}') from None


def whole(low: int, high: int = LARGEST) -> Number:
    return Number(low, high, whole=True)


def output_path(text: str) -> Path:
    """argparse's type of a file or folder to be written, beside which others of longer names may be."""
    if not text.strip() or '\0' in text:
        raise argparse.ArgumentTypeError(f'must name a file or folder, got {shorten(text)}')
    if max(len(os.fsencode(part)) for part in Path(text).parts or '.') > NAME_BYTES:
        raise argparse.ArgumentTypeError(f'is a longer name than most file systems allow: choose one of at most '
                                         f'{NAME_BYTES} bytes, got {shorten(text)}')
    return Path(text)


@dataclass(frozen=True)
class Text:
    """A string, one of `choices` if there are any; `null`: or null, for which an empty string stands too."""

    choices: tuple[str, ...] = ()
    null: bool = False
    empty: bool = False

    def __str__(self):
        if self.choices:
            return f'one of {", ".join(self.choices)}'
        return 'a string or null' if self.null else 'a string' if self.empty else 'a string that is not empty'

    def read(self, value) -> str | None:
        if self.null and value in (None, ''):
            return None
        if (not isinstance(value, str) or '\0' in value or (not value and not self.empty)
                or (self.choices and value not in self.choices)):
            raise ValueError(f'must be {self}')
        return value


class Flag:
    """true or false; the words of YAML 1.1 (yes, no, on, off), which YAML 1.2 reads as strings, are accepted."""

    words = {'true': True, 'yes': True, 'on': True, 'false': False, 'no': False, 'off': False}

    def read(self, value) -> bool:
        found = value if isinstance(value, bool) else self.words.get(value.lower()) if isinstance(value, str) else None
        if found is None:
            raise ValueError('must be true or false')
        return found


@dataclass(frozen=True)
class Either:
    """A number, or a text that names how to find one."""

    text: Text
    number: Number

    def read(self, value) -> str | float:
        try:
            return (self.text if isinstance(value, str) else self.number).read(value)
        except ValueError:
            raise ValueError(f'must be {self.text}, or {self.number}') from None


class Layers:
    """null, or layers counted from 1, or pairs [student's, teacher's]. models/distill/hidden.py checks the depths."""

    def read(self, value) -> list | None:
        pairs = value if isinstance(value, list) else [None]
        layers = [n for entry in pairs for n in (entry if isinstance(entry, list) and len(entry) == 2 else [entry])]
        if value is not None and (not layers or not all(type(n) is int and 1 <= n <= 1000 for n in layers)):
            raise ValueError('must be null, layers as in [4, 8, 12], or pairs as in [[6, 12]]')
        return value


class Compile(Flag):
    """A flag, or a mode of torch.compile."""

    modes = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')

    def read(self, value) -> bool | str:
        try:
            return value if value in self.modes else super().read(value)
        except ValueError:
            raise ValueError(f'must be true or false, or one of {", ".join(self.modes)}') from None


SHARE, FLAG, TEXT, OPTIONAL = Number(0, 1), Flag(), Text(), Text(null=True)

RULES = {
    'model.size': TEXT,  # a block of sizes.yaml
    'model.image_size': whole(1, 8192),
    'model.init': OPTIONAL,
    'model.init_vision': OPTIONAL,
    'model.init_text': OPTIONAL,
    'model.init_layers': Text(('spaced', 'first', 'last')),
    'model.dropout': Number(0, 0.9),
    'model.vit_ckpt_layer': whole(0, 1000),
    'tokenizer': TEXT,
    'teacher.weights': OPTIONAL,
    'teacher.cache': OPTIONAL,
    'teacher.top_k': whole(1, 100_000),
    'loss.*': Number(0, 1e6),
    'hidden_layers.*': Layers(),
    'ita.queue_size': whole(0, 10 ** 8),
    'ita.momentum': SHARE,
    'ita.alpha': SHARE,
    'ita.alpha_ramp_epochs': whole(0, 100_000),
    'negative_all_rank': FLAG,
    'data.train': TEXT,
    'data.val_fraction': Number(0, 0.5),
    'data.root': TEXT,
    'data.split': Either(Text(('standard', 'hash')), Number(0, 0.4, above=True)),
    'data.prompt': Text(empty=True),
    'data.teacher_captions': SHARE,
    'data.max_words': whole(1, 100_000),
    'data.max_tokens': whole(3, 100_000),  # [CLS], [SEP] and one more
    'data.min_scale': Number(0, 1, above=True),
    'data.randaugment': FLAG,
    'data.num_workers': whole(0, 1024),
    'data.image_memory': Number(0, 1024, above=True),
    'data.max_bad_fraction': SHARE,
    'optim.lr': Number(0, 100),
    'optim.min_lr': Number(0, 100),
    'optim.warmup_lr': Number(0, 100),
    'optim.warmup_steps': whole(0),
    'optim.lr_scheduler': Text(('step', 'cosine')),
    'optim.lr_decay_rate': Number(0, 1, above=True),
    'optim.pretrained_lr_scale': Number(0, 100),
    'optim.weight_decay': Number(0, 100),
    'optim.clip_grad': Number(0, 1e6),
    'optim.grad_accum_steps': whole(1, 100_000),
    'optim.shard': FLAG,
    'train.epochs': whole(0, 100_000),
    'train.batch_size': whole(1, 10 ** 6),
    'train.precision': Text(('bf16', 'fp32')),
    'train.compile': Compile(),
    'train.log_every': whole(1),
    'train.save_every': whole(0),
    'train.keep_checkpoints': whole(0, 10_000),
    'train.wandb_project': OPTIONAL,
    'scst.epochs': whole(0, 100_000),
    'scst.lr': Number(0, 100),
    'scst.samples': whole(2, 1000),  # each caption is compared with the mean of the others of its image
    'eval.num_beams': whole(1, 1000),
    'eval.max_length': whole(2, 100_000),
    'eval.min_length': whole(0, 100_000),
    'eval.batch_size': whole(1, 10 ** 6),
    'eval.k_test': whole(0),
    'eval.memory_mb': whole(0, 10 ** 8),
}
# Old name -> new one, or None for a setting that is gone. Files, command lines and checkpoints may use the old names
# until the next release.
RENAMED = {
    'teacher.size': None,
    'data.val': 'data.val_fraction',
    'data.workers': 'data.num_workers',
    'data.max_bad_share': 'data.max_bad_fraction',
    'optim.schedule': 'optim.lr_scheduler',
    'optim.decay': 'optim.lr_decay_rate',
    'optim.clip_norm': 'optim.clip_grad',
    'optim.accumulate': 'optim.grad_accum_steps',
    'train.keep': 'train.keep_checkpoints',
    'train.wandb': 'train.wandb_project',
}
# Of a block of sizes.yaml; those that it may leave out have a default.
SIZE_RULES = {
    'patch_size': whole(1, 1024),
    'vision_width': whole(4, 65536),
    'vision_depth': whole(1, 1000),
    'vision_heads': whole(1, 1024),
    'text_width': whole(1, 65536),
    'text_depth': whole(1, 1000),
    'text_heads': whole(1, 1024),
    'text_ffn': whole(1, 10 ** 6),
    'embed_dim': whole(1, 65536),
    'max_positions': whole(3, 100_000),
}
SIZE_DEFAULTS = {'embed_dim': 256, 'max_positions': 512}
NOT_ABOVE = [('optim.min_lr', 'optim.lr'), ('optim.warmup_lr', 'optim.lr'), ('eval.min_length', 'eval.max_length')]


def rule(key: str) -> Number | Text | Either | Flag | Layers:
    """The rule of a dotted key of a config. Every key of the shipped files has one."""
    return RULES.get(key) or RULES[f'{key.partition(".")[0]}.*']


def relations(config: dict) -> list[tuple[str, str]]:
    """What does not go together in a config (values by dotted key): (key, what it must be)."""
    wrong = [(low, f'must be at most {high}, {config[high]}') for low, high in NOT_ABOVE
             if low in config and config[low] > config[high]]
    if config.get('scst.epochs') and config['optim.min_lr'] > config['scst.lr']:
        wrong.append(('optim.min_lr', f'must be at most scst.lr, {config["scst.lr"]}'))
    return wrong


def net_relations(config: dict, net: dict, name: str) -> list[tuple[str, str]]:
    """Which settings a net cannot serve: (key, what it must be).

    Args:
        config: values by dotted key.
        net: its `patch_size` and `max_positions`.
        name: how a message calls the net.
    """
    wrong = [(key, f'must be at most the text positions of {name}, {net["max_positions"]}')
             for key in ('data.max_tokens', 'eval.max_length') if config.get(key, 0) > net['max_positions']]
    if config.get('model.image_size', 0) % net['patch_size']:
        wrong.append(('model.image_size', f'must be a multiple of the patch size of {name}, {net["patch_size"]}'))
    return wrong


def size_relations(block: dict) -> list[tuple[str, str]]:
    """What does not go together in a block of sizes.yaml: (key, what it must be)."""
    wrong = [(f'{tower}_width', f'must be a multiple of {tower}_heads, {block[f"{tower}_heads"]}')
             for tower in ('vision', 'text') if block[f'{tower}_width'] % block[f'{tower}_heads']]
    if block['vision_width'] % 4:
        wrong.append(('vision_width', 'must be a multiple of 4, which the 2-d sine-cosine positions need'))
    return wrong
