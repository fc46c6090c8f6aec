// The mean negative log-likelihood of targets, and its gradient. Shapes: M rows of V classes.

#include "common.cuh"
#include "reduce.cuh"

// The most negative number: what is -inf then still has a difference to it.
__device__ __forceinline__ REAL lowest() {
    return REAL(sizeof(REAL) == 8 ? -1.7976931348623157e308 : -3.4028234663852886e38);
}

// How many rows count, but at least 1, to n; one block.
extern "C" __global__ void cross_entropy_count(const bool* counts, REAL* n, long long M) {
    SHARED(REAL, room);
    REAL mine = 0;
    for (long long m = threadIdx.x; m < M; m += blockDim.x) mine += counts[m] ? 1 : 0;
    const REAL all = over_block(mine, Sum(), room);
    if (threadIdx.x == 0) *n = all > 0 ? all : REAL(1);
}

// A block a row: its loss to losses[row] and, unless d_logits is null, its share of the gradient to d_logits. A
// row that does not count is not read and has neither; counts may be null, as is then n, which is M. The
// largest logit and the sum beside it are found in one pass (M. Milakov and N. Gimelshein, "Online normalizer
// calculation for softmax", 2018), so that logits are read twice, and once without the gradient. Out of range
// of a target nothing is read, and the loss is NaN.
extern "C" __global__ void cross_entropy_rows(
    const STORE* logits, const long long* targets, const bool* counts, const REAL* n, REAL* losses,
    STORE* d_logits, long long V) {
    SHARED(REAL, room);
    const STORE* const z = logits + row() * V;
    const long long first = threadIdx.x * VECTOR, step = blockDim.x * VECTOR;
    if (counts != nullptr && !counts[row()]) {
        if (threadIdx.x == 0) losses[row()] = 0;
        if (d_logits == nullptr) return;
        for (long long j = first; j < V; j += step) store_zeros(d_logits + row() * V + j);
        return;
    }
    REAL top = lowest(), total = 0;
    for (long long j = first; j < V; j += step) {
        REAL x[VECTOR];
        load(z + j, x);
        REAL high = top;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) high = Max()(x[v], high);
        if (high > top) {
            total *= exp(top - high);
            top = high;
        }
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) total += exp(x[v] - top);
    }
    const REAL highest = over_block(top, Max(), room);
    total = over_block(total * exp(top - highest), Sum(), room);

    const long long target = targets[row()];
    if (threadIdx.x == 0) {
        const bool is_class = target >= 0 && target < V;
        const REAL of_target = is_class ? real(z[target]) : REAL(float_of_bits(0x7fc00000));
        losses[row()] = log(total) - (of_target - highest);
    }
    if (d_logits == nullptr) return;
    const REAL share = 1 / (n == nullptr ? REAL(rows()) : *n);
    for (long long j = first; j < V; j += step) {
        REAL x[VECTOR];
        load(z + j, x);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v)
            x[v] = (exp(x[v] - highest) / total - (j + v == target ? 1 : 0)) * share;
        store(x, d_logits + row() * V + j);
    }
}

// The sum of losses (M) over n, or over M where n is null, to loss; one block.
extern "C" __global__ void cross_entropy_mean(const REAL* losses, const REAL* n, REAL* loss, long long M) {
    SHARED(REAL, room);
    REAL mine = 0;
    for (long long m = threadIdx.x; m < M; m += blockDim.x) mine += losses[m];
    const REAL all = over_block(mine, Sum(), room);
    if (threadIdx.x == 0) *loss = all / (n == nullptr ? REAL(M) : *n);
}
