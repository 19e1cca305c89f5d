"""Evaluation: recall, caption metrics and speed, as functions for scripts and notebooks."""
