"""Learners: one file per method family. `base.py` is the contract; `parts/` holds what families share."""
