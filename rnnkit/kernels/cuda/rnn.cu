// One time step of a simple RNN around its matrix product. Shapes in the letters of rnnkit._typing; t is the
// step.

#include "common.cuh"

// gates[t] (B, H) holds the input's share and W_hh h. Advances h (B, H) and fills output[t].
extern "C" __global__ void rnn_forward(
    const REAL* gates, STORE* h, STORE* output, const long long* lengths, long long relu, long long H,
    long long t) {
    const long long j = column(), at = row() * H + j, here = t * rows() * H + at;
    if (j >= H) return;
    if (!is_live(lengths, t)) return store_zeros(output + here);
    REAL z[VECTOR];
    load(gates + here, z);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) z[v] = relu ? (z[v] < 0 ? REAL(0) : z[v]) : tanh(z[v]);
    store(z, h + at);
    store(z, output + here);
}

// Fills d_gates[t] (B, H). What arrives at h is d_h (B, H) + d_output[t]; d_h is left zero, for the product
// with W_hh to be added to. A sequence without this step has no gradient here, and its d_h waits.
extern "C" __global__ void rnn_backward(
    const STORE* output, REAL* d_gates, REAL* d_h, const STORE* d_output, const long long* lengths,
    long long relu, long long H, long long t) {
    const long long j = column(), at = row() * H + j, here = t * rows() * H + at;
    if (j >= H) return;
    if (!is_live(lengths, t)) return store_zeros(d_gates + here);
    REAL h[VECTOR], d_z[VECTOR], d_y[VECTOR];
    load(output + here, h);
    load(d_h + at, d_z);
    load(d_output + here, d_y);
    add(d_y, d_z);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v)
        d_z[v] = relu ? (h[v] > 0 ? d_z[v] : REAL(0)) : d_z[v] * (1 - h[v] * h[v]);
    store(d_z, d_gates + here);
    store_zeros(d_h + at);
}
