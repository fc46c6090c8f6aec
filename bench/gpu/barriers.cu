// What a recurrent kernel that stays on the GPU for a whole sequence pays at every time step: a barrier
// among all blocks of the grid, or among the eight blocks of a cluster. And a kernel that does nothing.
// No headers: NVRTC finds none by itself.

// A barrier takes microseconds; a block that spins this long waits for one that is not resident.
#define MOST_SPINS (1 << 24)

extern "C" __global__ void empty() {}

// Each barrier adds one to `arrived` for every block; `arrived` and `failed` are zero at first. Launched
// cooperatively, so that all blocks are resident. A block that gives up sets `failed` and leaves, and the
// others, which then give up too, follow.
extern "C" __global__ void grid_barriers(unsigned int *arrived, int *failed, int count) {
    const unsigned int blocks = gridDim.x * gridDim.y * gridDim.z;
    if (threadIdx.x != 0) return;
    for (int k = 1; k <= count; k++) {
        __threadfence();
        atomicAdd(arrived, 1u);
        int spins = 0;
        while (*(volatile unsigned int *)arrived < k * blocks) {
            if (++spins == MOST_SPINS) {
                *failed = 1;
                return;
            }
        }
        __threadfence();
    }
}

// Needs compute capability 9.0; the hardware's barrier cannot hang on a block of its own cluster.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(8, 1, 1) cluster_barriers(int count) {
    for (int k = 0; k < count; k++) {
        asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;"
                     ::: "memory");
    }
}
#endif
