// A vector scaled so that its norm is at most a given number.

#include "common.cuh"
#include "reduce.cuh"
#include "norm.cuh"

// Each block's share of the sum of squares of flat (N), to sums (blocks).
extern "C" __global__ void clip_sums(const STORE* flat, REAL* sums, long long N) {
    SHARED(REAL, room);
    const REAL all = sum_of_squares(flat, place(), stride(), N, room);
    if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

// On the same grid, of no more blocks than a block has threads: every block adds up all sums by itself, so
// that none waits for another. Scales flat in place unless its norm is small enough, and fills norm ().
extern "C" __global__ void clip_scale(
    STORE* flat, const REAL* sums, REAL* norm, double max_norm, long long N) {
    SHARED(REAL, room);
    const REAL length = norm_of(sums, gridDim.x, room);
    if (blockIdx.x == 0 && threadIdx.x == 0) *norm = length;
    const REAL scale = scale_of(length, max_norm);
    if (scale == 1) return;
    for (long long at = place(); at < N; at += stride()) {
        REAL x[VECTOR];
        load_part(flat + at, N - at, x);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) x[v] *= scale;
        store_part(x, N - at, flat + at);
    }
}
