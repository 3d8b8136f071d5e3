// Memory for the stacks of the fibers of a block. It is used again: thousands of fresh pages take longer than most
// kernels.
#pragma once
#include <pthread.h>
#include <stddef.h>
#include <sys/mman.h>

static const size_t EMU_STACK_BYTES = 64 << 10, EMU_MAX_THREADS = 1024;

// The head of a list; each piece begins with the address of the next. Inline, so that the libraries of all kernels
// share it.
inline unsigned char* emu_free_stacks = nullptr;
inline pthread_mutex_t emu_stacks_lock = PTHREAD_MUTEX_INITIALIZER;

// Returns memory for the stacks of EMU_MAX_THREADS threads, or null.
static unsigned char* emu_take_stacks() {
    pthread_mutex_lock(&emu_stacks_lock);
    unsigned char* stacks = emu_free_stacks;
    if (stacks) emu_free_stacks = *(unsigned char**)stacks;
    pthread_mutex_unlock(&emu_stacks_lock);
    if (stacks) return stacks;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = (unsigned char*)mmap(0, EMU_STACK_BYTES * EMU_MAX_THREADS, PROT_READ | PROT_WRITE, flags, -1, 0);
    return stacks == MAP_FAILED ? nullptr : stacks;
}

static void emu_give_stacks(unsigned char* stacks) {
    pthread_mutex_lock(&emu_stacks_lock);
    *(unsigned char**)stacks = emu_free_stacks;
    emu_free_stacks = stacks;
    pthread_mutex_unlock(&emu_stacks_lock);
}
