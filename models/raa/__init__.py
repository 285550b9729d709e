"""RAA and SSIAT: their learner and the shift of class means."""

from models.raa.learner import RAA

__all__ = ["RAA"]
