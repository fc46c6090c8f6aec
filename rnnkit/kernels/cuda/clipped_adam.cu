// Clipping and a step of Adam in one launch, whose blocks wait for each other.

#include "common.cuh"
#include "reduce.cuh"
#include "sync.cuh"
#include "norm.cuh"
#include "adam.cuh"

// Fills norm () with that of the gradient d_flat (N), and changes flat, mean and square (N) in place by the
// gradient scaled to a norm of at most max_norm; adam.cuh explains the other numbers. The scaled gradient is
// not stored, so in half precision it is not rounded. A cooperative launch on a grid (1, n), of no more blocks
// than a block has threads: each gives its share of the sum of squares to sums (n), and adds up all by itself,
// so that all have the same norm. flags (1 + n) is zero at first; `error` is the address of the error flag.
extern "C" __global__ void clipped_adam(
    STORE* flat, const STORE* d_flat, REAL* mean, REAL* square, REAL* sums, REAL* norm, unsigned* flags,
    long long error, double max_norm, double beta_1, double beta_2, double shrink, double step_size,
    double root, double eps, long long N) {
    SHARED(REAL, room);
    const long long first = column(), step = (long long)gridDim.y * blockDim.x * VECTOR;
    const REAL share = sum_of_squares(d_flat, first, step, N, room);
    if (threadIdx.x == 0) sums[blockIdx.y] = share;
    tell_done(flags, blockIdx.y, 1);
    if (!all_are_done(flags, 0, 1, gridDim.y, 1, reinterpret_cast<unsigned*>(error))) return;

    const REAL length = norm_of(sums, gridDim.y, room), scale = scale_of(length, max_norm);
    if (blockIdx.y == 0 && threadIdx.x == 0) *norm = length;
    const Adam numbers = {beta_1, beta_2, shrink, step_size, root, eps};
    for (long long at = first; at < N; at += step)
        numbers.step(flat + at, d_flat + at, mean + at, square + at, scale, N - at);
}
