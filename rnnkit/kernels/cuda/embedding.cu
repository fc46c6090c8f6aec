// The gradient of a table of which rows were looked up.

#include "common.cuh"

// d_table (V, N) from d_rows (M, N), of which row m belongs to the table's row index[m]: each block adds up
// all that belong to its one row, in the order of m, so that the sum is always the same. It looks through the
// index by as many entries as it has threads, a multiple of 32, and needs shared memory for one int a thread
// and one a warp.
extern "C" __global__ void embedding_backward(
    const STORE* d_rows, const long long* index, STORE* d_table, long long M, long long N) {
    SHARED(int, counts);  // one a warp
    int* const hits = counts + blockDim.x / 32;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const long long j = column();
    REAL sum[VECTOR] = {};
    for (long long start = 0; start < M; start += blockDim.x) {
        const long long m = start + thread;
        const bool hit = m < M && index[m] == row();
        if (!__syncthreads_or(hit)) continue;
        const unsigned int votes = __ballot_sync(0xffffffffu, hit);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        int place = __popc(votes & ((1u << lane) - 1)), total = 0;
        for (int w = 0; w < (int)blockDim.x / 32; ++w) {
            if (w < warp) place += counts[w];
            total += counts[w];
        }
        if (hit) hits[place] = thread;
        __syncthreads();
        if (j >= N) continue;
        for (int k = 0; k < total; ++k) {
            REAL d_row[VECTOR];
            load(d_rows + (start + hits[k]) * N + j, d_row);
            add(d_row, sum);
        }
    }
    if (j < N) store(sum, d_table + row() * N + j);
}
