"""The kernels of tokenferry.kernels.link_limits on windows of their own: rows, flags and barriers between R GPUs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry import env
from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.errors import PeerTimeout
from tokenferry.jit.driver import Device
from tokenferry.jit.kernel import Jit, Kernel, KernelSpec
from tokenferry.kernels.link_limits import spec
from tokenferry.memory.tensor import bytes_at
from tokenferry.memory.window import Window, share
from tokenferry.transports.handshake import Bootstrap

ROWS_OFFSET = 1 << 16


class Links(Protocol):
    """The links that `tokenferry.bench.suites.limits` measures; launches go to the current stream, unawaited.

    Rows: each rank has ``num_rows`` rows of ``row_bytes``; row t goes to rank ``(rank + 1 + t % n) % R`` with
    ``n = max(R - 1, 1)``, to place ``t // n`` of this source in that rank's window.
    """

    rank: int
    num_ranks: int
    num_sms: int

    def shape(self, num_rows: int, row_bytes: int) -> None: ...  # noqa: D102 - of the rows from here on
    def store(self, rows: Tensor, num_sms: int) -> None: ...  # noqa: D102 - rows -> the peers' windows
    def load(self, rows: Tensor, num_sms: int) -> None: ...  # noqa: D102 - the same places -> rows
    def copy(self, target: Tensor, source: Tensor, num_sms: int) -> None: ...  # noqa: D102 - within this rank
    def flag(self, iterations: int) -> None: ...  # noqa: D102 - ping-pong between ranks 0 and 1
    def barrier(self, iterations: int = 1) -> None: ...  # noqa: D102 - of all ranks
    def places(self) -> Tensor: ...  # noqa: D102 - [R, rows per source, row_bytes] uint8: what peers stored here
    def check(self) -> None: ...  # noqa: D102 - raise PeerTimeout if a wait ran out; after synchronize


class CudaLinks:
    """Links between GPUs; a context manager.

    Contract: making it is collective, everything else is local; the launches of all ranks have to match.

    Args:
        pg: The process group.
        device: This rank's GPU.
        row_bytes: The most bytes of rows, over all ranks and places, that `shape` will request.
        timeout_s: For the rendezvous, and for each wait of a kernel.
        cache: Folder of compiled kernels; None: they are compiled anew.

    Raises:
        BackendUnavailable: the GPUs cannot reach each other, or there is no memory or compiler.
        PeerTimeout: a rank did not arrive.
    """

    def __init__(
        self, pg: dist.ProcessGroup, device: torch.device, row_bytes: int, timeout_s: float, cache: Path | None = None
    ) -> None:
        self.rank, self.num_ranks = pg.rank(), pg.size()
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.timeout_s = timeout_s
        self._device = device
        bootstrap = Bootstrap(pg, timeout_s, device) if self.num_ranks > 1 else None
        size = ROWS_OFFSET + window_bytes(row_bytes, self.num_ranks)
        self._window: Window = share(bootstrap, self.rank, range(self.num_ranks), device, size, ROWS_OFFSET)
        self._jit = Jit(device.index or 0, cache, arch=env.read_one("arch"))
        with closing(Device(device.index or 0)) as opened:
            self._smem_bytes = opened.smem_bytes() - spec.STORE.static_smem
        self._jit.warmup(spec.SPECS)
        self._failed = torch.zeros(1, dtype=torch.int32, device=device)
        self._params = spec.PARAMS.struct()
        self._params.windows[: self.num_ranks] = self._window.bases
        self._params.failed = self._failed.data_ptr()
        self._params.timeout_ns = int(timeout_s * 1e9)
        self._params.rows_offset = ROWS_OFFSET
        self._params.rank, self._params.num_ranks = self.rank, self.num_ranks
        self._next = {spec.FLAG: 1, spec.BARRIER: 1}  # words of a new window are zero: the first iteration is 1

    def shape(self, num_rows: int, row_bytes: int) -> None:
        """Say how many rows of which size each rank has."""
        self._params.num_rows, self._params.row_bytes = num_rows, row_bytes
        self._params.rows_per_rank = rows_per_source(num_rows, self.num_ranks)

    def store(self, rows: Tensor, num_sms: int) -> None:
        """Store this rank's rows into the peers' windows."""
        self._move(spec.STORE, rows, num_sms)

    def load(self, rows: Tensor, num_sms: int) -> None:
        """Load the rows that `store` has stored back from the peers' windows."""
        self._move(spec.LOAD, rows, num_sms)

    def copy(self, target: Tensor, source: Tensor, num_sms: int) -> None:
        """Copy rows within this rank's memory."""
        self._params.target = target.data_ptr()
        self._move(spec.COPY, source, num_sms)

    def flag(self, iterations: int) -> None:
        """Let ranks 0 and 1 exchange flags in turns."""
        self._synchronize(spec.FLAG, iterations)

    def barrier(self, iterations: int = 1) -> None:
        """Let every rank wait for every rank."""
        self._synchronize(spec.BARRIER, iterations)

    def places(self) -> Tensor:
        """View what peers stored into this rank's window: ``[R, rows per source, row_bytes]`` uint8."""
        sizes = self.num_ranks, self._params.rows_per_rank, self._params.row_bytes
        num_bytes = sizes[0] * sizes[1] * sizes[2]
        return bytes_at(self._window.base + ROWS_OFFSET, num_bytes, self._device, self._window).view(sizes)

    def check(self) -> None:
        """Check whether a wait of a kernel ran out; the device has to be idle.

        Raises:
            PeerTimeout: a wait ran out; names the peer.
        """
        late = int(self._failed.item())
        if late:
            raise PeerTimeout(
                f"limits: rank {self.rank} waited {self.timeout_s} s in a kernel for rank {late - 1}",
                phase="limits",
                call=self._next[spec.BARRIER],
                rank=self.rank,
                peers=(late - 1,),
                waited_s=self.timeout_s,
            )

    def close(self) -> None:
        """Free kernels and windows. Local; the device has to be idle, and the peers done with this rank's window."""
        self._jit.close()
        self._window.close()

    def __enter__(self) -> CudaLinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kernel(self, which: KernelSpec) -> Kernel:
        return self._jit.kernel(which, stages=spec.STAGES)

    def _move(self, which: KernelSpec, rows: Tensor, num_sms: int) -> None:
        self._params.local = rows.data_ptr()
        row_bytes = self._params.row_bytes
        warps = min(spec.MAX_THREADS // 32, self._smem_bytes // (spec.STAGES * row_bytes))
        smem = warps * spec.STAGES * row_bytes
        self._kernel(which).launch(self._params, num_sms, warps * 32, smem, self._stream())

    def _synchronize(self, which: KernelSpec, iterations: int) -> None:
        self._params.epoch, self._params.iterations = self._next[which], iterations
        self._next[which] += iterations
        self._kernel(which).launch(self._params, 1, 32, 0, self._stream())

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream


def rows_per_source(num_rows: int, num_ranks: int) -> int:
    """Places that a window has for the rows of each source."""
    return -(-num_rows // max(num_ranks - 1, 1))


def window_bytes(row_bytes: int, num_ranks: int) -> int:
    """Bytes of places for R sources of ``row_bytes`` in all each, with space for one unfinished turn of rows."""
    return num_ranks * (-(-row_bytes // max(num_ranks - 1, 1)) + (1 << 16))


def check_stored(places: Tensor, rank: int, source: int, rows: Tensor) -> None:
    """Check the rows of one source in a rank's window.

    Args:
        places: ``[R, rows per source, row_bytes]``: the window of ``rank``.
        rank: The rank whose window it is.
        source: The rank whose rows are checked.
        rows: ``[num_rows, row_bytes]``: all rows of ``source``.

    Raises:
        WrongAnswer: a row is missing or damaged.
    """
    num_ranks = len(places)
    others = max(num_ranks - 1, 1)
    expected = rows[(rank - source - 1) % num_ranks :: others]
    got = places[source, : len(expected)]
    if not torch.equal(got, expected):
        wrong = int((got != expected).any(1).sum())
        raise WrongAnswer(
            f"bulk store: {wrong} of {len(expected)} rows from rank {source} are wrong in the window of rank {rank}"
        )
