"""Random topologies for hypothesis."""

from hypothesis import strategies as st

from tokenferry.topology import by_place


@st.composite
def topologies(draw: st.DrawFn, least_nodes: int = 1) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of up to four nodes of up to four, which need not be consecutive."""
    num_nodes, per_node = draw(st.integers(least_nodes, 4)), draw(st.integers(1, 4))
    places = [str(node) for node in range(num_nodes) for _ in range(per_node)]
    return by_place(draw(st.one_of(st.just(places), st.permutations(places))))
