"""Routers, experts, and a complete expert-parallel Mixture-of-Experts layer for training.

Gradients (see `MoELayer`): backward computes the gradients of the *mean over ranks* of the ranks' losses. Each expert
is on one rank, so its gradients are complete; those of replicated parameters (the router, the rest of the model) have
to be averaged over the ranks, which DistributedDataParallel and FSDP2 do by themselves; see `parallelize`.
"""

from tokenferry.nn.clipping import clip_grad_norm_
from tokenferry.nn.experts import GELUExperts, SwiGLUExperts
from tokenferry.nn.grad_scaler import GradScaler
from tokenferry.nn.grouped import by_expert
from tokenferry.nn.layer import MoELayer
from tokenferry.nn.losses import RouterLosses, load_balance_loss, z_loss
from tokenferry.nn.model_routers import auxiliary_losses, update_biases
from tokenferry.nn.options import LayerOptions, RouterOptions
from tokenferry.nn.parallel import parallelize
from tokenferry.nn.router import GroupLimit, Router, group_limited_topk, softmax_topk

__all__ = [
    "GELUExperts",
    "GradScaler",
    "GroupLimit",
    "LayerOptions",
    "MoELayer",
    "Router",
    "RouterLosses",
    "RouterOptions",
    "SwiGLUExperts",
    "auxiliary_losses",
    "by_expert",
    "clip_grad_norm_",
    "group_limited_topk",
    "load_balance_loss",
    "parallelize",
    "softmax_topk",
    "update_biases",
    "z_loss",
]
