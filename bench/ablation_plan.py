"""The variants of bench.ablation: what each changes of the demo's configs."""

from dataclasses import dataclass

from bench.photos_plan import DEFAULT, STUDENT_ROWS
from bench.photos_plan import terms as only

SEEDS = (1, 2, 3)
# The twelve terms between last layers, as weighed when all are on.
TERMS = {'image_tokens': 5, 'image_feat': 1, 'text_feat': 1, 'fused_feat': 1, 'decoder_feat': 1, 'ita_soft': 1,
         'itm_soft': 1, 'lm_logits': 1, 'self_attn': 1, 'cross_attn': 1, 'decoder_self_attn': 1,
         'decoder_cross_attn': 1}
HIDDEN = {'vision_hidden': 1, 'text_hidden': 1, 'fused_hidden': 1, 'decoder_hidden': 1}
# What the others led to: the terms that earn their cost (bench/ablation.md).
SIX = ('image_tokens', 'lm_logits', 'decoder_cross_attn', 'vision_hidden', 'fused_hidden', 'decoder_hidden')
# What the demo had before: of pre-training, and of the retrieval finetune.
FIVE = ('image_tokens', 'lm_logits', 'image_feat', 'text_feat', 'ita_soft')
RETRIEVAL_FIVE = ('image_tokens', 'itm_soft', 'image_feat', 'text_feat', 'ita_soft')
SCRATCH = ('model.init_vision=null', 'model.init_text=null')
NO_TEACHER = ('teacher.weights=null',)


@dataclass(frozen=True)
class Variant:
    """Args:
        settings: overrides of the demo's config of the stage ('pretrain', 'retrieval' or 'caption').
        epochs: passes over the pairs of a pre-training run.
        pairs: how many there are.
        elsewhere: the vision tower starts as a classifier of scenes (bench/classifier.py), the text tower from scratch.
        start: folder of the pre-training run that a finetune starts from.
        plotted: whether its learning curve is drawn.
        stored: the teacher's targets are stored first, and the run trains without it.
        matching: whether recalls are measured re-ranked too, which takes as long as the training.
    """

    name: str
    group: str
    settings: tuple[str, ...] = ()
    stage: str = 'pretrain'
    epochs: int = 1
    pairs: int = 1200
    elsewhere: bool = False
    start: str = ''
    plotted: bool = False
    stored: bool = False
    matching: bool = True

    @property
    def folder(self) -> str:
        return self.name.replace(' ', '_').replace('/', '-').replace(',', '')


def terms(*names: str, **more: float) -> tuple[str, ...]:
    """Settings that give these terms their weight, and all others of the teacher 0."""
    weights = {name: 0 for name in (*TERMS, *HIDDEN)} | {name: TERMS[name] for name in names} | more
    return tuple(f'loss.{name}={weight}' for name, weight in weights.items())


def six(**more: float) -> tuple[str, ...]:
    return terms(**{name: TERMS.get(name, 1) for name in SIX} | more)


def finetune(*names: str, of: tuple[str, ...]) -> tuple[str, ...]:
    """As `terms`, for a stage that knows only the terms `of`."""
    return tuple(f'loss.{name}={TERMS.get(name, 1) if name in names else 0}' for name in of)


def caption(*names: str) -> tuple[str, ...]:
    return finetune(*names, of=('image_tokens', 'decoder_feat', 'lm_logits', 'decoder_self_attn', 'decoder_cross_attn',
                                'vision_hidden', 'decoder_hidden'))


def retrieval(*names: str) -> tuple[str, ...]:
    return finetune(*names, of=('image_tokens', 'image_feat', 'text_feat', 'fused_feat', 'ita_soft', 'itm_soft',
                                'self_attn', 'cross_attn', 'vision_hidden', 'text_hidden', 'fused_hidden'))


PRETRAINING, SINGLE = 'Pre-training, from layers of the teacher', 'One term alone, and all of the last layers but one'
START, STEPS, SIZES = 'Where the student starts', 'More steps', 'Sizes of the student, 3 times the steps'
ELSEWHERE, MANY = 'A quarter that starts as in a real run, 800 steps', 6400
ELSEWHERE_ROWS = {name: STUDENT_ROWS[name] for name in (
    'no teacher', "the original's nine terms", 'default', 'default and both embeddings', 'storable terms alone')} | {
    'default, hidden states of 3 layers': (*only(**DEFAULT), 'hidden_layers.vision=[3, 5, 7]',
                                           'hidden_layers.text=[2, 4, 6]')}
CAPTION, RETRIEVAL = 'Caption finetune', 'Retrieval finetune'

PLAN = [
    Variant('the six', PRETRAINING, six(), plotted=True),
    *(Variant(f'the six but {name}', PRETRAINING, six(**{name: 0})) for name in SIX),
    Variant('the six and the three of embeddings', PRETRAINING, six(image_feat=1, text_feat=1, ita_soft=1)),
    Variant('the five', PRETRAINING, terms(*FIVE), plotted=True),
    Variant('the five from stored targets', PRETRAINING, terms(*FIVE), stored=True, matching=False),
    Variant('no distillation term', PRETRAINING, terms(), plotted=True),
    Variant('all', PRETRAINING, terms(*TERMS), plotted=True),
    Variant('all, hidden layers too', PRETRAINING, terms(*TERMS, **HIDDEN)),
    Variant('hidden layers alone', PRETRAINING, terms(**HIDDEN)),
    *(Variant(f'{name} alone', SINGLE, terms(**{name: weight}), matching=False)
      for name, weight in (TERMS | HIDDEN).items()),
    *(Variant(f'all but {name}', SINGLE, terms(**{**TERMS, name: 0}), matching=False) for name in TERMS),
    Variant('from scratch, the six', START, SCRATCH + six(), plotted=True),
    Variant('from scratch, no teacher', START, SCRATCH + NO_TEACHER, plotted=True),
    Variant('first layers, the six', START, (*six(), 'model.init_layers=first')),
    Variant('no distillation term, 3 times the steps', STEPS, (*terms(), 'train.epochs=3'), epochs=3),
    Variant('the six, 3 times the steps', STEPS, (*six(), 'train.epochs=3'), epochs=3),
    Variant('from scratch, no teacher, 3 times the steps', STEPS, (*SCRATCH, *NO_TEACHER, 'train.epochs=3'), epochs=3),
    Variant('a quarter, the six', STEPS, (*six(), 'model.size=mini_4')),
    Variant('a quarter, no distillation term, 3 times the steps', STEPS,
            (*terms(), 'model.size=mini_4', 'train.epochs=3'), epochs=3),
    *(Variant(f'1/{part}', SIZES, (*six(), f'model.size={size}', 'train.epochs=3'), epochs=3)
      for part, size in {2: 'bench/sizes.yaml:mini_2', 4: 'mini_4', 6: 'bench/sizes.yaml:mini_6',
                         10: 'bench/sizes.yaml:mini_10'}.items()),
    *(Variant(f'elsewhere: {name}', ELSEWHERE, (*settings, 'model.size=mini_4'), pairs=MANY, elsewhere=True)
      for name, settings in ELSEWHERE_ROWS.items()),
    Variant('elsewhere: no teacher, 1,600 steps', ELSEWHERE, (*NO_TEACHER, 'model.size=mini_4'), pairs=2 * MANY,
            elsewhere=True),
    *(Variant(f'caption: {name}', CAPTION, settings, 'caption', start='the_five') for name, settings in {
        'image_tokens, lm_logits': caption('image_tokens', 'lm_logits'),
        'no teacher': NO_TEACHER,
        'hidden layers, decoder_cross_attn too': caption('image_tokens', 'lm_logits', 'vision_hidden', 'decoder_hidden',
                                                         'decoder_cross_attn'),
        "half of the captions the teacher's": (*caption('image_tokens', 'lm_logits'), 'data.teacher_captions=0.5'),
        "all captions the teacher's": (*caption('image_tokens', 'lm_logits'), 'data.teacher_captions=1'),
        'self-critical epoch after the first row': (*caption('image_tokens', 'lm_logits'), 'scst.epochs=1')}.items()),
    *(Variant(f'retrieval: {name}', RETRIEVAL, settings, 'retrieval', start='the_five') for name, settings in {
        'image_tokens, itm_soft, the three of embeddings': retrieval(*RETRIEVAL_FIVE),
        'no teacher': NO_TEACHER,
        'no itm_soft': retrieval(*(name for name in RETRIEVAL_FIVE if name != 'itm_soft')),
        'no image_tokens': retrieval(*(name for name in RETRIEVAL_FIVE if name != 'image_tokens')),
        'hidden layers too': retrieval(*RETRIEVAL_FIVE, 'vision_hidden', 'fused_hidden'),
        'image_tokens, hidden layers, itm_soft': retrieval('image_tokens', 'itm_soft', 'vision_hidden', 'fused_hidden')
    }.items()),
]
STUDENTS = {variant.start for variant in PLAN if variant.start}
