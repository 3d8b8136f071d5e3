"""All kernels that the CUDA backend launches; `ExpertGroup.warmup` and the compile tests iterate over them."""

from __future__ import annotations

from tokenferry.kernels.across_check.spec import SPEC as ACROSS_CHECK
from tokenferry.kernels.across_clock.spec import SPEC as ACROSS_CLOCK
from tokenferry.kernels.across_open.spec import SPEC as ACROSS_OPEN
from tokenferry.kernels.combine_nodes.spec import SPEC as COMBINE_NODES
from tokenferry.kernels.combine_pull.spec import SPEC as COMBINE_PULL
from tokenferry.kernels.combine_push.spec import SPEC as COMBINE_PUSH
from tokenferry.kernels.decode_combine.spec import SPEC as DECODE_COMBINE
from tokenferry.kernels.decode_dispatch.spec import ACROSS as DECODE_DISPATCH_ACROSS
from tokenferry.kernels.decode_dispatch.spec import SPEC as DECODE_DISPATCH
from tokenferry.kernels.decode_encode.spec import SPEC as DECODE_ENCODE
from tokenferry.kernels.decode_open.spec import SPEC as DECODE_OPEN
from tokenferry.kernels.decode_pack.spec import SPEC as DECODE_PACK
from tokenferry.kernels.decode_sum.spec import SPEC as DECODE_SUM
from tokenferry.kernels.decode_unpack.spec import SPEC as DECODE_UNPACK
from tokenferry.kernels.dispatch.spec import SPEC as DISPATCH
from tokenferry.kernels.dispatch_assign.spec import SPEC as DISPATCH_ASSIGN
from tokenferry.kernels.dispatch_expand.spec import SPEC as DISPATCH_EXPAND
from tokenferry.kernels.dispatch_fused.spec import SPEC as DISPATCH_FUSED
from tokenferry.kernels.dispatch_layout.spec import SPEC as DISPATCH_LAYOUT
from tokenferry.kernels.dispatch_notify.spec import SPEC as DISPATCH_NOTIFY
from tokenferry.kernels.dispatch_pack.spec import SPEC as DISPATCH_PACK
from tokenferry.kernels.dispatch_rails.spec import SPEC as DISPATCH_RAILS
from tokenferry.kernels.dispatch_relay.spec import SPEC as DISPATCH_RELAY
from tokenferry.kernels.dispatch_restrict.spec import SPEC as DISPATCH_RESTRICT
from tokenferry.kernels.dispatch_split.spec import SPEC as DISPATCH_SPLIT
from tokenferry.kernels.share_workspace.spec import SPEC as SHARE_WORKSPACE
from tokenferry.kernels.stage_input.spec import SPEC as STAGE_INPUT

SPECS = (
    DISPATCH_NOTIFY,
    DISPATCH_ASSIGN,
    DISPATCH,
    DISPATCH_FUSED,
    DISPATCH_EXPAND,
    DISPATCH_LAYOUT,
    DISPATCH_RESTRICT,
    STAGE_INPUT,
    COMBINE_PULL,
    COMBINE_PUSH,
    DECODE_DISPATCH,
    DECODE_COMBINE,
    SHARE_WORKSPACE,
)

ACROSS_NODES = (
    DISPATCH_SPLIT,
    DISPATCH_RAILS,
    DISPATCH_RELAY,
    DISPATCH_PACK,
    COMBINE_NODES,
    ACROSS_OPEN,
    ACROSS_CHECK,
    ACROSS_CLOCK,
    DECODE_PACK,
    DECODE_UNPACK,
    DECODE_DISPATCH_ACROSS,
    DECODE_OPEN,
    DECODE_ENCODE,
    DECODE_SUM,
)
"""Kernels of groups of several nodes only."""
