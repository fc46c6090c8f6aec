// A scan whose whole time loop is one launch: what the persistent_*.cu files share. Include common.cuh,
// sync.cuh, which says how blocks wait, and tensor.cuh first. Here are the plan and who does what;
// persistent_product.cuh multiplies, persistent_run.cuh has the loop. Nothing of this has run on a device.
//
// A group of SEQUENCES sequences is served by some blocks of the grid, which wait for each other at every
// step, or by one block alone; groups know nothing of each other. A block owns UNITS hidden units. At each
// step
//   1. its threads fetch what does not depend on the others: the gates of this step;
//   2. it waits until all blocks of the group have told that their last step is done, and copies what they
//      exchanged (forward h, backward the gradients of the gates: `operand`) to shared memory;
//   3. its warps multiply that by the block's rows of weights, which stay where they are for all steps;
//   4. for each pair of unit and sequence, an item, a thread adds up what the warps have, and does the cell's
//      arithmetic, in float32; the item's state (h, c, gradients) stays in its registers;
//   5. the block tells that its step is done, and only then stores what nobody waits for.
// Why so: the weights are read once, for the registers of a multiprocessor (256 KB, which 8 warps can use up)
// hold a block's share; where they do not, shared memory takes more of it, and what is left is read again at
// each step, ahead of its use. A step then moves little but what blocks exchange. What is multiplied is W
// (ROWS, K) times operand^T (K, SEQUENCES): the gates take the longer side of the tensor cores' tiles, so
// that a group may have as few as 8 sequences, and many groups few blocks each to wait for. What must come
// from memory is asked for before the wait, and what goes there for the way back leaves after it. Groups that
// cannot all be there at the same time go by several launches, however many the steps.
//
// A cell (persistent_lstm_forward.cu and others) is a struct with the state of its items and these members,
// most of them from persistent_there.cuh or persistent_back.cuh:
//   BACKWARD                              whether the scan is a way back, in the other order of time
//   begin(e, item), end(e, item)          load and store the state of item e
//   fetch(e, item, t), save(e, item, t)   as above; for a live step only
//   advance(e, item, step, totals)        the arithmetic; also where the step is not live
//   pad(item, t)                          what is stored for a step that a sequence does not have
//   K(), weight_row(row)                  how many numbers are multiplied; where a row of the block's W is
//   weights                               where all of it begins
//   initial(sequence), operand(sequence, step)   the row to be multiplied: before all steps, at a step
//
// A variant is given by these macros, which _plan.py chooses, beside those of common.cuh:
//   PRODUCT   0: halves on tensor cores; 1: TF32 on tensor cores; 2: float32
//   UNITS     hidden units of a block
//   N_TILES   sequences of a group, in tiles of 8
//   WARPS_M, TILES_M          warps along the rows of W, and tiles of 16 rows for each of them
//   WARPS_K, WINDOWS, CHUNKS  warps along K; each has WINDOWS times 64 bytes of a row in each of CHUNKS
//             chunks, which are copied one after the other, so that shared memory need not hold all of it
//   IN_SHARED  of the WINDOWS, for how many the weights are kept in shared memory for want of registers
//   STREAMED, RING  for how many they are kept nowhere, and how many of those are on their way at a time
//   GRID      1: there may be several blocks to a group, all of which must be resident; 0: one block, which
//             keeps the operand in shared memory
//   DIRECTIONS  2: both of a layer at once, in turn block by block; time runs the other way in the second
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

// K is cut into windows of 64 bytes. In a window, the four lanes that share rows of a tile take 16 bytes
// each, a piece: one load for two mma. So K is not in the order that PTX's fragments suggest, but in the same
// order on both sides, and nothing else matters.
constexpr int PIECE = 16 / sizeof(Operand);
constexpr int WINDOW = 4 * PIECE;
constexpr int PIECES = 4 * WARPS_K * WINDOWS;  // of a row, in a chunk
// An odd number of windows: 8 lanes that load pieces of two neighbouring sequences then find 32 different
// banks.
constexpr int PITCH = 64 * (WARPS_K * WINDOWS | 1);
constexpr int BUFFER = SEQUENCES * PITCH;
constexpr int BUFFERS = CHUNKS > 1 ? 2 : 1;
constexpr int SLOT = TILES_M * 2 * THREADS;                // a window of weights, by 16 bytes
constexpr int SHARED_WEIGHTS = CHUNKS * IN_SHARED * SLOT;  // by 16 bytes
// Likewise: the lanes of a warp store sums of 8 rows and 4 pairs of sequences to 32 different banks.
constexpr int SUMS_PITCH = ROWS + 4;

static_assert(IN_SHARED + STREAMED < WINDOWS, "some of the weights are in registers");
static_assert(RING <= CHUNKS * STREAMED && (RING > 0) == (STREAMED > 0), "no window comes twice in a step");
static_assert(GRID || CHUNKS == 1, "a block alone keeps the whole operand");

// Every block sorts the lengths for itself, by comparing each with all: a few microseconds for so many.
constexpr int MOST_SORTED = 2048;

// ----------------------------------------------------------------------------------------- who does what

// What a launch is about, beside the cell's own arrays.
struct Scan {
    const long long* lengths;  // (B), or null
    unsigned* flags;           // whether a block gave up; then for each block, how many steps it has done
    unsigned* error;           // in the host's memory
    int pitch;                 // of the rows of weights: a multiple of 16 bytes, filled up with zeros
    int first_group;           // of this launch, where one launch cannot hold them all
    int T, B, H;               // a step (B, G*H) has fewer than 2^31 elements, all of them may have more
    bool reverse;

    __device__ int blocks() const { return (H + UNITS - 1) / UNITS; }  // of a group
    __device__ int block() const { return blockIdx.y / DIRECTIONS; }   // of this launch and direction
    __device__ int group() const { return first_group + (GRID ? block() / blocks() : block()); }
    __device__ int first_unit() const { return GRID ? block() % blocks() * UNITS : 0; }
    // Where step t begins in an array (T, B, columns).
    __device__ long long step(int t, int columns) const { return (long long)t * B * columns; }
};

// The parameters that all kernels have after their own, and what becomes of them. Arrays that the directions
// of a layer do not share are given for each of them: BOTH declares them, and OF is this block's. Those of a
// second direction are null where there is none.
#define BOTH(type, name) type name, type name##_2
#define OF(name) (DIRECTIONS == 2 && blockIdx.y % 2 ? name##_2 : name)
#define SCAN_PARAMETERS                                                                                \
    const long long *lengths, unsigned *flags, long long error, long long T, long long B, long long H, \
        long long reverse, long long pitch, long long first_group
#define SCAN                                                                                               \
    {                                                                                                      \
        lengths, flags, reinterpret_cast<unsigned*>(error), int(pitch), int(first_group), int(T), int(B),  \
            int(H), (reverse != 0) != (DIRECTIONS == 2 && blockIdx.y % 2)                                  \
    }

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
    bool exists;    // or is it the product after the last one
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

// Puts the sequences of this block's group in shared memory: the longest of all go to the first group and so
// on, so that a group has little to do for sequences that are over.
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

// Waits until all blocks of the group have done `count` steps; false, for all threads, where one does not come.
__device__ __forceinline__ bool all_have_done(const Scan& scan, unsigned count) {
    const int first = scan.block() / scan.blocks() * scan.blocks() * DIRECTIONS + blockIdx.y % DIRECTIONS;
    return all_are_done(scan.flags, first, DIRECTIONS, scan.blocks(), count, scan.error);
}

// Tells the group that this block has done `count` steps.
__device__ __forceinline__ void tell_done(const Scan& scan, unsigned count) {
    tell_done(scan.flags, blockIdx.y, count);
}

// An item's gates at step t of gates (T, B, GATES*H).
template <int GATES>
__device__ __forceinline__ void load_gates(
    const Scan& scan, const REAL* gates, const Item& item, int t, REAL (&a)[GATES]) {
    const REAL* const from = gates + scan.step(t, GATES * scan.H) + item.gates_at(GATES, scan.H);
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) a[gate] = from[gate * scan.H];
}

template <int GATES>
__device__ __forceinline__ void store_gates(
    const Scan& scan, const REAL (&a)[GATES], const Item& item, int t, REAL* gates) {
    REAL* const to = gates + scan.step(t, GATES * scan.H) + item.gates_at(GATES, scan.H);
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) to[gate * scan.H] = a[gate];
}
