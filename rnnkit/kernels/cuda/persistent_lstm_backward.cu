// An LSTM's way back in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the
// rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"
#include "persistent_product.cuh"
#include "persistent_run.cuh"
#include "persistent_back.cuh"

struct Cell : Back<4> {
    REAL* gates;
    const REAL *c_prev, *d_c_n;
    REAL* d_c_0;
    REAL d_c[ITEMS], a[ITEMS][4], c[ITEMS];

    __device__ __forceinline__ void begin(int e, const Item& item) {
        Back::begin(e, item);
        d_c[e] = d_c_n[item.at];
    }
    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        Back::fetch(e, item, t);
        load_gates(scan, gates, item, t, a[e]);
        c[e] = c_prev[scan.step(t, scan.H) + item.at];
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        // A sequence's first step on the way back has the gradient of its final state, which waited until
        // now.
        if (item.has(step.before)) d_h[e] = totals(item.unit);
        if (!item.has(step.t)) return;
        const REAL i = a[e][0], f = a[e][1], g = a[e][2], o = a[e][3];
        const REAL tanh_c = tanh(f * c[e] + i * g), d_h_t = d_h[e] + d_y[e];
        const REAL d_c_t = d_c[e] + d_h_t * o * (1 - tanh_c * tanh_c);
        a[e][0] = d_c_t * g * i * (1 - i);
        a[e][1] = d_c_t * c[e] * f * (1 - f);
        a[e][2] = d_c_t * i * (1 - g * g);
        a[e][3] = d_h_t * tanh_c * o * (1 - o);
        d_c[e] = d_c_t * f;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) tell(item, step, gate, a[e][gate]);
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        store_gates(scan, a[e], item, t, gates);
    }
    __device__ __forceinline__ void pad(const Item& item, int t) {
        const REAL zeros[4] = {};
        store_gates(scan, zeros, item, t, gates);
    }
    __device__ __forceinline__ void end(int e, const Item& item) {
        Back::end(e, item);
        d_c_0[item.at] = d_c[e];
    }
};

// Turns the activated gates (T, B, 4H) into their gradients and fills d_h_0 and d_c_0 (B, H). exchange (2, B,
// 4H) is for what the blocks of a group tell each other; null for GRID = 0. flags as on the way there.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm_backward_persistent(
    BOTH(const Operand*, weights), BOTH(Operand*, exchange), BOTH(REAL*, gates), BOTH(const REAL*, c_prev),
    BOTH(const STORE*, d_output), BOTH(const STORE*, d_h_n), BOTH(const REAL*, d_c_n), BOTH(STORE*, d_h_0),
    BOTH(REAL*, d_c_0), SCAN_PARAMETERS) {
    const Scan scan = SCAN;
    Cell cell = {{scan, OF(weights), OF(d_output), OF(d_h_n), OF(d_h_0), OF(exchange)},
                 OF(gates), OF(c_prev), OF(d_c_n), OF(d_c_0)};
    run(cell, scan);
}
