"""The model: one BLIP class for teacher and student, its losses, momentum twin, generation and checkpoints."""
