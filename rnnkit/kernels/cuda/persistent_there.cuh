// What the cells share on the way there of a persistent scan; include persistent_run.cuh first.

// The way there of a cell with so many gates.
template <int GATES>
struct There {
    static constexpr bool BACKWARD = false;
    const Scan& scan;
    const STORE *weights, *h_0;  // weights (GATES*H, pitch)
    STORE *output, *h_n;
    unsigned char* buffer;
    STORE h[ITEMS];

    __device__ __forceinline__ int K() const { return scan.H; }
    // Gate after gate, of each the block's units.
    __device__ __forceinline__ const STORE* weight_row(int row) const {
        const int gate = row / UNITS, j = scan.first_unit() + row % UNITS;
        return gate < GATES && j < scan.H ? weights + ((long long)gate * scan.H + j) * scan.pitch : nullptr;
    }
    __device__ __forceinline__ Row initial(const Sequence& sequence) const {
        return {h_0 + (sequence.b < 0 ? 0 : sequence.b * scan.H), sequence.b >= 0};
    }
    // The h before is found in the output; for a sequence's first step in h_0.
    __device__ __forceinline__ Row operand(const Sequence& sequence, const Step& step) const {
        if (!sequence.has(step.t)) return {h_0, false};
        if (!sequence.has(step.before)) return initial(sequence);
        return {output + scan.step(step.before, scan.H) + sequence.b * scan.H, true};
    }
    __device__ __forceinline__ void begin(int e, const Item& item) { h[e] = h_0[item.at]; }
    __device__ __forceinline__ void tell(int e, const Item& item, int t, REAL new_h) {
        round_to(new_h, h[e]);
        output[scan.step(t, scan.H) + item.at] = h[e];
        if (!GRID) put_operand(buffer, item.n, item.j, h[e]);
    }
    __device__ __forceinline__ void pad(const Item& item, int t) {
        output[scan.step(t, scan.H) + item.at] = STORE();
    }
    __device__ __forceinline__ void end(int e, const Item& item) { h_n[item.at] = h[e]; }
};
