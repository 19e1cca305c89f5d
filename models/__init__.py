"""The model: one BLIP class for teacher and student, its losses, and the momentum encoder."""
