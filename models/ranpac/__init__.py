"""RanPAC: its learner and ridge regression on random features."""

from models.ranpac.learner import RanPAC

__all__ = ["RanPAC"]
