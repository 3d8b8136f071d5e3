"""The shared memory that blocks ask for, on GPUs that have least of it: 99 KB."""

import pytest
import torch

from support.silent_kernels import SilentGroup
from support.silent_nodes import SilentNodes
from tokenferry import ConfigError, DispatchOptions, Layout, MoeShape, Quantized, Routing, ShapeError
from tokenferry.backends.cuda import launch, plan, token_layout
from tokenferry.backends.cuda.across.decode_forms import _pack_bytes
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.kernels.control_block import MAX_EXPERTS, MAX_NODES, MAX_RANKS, MAX_TOP_K
from tokenferry.kernels.decode_pack import spec as pack_spec
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.kernels.dispatch_fused import spec as fused_spec
from tokenferry.kernels.dispatch_layout import spec as layout_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.topology import Topology, consecutive

LEAST = 99 << 10


@pytest.fixture
def context():
    """The context of a rank of eight whose kernels do nothing, on such a GPU."""
    context = SilentGroup(MoeShape(4, 2, 16, 8)).group._backend.context
    context.smem_bytes, context.num_ranks = LEAST, MAX_RANKS
    return context


@pytest.mark.parametrize("scale", [None, (torch.float32, 7), (torch.float32, 56), (torch.int8, 1 << 20)])
def test_every_group_of_one_node_fits(context, scale):
    """So nothing that `tokenferry explain` accepts, which is of one node, fails at its first launch."""
    most = MoeShape(MAX_EXPERTS, MAX_TOP_K, 1 << 20, 1 << 20)
    sizes = plan.geometry(most, DispatchOptions(Layout.MASKED, capacity=64), MAX_RANKS).sizes
    bulk, num_local = scale is not None, MAX_EXPERTS // MAX_RANKS
    dtype, columns = scale or (None, 0)
    assert plan.too_many_experts(most, Topology(0, consecutive(8, 8)), LEAST) == ""
    for hidden in (16, 7168, 8192, 8208, 1 << 20):
        kind = RowKind(torch.int8, hidden, dtype, columns, bulk, True, torch.int64, MAX_TOP_K)
        for template, spec in (
            (launch.notify_template(context, sizes, MAX_TOP_K, wide=True), notify_spec.SPEC),
            (launch.assign_template(context, sizes, MAX_TOP_K, wide=True), assign_spec.SPEC),
            (launch.dispatch_template(context, kind, num_local, by_expert=True), dispatch_spec.SPEC),
            (launch.fused_template(context, kind, sizes, num_local), fused_spec.SPEC),
        ):
            assert template.smem_bytes <= LEAST - spec.static_smem, (spec.name, hidden)


def test_scales_travel_with_rows_where_they_fit(context):
    for columns, alone in ((64, 0), (4096, 0), (9000, 1)):
        kind = RowKind(torch.int8, 128, torch.float32, columns, True, False, torch.int64, 2)
        p = launch.dispatch_template(context, kind, 1, by_expert=False).params
        assert (p.small_scale, p.bulk_scale_bytes) == (alone, 0 if alone else 4 * columns)
        assert (p.num_scales, p.scale_size) == ((columns, 4) if alone else (0, 0))


def test_scales_that_lanes_cannot_copy():
    silent = SilentGroup(MoeShape(4, 2, 16, 8))
    silent.group._backend.context.smem_bytes = LEAST
    x = Quantized(torch.ones(2, 16), torch.ones(2, 3000, dtype=torch.complex128))
    with pytest.raises(ShapeError, match=r"scale: rows of 48000 bytes of torch\.complex128 have no room"):
        silent.group.dispatch(x, Routing(torch.zeros(2, 2, dtype=torch.int64)))
    assert silent.launches == []


@pytest.mark.parametrize("per_node", [1, 8])
@pytest.mark.parametrize("num_nodes", [1, 2, 64, MAX_NODES])
@pytest.mark.parametrize("dynamic_bytes", [100, 5_000, LEAST - 2048, 110_000])
def test_the_most_experts_that_can_be_counted(num_nodes, per_node, dynamic_bytes):
    most = notify_spec.most_experts(per_node, num_nodes, dynamic_bytes)
    assert most < 1 or notify_spec.smem_bytes(most, per_node, num_nodes) <= dynamic_bytes
    assert notify_spec.smem_bytes(max(0, most) + 1, per_node, num_nodes) > dynamic_bytes


def test_groups_of_many_nodes_that_do_not_fit():
    topology = Topology(0, consecutive(2048, 8))
    assert plan.too_many_experts(MoeShape(2048, 8, 16, 8), topology, LEAST) == ""
    found = plan.too_many_experts(MoeShape(MAX_EXPERTS, 8, 16, 8), topology, LEAST)
    assert "num_experts=4096, and on 256 nodes of 8 ranks at most 2048 are possible with the 99 KB" in found
    assert plan.too_many_experts(MoeShape(MAX_EXPERTS, 8, 16, 8), topology, 163 << 10) == ""


def test_a_view_with_too_many_experts():
    silent = SilentNodes(MoeShape(4, 2, 16, 8))
    silent.group._backend.context.smem_bytes = 2048 + 64
    silent.group.dispatch(torch.ones(2, 16), Routing(torch.zeros(2, 2, dtype=torch.int64)))
    before = len(silent.launches)
    view = silent.group.for_shape(MoeShape(6, 2, 16, 8))
    with pytest.raises(ConfigError, match=r"for_shape: backend cuda: num_experts=6, .* at most 4 are possible"):
        view.dispatch(torch.ones(2, 16), Routing(torch.zeros(2, 2, dtype=torch.int64)))
    assert len(silent.launches) == before


def test_decode_calls_whose_tokens_do_not_fit():
    """On nodes of one rank, as GPUs that cannot map each other are, `decode_pack` has most nodes for its tokens."""
    topology, room = Topology(0, consecutive(64, 1)), LEAST - pack_spec.SPEC.static_smem
    most = pack_spec.most_tokens(64, room)
    assert most == 6304
    assert _pack_bytes(MoeShape(64, 2, 128, most), topology, room) <= room
    with pytest.raises(ConfigError, match="max_tokens=6305, and in decode calls of 64 nodes of 1 rank at most 6304"):
        _pack_bytes(MoeShape(64, 2, 128, most + 1), topology, room)
    assert _pack_bytes(MoeShape(64, 2, 128, 1 << 13), topology, 163 << 10), "the most that any GPU takes"


def test_layouts_of_many_ranks():
    silent = SilentGroup(MoeShape(4, 2, 16, 8))
    index = torch.zeros(2, 2, dtype=torch.int64)
    token_layout.token_layout(silent.group._backend.context, index, MAX_EXPERTS, MAX_RANKS * MAX_NODES)
    (name, _, _, smem_bytes, _) = silent.launches[-1]
    assert name == "dispatch_layout"
    assert smem_bytes <= LEAST - layout_spec.SPEC.static_smem
