// A simple RNN's scan in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the
// rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"
#include "persistent_product.cuh"
#include "persistent_run.cuh"
#include "persistent_there.cuh"

struct Cell : There<1> {
    const REAL* gates;
    bool relu;
    REAL a[ITEMS][1];

    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        load_gates(scan, gates, item, t, a[e]);
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        if (!item.has(step.t)) return;
        const REAL z = a[e][0] + totals(item.unit);
        tell(e, item, step.t, relu ? (z < 0 ? REAL(0) : z) : tanh(z));
    }
    __device__ __forceinline__ void save(int, const Item&, int) {}
};

// gates (T, B, H) holds the input's share. Fills output (T, B, H) and h_n (B, H). flags is zero at first; it
// has one number more than there are blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1) rnn_forward_persistent(
    BOTH(const STORE*, weights), BOTH(const REAL*, gates), BOTH(const STORE*, h_0), BOTH(STORE*, output),
    BOTH(STORE*, h_n), long long relu, SCAN_PARAMETERS) {
    const Scan scan = SCAN;
    Cell cell = {{scan, OF(weights), OF(h_0), OF(output), OF(h_n)}, OF(gates), relu != 0};
    run(cell, scan);
}
