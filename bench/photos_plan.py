"""The runs of bench.photos: what each changes of configs/photos."""

from dataclasses import dataclass

from models.distill.terms import TEACHER_TERMS

TEACHER, STUDENT = 'configs/photos/teacher.yaml', 'configs/photos/student.yaml'
CAUSES, RECIPES, NETS, STUDENTS = ('Alignment alone, 100 updates of 128 pairs', 'All losses, 117 updates of 256 pairs',
                                   'Teacher', 'Students of a quarter, 234 updates of 128 pairs')


@dataclass(frozen=True)
class Run:
    """Args:
        group: the table it belongs to.
        settings: overrides of the config.
        start: where a student starts: 'elsewhere', 'cut from the teacher' or, of another net, ''.
        full: measure re-ranked recalls and beam-search captions, too, not only cosine recalls and greedy captions.
        split: the split that is measured.
    """

    name: str
    group: str
    config: str
    settings: tuple[str, ...]
    seed: int = 1
    start: str = ''
    full: bool = False
    split: str = 'test'


def terms(**weights: float) -> tuple[str, ...]:
    """Overrides that give the distillation terms these weights, and all others 0."""
    return tuple(f'loss.{name}={weights.get(name, 0)}' for name in sorted(TEACHER_TERMS))


PUBLISHED = ('model.init_vision=photos/vit.safetensors', 'model.init_text=photos/minilm')
EQUAL_LR = 'optim.pretrained_lr_scale=1'
ITA_ALONE = ('loss.itm=0', 'loss.lm=0', 'data.train=photos/some.json', 'train.epochs=1', 'train.batch_size=128',
             'optim.warmup_steps=10', 'optim.lr=1e-4', EQUAL_LR, 'ita.momentum=0.95')
QUEUE, ONLINE = 'ita.queue_size=1024', 'ita.momentum=0'
HIGH_LR = 'optim.lr=1e-3'
CAUSE_ROWS = {
    'queue 1,024, momentum 0.95, lr 1e-4': (QUEUE,),
    'queue 1,024, momentum 0, lr 1e-4': (QUEUE, ONLINE),
    'queue 1,024, momentum 0.95, lr 5e-5': (QUEUE, 'optim.lr=5e-5'),
    'queue 1,024, momentum 0.95, lr 1e-4, alpha 0': (QUEUE, 'ita.alpha=0'),
    'no queue, momentum 0.95, lr 1e-4': (),
    'no queue, momentum 0.995, lr 1e-4': ('ita.momentum=0.995',),
    'no queue, momentum 0, lr 1e-4': (ONLINE,),
    'no queue, momentum 0, lr 5e-5': (ONLINE, 'optim.lr=5e-5'),
    'no queue, momentum 0, lr 1e-4, alpha 0': (ONLINE, 'ita.alpha=0'),
    'no queue, momentum 0, lr 1e-4, 25 updates of 512': (ONLINE, 'train.batch_size=512', 'optim.warmup_steps=3'),
    'no queue, momentum 0, lr 1e-3, towers 1e-4': (ONLINE, HIGH_LR, 'optim.pretrained_lr_scale=0.1'),
    'no queue, momentum 0, lr 1e-3, towers frozen': (ONLINE, HIGH_LR, 'optim.pretrained_lr_scale=0'),
}
ONE_EPOCH = ('train.epochs=1', 'optim.warmup_steps=20')
RECIPE_ROWS = {
    'queue 4,096, momentum 0.995, lr 2e-4': ('ita.queue_size=4096', 'ita.momentum=0.995', 'optim.lr=2e-4', EQUAL_LR),
    'no queue, momentum 0.995, lr 2e-4': ('ita.momentum=0.995', 'optim.lr=2e-4', EQUAL_LR),
    'no queue, momentum 0.9, lr 1e-3, towers 2e-4': ('optim.pretrained_lr_scale=0.2',),
    'no queue, momentum 0.9, lr 1e-3, towers 1e-4': (),
}
DEFAULT = dict(image_tokens=5, itm_soft=1, lm_logits=1, decoder_cross_attn=1, vision_hidden=1, fused_hidden=1,
               decoder_hidden=1)
NINE = dict(image_feat=1, text_feat=1, fused_feat=1, decoder_feat=1, ita_soft=1, lm_logits=1, self_attn=1, cross_attn=1,
            decoder_self_attn=1)
EMBEDDINGS = dict(image_feat=1, text_feat=1)
STORABLE = dict(image_feat=1, text_feat=1, ita_soft=1, itm_soft=1, lm_logits=1)
THREE = ('hidden_layers.vision=[4, 8, 12]', 'hidden_layers.text=[2, 4, 6]')
STUDENT_ROWS = {
    'no teacher': ('teacher.weights=null',),
    'no distillation term': terms(),
    "the original's nine terms": terms(**NINE),
    'default': terms(**DEFAULT),
    'default and both embeddings': terms(**DEFAULT, **EMBEDDINGS),
    'default, both embeddings, ita_soft': terms(**DEFAULT, **EMBEDDINGS, ita_soft=1),
    'storable terms alone': terms(**STORABLE),
    'default, hidden states of 3 layers': (*terms(**DEFAULT), *THREE),
}
CUT = ('model.init_vision=teacher', 'model.init_text=teacher')


def plan() -> list[Run]:
    """All runs, the most telling first."""
    causes = [Run(name, CAUSES, TEACHER, (*PUBLISHED, *ITA_ALONE, *settings)) for name, settings in CAUSE_ROWS.items()]
    recipes = [Run(name, RECIPES, TEACHER, (*PUBLISHED, *settings, *ONE_EPOCH), split='val')
               for name, settings in RECIPE_ROWS.items()]
    students = []
    for seed in (1, 2, 3):
        for start, where in (('elsewhere', ()), ('cut from the teacher', CUT)):
            students += [Run(name, STUDENTS, STUDENT, (*where, *settings), seed, start)
                         for name, settings in STUDENT_ROWS.items() if name != 'no teacher' or start == 'elsewhere']
    return [*causes, *recipes, Run('teacher', NETS, TEACHER, PUBLISHED, full=True), *students]
