"""How long each wait of a decode call across nodes lasts if it masks late ranks: a part of the deadline of the group.

A rank that waits for a lost one keeps others waiting, which must not take it for lost. So a wait is longer than those
that can come before the message that it waits for, by a quarter of the deadline, by which ranks may be apart anyway:

- The rows of a dispatch from another node come from a rank that has waited at most for memory.
- Those that are passed on inside the node come from a rank that has waited for other nodes.
- The weights of a combine come from a rank that has waited in the dispatch before, when the own rank perhaps did not.
- The answers inside a node are sent before anything is waited for.
- The sums come from a rank that has waited for weights and for answers.
"""

from __future__ import annotations

MEMORY = 0.25
ROWS_ACROSS = 0.5
ROWS_INSIDE = 0.75
WEIGHTS_ACROSS = 0.75
ANSWERS_INSIDE = 0.5
SUMS_ACROSS = 1.0
