"""Captions: BLIP's cleaning, and text that every file format can hold."""

import re

PROMPT = 'a picture of '  # BLIP's, before every caption that is generated
PUNCTUATION = '.!"()*#:;~'
EDGES = PUNCTUATION + ' '  # what a caption without a word is made of
BLANKED = str.maketrans(dict.fromkeys(PUNCTUATION, ' '))


def clean_caption(text: str, max_words: int) -> str:
    """BLIP's `pre_caption`: lower case, punctuation and runs of white space to one blank, at most `max_words` words."""
    text = re.sub(r'\s{2,}', ' ', text.lower().translate(BLANKED)).rstrip('\n').strip(' ')
    return ' '.join(text.split(' ')[:max_words])


def is_empty(text: str) -> bool:
    """True when cleaning leaves no word."""
    return not text[:1].isalnum() and not text.translate(BLANKED).strip()  # the first is quick


def one_line(text) -> str:
    """The caption with single blanks for white space; '' when it is no text or cleaning leaves no word."""
    if not isinstance(text, str):
        return ''
    if not text.isprintable() or '  ' in text:  # most captions need nothing, and there are millions
        text = ' '.join(storable(text).split())
    return text.strip() if text.strip(EDGES) else ''


def storable(text: str) -> str:
    """Without lone surrogates (halves of a broken emoji), which neither UTF-8 nor Arrow nor a tokenizer can hold."""
    return text if text.isascii() else text.encode('utf-8', 'ignore').decode()
