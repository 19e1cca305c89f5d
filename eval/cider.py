"""CIDEr-D of a few captions at a time, as the reward of self-critical training."""

import math
from collections import Counter

from pycocoevalcap.cider.cider_scorer import precook

from data.distributed import progress
from eval.metrics import simple_tokens

ORDERS, SIGMA = 4, 6.0  # pycocoevalcap's: n-grams up to 4 words, width of the length penalty
END = '[SEP]'  # a word that the simple tokenizer does not give
Vector = tuple[dict[tuple[str, ...], float], list[float], int]  # n-gram -> tf-idf, norm per order, length


class CiderReward:
    """pycocoevalcap's CIDEr (which is CIDEr-D) with the document frequencies of the training references, counted once.

    Its own scorer counts them anew for each set that it scores, and takes several times as long. Captions and
    references are split by the simple tokenizer, without Java. The end of a caption is a word too, as in Luo's
    ImageCaptioning.pytorch: otherwise a caption that breaks off ("a man with a") scores as well as one that ends.

    Args:
        references: the captions of each training image.
    """

    def __init__(self, references: list[list[str]]):
        self.references = references
        counts = Counter()
        for texts in progress(references, desc='n-grams'):
            counts.update({ngram for text in texts for ngram in self.ngrams(text, True)})
        self.frequency = {ngram: count for ngram, count in counts.items() if count > 1}  # a count of 1 weighs as none
        self.log_images = math.log(len(references))

    def __call__(self, images: list[int], captions: list[str], ended: list[bool]) -> list[float]:
        """The reward of each caption, 0 to 10.

        Args:
            images: of each caption its index in the references.
            ended: whether the caption came to its end, or was cut off.
        """
        wanted = {image: [self.vector(text, True) for text in self.references[image]] for image in set(images)}
        return [self.score(self.vector(caption, end), wanted[image])
                for image, caption, end in zip(images, captions, ended, strict=True)]

    @staticmethod
    def ngrams(text: str, ended: bool) -> dict[tuple[str, ...], int]:
        return precook(f'{simple_tokens(text)} {END if ended else ""}', ORDERS)

    def vector(self, text: str, ended: bool) -> Vector:
        weights, norms, length = {}, [0.0] * ORDERS, 0
        for ngram, count in self.ngrams(text, ended).items():
            weight = count * (self.log_images - math.log(self.frequency.get(ngram, 1)))
            weights[ngram] = weight
            norms[len(ngram) - 1] += weight ** 2
            length += count if len(ngram) == 2 else 0
        return weights, [math.sqrt(norm) for norm in norms], length

    @staticmethod
    def score(caption: Vector, references: list[Vector]) -> float:
        weights, norms, length = caption
        total = 0.0
        for wanted, wanted_norms, wanted_length in references:
            products = [0.0] * ORDERS
            for ngram, weight in weights.items():  # in the caption's order: a set's would differ from run to run
                if ngram in wanted:
                    products[len(ngram) - 1] += min(weight, wanted[ngram]) * wanted[ngram]
            cosines = (product / (a * b) for product, a, b in zip(products, norms, wanted_norms, strict=True) if a * b)
            total += sum(cosines) * math.exp(-(length - wanted_length) ** 2 / (2 * SIGMA ** 2))
        return 10 * total / ORDERS / len(references)
