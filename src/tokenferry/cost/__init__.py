"""A model of the cost of dispatch and combine across nodes: rows and bytes on each link, times, memory.

Nothing here moves data, and only `sampling` computes with tensors. docs/cost-model.md gives the formulas, and what they
were compared with.
"""
