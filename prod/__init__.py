"""DLIP in a notebook or a service: captions, embeddings, similarities, matching."""

__all__ = ['DLIPProd']


def __getattr__(name: str):
    if name != 'DLIPProd':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from prod.dlip import DLIPProd  # only now: `python -m prod.X` imports this file before anything else
    return DLIPProd
