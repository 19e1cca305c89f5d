"""Weights: checkpoints, other formats, downloads, and how teacher and student are built from them."""
