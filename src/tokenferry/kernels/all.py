"""Every kernel that the CUDA backend launches; what `ExpertGroup.warmup` and the compile tests go through."""

from __future__ import annotations

from tokenferry.kernels.collect.spec import SPEC as COLLECT
from tokenferry.kernels.count.spec import SPEC as COUNT
from tokenferry.kernels.move.spec import SPEC as MOVE
from tokenferry.kernels.place.spec import SPEC as PLACE
from tokenferry.kernels.pull.spec import SPEC as PULL
from tokenferry.kernels.push.spec import SPEC as PUSH
from tokenferry.kernels.spread.spec import SPEC as SPREAD
from tokenferry.kernels.stage.spec import SPEC as STAGE
from tokenferry.kernels.unpack.spec import SPEC as UNPACK

SPECS = (COUNT, PLACE, MOVE, UNPACK, STAGE, PULL, PUSH, SPREAD, COLLECT)
