// What kernels that run a whole sequence are made of, right and wrong, by which test_host_device.py tests the
// host device itself: products of a warp, and blocks that wait for each other.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"

// Both halves from memory as one register.
__device__ unsigned pair(const STORE* first, const STORE* second) {
    return first->bits | (unsigned)second->bits << 16;
}

// d (16, 8) += a (16, 16) b (16, 8) of halves, in C order; `lane` may be wrong.
__device__ void multiply_halves(const STORE* a, const STORE* b, float* d, unsigned lane) {
    const unsigned g = lane / 4, k = lane % 4 * 2;
    const STORE *p = a + g * 16 + k, *q = b + k * 8 + g;
    float* const r = d + g * 8 + k;
    const unsigned left[4] = {
        pair(p, p + 1), pair(p + 128, p + 129), pair(p + 8, p + 9), pair(p + 136, p + 137)};
    const unsigned right[2] = {pair(q, q + 8), pair(q + 64, q + 72)};
    float sum[4] = {r[0], r[1], r[64], r[65]};
    mma_16x8x16(sum, left, right, STORE());
    r[0] = sum[0], r[1] = sum[1], r[64] = sum[2], r[65] = sum[3];
}
extern "C" __global__ void product_of_halves(const STORE* a, const STORE* b, float* d) {
    multiply_halves(a, b, d, threadIdx.x % 32);
}
extern "C" __global__ void product_with_wrong_lanes(const STORE* a, const STORE* b, float* d) {
    multiply_halves(a, b, d, threadIdx.x ^ 1);
}
extern "C" __global__ void product_of_half_a_warp(const STORE* a, const STORE* b, float* d) {
    if (threadIdx.x < 16) multiply_halves(a, b, d, threadIdx.x);
}
extern "C" __global__ void product_in_two_places(const STORE* a, const STORE* b, float* d) {
    if (threadIdx.x < 16) {
        multiply_halves(a, b, d, threadIdx.x);
    } else {
        const unsigned zeros[4] = {}, none[2] = {};
        float sum[4];
        mma_16x8x16(sum, zeros, none, STORE());
    }
}

// The same of (16, 8) and (8, 8) in TF32.
template <bool ROUND>
__device__ void multiply_tf32(const float* a, const float* b, float* d) {
    const unsigned g = threadIdx.x / 4, k = threadIdx.x % 4;
    const float *p = a + g * 8 + k, *q = b + k * 8 + g, rows[4] = {p[0], p[64], p[4], p[68]};
    float* const r = d + g * 8 + k * 2;
    unsigned left[4];
    for (int n = 0; n < 4; ++n) left[n] = ROUND ? tf32(rows[n]) : bits_of_float(rows[n]);
    const unsigned right[2] = {tf32(q[0]), tf32(q[32])};
    float sum[4] = {r[0], r[1], r[64], r[65]};
    mma_16x8x8(sum, left, right);
    r[0] = sum[0], r[1] = sum[1], r[64] = sum[2], r[65] = sum[3];
}
extern "C" __global__ void product_in_tf32(const float* a, const float* b, float* d) {
    multiply_tf32<true>(a, b, d);
}
extern "C" __global__ void product_of_unrounded(const float* a, const float* b, float* d) {
    multiply_tf32<false>(a, b, d);
}
extern "C" __global__ void rounded_to_tf32(const float* from, unsigned* to) {
    to[threadIdx.x] = tf32(from[threadIdx.x]);
}

// ------------------------------------------------------------------------------------- waiting for others

// Whether *count reached `target` within `patience` looks, and nobody else gave up, which shows in *error.
__device__ bool wait_for(const unsigned* count, unsigned target, long long patience, unsigned* error) {
    for (long long look = 0; int(load_acquire(count) - target) < 0; ++look) {
        if (look >= patience) store_system(error, 1);
        if (load_system(error)) return false;
        pause();
    }
    return true;
}

enum Fault { NONE, WITHOUT_WAIT, WITHOUT_BARRIER, WITHOUT_RELEASE, ONE_SLOT, ONE_BLOCK_LESS };

// In each round every thread adds up what all blocks' threads of its number hold, modulo 4096, and adds its
// place. x (2, blocks, threads) has a slot for even and one for odd rounds: who may write a slot again has
// seen that all have written the other one, and so read this one.
template <Fault FAULT>
__device__ void add_up(float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    SHARED(unsigned, there);
    const unsigned size = gridDim.y * blockDim.x, here = blockIdx.y * blockDim.x + threadIdx.x;
    if (FAULT == ONE_BLOCK_LESS && blockIdx.y == gridDim.y - 1) return;
    for (long long k = 0; k < rounds; ++k) {
        if (threadIdx.x == 0)
            *there = FAULT == WITHOUT_WAIT || wait_for(count, k * gridDim.y, patience, error);
        __syncthreads();
        if (!*there) return;
        const float* const from = x + (FAULT == ONE_SLOT ? 0 : k % 2 * size);
        float* const to = x + (FAULT == ONE_SLOT ? 0 : (k + 1) % 2 * size);
        float sum = 0;
        for (unsigned block = 0; block < gridDim.y; ++block) sum += from[block * blockDim.x + threadIdx.x];
        to[here] = sum - floor(sum / 4096) * 4096 + here;
        if (FAULT != WITHOUT_BARRIER) __syncthreads();
        if (threadIdx.x == 0) FAULT == WITHOUT_RELEASE ? atomicAdd(count, 1u) : add_release(count, 1);
    }
}
extern "C" __global__ void added_up(
    float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    add_up<NONE>(x, count, error, patience, rounds);
}
extern "C" __global__ void added_up_without_wait(
    float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    add_up<WITHOUT_WAIT>(x, count, error, patience, rounds);
}
extern "C" __global__ void added_up_without_barrier(
    float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    add_up<WITHOUT_BARRIER>(x, count, error, patience, rounds);
}
extern "C" __global__ void added_up_without_release(
    float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    add_up<WITHOUT_RELEASE>(x, count, error, patience, rounds);
}
extern "C" __global__ void added_up_in_one_slot(
    float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    add_up<ONE_SLOT>(x, count, error, patience, rounds);
}
extern "C" __global__ void added_up_by_one_block_less(
    float* x, unsigned* count, unsigned* error, long long patience, long long rounds) {
    add_up<ONE_BLOCK_LESS>(x, count, error, patience, rounds);
}

// One block less than there are waits, so that the others give up; `error` is the address of the host's flag.
extern "C" __global__ void gives_up(float* x, unsigned* count, long long error, long long patience) {
    add_up<ONE_BLOCK_LESS>(x, count, reinterpret_cast<unsigned*>(error), patience, 2);
}

extern "C" __global__ void spins_without_pause(const unsigned* flag) {
    while (load_acquire(flag) != 1) {
    }
}
extern "C" __global__ void loads_16_bytes(const float* from, float* to, long long at) {
    const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(from + at);
    for (int k = 0; k < 4; ++k) to[k] = four.x[k];
}

// Threads copy 16 bytes each, in two groups; the next thread reads them.
template <bool WAIT, bool SYNC>
__device__ void copy_around(const float* from, float* to, long long n) {
    SHARED(float, shared);
    const long long here = threadIdx.x * 4, next = (threadIdx.x + 1) % blockDim.x * 4, half = blockDim.x * 4;
    copy_async(shared + here, from + (here < n ? here : 0), here < n);
    copy_commit();
    copy_async(shared + half + here, from + here, true);
    copy_commit();
    if (WAIT) copy_wait<1>();
    if (SYNC) __syncthreads();
    for (int k = 0; k < 4; ++k) to[here + k] = shared[next + k];
    copy_wait<0>();
    for (int k = 0; k < 4; ++k) to[half + here + k] = shared[half + here + k];
}
extern "C" __global__ void copied(const float* from, float* to, long long n) {
    copy_around<true, true>(from, to, n);
}
extern "C" __global__ void copied_without_wait(const float* from, float* to, long long n) {
    copy_around<false, true>(from, to, n);
}
extern "C" __global__ void copied_without_barrier(const float* from, float* to, long long n) {
    copy_around<true, false>(from, to, n);
}
extern "C" __global__ void copied_and_left(const float* from) {
    SHARED(float, shared);
    copy_async(shared, from, true);
}
extern "C" __global__ void zeros_copied(const float* from, float* to) {
    SHARED(float, shared);
    copy_async(shared, from, false);
    copy_commit();
    copy_wait<0>();
    *to = *shared;
}
