"""What a weights file must hold: checked before anything is built from it, in time and memory that its size bounds."""

import os

import torch

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = 1e4  # of a trained net's weights, which stay below a hundred; from 1e6 on sums of squares overflow float32
EMBEDDINGS = ('word_embeddings.weight', 'patch_embed.proj.weight')  # never constant, except where a file has holes


def check_tensors(weights, source: str | os.PathLike) -> None:
    """Refuse what is no state dict, before its sizes are believed.

    A tensor that is expanded (stride 0) takes a few bytes in the file, and may claim any size.

    Raises:
        ValueError: naming the key whose value is no dense tensor, or claims more numbers than the file holds.
    """
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f'{source} holds no weights: expected tensors by name, got '
                         f'{"nothing" if weights == {} else type(weights).__name__}')
    held, claimed = {}, {}
    for key, weight in weights.items():
        if not isinstance(key, str) or not isinstance(weight, torch.Tensor):
            raise ValueError(f'{source} holds {type(weight).__name__} under {str(key)[:80]!r}, where a weight '
                             f'should be')
        kind = ('sparse' if weight.layout != torch.strided else 'quantised' if weight.is_quantized else
                'on the meta device, without numbers' if weight.is_meta else 'nested' if weight.is_nested else None)
        if kind:
            raise ValueError(f'{source}: {key[:80]} is {kind}: save its dense float weights instead')
        storage = weight.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        claimed[weight.data_ptr(), weight.shape] = weight.nbytes
    if sum(claimed.values()) > 2 * sum(held.values()):  # some views of one another are legitimate
        key, weight = max(weights.items(), key=lambda item: item[1].nbytes)
        raise ValueError(f'{source} claims more numbers than it holds: {key[:80]} {tuple(weight.shape)} is '
                         f'expanded or damaged')


def check_numbers(weights: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Refuse weights that no net can compute with.

    Raises:
        ValueError: naming the keys that are no floating-point numbers, hold NaN, infinite or absurdly large ones, or of
            the embeddings are all the same number.
    """
    odd = {key: weight.dtype for key, weight in weights.items() if weight.dtype not in PRECISIONS}
    if odd:
        key, dtype = next(iter(odd.items()))
        raise ValueError(f'{source} holds no usable net: {key[:80]} is of {str(dtype).removeprefix("torch.")}, weights '
                         f'are float32, float16, bfloat16 or float64')
    ranges = {key: [float(end) for end in weight.aminmax()] for key, weight in weights.items() if weight.numel()}
    broken = [key for key, (low, high) in ranges.items() if not abs(high - low) < float('inf')]
    if broken:
        raise ValueError(f'{source} holds NaN or infinite numbers ({", ".join(broken[:3])}): the training that wrote '
                         f'it diverged, use an earlier one')
    for key, (low, high) in ranges.items():
        if max(-low, high) > LARGEST:
            raise ValueError(f'{source} holds no usable net: {key[:80]} has weights up to {max(-low, high):.1g}, '
                             f'trained ones stay below {LARGEST:.0g}')
        if low == high and key.endswith(EMBEDDINGS):
            raise ValueError(f'{source} holds no usable net: {key[:80]} is {low:g} throughout; was the file copied '
                             f'whole?')
