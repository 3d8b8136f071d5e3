"""A group of one: options, variables, the log line. The calls of groups are in tests/contract."""

import logging
import warnings

import pytest
import torch
import torch.distributed as dist

from tokenferry import (
    ArgumentError,
    ClosedError,
    ConfigError,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MoeShape,
    Routing,
)
from tokenferry.compat.deep_ep import Buffer

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=16)


def test_auto_logs_its_choice_and_the_reason(caplog):
    with caplog.at_level(logging.INFO, "tokenferry"), ExpertGroup(None, SHAPE) as group:
        assert (group.backend, group.transport, group.rank, group.num_ranks) == ("cpu", "none", 0, 1)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("tokenferry")]
    assert len(lines) == 1
    assert "'auto' chose cpu" in lines[0]
    assert "group of one" in lines[0]


def test_a_requested_backend_logs_nothing(caplog):
    with caplog.at_level(logging.INFO, "tokenferry"), ExpertGroup(None, SHAPE, backend="cpu"):
        assert not caplog.records


def test_timeout_comes_from_the_option_then_the_variable_then_the_default(monkeypatch):
    assert ExpertGroup(None, SHAPE).timeout_s == 100.0
    monkeypatch.setenv("TOKENFERRY_TIMEOUT_S", "7.5")
    assert ExpertGroup(None, SHAPE).timeout_s == 7.5
    assert ExpertGroup(None, SHAPE, timeout_s=3).timeout_s == 3.0


@pytest.mark.parametrize(("name", "value"), [("TIMEOUT_S", "never"), ("TRANSPORT", "rdma"), ("BACKEND", "tpu")])
def test_a_bad_variable_stops_the_group(monkeypatch, name, value):
    monkeypatch.setenv(f"TOKENFERRY_{name}", value)
    with pytest.raises(ConfigError, match=rf"TOKENFERRY_{name}='{value}'"):
        ExpertGroup(None, SHAPE)


def test_a_group_of_one_has_no_rank_to_mask():
    with (
        ExpertGroup(None, SHAPE) as group,
        pytest.raises(ArgumentError, match="of which a group of one has none, got 0"),
    ):
        group.mask(0)


def test_there_may_be_more_choices_than_experts():
    """Slots may be unused, and experts repeat: DeepEP's programs pass such routings, and random cases have them."""
    routing = Routing(torch.tensor([[0, 1, -1, -1], [1, 1, 1, 0]]), torch.full((2, 4), 0.25))
    with ExpertGroup(None, MoeShape(num_experts=2, top_k=4, hidden=16, max_tokens=8), backend="cpu") as group:
        x = torch.ones(2, 16)
        for layout, total in ((Layout.ROWS, 1.0), (Layout.EXPERTS, 2.0), (Layout.MASKED, 2.0)):
            sent = group.dispatch(x, routing, options=DispatchOptions(layout))
            assert sent.expert_counts.tolist() == [2, 2]
            assert group.combine(sent.x, sent.plan).x[:, 0].tolist() == [total, total]
        sent = group.decode_dispatch(x, routing)
        assert group.decode_combine(sent.x, sent.plan).x[:, 0].tolist() == [0.5, 1.0]


def test_closing_a_view_closes_the_group():
    group = ExpertGroup(None, SHAPE)
    view = group.for_shape(MoeShape(2, 1, 16, 4))
    sent = view.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0], [1]])))
    view.close()
    with pytest.raises(ClosedError, match="dispatch: the group was closed; make a new ExpertGroup"):
        group.dispatch(torch.ones(1, 8), Routing(torch.tensor([[0, 1]])))
    assert sent.x.shape == (2, 16)


def test_a_group_closes_when_its_block_ends_in_an_error():
    with pytest.raises(RuntimeError, match="mine"), ExpertGroup(None, SHAPE) as group:
        raise RuntimeError("mine")
    with pytest.raises(ClosedError):
        group.for_shape(SHAPE)


@pytest.mark.parametrize("make", [lambda group: ExpertGroup(group, SHAPE), Buffer])
def test_a_rank_that_is_no_member_is_told_so(make):
    with pytest.raises(ConfigError, match="this rank is not a member of the process group"):
        make(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ConfigError, match=r"expected a torch.distributed.ProcessGroup or None, got int"):
        make(3)


def test_a_group_of_one_among_several_processes_warns_once_where_it_was_made(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            ExpertGroup(None, SHAPE)
    assert [warning.filename for warning in caught] == [__file__]
    assert "WORLD_SIZE is 4; call torch.distributed.init_process_group, and pass" in str(caught[0].message)
    with pytest.warns(UserWarning, match="WORLD_SIZE is 4"):
        Buffer(None)


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_a_process_alone_does_not_warn(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExpertGroup(None, SHAPE)


def make_alone(rank, pg) -> None:
    with pytest.warns(UserWarning, match=r"torch\.distributed has 2 ranks; pass torch\.distributed\.group\.WORLD"):
        assert ExpertGroup(None, SHAPE).num_ranks == 1


def test_a_group_of_one_among_several_ranks_warns(worlds):
    worlds(2).run(make_alone)
