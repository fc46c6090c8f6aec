// A step of Adam.

#include "common.cuh"

// Changes flat, mean and square (N) in place by the gradient d_flat (N); the reference has the formulas. All
// that the whole vector has in common was computed on the host: shrink is 1 - lr * weight_decay, step_size
// lr / (1 - beta_1^t), root the square root of 1 - beta_2^t.
extern "C" __global__ void adam(
    STORE* flat, const STORE* d_flat, REAL* mean, REAL* square, double beta_1, double beta_2, double shrink,
    double step_size, double root, double eps, long long N) {
    const long long at = place(), left = N - at;
    if (left <= 0) return;
    REAL p[VECTOR], d[VECTOR], m[VECTOR], s[VECTOR];
    load_part(flat + at, left, p);
    load_part(d_flat + at, left, d);
    load_part(mean + at, left, m);
    load_part(square + at, left, s);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        m[v] = REAL(beta_1) * m[v] + REAL(1 - beta_1) * d[v];
        s[v] = REAL(beta_2) * s[v] + REAL(1 - beta_2) * d[v] * d[v];
        p[v] = REAL(shrink) * p[v] - REAL(step_size) * m[v] / (sqrt(s[v]) / REAL(root) + REAL(eps));
    }
    store_part(p, left, flat + at);
    store_part(m, left, mean + at);
    store_part(s, left, square + at);
}
