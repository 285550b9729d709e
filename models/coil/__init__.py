"""COIL: its learner and its transport."""

from models.coil.learner import COIL

__all__ = ["COIL"]
