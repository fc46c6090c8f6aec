// How blocks of one launch wait for each other, and threads for what they copy; include common.cuh first.
// Blocks that wait must all be there at the same time, as a cooperative launch guarantees.
//
// One block writes its share, synchronises its threads, and one of them tells so by store_release or
// add_release; another block has one thread look with load_acquire until it sees that, and pause in between;
// it synchronises its threads, and all of them may read what was written.

#ifndef RNNKIT_HOST

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
    unsigned x;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void store_release(unsigned* p, unsigned x) {
    asm volatile("st.release.gpu.u32 [%0], %1;" : : "l"(p), "r"(x) : "memory");
}

// Returns what *p was before.
__device__ __forceinline__ unsigned add_release(unsigned* p, unsigned x) {
    unsigned before;
    asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}

// In memory of the host that the device can reach: the error flag. Each load crosses the bus.
__device__ __forceinline__ unsigned load_system(const unsigned* p) {
    unsigned x;
    asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void store_system(unsigned* p, unsigned x) {
    asm volatile("st.relaxed.sys.u32 [%0], %1;" : : "l"(p), "r"(x) : "memory");
}

// Between two looks at what another block will write. How many nanoseconds are worth asking for is a matter
// of measurement.
__device__ __forceinline__ void pause() { asm volatile("nanosleep.u32 20;"); }

// Brings 16 bytes to shared memory, past the registers and the first-level cache, or zeros where they are not
// `there`; `global` must then still point into an array. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there) {
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(global), "r"(there ? 16 : 0)
                 : "memory");
}

// Makes a group of what this thread copies since the last group.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all groups of this thread but the LATER last ones have arrived; others see them behind a
// barrier.
template <int LATER>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory");
}

#endif

// A block looks so many times before it gives up: some seconds, where what it waits for takes microseconds. It
// looks whether another one gave up once in PATIENCE times.
#ifndef MOST_SPINS
#define MOST_SPINS (1u << 23)
#endif
constexpr unsigned PATIENCE = MOST_SPINS / 64;

// `flags` has a number that says whether a block gave up, and then one for each block: how often it has told
// that it is done. All are zero at first.

// Waits until `blocks` blocks, `first` and each `step`-th after it, are done `count` times. False, for all
// threads, where one does not come in time or another block gave up waiting: then the host will learn it from
// the error flag.
__device__ __forceinline__ bool all_are_done(
    unsigned* flags, int first, int step, int blocks, unsigned count, unsigned* error) {
    const unsigned* const theirs = flags + 1 + first;
    bool failed = false;
    for (int k = threadIdx.x; k < blocks && !failed; k += blockDim.x) {
        for (unsigned spins = 1; load_acquire(theirs + k * step) < count && !failed; ++spins) {
            if (spins == MOST_SPINS) {
                store_system(error, 1);
                store_release(flags, 1);
            }
            if (spins % PATIENCE == 0) failed = load_acquire(flags) != 0;
            pause();
        }
    }
    return !__syncthreads_or(failed);
}

// Tells that a block is done for the `count`-th time: all its threads, whose stores come before.
__device__ __forceinline__ void tell_done(unsigned* flags, int block, unsigned count) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flags + 1 + block, count);
}
