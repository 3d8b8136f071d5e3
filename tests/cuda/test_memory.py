"""Windows and heaps on GPUs: what one rank writes the others see, and memory is used again in the order of streams."""

import gc
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tokenferry.errors import BackendUnavailable
from tokenferry.memory.heap import HeapFull
from tokenferry.memory.reach import describe, why_not
from tokenferry.memory.tensor import bytes_at
from tokenferry.memory.window import share, share_in_process
from tokenferry.transports.handshake import Bootstrap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MIB = 1 << 20
CYCLES = 200_000_000
"""About a tenth of a second on one of our GPUs: long beside everything that the host does meanwhile."""


def here():
    return torch.device("cuda", torch.cuda.current_device())


def current():
    return torch.cuda.current_stream().cuda_stream


@pytest.fixture
def window():
    made = share(None, 0, range(1), torch.device("cuda", 0), 8 * MIB)
    yield made
    made.close()


def write_and_read(rank, pg):
    """Each rank writes its number into its place in every window, twice over: windows can be made again."""
    device, size = here(), pg.size()
    for _ in range(2):
        window = share(Bootstrap(pg, 20.0, device), rank, range(size), device, 4 * MIB)
        assert why_not(Bootstrap(pg, 20.0).exchange(describe(device)), rank) == ""
        assert not bytes_at(window.base, 4 * MIB, device, None).any(), "the window is zero"
        dist.barrier(pg)
        for base in window.bases:
            bytes_at(base + rank * 1000, 1000, device, None).fill_(rank + 1)
        torch.cuda.synchronize()
        dist.barrier(pg)
        seen = bytes_at(window.base, size * 1000, device, None).view(size, 1000).cpu()
        assert [row.unique().tolist() for row in seen] == [[peer + 1] for peer in range(size)]
        kept = window.heap(MIB).block(1000, current()).tensor().fill_(9)
        window.close()
        window.close()
        dist.barrier(pg)
        assert kept.unique().tolist() == [9], "tensors outlive the window"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_a_rank_writes_its_peers_see(worlds, num_ranks):
    worlds(num_ranks, "cuda").run(write_and_read)


def too_much(rank, pg):
    device = here()
    num_bytes = 1 << 50 if rank else MIB
    try:
        share(Bootstrap(pg, 20.0), rank, range(2), device, num_bytes)
    except BackendUnavailable as error:
        text = str(error)
    window = share(Bootstrap(pg, 20.0), rank, 2, device, MIB)
    window.close()
    return text


def test_too_little_memory_on_one_rank_is_an_error_on_all(worlds):
    first, second = worlds(2, "cuda").run(too_much)
    assert first == second
    assert "rank 1: cuda:" in first
    assert "TOKENFERRY_HEAP_MB" in first


NCCL = """
import sys, torch, torch.distributed as dist
from tokenferry.transports.handshake import Bootstrap, moves_cpu_tensors
from tokenferry.memory.window import share
rank = int(sys.argv[1])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
group, device = dist.group.WORLD, torch.device("cuda", rank)
assert not moves_cpu_tensors(group)
window = share(Bootstrap(group, 20.0, device), rank, 2, device, 4 << 20)
window.close()
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_group_of_nccl_alone_is_enough(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", NCCL, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [(rank.communicate(timeout=120)[1], rank.returncode) for rank in ranks]
    assert [code for _, code in results] == [0, 0], results


def test_virtual_ranks_have_windows_of_their_own():
    windows = share_in_process(3, torch.device("cuda", 0), 4 * MIB)
    for rank, window in enumerate(windows):
        bytes_at(windows[0].bases[rank], 100, window.device, None).fill_(rank + 1)
    assert [bytes_at(w.base, 100, w.device, None).unique().tolist() for w in windows] == [[1], [2], [3]]
    for window in windows:
        window.close()


def test_memory_goes_back_to_the_device_with_the_last_tensor():
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info(0)[0]
    window = share(None, 0, 1, torch.device("cuda", 0), 512 * MIB)
    tensor = window.heap(0).block(1000, current()).tensor()
    window.close()
    assert torch.cuda.mem_get_info(0)[0] <= free - 500 * MIB
    del tensor
    gc.collect()
    assert torch.cuda.mem_get_info(0)[0] > free - 100 * MIB


def test_a_block_is_an_ordinary_tensor(window):
    heap = window.heap(MIB)
    block = heap.block(4000, current())
    tensor = block.tensor()
    assert (tensor.device, tensor.data_ptr(), tensor.shape) == (torch.device("cuda", 0), block.address, (4000,))
    del block
    x = tensor.view(torch.bfloat16).view(20, 100).fill_(2).requires_grad_()
    del tensor
    loss = (x.float() * x.float()).sum()
    grad = torch.autograd.grad(loss, x)[0]
    assert grad.unique().tolist() == [4.0]
    assert torch.cat([x.detach(), x.detach()]).sum().item() == 8000
    assert heap.num_live == 1
    del x, loss
    assert heap.num_live == 0


def test_memory_that_another_stream_reads_is_not_overwritten(window):
    """A slow reader on a side stream; its input dies there; the next block in this place is written elsewhere."""
    heap = window.heap(MIB)
    side = torch.cuda.Stream()
    size = heap.largest_free
    tensor = heap.block(size, current()).tensor().fill_(1)
    address = tensor.data_ptr()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        seen = tensor.clone()
        del tensor
    again = heap.block(size, current()).tensor().fill_(2)
    assert again.data_ptr() == address
    torch.cuda.synchronize()
    assert seen.unique().tolist() == [1]


def test_memory_of_another_stream_is_not_overwritten(window):
    """The same where block and reader are of the side stream, and nothing was recorded when the block died."""
    heap = window.heap(MIB)
    side = torch.cuda.Stream()
    size = heap.largest_free
    with torch.cuda.stream(side):
        tensor = heap.block(size, current()).tensor().fill_(1)
        torch.cuda._sleep(CYCLES)
        seen = tensor.clone()
        del tensor
    heap.block(size, current()).tensor().fill_(2)
    torch.cuda.synchronize()
    assert seen.unique().tolist() == [1]


def test_a_graph_keeps_its_blocks_and_waits_for_those_before_it(window):
    heap = window.heap(MIB)
    size = heap.largest_free // 4
    side = torch.cuda.Stream()
    out = torch.zeros(size, dtype=torch.uint8, device="cuda")
    before = heap.block(size, current()).tensor().fill_(5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = heap.block(size, current()).tensor()
        first.fill_(3)
        address = first.data_ptr()
        del first, before
        again = heap.block(size, current()).tensor()
        assert again.data_ptr() == address, "the capture itself takes it again"
        again.fill_(4)
        out.copy_(again)
        del again
    others = [heap.block(size, current()).tensor().fill_(1) for _ in range(3)]
    with pytest.raises(HeapFull):
        heap.block(size, current())
    graph.replay()
    torch.cuda.synchronize()
    assert out.unique().tolist() == [4]
    assert [other.unique().tolist() for other in others] == [[1]] * 3

    # A graph that takes what two eager streams have used waits for both of them at each replay.
    with torch.cuda.stream(side):
        mine = others.pop()
        place = mine.data_ptr()
        del mine
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        late = heap.block(size, current()).tensor()
        assert late.data_ptr() == place
        late.fill_(6)
    graph.replay()
    torch.cuda.synchronize()
    assert late.unique().tolist() == [6]


EXIT = """
import sys, torch
from tokenferry.memory.window import share
window = share(None, 0, 1, torch.device("cuda", 0), 8 << 20)
heap = window.heap(0)
kept = [heap.block(1000, torch.cuda.current_stream().cuda_stream).tensor() for _ in range(3)]
sys.kept = kept[0].view(torch.float32).requires_grad_() * 2
if sys.argv[1] == "closed":
    window.close()
"""


@pytest.mark.parametrize("how", ["open", "closed"])
def test_the_interpreter_ends_quietly_with_tensors_alive(how):
    done = subprocess.run([sys.executable, "-c", EXIT, how], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_block_and_its_tensor_cost_the_host_little(window):
    import time

    heap, stream = window.heap(MIB), current()
    heap.block(MIB, stream).tensor()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            heap.block(MIB, stream).tensor()
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 20e-6, f"{best * 1e6:.1f} us"
