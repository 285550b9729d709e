"""HCL: its learner, the inversion of images, the choice of an epoch, networks that change over a stream."""

from models.hcl.learner import HCL

__all__ = ["HCL"]
