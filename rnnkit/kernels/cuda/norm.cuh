// The norm of a vector and what it is clipped by, for clip.cu and clipped_adam.cu; include common.cuh and
// reduce.cuh first.

// The sum of squares of a block's share of flat (N), for all its threads; each takes VECTOR elements from
// `first` on, and again after each `step`.
__device__ __forceinline__ REAL sum_of_squares(
    const STORE* flat, long long first, long long step, long long N, REAL* room) {
    REAL mine = 0;
    for (long long at = first; at < N; at += step) {
        REAL x[VECTOR];
        load_part(flat + at, N - at, x);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) mine += x[v] * x[v];
    }
    return over_block(mine, Sum(), room);
}

// The norm, from the sums of squares of no more blocks than a block has threads; all threads of all blocks add
// them up in the same order.
__device__ __forceinline__ REAL norm_of(const REAL* sums, unsigned blocks, REAL* room) {
    return sqrt(over_block(threadIdx.x < blocks ? sums[threadIdx.x] : REAL(0), Sum(), room));
}

// What a vector of this norm is multiplied with: 1 where it is small enough, or NaN.
__device__ __forceinline__ REAL scale_of(REAL norm, double max_norm) {
    const REAL scale = REAL(max_norm) / (norm + REAL(1e-6));
    return scale < 1 ? scale : REAL(1);
}
