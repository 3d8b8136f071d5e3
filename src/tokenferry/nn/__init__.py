"""Routers, and a complete expert-parallel Mixture-of-Experts layer for training.

What to do with gradients (see `MoELayer`): backward computes those of the *sum of all ranks' losses*. Experts live on
one rank each and need nothing more; the gradients of everything that every rank has a copy of (the router, the rest of
the model) must be summed over the ranks. For the mean over R ranks, give each rank ``loss / R``.
"""

from tokenferry.nn.layer import MoELayer
from tokenferry.nn.router import Router, group_limited_topk, softmax_topk

__all__ = ["MoELayer", "Router", "group_limited_topk", "softmax_topk"]
