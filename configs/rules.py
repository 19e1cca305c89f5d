"""What each setting may be: one rule a key, and the relations between keys. The same rules parse command lines."""

import argparse
from dataclasses import dataclass

from utils import shorten

LARGEST = 2 ** 31 - 1  # where nothing else bounds a number


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


SHARE = Number(0, 1)
