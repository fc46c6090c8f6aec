// An LSTM's way back in one launch. Shapes in the letters of rnnkit._typing; persistent.cuh explains the rest.

#include "common.cuh"
#include "sync.cuh"
#include "tensor.cuh"
#include "persistent.cuh"

struct Backward {
    static constexpr bool BACKWARD = true;
    const Scan& scan;
    REAL* gates;
    const REAL* c_prev;
    const STORE *weight_hh, *d_output, *d_h_n;
    const REAL* d_c_n;
    STORE* d_h_0;
    REAL* d_c_0;
    Operand* exchange;
    unsigned char* buffer;
    REAL d_h[ITEMS], d_c[ITEMS], a[ITEMS][4], c[ITEMS], d_y[ITEMS];

    __device__ __forceinline__ int K() const { return 4 * scan.H; }
    // The columns of weight_hh of the block's units.
    __device__ __forceinline__ Operand weight(int row, int k) const {
        const int j = scan.first_unit() + row;
        Operand x = Operand();
        if (row < UNITS && j < scan.H && k < K()) round_to(real(weight_hh[(long long)k * scan.H + j]), x);
        return x;
    }
    // Two slots are enough: who writes into one again has seen that all have read it and written the other.
    __device__ __forceinline__ Operand* slot(int count) const {
        return exchange + scan.step(count % 2, K());
    }
    __device__ __forceinline__ Row initial(const Sequence& sequence) const {
        return {reinterpret_cast<const Operand*>(gates), false};
    }
    __device__ __forceinline__ Row operand(const Sequence& sequence, const Step& step) const {
        if (!sequence.has(step.before)) return {exchange, false};
        return {slot(step.count + 1) + sequence.b * K(), true};
    }

    __device__ __forceinline__ void begin(int e, const Item& item) {
        d_h[e] = real(d_h_n[item.at]);
        d_c[e] = d_c_n[item.at];
    }
    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        const REAL* const from = gates + scan.step(t, 4 * scan.H) + item.gates_at(4, scan.H);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) a[e][gate] = from[gate * scan.H];
        c[e] = c_prev[scan.step(t, scan.H) + item.at];
        d_y[e] = real(d_output[scan.step(t, scan.H) + item.at]);
    }
    __device__ __forceinline__ void advance(int e, const Item& item, const Step& step, const Totals& totals) {
        // A sequence's first step on the way back has the gradient of its final state, which waited until now.
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
        for (int gate = 0; gate < 4; ++gate) {
            Operand x;
            round_to(a[e][gate], x);
            if (GRID) slot(step.count)[item.gates_at(4, scan.H) + gate * scan.H] = x;
            else put_operand(buffer, item.n, gate * scan.H + item.j, x);
        }
    }
    __device__ __forceinline__ void save(int e, const Item& item, int t) {
        REAL* const to = gates + scan.step(t, 4 * scan.H) + item.gates_at(4, scan.H);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) to[gate * scan.H] = a[e][gate];
    }
    __device__ __forceinline__ void pad(const Item& item, int t) {
        REAL* const to = gates + scan.step(t, 4 * scan.H) + item.gates_at(4, scan.H);
        for (int gate = 0; gate < 4; ++gate) to[gate * scan.H] = 0;
    }
    __device__ __forceinline__ void end(int e, const Item& item) {
        round_to(d_h[e], d_h_0[item.at]);
        d_c_0[item.at] = d_c[e];
    }
};

// Turns the activated gates (T, B, 4H) into their gradients and fills d_h_0 and d_c_0 (B, H). exchange (2, B, 4H)
// is for what the blocks of a group tell each other, in what is multiplied; null for GRID = 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm_backward_persistent(
    REAL* gates, const REAL* c_prev, const STORE* weight_hh, const STORE* d_output, const STORE* d_h_n,
    const REAL* d_c_n, STORE* d_h_0, REAL* d_c_0, Operand* exchange, const long long* lengths, unsigned* flags,
    long long error, long long T, long long B, long long H, long long reverse) {
    const Scan scan = {lengths, flags, reinterpret_cast<unsigned*>(error), int(T), int(B), int(H), reverse != 0};
    Backward cell = {scan, gates, c_prev, weight_hh, d_output, d_h_n, d_c_n, d_h_0, d_c_0, exchange};
    run(cell, scan);
}
