"""Distillation: the objective of a training step, its terms, and what the teacher says."""
