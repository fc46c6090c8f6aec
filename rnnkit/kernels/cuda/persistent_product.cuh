// The product of a persistent scan: what is multiplied, the weights, the sums; include persistent.cuh first.

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_m() { return threadIdx.x / 32 % WARPS_M; }
__device__ __forceinline__ int warp_k() { return threadIdx.x / 32 / WARPS_M; }

// The K numbers of a sequence that are to be multiplied; zeros where they are not `there`, and `at` then
// points anywhere into an array.
struct Row {
    const Operand* at;
    bool there;
};

// Copies a chunk of each sequence's row to shared memory: a warp takes a row, a lane 16 bytes and every 32nd
// after them.
template <class RowOf>
__device__ __forceinline__ void copy_rows(
    unsigned char* buffer, int chunk, const Sequence* sequences, int K, RowOf row_of) {
    for (int n = threadIdx.x / 32; n < SEQUENCES; n += WARPS_M * WARPS_K) {
        const Row row = row_of(sequences[n]);
#pragma unroll 8
        for (int part = 0; part < (PIECES + 31) / 32; ++part) {
            const int piece = part * 32 + lane(), k = (chunk * PIECES + piece) * PIECE;
            if (piece >= PIECES) break;
            unsigned char* const to = buffer + n * PITCH + 16 * piece;
#if ALIGNED
            const bool there = row.there && k < K;
            copy_async(to, there ? row.at + k : row.at, there);
#else
            for (int i = 0; i < PIECE; ++i)
                reinterpret_cast<Operand*>(to)[i] = row.there && k + i < K ? row.at[k + i] : Operand();
#endif
        }
    }
    copy_commit();
}

// In a block that serves its group alone the cell puts its numbers where the product of the next step finds
// them.
__device__ __forceinline__ void put_operand(unsigned char* buffer, int n, int k, Operand x) {
    reinterpret_cast<Operand*>(buffer + n * PITCH)[k] = x;
}

// ------------------------------------------------------------------------------------------- the product

using Four = Pack<unsigned, 4>;

__device__ __forceinline__ Four piece_at(const void* p) { return *reinterpret_cast<const Four*>(p); }

__device__ __forceinline__ unsigned weight_bits(unsigned bits) {
    return PRODUCT == ROUNDED_TO_TF32 ? tf32(float_of_bits(bits)) : bits;
}

// A thread's part of W: for a window, of each tile the pieces of two rows, as fragments of two mma.
using Fragments = unsigned[TILES_M][2][4];

__device__ __forceinline__ void put_piece(const Four& piece, int m, int half, Fragments& fragments) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[m][i / 2][i % 2 * 2 + half] = weight_bits(piece.x[i]);
}

// Where a piece of W lies; null where there is none.
template <class Cell>
__device__ __forceinline__ const Operand* find_piece(const Cell& cell, int chunk, int w, int m, int half) {
    const int window = (chunk * WARPS_K + warp_k()) * WINDOWS + w, k = window * WINDOW + lane() % 4 * PIECE;
    const Operand* const row = cell.weight_row((warp_m() * TILES_M + m) * 16 + half * 8 + lane() / 4);
    return row != nullptr && k < cell.K() ? row + k : nullptr;
}

template <class Cell>
__device__ __forceinline__ void load_fragments(const Cell& cell, int chunk, int w, Fragments& fragments) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Operand* const at = find_piece(cell, chunk, w, m, half);
            put_piece(at == nullptr ? Four() : piece_at(at), m, half, fragments);
        }
}

// Of each chunk the first windows are in registers. What does not fit there lies in shared memory, where
// nobody else reads it: 16 bytes of a thread beside those of the next one. What does not fit there either
// comes anew at each step, most of it from the second-level cache, through a ring of RING slots. Which
// windows are next is always known, at the end of a step those that the next one begins with, so that some
// arrive while blocks wait for each other. A thread copies and reads its own pieces alone: there is nothing
// to wait for but the copies.
constexpr int IN_REGISTERS = WINDOWS - IN_SHARED - STREAMED;
struct Weights {
    Fragments in_registers[CHUNKS][IN_REGISTERS];
    Four *shared, *ring;
    int slot;

    template <class Cell>
    __device__ __forceinline__ void load(const Cell& cell) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int w = 0; w < IN_REGISTERS; ++w) load_fragments(cell, chunk, w, in_registers[chunk][w]);
#pragma unroll 1
            for (int w = 0; w < IN_SHARED; ++w) {
                Fragments fragments;
                load_fragments(cell, chunk, IN_REGISTERS + w, fragments);
#pragma unroll
                for (int mma = 0; mma < 2 * TILES_M; ++mma) {
                    const unsigned(&x)[4] = fragments[mma / 2][mma % 2];
                    *place(chunk, w, mma) = {x[0], x[1], x[2], x[3]};
                }
            }
        }
    }
    // Those of a window in shared memory.
    __device__ __forceinline__ void get(int chunk, int w, Fragments& fragments) const {
#pragma unroll
        for (int mma = 0; mma < 2 * TILES_M; ++mma) {
            const Four four = *place(chunk, w, mma);
#pragma unroll
            for (int i = 0; i < 4; ++i) fragments[mma / 2][mma % 2][i] = four.x[i];
        }
    }
    __device__ __forceinline__ Four* place(int chunk, int w, int mma) const {
        return shared + (chunk * IN_SHARED + w) * SLOT + mma * THREADS + threadIdx.x;
    }

#if STREAMED
    // Asks for the next windows, as many as there are slots, before the first step.
    template <class Cell>
    __device__ __forceinline__ void start(const Cell& cell) {
#pragma unroll 1
        for (slot = 0; slot < RING; ++slot) ask(cell, slot);
        slot = 0;
    }
    // Those of the streamed window `index` of a step, counted over all chunks, go to the current slot.
    template <class Cell>
    __device__ __forceinline__ void ask(const Cell& cell, int index) const {
        const int chunk = index / STREAMED, w = IN_REGISTERS + IN_SHARED + index % STREAMED;
#pragma unroll
        for (int mma = 0; mma < 2 * TILES_M; ++mma) {
            const Operand* const at = find_piece(cell, chunk, w, mma / 2, mma % 2);
            copy_async(in_slot(mma), at == nullptr ? cell.weights : at, at != nullptr);
        }
        copy_commit();
    }
    // Waits for what was asked for first. Later groups may be on their way, and so may an operand's.
    __device__ __forceinline__ void get_streamed(Fragments& fragments) const {
        copy_wait<RING - 1>();
#pragma unroll
        for (int mma = 0; mma < 2 * TILES_M; ++mma) put_piece(*in_slot(mma), mma / 2, mma % 2, fragments);
    }
    // The slot was read, and takes what comes RING windows later.
    template <class Cell>
    __device__ __forceinline__ void go_on(const Cell& cell, int index) {
        index += RING;
        ask(cell, index < CHUNKS * STREAMED ? index : index - CHUNKS * STREAMED);
        slot = slot + 1 < RING ? slot + 1 : 0;
    }
    __device__ __forceinline__ Four* in_slot(int mma) const {
        return ring + slot * SLOT + mma * THREADS + threadIdx.x;
    }
#endif
};

#if PRODUCT == 0
__device__ __forceinline__ unsigned operand_bits(unsigned bits) { return bits; }
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_16x8x16(d, a, b, STORE());
}
#elif PRODUCT == 1
__device__ __forceinline__ unsigned operand_bits(unsigned bits) { return tf32(float_of_bits(bits)); }
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_16x8x8(d, a, b);
}
#endif

#if PRODUCT != 2

// What a thread has of W operand^T, as mma lays it out: rows lane / 4 and 8 below, two neighbouring
// sequences.
struct Sums {
    float x[TILES_M][N_TILES][4];

    __device__ __forceinline__ const unsigned char* first(const unsigned char* operand) const {
        return operand + lane() / 4 * PITCH + warp_k() * WINDOWS * 64 + lane() % 4 * 16;
    }
    __device__ __forceinline__ void add(const Fragments& a, const unsigned char* window) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const Four piece = piece_at(window + n * 8 * PITCH);
            unsigned b[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = operand_bits(piece.x[i]);
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i) multiply(x[m][n], a[m][i], b[i]);
        }
    }
    __device__ __forceinline__ void tile(int m, int n, float (&sums)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = x[m][n][i];
    }
};

#else

// The same without tensor cores: each of the four lanes that share rows has its own part of K, for all
// sequences.
struct Sums {
    float x[TILES_M][N_TILES][2][8];  // two rows, eight sequences

    __device__ __forceinline__ const unsigned char* first(const unsigned char* operand) const {
        return operand + warp_k() * WINDOWS * 64 + lane() % 4 * 16;
    }
    __device__ __forceinline__ void add(const Fragments& a, const unsigned char* window) {
#pragma unroll
        for (int n = 0; n < SEQUENCES; ++n) {
            const Four piece = piece_at(window + n * PITCH);
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int part = 0; part < 8; ++part)
                    x[m][n / 8][part % 2][n % 8] +=
                        float_of_bits(a[m][part / 4][part % 4]) * float_of_bits(piece.x[part / 2]);
        }
    }
    // The four lanes add up what they have, and each keeps the two sequences that mma would give it.
    __device__ __forceinline__ void tile(int m, int n, float (&sums)[4]) const {
        const bool upper = lane() & 2, odd = lane() & 1;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = x[m][n][row][i], high = x[m][n][row][4 + i];
                four[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float low = four[i], high = four[2 + i];
                sums[2 * row + i] = (odd ? high : low) + __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
            }
        }
    }
};

#endif

template <class Cell>
__device__ __forceinline__ void add_product(
    const Cell& cell, Weights& weights, int chunk, const unsigned char* operand, Sums& sums) {
    const unsigned char* const first = sums.first(operand);
#pragma unroll
    for (int w = 0; w < IN_REGISTERS; ++w) sums.add(weights.in_registers[chunk][w], first + w * 64);
#pragma unroll 1
    for (int w = 0; w < IN_SHARED; ++w) {
        Fragments fragments;
        weights.get(chunk, w, fragments);
        sums.add(fragments, first + (IN_REGISTERS + w) * 64);
    }
#if STREAMED
#pragma unroll 1
    for (int w = 0; w < STREAMED; ++w) {
        Fragments fragments;
        weights.get_streamed(fragments);
        sums.add(fragments, first + (IN_REGISTERS + IN_SHARED + w) * 64);
        weights.go_on(cell, chunk * STREAMED + w);
    }
#endif
}

// Each warp leaves its sums in shared memory, (WARPS_K, SEQUENCES, SUMS_PITCH).
__device__ __forceinline__ void store_sums(const Sums& sums, float* shared) {
    float* const first =
        shared + (warp_k() * SEQUENCES + lane() % 4 * 2) * SUMS_PITCH + warp_m() * TILES_M * 16 + lane() / 4;
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            float four[4];
            sums.tile(m, n, four);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                first[(n * 8 + i % 2) * SUMS_PITCH + m * 16 + i / 2 * 8] = four[i];
        }
}

// What a cell gets of the product: row `row` of W times the operand of an item's sequence.
struct Totals {
    const float* sums;

    __device__ __forceinline__ REAL operator()(int row) const {
        REAL total = 0;
#pragma unroll
        for (int k = 0; k < WARPS_K; ++k) total += sums[k * SEQUENCES * SUMS_PITCH + row];
        return total;
    }
};
