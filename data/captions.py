"""Captions: BLIP's cleaning, and text that every file format can hold."""

import re

PUNCTUATION = '.!"()*#:;~'
BLANKED = str.maketrans(dict.fromkeys(PUNCTUATION, ' '))


def clean_caption(text: str, max_words: int) -> str:
    """BLIP's `pre_caption`: lower case, punctuation and runs of white space to one blank, at most `max_words` words."""
    text = re.sub(r'\s{2,}', ' ', text.lower().translate(BLANKED)).rstrip('\n').strip(' ')
    return ' '.join(text.split(' ')[:max_words])


def is_empty(text: str) -> bool:
    """True when cleaning leaves no word."""
    return not text.translate(BLANKED).strip()


def storable(text: str) -> str:
    """Without lone surrogates (halves of a broken emoji), which neither UTF-8 nor Arrow nor a tokenizer can hold."""
    return text if text.isascii() else text.encode('utf-8', 'ignore').decode()
