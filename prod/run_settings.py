"""What a checkpoint's training config says about its use: prompt, length of texts, beams."""

import os

from data.captions import PROMPT

MAX_TOKENS = 35  # of a text, where the checkpoint does not say what it was trained with
MIN_NEW, MAX_NEW = 6, 26  # tokens of a caption after its prompt: the original's 10 and 30 less the 4 of its prompt


def run_settings(info: dict, max_positions: int, source: str | os.PathLike) -> tuple[str, int, dict[str, int]]:
    """(prompt, tokens of a text, those of num_beams, max_length and min_length that the config sets).

    Args:
        info: of `load_model`, whose `config` is a mapping of mappings where it is there.
        max_positions: of the net.

    Raises:
        ValueError: naming the setting that is of the wrong kind or out of range.
    """
    config = info.get('config') or {}
    data, evaluation = config.get('data') or {}, config.get('eval') or {}
    prompt = data.get('prompt', '' if data else PROMPT)  # pre-training has none
    if not isinstance(prompt, str):
        raise ValueError(f'data.prompt in {source} is {str(prompt)[:40]!r}, no text')
    generation = {key: evaluation[key] for key in ('num_beams', 'max_length', 'min_length') if key in evaluation}
    tokens = data.get('max_tokens', min(MAX_TOKENS, max_positions))
    for name, value, low, high in (('data.max_tokens', tokens, 3, max_positions),
                                   *((f'eval.{key}', value, 0 if key == 'min_length' else 1, max_positions)
                                     for key, value in generation.items())):
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f'{name} in {source} is {str(value)[:40]!r}: it must be a whole number from {low} to '
                             f'{high}')
    return prompt, tokens, generation
