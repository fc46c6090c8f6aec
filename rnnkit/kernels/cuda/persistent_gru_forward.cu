// A GRU's scan in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"
#include "persistent_product.cuh"
#include "persistent_run.cuh"
#include "persistent_there.cuh"

struct Cell : There<3> {
    REAL *gates, *recurrent_n;
    const STORE* bias_hn;
    REAL a[ITEMS][3], w_n[ITEMS];

    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        load_gates(scan, gates, item, t, a[e]);
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        if (!item.has(step.t)) return;
        w_n[e] = totals(2 * UNITS + item.unit);
        if (bias_hn != nullptr) w_n[e] += real(bias_hn[item.j]);
        const REAL r = sigmoid(a[e][0] + totals(item.unit)), z = sigmoid(a[e][1] + totals(UNITS + item.unit));
        const REAL n = tanh(a[e][2] + r * w_n[e]);
        a[e][0] = r;
        a[e][1] = z;
        a[e][2] = n;
        tell(e, item, step.t, (1 - z) * n + z * real(h[e]));
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        if (recurrent_n == nullptr) return;
        store_gates(scan, a[e], item, t, gates);
        recurrent_n[scan.step(t, scan.H) + item.at] = w_n[e];
    }
};

// gates (T, B, 3H) holds the input's share; bias_hn (H) may be null. Fills output (T, B, H) and h_n (B, H).
// For the way back the activated gates take the place of gates, and recurrent_n (T, B, H) gets W_n h + b_hn;
// recurrent_n is null where there is none. flags is zero at first; it has one number more than there are
// blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1) gru_forward_persistent(
    BOTH(const STORE*, weights), BOTH(REAL*, gates), BOTH(const STORE*, bias_hn), BOTH(const STORE*, h_0),
    BOTH(STORE*, output), BOTH(STORE*, h_n), BOTH(REAL*, recurrent_n), SCAN_PARAMETERS) {
    const Scan scan = SCAN;
    Cell cell = {{scan, OF(weights), OF(h_0), OF(output), OF(h_n)}, OF(gates), OF(recurrent_n), OF(bias_hn)};
    run(cell, scan);
}
