"""EASE: its learner and prototypes in the subspaces of several adapters."""

from models.ease.learner import EASE

__all__ = ["EASE"]
