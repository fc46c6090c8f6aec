// An LSTM's scan in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"
#include "persistent_product.cuh"
#include "persistent_run.cuh"
#include "persistent_there.cuh"

struct Cell : There<4> {
    REAL *gates, *c_prev;
    const REAL* c_0;
    REAL* c_n;
    REAL c[ITEMS], a[ITEMS][4];

    __device__ __forceinline__ void begin(int e, const Item& item) {
        There::begin(e, item);
        c[e] = c_0[item.at];
    }
    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        load_gates(scan, gates, item, t, a[e]);
        if (c_prev != nullptr) c_prev[scan.step(t, scan.H) + item.at] = c[e];
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        if (!item.has(step.t)) return;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
            const REAL z = a[e][gate] + totals(gate * UNITS + item.unit);
            a[e][gate] = gate == 2 ? tanh(z) : sigmoid(z);
        }
        c[e] = a[e][1] * c[e] + a[e][0] * a[e][2];
        tell(e, item, step.t, a[e][3] * tanh(c[e]));
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        if (c_prev != nullptr) store_gates(scan, a[e], item, t, gates);
    }
    __device__ __forceinline__ void end(int e, const Item& item) {
        There::end(e, item);
        c_n[item.at] = c[e];
    }
};

// gates (T, B, 4H) holds the input's share. Fills output (T, B, H), h_n and c_n (B, H). For the way back the
// activated gates take the place of gates, and c_prev (T, B, H) gets the c before each step; c_prev is null
// where there is none. flags is zero at first; it has one number more than there are blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm_forward_persistent(
    BOTH(const STORE*, weights), BOTH(REAL*, gates), BOTH(const STORE*, h_0), BOTH(const REAL*, c_0),
    BOTH(STORE*, output), BOTH(STORE*, h_n), BOTH(REAL*, c_n), BOTH(REAL*, c_prev), SCAN_PARAMETERS) {
    const Scan scan = SCAN;
    Cell cell = {{scan, OF(weights), OF(h_0), OF(output), OF(h_n)}, OF(gates), OF(c_prev), OF(c_0), OF(c_n)};
    run(cell, scan);
}
