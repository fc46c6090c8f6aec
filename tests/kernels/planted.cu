// Kernels right and wrong, by which test_host_device.py tests the host device itself.

#include "common.cuh"

template <bool SYNC>
__device__ void reverse_block(const REAL* from, REAL* to) {
    SHARED(REAL, shared);
    shared[threadIdx.x] = from[threadIdx.x];
    if (SYNC) __syncthreads();
    to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void reversed(const REAL* from, REAL* to) { reverse_block<true>(from, to); }
extern "C" __global__ void reversed_without_barrier(const REAL* from, REAL* to) {
    reverse_block<false>(from, to);
}

// The second barrier keeps a fast thread from overwriting what a slow one has not read.
template <bool SYNC>
__device__ void rotate_block(const REAL* from, REAL* to, long long times) {
    SHARED(REAL, shared);
    REAL x = from[threadIdx.x];
    for (long long k = 0; k < times; ++k) {
        shared[threadIdx.x] = x;
        __syncthreads();
        x = shared[(threadIdx.x + 1) % blockDim.x];
        if (SYNC) __syncthreads();
    }
    to[threadIdx.x] = x;
}
extern "C" __global__ void rotated(const REAL* from, REAL* to, long long n) {
    rotate_block<true>(from, to, n);
}
extern "C" __global__ void rotated_without_second_barrier(const REAL* from, REAL* to, long long n) {
    rotate_block<false>(from, to, n);
}

// One element a thread, of n in all: the one that is t places on.
extern "C" __global__ void moved(const REAL* from, REAL* to, long long n, long long t) {
    const long long k = (blockIdx.x * gridDim.y + blockIdx.y) * blockDim.x + threadIdx.x;
    to[k] = from[(k + t) % n];
}

extern "C" __global__ void divergent(REAL* to) {
    if (threadIdx.x < 3) __syncthreads();
    to[threadIdx.x] = 1;
}
extern "C" __global__ void divergent_lines(REAL* to) {
    if (threadIdx.x < 3) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    to[threadIdx.x] = 1;
}
extern "C" __global__ void spins_for_ever(const REAL* flag) {
    while (*(const volatile REAL*)flag != 1) __nanosleep(100);
}

extern "C" __global__ void writes_beyond(REAL* to, long long n) { to[n] = 1; }
extern "C" __global__ void writes_before(REAL* to) { to[-1] = 1; }
extern "C" __global__ void writes_beyond_shared(long long n) {
    SHARED(REAL, shared);
    shared[n] = 1;
}

// The sum of each warp, once by shuffles down, once across.
extern "C" __global__ void warp_sums(const REAL* from, REAL* down, REAL* across) {
    REAL x = from[threadIdx.x], y = x;
    for (int n = 16; n > 0; n /= 2) x += __shfl_down_sync(0xffffffffu, x, n);
    for (int n = 16; n > 0; n /= 2) y += __shfl_xor_sync(0xffffffffu, y, n);
    if (threadIdx.x % 32 == 0) down[threadIdx.x / 32] = x;
    across[threadIdx.x] = y;
}

// Which threads have a negative number, by ballots, and how many in the block.
extern "C" __global__ void negatives(const REAL* from, long long* votes, long long* count) {
    const bool negative = from[threadIdx.x] < 0;
    const unsigned ballot = __ballot_sync(0xffffffffu, negative);
    if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = ballot;
    const int all = __syncthreads_count(negative);
    if (threadIdx.x == 0) *count = all;
}

// Each block adds to what the block before it wrote in the last round: needs all blocks at the same time.
extern "C" __global__ void around_the_grid(REAL* x, long long rounds) {
    for (long long k = 0; k < rounds; ++k) {
        const REAL before = x[(blockIdx.x + gridDim.x - 1) % gridDim.x];
        grid_barrier();
        if (threadIdx.x == 0) x[blockIdx.x] = before + 1;
        grid_barrier();
    }
}

// The same meeting by a flag in memory.
extern "C" __global__ void meet_at_a_counter(REAL* to, long long* counter) {
    if (threadIdx.x == 0) {
        atomicAdd(counter, 1ll);
        while (*(volatile long long*)counter != gridDim.x) __nanosleep(100);
    }
    __syncthreads();
    to[blockIdx.x * blockDim.x + threadIdx.x] = *counter;
}

extern "C" __global__ void halves(const float* from, STORE* to, float* back, long long n) {
    const long long k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= n) return;
    round_to(from[k], to[k]);
    back[k] = real(to[k]);
}
