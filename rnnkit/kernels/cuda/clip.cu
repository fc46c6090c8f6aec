// A vector scaled so that its norm is at most a given number.

#include "common.cuh"
#include "reduce.cuh"

// Each block's share of the sum of squares of flat (N), to sums (blocks).
extern "C" __global__ void clip_sums(const STORE* flat, REAL* sums, long long N) {
    SHARED(REAL, room);
    REAL mine = 0;
    for (long long at = place(); at < N; at += stride()) {
        REAL x[VECTOR];
        load_part(flat + at, N - at, x);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) mine += x[v] * x[v];
    }
    const REAL all = over_block(mine, Sum(), room);
    if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

// On the same grid, of no more blocks than a block has threads: every block adds up all sums by itself, so
// that none waits for another. Scales flat in place unless its norm is small enough, and fills norm ().
extern "C" __global__ void clip_scale(
    STORE* flat, const REAL* sums, REAL* norm, double max_norm, long long N) {
    SHARED(REAL, room);
    const REAL mine = threadIdx.x < gridDim.x ? sums[threadIdx.x] : REAL(0);
    const REAL length = sqrt(over_block(mine, Sum(), room));
    if (blockIdx.x == 0 && threadIdx.x == 0) *norm = length;
    const REAL scale = REAL(max_norm) / (length + REAL(1e-6));
    if (!(scale < 1)) return;
    for (long long at = place(); at < N; at += stride()) {
        REAL x[VECTOR];
        load_part(flat + at, N - at, x);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) x[v] *= scale;
        store_part(x, N - at, flat + at);
    }
}
