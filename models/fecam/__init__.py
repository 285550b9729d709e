"""FeCAM: its learner and the metric of each class."""

from models.fecam.learner import FeCAM

__all__ = ["FeCAM"]
