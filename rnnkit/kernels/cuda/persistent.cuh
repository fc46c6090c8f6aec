// A scan whose whole time loop is one launch: what the persistent_*.cu files share. Include common.cuh, sync.cuh
// and tensor.cuh first. Nothing of this has run on a device.
//
// A group of SEQUENCES sequences is served by the blocks of a row of the grid, which wait for each other at every
// step, or by one block alone; groups know nothing of each other. A block owns UNITS hidden units. At each step
//   1. its threads fetch what does not depend on the others: the gates of this step;
//   2. it waits until all blocks of the group have told that their last step is done, and copies what they
//      exchanged (forward h, backward the gradients of the gates: `operand`) to shared memory;
//   3. its warps multiply that by the block's rows of weights, which stay in registers for the whole sequence;
//   4. each pair of unit and sequence, an item, adds up what the warps have, and does the cell's arithmetic, in
//      float32; its state (h, c, gradients) stays in the registers of one thread;
//   5. the block tells that its step is done, and only then stores what nobody waits for.
// What is multiplied is W (ROWS, K) times operand^T (K, SEQUENCES): the gates take the longer side of the tensor
// cores' tiles, so that a group may have as few as 8 sequences.
//
// A cell (persistent_lstm_forward.cu and others) is a struct with the state of its items and these members:
//   BACKWARD                              whether the scan is a way back, in the other order of time
//   begin(e, item), end(e, item)          load and store the state of item e
//   fetch(e, item, t), save(e, item, t)   as above; for a live step only
//   advance(e, item, step, totals)        the arithmetic; also where the step is not live
//   pad(item, t)                          what is stored for a step that a sequence does not have
//   initial(sequence), operand(sequence, step)   the row to be multiplied: before all steps, at a step
//   weight(row, k)                        the element of the block's W
//
// A variant is given by these macros, which _plan.py chooses, beside those of common.cuh:
//   PRODUCT   0: halves on tensor cores; 1: TF32 on tensor cores; 2: float32
//   UNITS     hidden units of a block
//   N_TILES   sequences of a group, in tiles of 8
//   WARPS_M, TILES_M          warps along the rows of W, and tiles of 16 rows for each of them
//   WARPS_K, WINDOWS, CHUNKS  warps along K; each has WINDOWS times 64 bytes of a row in each of CHUNKS chunks,
//             which are copied one after the other, so that shared memory need not hold the whole operand
//   GRID      1: there may be several blocks to a group, all of which must be resident; 0: one block, which
//             keeps the operand in shared memory
//   ALIGNED   1: rows of the operand begin on multiples of 16 bytes

constexpr int THREADS = 32 * WARPS_M * WARPS_K;
constexpr int ROWS = 16 * TILES_M * WARPS_M;
constexpr int SEQUENCES = 8 * N_TILES;
constexpr int ITEMS = (UNITS * SEQUENCES + THREADS - 1) / THREADS;  // of a thread, at most

enum { HALVES, ROUNDED_TO_TF32, FLOATS };
template <int>
struct OperandOf {
    using Type = float;
};
template <>
struct OperandOf<HALVES> {
    using Type = STORE;
};
using Operand = OperandOf<PRODUCT>::Type;

// K is cut into windows of 64 bytes. In a window, the four lanes that share rows of a tile take 16 bytes each, a
// piece: one load for two mma. So K is not in the order that PTX's fragments suggest, but in the same order on
// both sides, and nothing else matters.
constexpr int PIECE = 16 / sizeof(Operand);
constexpr int WINDOW = 4 * PIECE;
constexpr int PIECES = 4 * WARPS_K * WINDOWS;  // of a row, in a chunk
// An odd number of windows: 8 lanes that load pieces of two neighbouring sequences then find 32 different banks.
constexpr int PITCH = 64 * (WARPS_K * WINDOWS | 1);
constexpr int BUFFER = SEQUENCES * PITCH;
constexpr int BUFFERS = CHUNKS > 1 ? 2 : 1;
// Likewise: the lanes of a warp store sums of 8 rows and 4 pairs of sequences to 32 different banks.
constexpr int SUMS_PITCH = ROWS + 4;

static_assert(GRID || CHUNKS == 1, "a block alone keeps the whole operand");

// A block looks so many times before it gives up: some seconds, where a step takes microseconds. It looks whether
// another one gave up once in PATIENCE times.
#ifndef MOST_SPINS
#define MOST_SPINS (1u << 23)
#endif
constexpr unsigned PATIENCE = MOST_SPINS / 64;
// Every block sorts the lengths for itself, by comparing each with all: a few microseconds for so many.
constexpr int MOST_SORTED = 2048;

// ----------------------------------------------------------------------------------------- who does what

// What a launch is about, beside the cell's own arrays.
struct Scan {
    const long long* lengths;  // (B), or null
    unsigned* flags;           // whether a block gave up; then for each block, how many steps it has done
    unsigned* error;           // in the host's memory
    int T, B, H;               // a step, (B, G*H), has fewer than 2^31 elements; a sequence of them may have more
    bool reverse;

    __device__ int blocks() const { return (H + UNITS - 1) / UNITS; }  // of a group
    __device__ int block() const { return blockIdx.y; }
    __device__ int group() const { return GRID ? block() / blocks() : block(); }
    __device__ int first_unit() const { return GRID ? block() % blocks() * UNITS : 0; }
    // Where step t begins in an array (T, B, columns).
    __device__ long long step(int t, int columns) const { return (long long)t * B * columns; }
};

struct Sequence {
    int b, length;  // b is -1 where the group has fewer sequences
    __device__ bool has(int t) const { return t >= 0 && t < length; }
};

struct Item {
    Sequence sequence;
    int unit, n;  // of the block, of the group
    int j, at;    // of all units, of an array (B, H)
    bool exists;
    __device__ bool has(int t) const { return exists && sequence.has(t); }
    // Where its gate 0 is in (B, gates * H).
    __device__ int gates_at(int gates, int H) const { return at + sequence.b * (gates - 1) * H; }
};

struct Step {
    int count;      // of the group
    int t, before;  // this time step, and the one before in the order of the scan
};

// Makes the compiler forget what it knows of x: what follows from x is then computed where it is needed, and
// does not occupy registers all the time, which are full of weights.
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)); }

__device__ __forceinline__ Item item_of(int e, const Scan& scan, const Sequence* sequences) {
    int index = e * THREADS + int(threadIdx.x);
    forget(index);
    Item item;
    item.unit = index % UNITS;
    item.n = index / UNITS;
    item.j = scan.first_unit() + item.unit;
    item.exists = item.n < SEQUENCES && item.j < scan.H;
    item.sequence = sequences[item.n < SEQUENCES ? item.n : 0];
    item.exists &= item.sequence.b >= 0;
    item.at = item.sequence.b * scan.H + item.j;
    return item;
}

__device__ __forceinline__ int length_of(const Scan& scan, int b) {
    if (scan.lengths == nullptr) return scan.T;
    const long long length = scan.lengths[b];  // on a device nobody has checked it
    return int(length < 0 ? 0 : length > scan.T ? scan.T : length);
}

// Puts the sequences of this block's group in shared memory: the longest of all go to the first group and so on,
// so that a group has little to do for sequences that are over.
__device__ __forceinline__ void choose_sequences(const Scan& scan, Sequence* sequences) {
    const int first = scan.group() * SEQUENCES;
    const bool sorted = scan.lengths != nullptr && scan.B <= MOST_SORTED;
    for (int n = threadIdx.x; n < SEQUENCES; n += THREADS) {
        if (first + n >= scan.B) sequences[n] = {-1, 0};
        else if (!sorted) sequences[n] = {first + n, length_of(scan, first + n)};
    }
    if (!sorted) return;
    for (int b = threadIdx.x; b < scan.B; b += THREADS) {
        const int length = length_of(scan, b);
        int place = -first;
        for (int other = 0; other < scan.B; ++other) {
            const int its = length_of(scan, other);
            place += its > length || (its == length && other < b);
        }
        if (place >= 0 && place < SEQUENCES) sequences[place] = {b, length};
    }
}

// ------------------------------------------------------------------------------------- blocks of a group

// Waits until all blocks of the group have done `count` steps. False, for all threads, where one does not come in
// time or another block gave up waiting: then the host will learn it from the error flag.
__device__ __forceinline__ bool all_have_done(const Scan& scan, unsigned count) {
    const unsigned* const flags = scan.flags + 1 + scan.group() * scan.blocks();
    bool failed = false;
    for (int k = threadIdx.x; k < scan.blocks() && !failed; k += THREADS) {
        for (unsigned spins = 1; load_acquire(flags + k) < count && !failed; ++spins) {
            if (spins == MOST_SPINS) {
                store_system(scan.error, 1);
                store_release(scan.flags, 1);
            }
            if (spins % PATIENCE == 0) failed = load_acquire(scan.flags) != 0;
            pause();
        }
    }
    return !__syncthreads_or(failed);
}

// Tells the group that this block has done `count` steps: all its threads, whose stores come before.
__device__ __forceinline__ void tell_done(const Scan& scan, unsigned count) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(scan.flags + 1 + scan.block(), count);
}

// ------------------------------------------------------------------------------------------- the operand

// The K numbers of a sequence that are to be multiplied; zeros where they are not `there`, and `at` then points
// anywhere into an array.
struct Row {
    const Operand* at;
    bool there;
};

// Copies a chunk of each sequence's row to shared memory.
template <class RowOf>
__device__ __forceinline__ void copy_rows(
    unsigned char* buffer, int chunk, const Sequence* sequences, int K, RowOf row_of) {
    for (int p = threadIdx.x; p < SEQUENCES * PIECES; p += THREADS) {
        const int n = p / PIECES, piece = p % PIECES;
        const Row row = row_of(sequences[n]);
        const int k = (chunk * PIECES + piece) * PIECE;
        unsigned char* const to = buffer + n * PITCH + 16 * piece;
#if ALIGNED
        const bool there = row.there && k < K;
        copy_async(to, there ? row.at + k : row.at, there);
#else
        for (int i = 0; i < PIECE; ++i)
            reinterpret_cast<Operand*>(to)[i] = row.there && k + i < K ? row.at[k + i] : Operand();
#endif
    }
    copy_commit();
}

// In a block that serves its group alone the cell puts its numbers where the product of the next step finds them.
__device__ __forceinline__ void put_operand(unsigned char* buffer, int n, int k, Operand x) {
    reinterpret_cast<Operand*>(buffer + n * PITCH)[k] = x;
}

// ------------------------------------------------------------------------------------------- the product

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_m() { return threadIdx.x / 32 % WARPS_M; }
__device__ __forceinline__ int warp_k() { return threadIdx.x / 32 / WARPS_M; }

// A thread's part of W: for a window, the pieces of two rows, as fragments of two mma.
using WeightsOfChunk = unsigned[WINDOWS][TILES_M][2][4];
struct Weights {
    WeightsOfChunk a[CHUNKS];
};

__device__ __forceinline__ unsigned bits_of(float16 x) { return x.bits; }
__device__ __forceinline__ unsigned bits_of(bfloat16 x) { return x.bits; }
__device__ __forceinline__ unsigned bits_of(float x) {
    return PRODUCT == ROUNDED_TO_TF32 ? tf32(x) : bits_of_float(x);
}

template <class Cell>
__device__ __forceinline__ void load_weights(const Cell& cell, Weights& weights) {
    constexpr int A_WORD = PIECE / 4;  // elements
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int w = 0; w < WINDOWS; ++w)
#pragma unroll
            for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                for (int part = 0; part < 8; ++part) {
                    const int row = (warp_m() * TILES_M + m) * 16 + lane() / 4 + part % 2 * 8;
                    const int window = (chunk * WARPS_K + warp_k()) * WINDOWS + w;
                    const int k = window * WINDOW + lane() % 4 * PIECE + part / 2 * A_WORD;
                    unsigned bits = bits_of(cell.weight(row, k));
                    if (A_WORD == 2) bits |= bits_of(cell.weight(row, k + 1)) << 16;
                    weights.a[chunk][w][m][part / 4][part % 4] = bits;
                }
}

using Four = Pack<unsigned, 4>;

__device__ __forceinline__ Four piece_at(const unsigned char* p) { return *reinterpret_cast<const Four*>(p); }

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

// What a thread has of W operand^T, as mma lays it out: rows lane / 4 and 8 below, two neighbouring sequences.
struct Sums {
    float x[TILES_M][N_TILES][4];

    __device__ __forceinline__ void add(const WeightsOfChunk& a, const unsigned char* operand) {
        const unsigned char* const first =
            operand + lane() / 4 * PITCH + warp_k() * WINDOWS * 64 + lane() % 4 * 16;
#pragma unroll
        for (int w = 0; w < WINDOWS; ++w)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
                const Four piece = piece_at(first + n * 8 * PITCH + w * 64);
                unsigned b[2][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = operand_bits(piece.x[i]);
#pragma unroll
                for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                    for (int i = 0; i < 2; ++i) multiply(x[m][n], a[w][m][i], b[i]);
            }
    }

    __device__ __forceinline__ void tile(int m, int n, float (&sums)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = x[m][n][i];
    }
};

#else

// The same without tensor cores: each of the four lanes that share rows has its own part of K, for all sequences.
struct Sums {
    float x[TILES_M][N_TILES][2][8];  // two rows, eight sequences

    __device__ __forceinline__ void add(const WeightsOfChunk& a, const unsigned char* operand) {
        const unsigned char* const first = operand + warp_k() * WINDOWS * 64 + lane() % 4 * 16;
#pragma unroll
        for (int w = 0; w < WINDOWS; ++w)
#pragma unroll
            for (int n = 0; n < SEQUENCES; ++n) {
                const Four piece = piece_at(first + n * PITCH + w * 64);
#pragma unroll
                for (int m = 0; m < TILES_M; ++m)
#pragma unroll
                    for (int part = 0; part < 8; ++part)
                        x[m][n / 8][part % 2][n % 8] +=
                            float_of_bits(a[w][m][part / 4][part % 4]) * float_of_bits(piece.x[part / 2]);
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

// --------------------------------------------------------------------------------------------- the scan

template <class Cell>
__device__ __forceinline__ void copy_and_multiply(
    const Cell& cell, const Step& step, unsigned char* buffers, const Sequence* sequences, const Weights& weights,
    Sums& sums) {
    const auto row_of = [&](const Sequence& sequence) { return cell.operand(sequence, step); };
    copy_rows(buffers, 0, sequences, cell.K(), row_of);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (chunk + 1 < CHUNKS) {
            copy_rows(buffers + (chunk + 1) % 2 * BUFFER, chunk + 1, sequences, cell.K(), row_of);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        sums.add(weights.a[chunk], buffers + chunk % BUFFERS * BUFFER);
        if (chunk + 2 < CHUNKS) __syncthreads();  // all have read the buffer that the next copy goes to
    }
}

template <class Cell>
__device__ __forceinline__ void run(Cell& cell, const Scan& scan) {
    SHARED(unsigned char, buffers);
    float* const shared_sums = reinterpret_cast<float*>(buffers + BUFFERS * BUFFER);
    Sequence* const sequences = reinterpret_cast<Sequence*>(shared_sums + WARPS_K * SEQUENCES * SUMS_PITCH);
    choose_sequences(scan, sequences);
    __syncthreads();
    int steps = 0;  // of the longest
    for (int n = 0; n < SEQUENCES; ++n) steps = sequences[n].length > steps ? sequences[n].length : steps;

    cell.buffer = buffers;
    if (!GRID) {
        copy_rows(buffers, 0, sequences, cell.K(), [&](const Sequence& sequence) { return cell.initial(sequence); });
        copy_wait<0>();
        __syncthreads();
    }
    Weights weights;
    load_weights(cell, weights);
#pragma unroll
    for (int e = 0; e < ITEMS; ++e) {
        const Item item = item_of(e, scan, sequences);
        if (item.exists) cell.begin(e, item);
    }
    // A way back ends with the product of the last gradients, which goes to the initial state.
    const int iterations = steps && Cell::BACKWARD ? steps + 1 : steps;
    const bool falling = scan.reverse != Cell::BACKWARD;
    for (int count = 0; count < iterations; ++count) {
        const int t = falling ? steps - 1 - count : count;
        const Step step = {count, t, falling ? t + 1 : t - 1};
#pragma unroll
        for (int e = 0; e < ITEMS; ++e) {
            const Item item = item_of(e, scan, sequences);
            if (item.has(t)) cell.fetch(e, item, t);
        }
        Sums sums = {};
        if (GRID) {
            if (count > 0 && !all_have_done(scan, count)) return;
            copy_and_multiply(cell, step, buffers, sequences, weights, sums);
        } else {
            sums.add(weights.a[0], buffers);
        }
        store_sums(sums, shared_sums);
        __syncthreads();
#pragma unroll
        for (int e = 0; e < ITEMS; ++e) {
            const Item item = item_of(e, scan, sequences);
            if (item.exists) cell.advance(e, item, step, Totals{shared_sums + item.n * SUMS_PITCH});
        }
        if (GRID) tell_done(scan, count + 1);
        else __syncthreads();
#pragma unroll
        for (int e = 0; e < ITEMS; ++e) {
            const Item item = item_of(e, scan, sequences);
            if (item.has(t)) cell.save(e, item, t);
            else if (item.exists && t >= 0 && t < steps) cell.pad(item, t);
        }
    }
#pragma unroll
    for (int e = 0; e < ITEMS; ++e) {
        const Item item = item_of(e, scan, sequences);
        if (!item.exists) continue;
        cell.end(e, item);
        for (int t = steps; t < scan.T; ++t) cell.pad(item, t);
    }
}
