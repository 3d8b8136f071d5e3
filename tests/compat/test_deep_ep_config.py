"""`Config`, the default tables and the sizes that DeepEP computes from them."""

import json

import pytest

from tokenferry.compat.deep_ep import Buffer, Config
from tokenferry.compat.deep_ep.config import low_latency_rdma_size_hint, rdma_buffer_size_hint
from tokenferry.cost.case import Case, Cluster
from tokenferry.cost.memory import decode_memory
from tokenferry.cost.rows import RankRows
from tokenferry.errors import ArgumentError, ConfigError
from tokenferry.types import MoeShape


@pytest.fixture(autouse=True)
def same_num_sms(monkeypatch):
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)


def numbers(config: Config) -> tuple[int, ...]:
    return tuple(vars(config).values())


@pytest.mark.parametrize(
    ("num_ranks", "dispatch", "combine"),
    [
        (2, (24, 256, 6, 132), (10, 256, 6, 132)),
        (8, (6, 256, 6, 132), (4, 256, 6, 132)),
        (48, (32, 288, 8, 128), (1, 288, 8, 128)),
        (160, (28, 720, 12, 132), (2, 720, 8, 128)),
        (1, (24, 256, 6, 132), (10, 256, 6, 132)),  # not listed: as the next larger
        (12, (36, 288, 20, 140), (4, 288, 12, 132)),
        (1000, (28, 720, 12, 132), (2, 720, 8, 128)),
    ],
)
def test_defaults_for_any_number_of_ranks(num_ranks, dispatch, combine):
    Buffer.set_num_sms(24)
    assert numbers(Buffer.get_dispatch_config(num_ranks)) == (24, *dispatch)
    assert numbers(Buffer.get_combine_config(num_ranks)) == (24, *combine)


def test_takes_keywords_from_json_and_shows_them():
    config = Config(**json.loads('{"num_sms": 8, "num_max_nvl_chunked_send_tokens": 16}'))
    assert repr(config).startswith("Config(num_sms=8, num_max_nvl_chunked_send_tokens=16, ")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((21,), "num_sms"),
        ((20, 256, 256), "num_max_nvl_chunked_send_tokens"),
        ((20, 0, 256), "num_max_nvl_chunked_send_tokens"),
        ((20, 6, 256, 0, 256), "num_max_rdma_chunked_send_tokens"),
        ((20, 6, 256, 129, 129), "num_max_rdma_chunked_send_tokens: expected at most 64"),
        ((20, 6.5), "num_max_nvl_chunked_send_tokens: expected an integer"),
        ((20, 6, 256, 6, None), "num_max_rdma_chunked_recv_tokens: expected an integer"),
    ],
)
def test_refuses_numbers_that_deep_ep_refuses(arguments, name):
    with pytest.raises(ConfigError, match=name):
        Config(*arguments)


@pytest.mark.parametrize("num_sms", [7, -2, 2.0])
def test_num_sms_is_even(num_sms):
    with pytest.raises(ConfigError, match="num_sms"):
        Buffer.set_num_sms(num_sms)
    assert Buffer.num_sms == 20


def test_nvl_hint_is_the_published_formula():
    row = 7168 * 2 + 8 + 128 * 8 + 128 * 4 + 128 * 4
    bytes_ = 12 * 8 * ((2 * 1 + 3) * 4 + 256 * row)
    assert Config(24, 6, 256).get_nvl_buffer_size_hint(7168 * 2, 8) == -(-bytes_ // 128) * 128
    assert Config().get_nvl_buffer_size_hint(2048, 3) % 128 == 0


def test_nothing_is_reserved_between_nodes():
    """What DeepEP would reserve is known all the same."""
    assert [Config().get_rdma_buffer_size_hint(14336, n) for n in (8, 16, 32)] == [0, 0, 0]
    one, two, four = (rdma_buffer_size_hint(Config(), 14336, n, 8) for n in (8, 16, 32))
    assert 0 == one < two < four


def test_hints_take_nodes_of_the_size_that_is_set(monkeypatch):
    """As many ranks as before, in more nodes: more traffic between them, and less inside."""
    row, config = 64 + 8 + 128 * 8 + 128 * 4 + 128 * 4, Config(2)
    assert config.get_nvl_buffer_size_hint(64, 6) == -(-6 * (5 * 4 + 256 * row) // 128) * 128
    assert rdma_buffer_size_hint(config, 64, 6, 8) == 0
    monkeypatch.setenv("TOKENFERRY_RANKS_PER_NODE", "2")
    assert config.get_nvl_buffer_size_hint(64, 6) == -(-2 * (9 * 4 + 256 * row) // 128) * 128
    assert rdma_buffer_size_hint(config, 64, 6, 2) == -(-3 * 2 * (6 * 4 + 258 * row) // 128) * 128
    assert rdma_buffer_size_hint(config, 64, 2, 2) == 0


def test_low_latency_hint_is_exact_on_one_node(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_RANKS_PER_NODE", "32")
    assert Buffer.get_low_latency_rdma_size_hint(1024, 6144, 32, 256) == 13086230656
    hint = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=288
    )
    assert hint == 4 * (288 * 128 * (2 * 7168 + 224)) + 2 * 1152 + 128
    assert Buffer.get_low_latency_rdma_size_hint(4, 128, 2, 2) == 8832  # here a dispatched row is the larger one


@pytest.mark.parametrize("tokens", [128, 100])
@pytest.mark.parametrize(("experts", "choices"), [(256, 64), (32, 32)])
def test_low_latency_hint_on_several_nodes_is_what_two_levels_take(experts, choices, tokens):
    """The cost model has the same buffers: its K is what DeepEP's function is not told."""
    case = Case(Cluster(4, 8), MoeShape(experts, choices, 7168, 4096), rows="bf16")
    modelled = decode_memory(case, RankRows(), slots=tokens).network_bytes
    hint = Buffer.get_low_latency_rdma_size_hint(tokens, 7168, 32, experts)
    assert hint == -(-modelled // 128) * 128
    assert hint < low_latency_rdma_size_hint(tokens, 7168, experts)
    assert Buffer.get_low_latency_rdma_size_hint(tokens, 7168, 64, experts) == pytest.approx(hint * 7 / 3, rel=1e-4)


@pytest.mark.parametrize("sizes", [(-1, 7168, 2, 8), (128, 0, 2, 8), (128, 7168, 0, 8), (128, 7168, 2, 0.5)])
def test_hints_for_no_sizes(sizes):
    with pytest.raises(ArgumentError, match=r"get_low_latency_rdma_size_hint: .*: expected an integer of at least 1"):
        Buffer.get_low_latency_rdma_size_hint(*sizes)
    for function in (Config().get_nvl_buffer_size_hint, Config().get_rdma_buffer_size_hint):
        for bad in ((-1, 8), (1.5, 8), (None, 8), (128, -3), (128, "8")):
            with pytest.raises(ConfigError, match=r"buffer_size_hint: .*: expected an integer of at least 0"):
                function(*bad)
    for function in (Buffer.get_dispatch_config, Buffer.get_combine_config):
        with pytest.raises(ArgumentError, match="num_ranks: expected an integer of at least 1, got 0"):
            function(0)
