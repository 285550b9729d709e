"""InfLoRA: its learner, its branches and its subspaces."""

from models.inflora.learner import InfLoRA

__all__ = ["InfLoRA"]
