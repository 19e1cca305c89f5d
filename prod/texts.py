"""Texts as a user gives them."""

from prod.images import kind


def checked_texts(texts: str | list[str] | tuple[str, ...], name: str = 'texts') -> list[str]:
    """One text or several -> a list; lone surrogates, which no tokenizer takes, are replaced.

    Args:
        name: what to call them in an error.

    Raises:
        TypeError, ValueError: naming what is no text, or that there is none.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple):
        raise TypeError(f'{name} is {kind(texts)}: pass a str or a list of str')
    if not texts:
        raise ValueError(f'the list of {name} is empty: pass at least one text')
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f'{name}[{i}] is {kind(text)}: it must be a str')
    return [text.encode('utf-8', 'replace').decode() for text in texts]
