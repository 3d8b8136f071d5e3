"""Expert placement: replicas of busy experts, and places for all, so that no rank has much more to do than others."""

from tokenferry.nn.balance.placement import Placement
from tokenferry.nn.balance.solve import balance

__all__ = ["Placement", "balance"]
