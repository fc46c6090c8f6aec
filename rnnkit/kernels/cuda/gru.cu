// One time step of a GRU around its matrix product. Shapes in the letters of rnnkit._typing; t is the step.

#include "common.cuh"

// gates[t] (B, 3H) holds the input's share and product (B, 3H) W_hh h; bias_hn (H) may be null. Advances h
// (B, H) and fills output[t]. For the way back the activated gates take the place of gates[t], and
// recurrent_n[t] gets W_n h + b_hn; recurrent_n is null where there is none.
extern "C" __global__ void gru_forward(
    REAL* gates, const REAL* product, const STORE* bias_hn, REAL* recurrent_n, STORE* h, STORE* output,
    const long long* lengths, long long H, long long t) {
    const long long j = column(), b = row(), step_row = t * rows() + b, at = b * H + j;
    if (j >= H) return;
    STORE* const y = output + step_row * H + j;
    if (!is_live(lengths, t)) return store_zeros(y);
    REAL* const a = gates + step_row * 3 * H + j;
    const REAL* const w = product + b * 3 * H + j;
    REAL r[VECTOR], z[VECTOR], n[VECTOR], w_r[VECTOR], w_z[VECTOR], w_n[VECTOR], h_t[VECTOR];
    load(a, r);
    load(a + H, z);
    load(a + 2 * H, n);
    load(w, w_r);
    load(w + H, w_z);
    load(w + 2 * H, w_n);
    load(h + at, h_t);
    if (bias_hn != nullptr) {
        REAL bias[VECTOR];
        load(bias_hn + j, bias);
        add(bias, w_n);
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        r[v] = sigmoid(r[v] + w_r[v]);
        z[v] = sigmoid(z[v] + w_z[v]);
        n[v] = tanh(n[v] + r[v] * w_n[v]);
        h_t[v] = (1 - z[v]) * n[v] + z[v] * h_t[v];
    }
    store(h_t, h + at);
    store(h_t, y);
    if (recurrent_n == nullptr) return;
    store(r, a);
    store(z, a + H);
    store(n, a + 2 * H);
    store(w_n, recurrent_n + step_row * H + j);
}

// Turns the activated gates[t] (B, 3H) into their gradient and recurrent_n[t] (B, H) into its own; d_w
// (B, 3H) is the gradient of the product. What arrives at h is d_h (B, H) + d_output[t]; d_h is left with the
// part that goes past the product, for the rest to be added to. A sequence without this step has no gradient
// here, and its d_h waits. The h before this step is found in the output, for a sequence's first step in h_0.
extern "C" __global__ void gru_backward(
    REAL* gates, REAL* recurrent_n, const STORE* output, const STORE* h_0, REAL* d_w, REAL* d_h,
    const STORE* d_output, const long long* lengths, long long T, long long reverse, long long H,
    long long t) {
    const long long j = column(), b = row(), step_row = t * rows() + b, at = b * H + j;
    if (j >= H) return;
    REAL* const a = gates + step_row * 3 * H + j;
    REAL* const w = d_w + b * 3 * H + j;
    REAL* const recurrent = recurrent_n + step_row * H + j;
    if (!is_live(lengths, t)) {
        for (int gate = 0; gate < 3; ++gate) {
            store_zeros(a + gate * H);
            store_zeros(w + gate * H);
        }
        return store_zeros(recurrent);
    }
    const long long first = reverse ? (lengths == nullptr ? T : lengths[b]) - 1 : 0;
    const long long before = reverse ? t + 1 : t - 1;
    REAL r[VECTOR], z[VECTOR], n[VECTOR], w_n[VECTOR], h[VECTOR], d_h_t[VECTOR], d_y[VECTOR];
    load(a, r);
    load(a + H, z);
    load(a + 2 * H, n);
    load(recurrent, w_n);
    load(t == first ? h_0 + at : output + (before * rows() + b) * H + j, h);
    load(d_h + at, d_h_t);
    load(d_output + step_row * H + j, d_y);
    add(d_y, d_h_t);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        const REAL r_v = r[v], z_v = z[v], n_v = n[v], d_h_v = d_h_t[v];
        n[v] = d_h_v * (1 - z_v) * (1 - n_v * n_v);
        r[v] = n[v] * w_n[v] * r_v * (1 - r_v);
        z[v] = d_h_v * (h[v] - n_v) * z_v * (1 - z_v);
        w_n[v] = n[v] * r_v;
        d_h_t[v] = d_h_v * z_v;
    }
    store(r, a);
    store(z, a + H);
    store(n, a + 2 * H);
    store(r, w);
    store(z, w + H);
    store(w_n, w + 2 * H);
    store(w_n, recurrent);
    store(d_h_t, d_h + at);
}
