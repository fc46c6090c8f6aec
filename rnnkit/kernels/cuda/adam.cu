// A step of Adam.

#include "common.cuh"
#include "adam.cuh"

// Changes flat, mean and square (N) in place by the gradient d_flat (N); adam.cuh explains the numbers.
extern "C" __global__ void adam(
    STORE* flat, const STORE* d_flat, REAL* mean, REAL* square, double beta_1, double beta_2, double shrink,
    double step_size, double root, double eps, long long N) {
    const Adam numbers = {beta_1, beta_2, shrink, step_size, root, eps};
    const long long at = place(), left = N - at;
    if (left > 0) numbers.step(flat + at, d_flat + at, mean + at, square + at, 1, left);
}
