"""The words of each dialect of DeepEP for what native calls say in errors."""

from __future__ import annotations

from tokenferry.compat.deep_ep.config import MAX_CHOICES
from tokenferry.compat.deep_ep.wording import Field, Method, Step, Wording
from tokenferry.types import MAX_SIZE

_TOP_K = Field("the number of columns of topk_idx")
_TOPK_IDX = Field("the number of bytes in a row of topk_idx")
_WEIGHTS = Field("the number of bytes in a row of topk_weights")
_HANDLE = {"dispatch of the plan": Field("the number of the call that made handle")}


def _rows(name: str, scales: str) -> dict[str, Field]:
    """Return what is compared of rows, for arguments of these names."""
    return {
        "dtype": Field(f"the dtype of {name}"),
        "bytes of rows": Field(f"the number of bytes in a row of {name}"),
        "bytes of scale": Field(f"the number of bytes in a row of {scales}"),
        "bytes of weights": _WEIGHTS,
        "bytes of topk_idx": _TOPK_IDX,
    }


_PAIR = {"x.data": "x", "x.scale": "x[1]", "plan": "handle"}
_X = _rows("x", "x[1]")
_SUMMED = {"y": "x", "plan": "handle"}

# ---------------------------------------------------------------------- V1

WITHOUT_EXPERTS = Step(
    "Buffer.dispatch",
    "passed no topk_idx",
    lambda R: {"num_experts": R, "top_k": R, "max_tokens": MAX_SIZE, "bytes of topk_idx": 8 * R},
)
TOTALS = Step(
    "Buffer.dispatch",
    "passed no topk_idx",
    lambda R: {},
    {"bytes of rows": "the length of num_tokens_per_expert"},
)
CLEAN = Step(
    "Buffer.clean_low_latency_buffer",
    "called Buffer.clean_low_latency_buffer",
    lambda R: {
        "num_experts": R, "top_k": 1, "max_tokens": 1, "dtype": "torch.bfloat16", "bytes of rows": 256,
        "fp8 scale": 0,
    },
)  # fmt: skip
_CAST = {
    "0": "use_fp8=False",
    "1": "use_fp8=True",
    "2": "use_fp8=True, round_scale=True",
    "3": "use_fp8=True, round_scale=True, use_ue8m0=True",
}
_LOGFMT = {"same": "False", "logfmt10": "True", "0": "False", "2": "True"}
V1 = Wording(
    {
        "dispatch": Method(
            "Buffer.dispatch",
            _PAIR,
            {
                **_X,
                "top_k": _TOP_K,
                "max_tokens": Field("num_worst_tokens", {str(MAX_SIZE): "0"}, "num_worst_tokens / R"),
                "device counts": Field("whether num_worst_tokens is given", {"0": "False", "1": "True"}),
                "capacity": Field("num_worst_tokens"),
            },
            steps=(WITHOUT_EXPERTS,),
        ),
        "redispatch": Method("Buffer.dispatch", _PAIR, {**_X, **_HANDLE}, "Buffer.dispatch with a handle"),
        "combine": Method("Buffer.combine", _SUMMED, {**_X, **_HANDLE}),
        "decode_dispatch": Method(
            "Buffer.low_latency_dispatch",
            {
                "stats.received": "cumulative_local_expert_recv_stats",
                "stats.wait_ns": "dispatch_wait_recv_cost_stats",
            },
            {
                **_X,
                "top_k": _TOP_K,
                "max_tokens": Field("num_max_dispatch_tokens_per_rank"),
                "fp8 scale": Field("the format", _CAST),
            },
            "Buffer.low_latency_dispatch, or with enable_shrink Buffer.clean_low_latency_buffer",
            (CLEAN,),
        ),
        "decode_combine": Method(
            "Buffer.low_latency_combine",
            {**_SUMMED, "plan.topk_weights": "topk_weights", "stats.wait_ns": "combine_wait_recv_cost_stats"},
            {**_X, **_HANDLE, "encoding": Field("use_logfmt", _LOGFMT)},
        ),
    },
)

# ---------------------------------------------------------------------- V2, V2.5


def barrier(owner: str) -> Step:
    """Return the step that is a barrier of `ElasticBuffer` or `EPBuffer`."""
    return Step(
        f"{owner}.barrier",
        f"called {owner}.barrier",
        lambda R: {
            "num_experts": R, "top_k": 1, "max_tokens": 1, "layout": 0, "alignment": 1, "device counts": 1,
            "capacity": 0, "dtype": "torch.uint8", "bytes of rows": 16, "bytes of scale": 0, "bytes of weights": 0,
        },
    )  # fmt: skip


def elastic(owner: str) -> Wording:
    """Return the words of `ElasticBuffer` or `EPBuffer`."""
    dispatch = Method(
        f"{owner}.dispatch",
        _PAIR,
        {
            **_X,
            "top_k": _TOP_K,
            "max_tokens": Field("num_max_tokens_per_rank"),
            "layout": Field("do_expand", {"0": "False", "1": "True"}),
            "alignment": Field("expert_alignment"),
            "device counts": Field("do_cpu_sync", {"0": "True", "1": "False"}),
        },
        f"{owner}.dispatch or {owner}.barrier",
        (barrier(owner),),
    )
    handle = {**_X, **_HANDLE, "layout": Field("do_expand", {"0": "False", "1": "True"})}
    return Wording(
        {
            "dispatch": dispatch,
            "redispatch": Method(f"{owner}.dispatch", _PAIR, handle, f"{owner}.dispatch with a handle"),
            "combine": Method(f"{owner}.combine", _SUMMED, handle),
        },
    )


ELASTIC = {owner: elastic(owner) for owner in ("ElasticBuffer", "EPBuffer")}

# ---------------------------------------------------------------------- the hybrid branch

HYBRID_DISPATCH, HYBRID_COMBINE = "HybridEPBuffer.dispatch_with_permute", "HybridEPBuffer.combine_with_unpermute"


def _numbers(done: str, dtype: str, differs: str) -> Step:
    """Return the step in which ranks exchange numbers, of this dtype: that of each step is another one."""
    return Step(
        HYBRID_DISPATCH,
        done,
        lambda R: {
            "num_experts": R, "top_k": min(R, MAX_CHOICES), "max_tokens": -(-R // MAX_CHOICES), "layout": 0,
            "alignment": 1, "device counts": 1, "capacity": R, "dtype": dtype,
        },
        {"dtype": "whether num_permuted_tokens is given", "bytes of rows": differs},
    )  # fmt: skip


MOST_CHOICES = _numbers("passed routing_map without num_permuted_tokens", "torch.int64", "num_permuted_tokens")
COUNTS = _numbers("passed num_permuted_tokens", "torch.int32", "the number of experts")
_HIDDEN = {"x": "hidden", "x.data": "hidden", "x.scale": "scaling_factor", "topk_weights": "probs", "plan": "handle"}
_HIDDEN_ROWS = {
    **_rows("hidden", "scaling_factor"),
    "bytes of weights": Field("the number of bytes of probs for a token"),
}
HYBRID = Wording(
    {
        "dispatch": Method(
            HYBRID_DISPATCH,
            _HIDDEN,
            {
                **_HIDDEN_ROWS,
                "num_experts": Field("num_of_experts"),
                "top_k": _TOP_K,
                "max_tokens": Field("the most tokens of a rank"),
                "alignment": Field("pad_multiple"),
                "device counts": Field("whether num_permuted_tokens is given", {"0": "False", "1": "True"}),
                "capacity": Field("num_permuted_tokens"),
            },
            steps=(MOST_CHOICES, COUNTS),
        ),
        "redispatch": Method(HYBRID_DISPATCH, _HIDDEN, {**_HIDDEN_ROWS, **_HANDLE}, f"{HYBRID_DISPATCH} with a handle"),
        "combine": Method(
            HYBRID_COMBINE, {"y": "hidden", "topk_weights": "probs", "plan": "handle"}, {**_HIDDEN_ROWS, **_HANDLE}
        ),
    },
    "hidden",
)
