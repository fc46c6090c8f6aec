// An LSTM's scan in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"

struct Forward {
    static constexpr bool BACKWARD = false;
    const Scan& scan;
    REAL* gates;
    const STORE *weight_hh, *h_0;
    const REAL* c_0;
    STORE *output, *h_n;
    REAL *c_n, *c_prev;
    unsigned char* buffer;
    REAL c[ITEMS], a[ITEMS][4];
    STORE h[ITEMS];

    __device__ __forceinline__ int K() const { return scan.H; }
    // Gate after gate, each with the block's units.
    __device__ __forceinline__ Operand weight(int row, int k) const {
        const int gate = row / UNITS;
        const int j = scan.first_unit() + row % UNITS;
        return gate < 4 && j < scan.H && k < scan.H ? weight_hh[((long long)gate * scan.H + j) * scan.H + k] : STORE();
    }
    __device__ __forceinline__ Row initial(const Sequence& sequence) const {
        return {h_0 + (sequence.b < 0 ? 0 : sequence.b * scan.H), sequence.b >= 0};
    }
    __device__ __forceinline__ Row operand(const Sequence& sequence, const Step& step) const {
        if (!sequence.has(step.t)) return {h_0, false};
        if (!sequence.has(step.before)) return initial(sequence);
        return {output + scan.step(step.before, scan.H) + sequence.b * scan.H, true};
    }

    __device__ __forceinline__ void begin(int e, const Item& item) {
        h[e] = h_0[item.at];
        c[e] = c_0[item.at];
    }
    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        const REAL* const from = gates + scan.step(t, 4 * scan.H) + item.gates_at(4, scan.H);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) a[e][gate] = from[gate * scan.H];
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
        round_to(a[e][3] * tanh(c[e]), h[e]);
        output[scan.step(step.t, scan.H) + item.at] = h[e];
        if (!GRID) put_operand(buffer, item.n, item.j, h[e]);
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        if (c_prev == nullptr) return;
        REAL* const to = gates + scan.step(t, 4 * scan.H) + item.gates_at(4, scan.H);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) to[gate * scan.H] = a[e][gate];
    }
    __device__ __forceinline__ void pad(const Item& item, int t) {
        output[scan.step(t, scan.H) + item.at] = STORE();
    }
    __device__ __forceinline__ void end(int e, const Item& item) {
        h_n[item.at] = h[e];
        c_n[item.at] = c[e];
    }
};

// gates (T, B, 4H) holds the input's share. Fills output (T, B, H), h_n and c_n (B, H). For the way back the
// activated gates take the place of gates, and c_prev (T, B, H) gets the c before each step; c_prev is null where
// there is none. `flags` is zero at first; it has one number more than there are blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm_forward_persistent(
    REAL* gates, const STORE* weight_hh, const STORE* h_0, const REAL* c_0, STORE* output, STORE* h_n, REAL* c_n,
    REAL* c_prev, const long long* lengths, unsigned* flags, long long error, long long T, long long B,
    long long H, long long reverse) {
    const Scan scan = {lengths, flags, reinterpret_cast<unsigned*>(error), int(T), int(B), int(H), reverse != 0};
    Forward cell = {scan, gates, weight_hh, h_0, c_0, output, h_n, c_n, c_prev};
    run(cell, scan);
}
