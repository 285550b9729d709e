"""MOS: its learner and the choice of an adapter for each image."""

from models.mos.learner import MOS

__all__ = ["MOS"]
