"""Five phrasings of a scene, the parser that reads them back, and the vocabulary they use."""

import re
from dataclasses import dataclass

from data.captions import PROMPT
from data.scenes import ARRANGEMENTS, BACKGROUNDS, COLOURS, FILLS, PLACES, SHAPES, SIZES, Scene, Thing
from data.transforms import swap_left_right

# {0}, {1}, {2}: the scene's things in canonical order; a phrasing without {bg} does not name the background.
TEMPLATES = {
    ('single', None): ('{0} in the {place} on {bg}', '{bg} background with {0} in the {place}',
                       'on {bg} there is {0} in the {place}', 'in the {place} there is {0} on {bg}',
                       'the {place} shows {0} on {bg}'),
    ('group', 'row'): ('{0} in a row on {bg}', '{bg} background with a row of {0}',
                       'on {bg} there are {0} side by side', 'a row of {0}', 'there are {0} in a row on {bg}'),
    ('group', 'column'): ('{0} in a column on {bg}', '{bg} background with a column of {0}',
                          'on {bg} there are {0} one above the other', 'a column of {0}',
                          'there are {0} in a column on {bg}'),
    ('pair', 'above'): ('{0} above {1} on {bg}', '{1} below {0} on {bg}', '{bg} background with {0} over {1}',
                        'under {0} there is {1} on {bg}', '{1} with {0} on top of it'),
    ('pair', 'left'): ('{0} left of {1} on {bg}', '{1} right of {0} on {bg}',
                       '{bg} background with {0} on the left and {1} on the right',
                       'to the right of {0} there is {1} on {bg}', '{1} with {0} on its left'),
    ('pair', 'inside'): ('{0} inside {1} on {bg}', '{1} around {0} on {bg}', '{bg} background with {1} that holds {0}',
                         'within {1} there is {0} on {bg}', '{1} with {0} in it'),
    ('triple', 'row'): ('{0}, {1} and {2} from left to right', '{1} between {0} on the left and {2} on the right',
                        'on {bg} from left to right {0}, {1} and {2}',
                        'on the left {0}, in the middle {1}, on the right {2}', '{2} right of {1} right of {0}'),
    ('triple', 'column'): ('{0}, {1} and {2} from top to bottom', '{1} between {0} on top and {2} at the bottom',
                           'on {bg} from top to bottom {0}, {1} and {2}',
                           'at the top {0}, in the middle {1}, at the bottom {2}', '{2} below {1} below {0}'),
}
STYLES = 5
WITHOUT_FILL, WITHOUT_SIZE = 2, 3  # the phrasings that leave an attribute out
NUMBERS = {2: 'two', 3: 'three'}


def article(words: str) -> str:
    return f'an {words}' if words[0] in 'aeiou' else f'a {words}'


def noun(thing: Thing, count: int, style: int) -> str:
    """'a small striped red star', 'three red stars'"""
    words = [thing.size if style != WITHOUT_SIZE else None,
             thing.fill if thing.fill != 'solid' and style != WITHOUT_FILL else None, thing.colour, thing.shape]
    text = ' '.join(word for word in words if word)
    plural = f'{text}es' if thing.shape == 'cross' else f'{text}s'
    return article(text) if count == 1 else f'{NUMBERS[count]} {plural}'


def caption(scene: Scene, style: int) -> str:
    """The scene in phrasing `style` (0..4): every thing's colour and shape, the arrangement, and mostly the rest."""
    templates = TEMPLATES[scene.kind, None if scene.kind == 'single' else scene.arrangement]
    nouns = [noun(thing, scene.count, style) for thing in scene.things]
    return templates[style].format(*nouns, bg=scene.background, place=scene.arrangement)


def captions(scene: Scene) -> list[str]:
    return [caption(scene, style) for style in range(STYLES)]


# ---------------------------------------------------------------- reading captions back

@dataclass(frozen=True)
class Reading:
    """What a caption says; things are in canonical order, attributes that it leaves out are None."""

    kind: str
    arrangement: str
    things: tuple[Thing, ...]
    background: str | None
    count: int


NOUN = re.compile(rf'\b(an|a|two|three) (?:({"|".join(SIZES)}) )?(?:({"|".join(FILLS)}) )?({"|".join(COLOURS)}) '
                  rf'({"|".join(SHAPES)})(?:es|s)?\b')
BACKGROUND = re.compile(rf'^({"|".join(BACKGROUNDS)}) background with |\bon ({"|".join(BACKGROUNDS)})\b')


def skeleton(text: str) -> tuple[str, list[re.Match], list[str]]:
    """A caption without the prompt, its nouns (-> 'N') and backgrounds; the nouns, and the backgrounds."""
    text = ' '.join(text.lower().replace(',', ' ').split()).removeprefix(PROMPT)
    nouns = list(NOUN.finditer(text))
    backgrounds = [a or b for a, b in BACKGROUND.findall(text)]
    bare = BACKGROUND.sub(' ', NOUN.sub('N', text))
    return ' '.join(bare.split()), nouns, backgrounds


def known_skeletons() -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Skeleton -> (kind, arrangement, canonical index of each noun), with those of mirrored images."""
    table = {}
    for (kind, arrangement), templates in TEMPLATES.items():
        for place in PLACES if kind == 'single' else (arrangement,):
            for template in templates:
                order = tuple(int(i) for i in re.findall(r'\{(\d)\}', template))
                text = re.sub(r'\{\d\}', 'a red star', template).format('', '', '', bg='white', place=place)
                table[skeleton(text)[0]] = kind, place, order
                mirrored = swap_left_right(skeleton(text)[0])
                if mirrored != skeleton(text)[0]:
                    other = swap_left_right(place) if kind == 'single' else place
                    table.setdefault(mirrored, (kind, other, tuple(max(order) - i for i in order)))
    return table


SKELETONS = known_skeletons()


def parse(text: str) -> Reading | None:
    """Read a caption; None when it is not one of the phrasings."""
    form, nouns, backgrounds = skeleton(text)
    if form not in SKELETONS or len(backgrounds) > 1:
        return None
    kind, arrangement, order = SKELETONS[form]
    things: list[Thing | None] = [None] * len(order)
    for i, match in zip(order, nouns, strict=True):
        _, size, fill, colour, shape = match.groups()
        things[i] = Thing(shape, colour, fill, size)
    numbers = {'a': 1, 'an': 1, 'two': 2, 'three': 3}
    counts = {numbers[match[1]] for match in nouns}
    if len(counts) != 1 or (counts == {1}) == (kind == 'group'):
        return None
    return Reading(kind, arrangement, tuple(things), backgrounds[0] if backgrounds else None, counts.pop())


def slots_match(text: str, scene: Scene) -> bool:
    """Whether a caption is exactly right: things, colours, count and arrangement, and whatever else it mentions.

    An unmentioned fill is read as left out, not as 'solid'.
    """
    reading = parse(text)
    return (reading is not None
            and (reading.kind, reading.arrangement, reading.count) == (scene.kind, scene.arrangement, scene.count)
            and reading.background in (None, scene.background)
            and all((said.shape, said.colour) == (is_.shape, is_.colour) and said.fill in (None, is_.fill)
                    and said.size in (None, is_.size)
                    for said, is_ in zip(reading.things, scene.things, strict=True)))


def vocabulary() -> list[str]:
    """WordPiece vocabulary: special tokens, pieces that can spell any word, and the words of the grammar."""
    characters = [*'abcdefghijklmnopqrstuvwxyz', ',', "'", '-']
    words = {*PROMPT.split(), *(f'{shape}{"es" if shape == "cross" else "s"}' for shape in SHAPES)}
    for (kind, arrangement), templates in TEMPLATES.items():
        for place in ARRANGEMENTS[kind] if arrangement is None else (arrangement,):
            for template in templates:
                words.update(re.findall('[a-z]+', re.sub(r'\{\w+\}', ' ', template) + ' ' + place))
    words.update(SHAPES, COLOURS, BACKGROUNDS, FILLS, SIZES, NUMBERS.values(), ('a', 'an'))
    return ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[DEC]', '[ENC]', *characters,
            *(f'##{c}' for c in characters[:26]), *sorted(words - set(characters))]
