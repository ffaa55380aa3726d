"""Prediction heads."""

from .sparseocc_head import SparseOccHead

__all__ = ['SparseOccHead']
