"""Routers, and a complete expert-parallel Mixture-of-Experts layer for training.

Gradients (see `MoELayer`): backward computes the gradients of the *sum of all ranks' losses*. Each expert is on one
rank, so its gradients are complete; those of replicated parameters (the router, the rest of the model) must be summed
over the ranks. For the mean over R ranks, use ``loss / R`` on each rank.
"""

from tokenferry.nn.layer import MoELayer
from tokenferry.nn.router import GroupLimit, Router, group_limited_topk, softmax_topk

__all__ = ["GroupLimit", "MoELayer", "Router", "group_limited_topk", "softmax_topk"]
