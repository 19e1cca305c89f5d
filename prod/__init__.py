"""DLIP in a notebook or a service: captions, embeddings, similarities, matching."""

from prod.dlip import DLIPProd

__all__ = ['DLIPProd']
