// A simple RNN's way back in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the
// rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"
#include "persistent_product.cuh"
#include "persistent_run.cuh"
#include "persistent_back.cuh"

struct Cell : Back<1> {
    const STORE* output;
    REAL* d_gates;
    bool relu;
    REAL a[ITEMS][1], h[ITEMS];

    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        Back::fetch(e, item, t);
        h[e] = real(output[scan.step(t, scan.H) + item.at]);
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        // A sequence's first step on the way back has the gradient of its final state, which waited until
        // now.
        if (item.has(step.before)) d_h[e] = totals(item.unit);
        if (!item.has(step.t)) return;
        const REAL d_h_t = d_h[e] + d_y[e];
        a[e][0] = relu ? (h[e] > 0 ? d_h_t : REAL(0)) : d_h_t * (1 - h[e] * h[e]);
        tell(item, step, 0, a[e][0]);
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        store_gates(scan, a[e], item, t, d_gates);
    }
    __device__ __forceinline__ void pad(const Item& item, int t) {
        d_gates[scan.step(t, scan.H) + item.at] = 0;
    }
};

// Fills d_gates (T, B, H) and d_h_0 (B, H). exchange (2, B, H) is for what the blocks of a group tell each
// other; null for GRID = 0. flags as on the way there.
extern "C" __global__ void __launch_bounds__(THREADS, 1) rnn_backward_persistent(
    BOTH(const Operand*, weights), BOTH(Operand*, exchange), BOTH(const STORE*, output), BOTH(REAL*, d_gates),
    BOTH(const STORE*, d_output), BOTH(const STORE*, d_h_n), BOTH(STORE*, d_h_0), long long relu,
    SCAN_PARAMETERS) {
    const Scan scan = SCAN;
    Cell cell = {{scan, OF(weights), OF(d_output), OF(d_h_n), OF(d_h_0), OF(exchange)},
                 OF(output), OF(d_gates), relu != 0};
    run(cell, scan);
}
