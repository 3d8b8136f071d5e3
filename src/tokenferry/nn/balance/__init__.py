"""Expert placement: replicas of busy experts, and places for all, so that no rank has much more to do than others."""

from tokenferry.nn.balance.loads import ExpertLoads
from tokenferry.nn.balance.moves import move_experts, rebalance
from tokenferry.nn.balance.placement import Placement
from tokenferry.nn.balance.routing import PlacedRouter, ReplicaMap
from tokenferry.nn.balance.solve import balance

__all__ = ["ExpertLoads", "PlacedRouter", "Placement", "ReplicaMap", "balance", "move_experts", "rebalance"]
