// One time step of an LSTM around its matrix product. Shapes in the letters of rnnkit._typing; t is the step.

#include "common.cuh"

// gates[t] (B, 4H) holds the input's share and W_hh h. Advances h (B, H) and c (B, H) and fills output[t].
// For the way back the activated gates take the place of gates[t], and c_prev[t] gets the c before; c_prev is
// null where there is none. With a projection (P, H) fills m (B, H), o * tanh(c), in place of h and output.
extern "C" __global__ void lstm_forward(
    REAL* gates, REAL* c, REAL* c_prev, STORE* h, STORE* output, REAL* m,
    const long long* lengths, long long H, long long t) {
    const long long j = column(), b = row(), step_row = t * rows() + b, at = b * H + j;
    if (j >= H) return;
    STORE* const y = m == nullptr ? output + step_row * H + j : nullptr;
    if (!is_live(lengths, t)) {
        if (y != nullptr) store_zeros(y);
        else store_zeros(m + at);
        return;
    }
    REAL* const a = gates + step_row * 4 * H + j;
    REAL i[VECTOR], f[VECTOR], g[VECTOR], o[VECTOR], c_t[VECTOR], h_t[VECTOR];
    load(a, i);
    load(a + H, f);
    load(a + 2 * H, g);
    load(a + 3 * H, o);
    load(c + at, c_t);
    if (c_prev != nullptr) store(c_t, c_prev + step_row * H + j);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        i[v] = sigmoid(i[v]);
        f[v] = sigmoid(f[v]);
        g[v] = tanh(g[v]);
        o[v] = sigmoid(o[v]);
        c_t[v] = f[v] * c_t[v] + i[v] * g[v];
        h_t[v] = o[v] * tanh(c_t[v]);
    }
    store(c_t, c + at);
    if (c_prev != nullptr) {
        store(i, a);
        store(f, a + H);
        store(g, a + 2 * H);
        store(o, a + 3 * H);
    }
    if (y != nullptr) {
        store(h_t, h + at);
        store(h_t, y);
    } else {
        store(h_t, m + at);
    }
}

// Turns the activated gates[t] (B, 4H) into their gradient, and d_c (B, H) into that of the c before. What
// arrives at h is d_h (B, H) + d_output[t]; d_h is left zero, for the product with W_hh to be added to. With
// a projection the gradient of m arrives in d_m (B, H) instead, and c_prev[t] is overwritten by m.
// A sequence without this step has no gradient here, and its d_h and d_c wait.
extern "C" __global__ void lstm_backward(
    REAL* gates, REAL* c_prev, REAL* d_c, REAL* d_h, const STORE* d_output, const REAL* d_m,
    const long long* lengths, long long H, long long t) {
    const long long j = column(), b = row(), step_row = t * rows() + b, at = b * H + j;
    if (j >= H) return;
    REAL* const a = gates + step_row * 4 * H + j;
    REAL* const c_before = c_prev + step_row * H + j;
    if (!is_live(lengths, t)) {
        for (int gate = 0; gate < 4; ++gate) store_zeros(a + gate * H);
        if (d_m != nullptr) store_zeros(c_before);
        return;
    }
    REAL i[VECTOR], f[VECTOR], g[VECTOR], o[VECTOR], c_0[VECTOR], d_c_t[VECTOR], d_m_t[VECTOR], m[VECTOR];
    load(a, i);
    load(a + H, f);
    load(a + 2 * H, g);
    load(a + 3 * H, o);
    load(c_before, c_0);
    load(d_c + at, d_c_t);
    if (d_m != nullptr) {
        load(d_m + at, d_m_t);
    } else {
        REAL d_y[VECTOR];
        load(d_h + at, d_m_t);
        load(d_output + step_row * H + j, d_y);
        add(d_y, d_m_t);
        store_zeros(d_h + at);
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        const REAL i_v = i[v], f_v = f[v], g_v = g[v], o_v = o[v];
        const REAL tanh_c = tanh(f_v * c_0[v] + i_v * g_v);
        const REAL d_c_v = d_c_t[v] + d_m_t[v] * o_v * (1 - tanh_c * tanh_c);
        m[v] = o_v * tanh_c;
        i[v] = d_c_v * g_v * i_v * (1 - i_v);
        f[v] = d_c_v * c_0[v] * f_v * (1 - f_v);
        g[v] = d_c_v * i_v * (1 - g_v * g_v);
        o[v] = d_m_t[v] * tanh_c * o_v * (1 - o_v);
        d_c_t[v] = d_c_v * f_v;
    }
    store(i, a);
    store(f, a + H);
    store(g, a + 2 * H);
    store(o, a + 3 * H);
    store(d_c_t, d_c + at);
    if (d_m != nullptr) store(m, c_before);
}

// After the product with the projection: projected (B, P) becomes h (B, P) and output[t].
extern "C" __global__ void lstm_project(
    const REAL* projected, STORE* h, STORE* output, const long long* lengths, long long P, long long t) {
    const long long j = column(), at = row() * P + j;
    if (j >= P) return;
    STORE* const y = output + t * rows() * P + at;
    if (!is_live(lengths, t)) return store_zeros(y);
    REAL h_t[VECTOR];
    load(projected + at, h_t);
    store(h_t, h + at);
    store(h_t, y);
}

// Before it, on the way back: what arrives at h, d_h (B, P) + d_output[t], goes to d_projected[t]; d_h is
// left zero.
extern "C" __global__ void lstm_project_backward(
    REAL* d_h, const STORE* d_output, REAL* d_projected, const long long* lengths, long long P, long long t) {
    const long long j = column(), at = row() * P + j, here = t * rows() * P + at;
    if (j >= P) return;
    if (!is_live(lengths, t)) return store_zeros(d_projected + here);
    REAL d_h_t[VECTOR], d_y[VECTOR];
    load(d_h + at, d_h_t);
    load(d_output + here, d_y);
    add(d_y, d_h_t);
    store(d_h_t, d_projected + here);
    store_zeros(d_h + at);
}
