// share_workspace: gives every rank the place of this rank's workspace, and waits for the places of theirs. The first
// decode call of a size does this, and `warmup`, which has no workspace, but wants all ranks to be there.
//
// Grid     one block of R warps; warp r exchanges its words with rank r, one word per lane.
// Reads    offers of all ranks that take part, in this rank's control block.
// Writes   its offer to the control blocks of these ranks; then `shares` and `members` of its own, for the host.
// Order    Each word of an offer carries the number of the exchange. Earlier work of the stream has cleared the
//          workspace, and the offer is released after it.
// Why      No offer is overwritten before it is read: that of exchange n lies in half n & 1. A rank writes that of n +
//          2 after it has read n + 1 from every member, which sent it after its own exchange n had ended. A rank that
//          is not a member may miss an offer; it learns by its acknowledgements that it is masked.
// Waits    for offers, with a deadline. A rank that is late, or has masked this one, is masked if p.mask_late;
//          otherwise the group fails.
// Cost     a round trip. sm_90a: <= 64 registers, 0 spills, 16 B of static shared memory.
// Tests    tests/emulator/test_new_sizes.py, tests/faults/test_masks.py, tests/compile.
#include "device/decode.cuh"

// The words of this rank's offer that have to be the same on all ranks, then the offset.
DEV u32 offer_word(const ShareWorkspaceParams& p, u32 w) {
    if (w < kSignatureWords) return p.handshake[w];
    return w < kOfferOffsetWord ? p.sizes[w - kSignatureWords] : p.offset;
}

// Returns whether a peer has masked this rank, and masks it in turn: it makes no offers to this rank. It may have made
// one before, so this is asked first.
DEV bool is_masked_by(const ShareWorkspaceParams& p, u32 peer) {
    if (!p.mask_late || load_acquire(&control_block(p, p.rank)->acks[0][peer]) != kMaskedAck) return false;
    return mask_peer(p, peer, kLateHandshake, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    share_workspace(const __grid_constant__ ShareWorkspaceParams p) {
    __shared__ u32 late, first_wrong, failed;
    ControlBlock* mine = control_block(p, p.rank);
    const u32 peer = threadIdx.x / 32, w = threadIdx.x % 32;
    const u32 epoch = mine->shares + 1, alive = p.alive & ~load_relaxed(&mine->masked);
    if (is_stopped(p)) return;
    const bool takes_part = peer < p.num_ranks && (alive >> peer & 1) && w < kOfferWords;
    if (threadIdx.x == 0) {
        late = failed = 0;
        first_wrong = ~0u;
    }
    __syncthreads();
    u32 value = 0, state = kOk;
    if (takes_part) {
        store_release(&control_block(p, peer)->offers[epoch & 1][p.rank][w], (u64)epoch << 32 | offer_word(p, w));
        state = is_masked_by(p, peer)
                    ? kTimedOut
                    : wait_for_word(p, kExchange, epoch, peer, &mine->offers[epoch & 1][peer][w], value);
        if (state == kTimedOut) atomicOr(&late, 1u << peer);
        if (state == kFailed) atomicOr(&failed, 1u);
        if (state == kOk && w != kOfferOffsetWord && value != offer_word(p, w))
            atomicMin(&first_wrong, threadIdx.x);  // only the first is reported
    }
    fence_system();
    __syncthreads();
    if (failed) return;
    if (threadIdx.x == first_wrong) {
        const u32 word = w < kSignatureWords ? w : kSizesWord;
        give_up(p, kMismatch, peer, word, value, offer_word(p, w), peer, 0);
    }
    if (first_wrong == ~0u && threadIdx.x == 0) {
        mine->members = alive & ~late;
        mine->shares = epoch;
    }
}
