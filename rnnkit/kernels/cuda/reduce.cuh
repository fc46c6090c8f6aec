// Sums and maxima over the threads of a block, a multiple of 32; include common.cuh first. A file that needs
// none does not include this: on the tests' host every thread that may wait is a fiber, which takes time.

struct Sum {
    __device__ __forceinline__ REAL operator()(REAL a, REAL b) const { return a + b; }
};

struct Max {
    __device__ __forceinline__ REAL operator()(REAL a, REAL b) const { return a > b ? a : b; }
};

// Gives every thread x of all threads, combined always in the same order. `room` is for one number a warp;
// all threads must call this.
template <class Combine>
__device__ __forceinline__ REAL over_block(REAL x, Combine combine, REAL* room) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    __syncthreads();  // others may still read what the reduction before this left in `room`
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; ++warp) x = combine(x, room[warp]);
    return x;
}
