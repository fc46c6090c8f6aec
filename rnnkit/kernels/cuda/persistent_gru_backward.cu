// A GRU's way back in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"
#include "persistent_product.cuh"
#include "persistent_run.cuh"
#include "persistent_back.cuh"

struct Cell : Back<3> {
    REAL *gates, *recurrent_n;
    const STORE *output, *h_0;
    REAL a[ITEMS][3], w_n[ITEMS], h[ITEMS];

    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        Back::fetch(e, item, t);
        load_gates(scan, gates, item, t, a[e]);
        w_n[e] = recurrent_n[scan.step(t, scan.H) + item.at];
        const int t_prev = scan.reverse ? t + 1 : t - 1;
        h[e] = real(item.has(t_prev) ? output[scan.step(t_prev, scan.H) + item.at] : h_0[item.at]);
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        // d_h had the part that goes past the product; a sequence's first step on the way back has the
        // gradient of its final state, which waited until now.
        if (item.has(step.before)) d_h[e] += totals(item.unit);
        if (!item.has(step.t)) return;
        const REAL r = a[e][0], z = a[e][1], n = a[e][2], d_h_t = d_h[e] + d_y[e];
        const REAL d_n = d_h_t * (1 - z) * (1 - n * n);
        a[e][0] = d_n * w_n[e] * r * (1 - r);
        a[e][1] = d_h_t * (h[e] - n) * z * (1 - z);
        a[e][2] = d_n;
        w_n[e] = d_n * r;
        d_h[e] = d_h_t * z;
        tell(item, step, 0, a[e][0]);
        tell(item, step, 1, a[e][1]);
        tell(item, step, 2, w_n[e]);
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        store_gates(scan, a[e], item, t, gates);
        recurrent_n[scan.step(t, scan.H) + item.at] = w_n[e];
    }
    __device__ __forceinline__ void pad(const Item& item, int t) {
        const REAL zeros[3] = {};
        store_gates(scan, zeros, item, t, gates);
        recurrent_n[scan.step(t, scan.H) + item.at] = 0;
    }
};

// Turns the activated gates (T, B, 3H) and recurrent_n (T, B, H) into their gradients and fills d_h_0 (B, H).
// exchange (2, B, 3H) is for what the blocks of a group tell each other; null for GRID = 0. flags as on the
// way there.
extern "C" __global__ void __launch_bounds__(THREADS, 1) gru_backward_persistent(
    BOTH(const Operand*, weights), BOTH(Operand*, exchange), BOTH(REAL*, gates), BOTH(REAL*, recurrent_n),
    BOTH(const STORE*, output), BOTH(const STORE*, h_0), BOTH(const STORE*, d_output),
    BOTH(const STORE*, d_h_n), BOTH(STORE*, d_h_0), SCAN_PARAMETERS) {
    const Scan scan = SCAN;
    Cell cell = {{scan, OF(weights), OF(d_output), OF(d_h_n), OF(d_h_0), OF(exchange)},
                 OF(gates), OF(recurrent_n), OF(output), OF(h_0)};
    run(cell, scan);
}
