"""The training step of the language model on CPU ranks, with results that are wrong."""

from unittest import mock

from tokenferry.bench.suites import language
from tokenferry.nn import MoELayer


def wrong_sum(session):
    """`measure_language` in which the sums of `MoELayer` are off by a thousandth, on rank 1 only."""
    right = MoELayer.forward

    def forward(self, x):
        return right(self, x) * (1.001 if session.rank == 1 else 1.0)

    with mock.patch.object(MoELayer, "forward", forward):
        language.measure_language(session)


def wrong_scale(session):
    """`measure_language` in which the gradients of the experts through all_to_all_single are sums over ranks."""
    with mock.patch("tokenferry.bench.baselines.all_to_all_layer.averaged_gradient", lambda weight, num_ranks: weight):
        language.measure_language(session)
