// What the cells share on the way back of a persistent scan; include persistent_run.cuh first.

// The way back. `d_h` is what arrives at the h after the next step.
template <int GATES>
struct Back {
    static constexpr bool BACKWARD = true;
    const Scan& scan;
    const Operand* weights;  // (H, pitch), weight_hh transposed
    const STORE *d_output, *d_h_n;
    STORE* d_h_0;
    Operand* exchange;  // (2, B, GATES*H), null for GRID = 0
    unsigned char* buffer;
    REAL d_h[ITEMS], d_y[ITEMS];

    __device__ __forceinline__ int K() const { return GATES * scan.H; }
    __device__ __forceinline__ const Operand* weight_row(int row) const {
        const int j = scan.first_unit() + row;
        return row < UNITS && j < scan.H ? weights + (long long)j * scan.pitch : nullptr;
    }
    // Two slots are enough: who writes to one again has seen that all have written to the other, hence read
    // this.
    __device__ __forceinline__ Operand* slot(int count) const { return exchange + scan.step(count % 2, K()); }
    __device__ __forceinline__ Row initial(const Sequence&) const {
        return {weights, false};  // which begin on a multiple of 16 bytes, as a copy even of nothing must
    }
    __device__ __forceinline__ Row operand(const Sequence& sequence, const Step& step) const {
        if (!sequence.has(step.before)) return {exchange, false};
        return {slot(step.count + 1) + sequence.b * K(), true};
    }
    __device__ __forceinline__ void begin(int e, const Item& item) { d_h[e] = real(d_h_n[item.at]); }
    __device__ __forceinline__ void fetch(int e, const Item& item, int t) {
        d_y[e] = real(d_output[scan.step(t, scan.H) + item.at]);
    }
    __device__ __forceinline__ void tell(const Item& item, const Step& step, int gate, REAL d_gate) {
        Operand x;
        round_to(d_gate, x);
        if (GRID) slot(step.count)[item.gates_at(GATES, scan.H) + gate * scan.H] = x;
        else put_operand(buffer, item.n, gate * scan.H + item.j, x);
    }
    __device__ __forceinline__ void end(int e, const Item& item) { round_to(d_h[e], d_h_0[item.at]); }
};
