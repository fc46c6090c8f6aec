// What every kernel file shares. A file is compiled once for each variant, given by macros:
//   STORE   what h, weights and outputs are stored in: float, double, float16 or bfloat16
//   REAL    what is computed in, and what gates and c are stored in: double for double, else float
//   VECTOR  how many neighbouring elements one thread works on: 1, or 4 where rows and pointers allow it
//
// No CUDA headers: NVRTC finds none by itself, and an installation may have none.
// tests/kernels/host.h stands in for the device where RNNKIT_HOST is defined.

struct float16 {
    unsigned short bits;
};

struct bfloat16 {
    unsigned short bits;
};

#ifndef RNNKIT_HOST

// All shared memory is dynamic: its size is an argument of the launch, which the tests poison and fence.
#define SHARED(type, name)                                   \
    extern __shared__ __align__(16) unsigned char shared_[]; \
    type* const name = reinterpret_cast<type*>(shared_)

__device__ __forceinline__ float float_of_half(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ unsigned short half_of_float(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ unsigned int bits_of_float(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of_bits(unsigned int bits) { return __uint_as_float(bits); }

#endif

__device__ __forceinline__ float real(float x) { return x; }
__device__ __forceinline__ double real(double x) { return x; }
__device__ __forceinline__ float real(float16 x) { return float_of_half(x.bits); }
__device__ __forceinline__ float real(bfloat16 x) { return float_of_bits((unsigned int)x.bits << 16); }

__device__ __forceinline__ void round_to(float x, float& y) { y = x; }
__device__ __forceinline__ void round_to(double x, double& y) { y = x; }
__device__ __forceinline__ void round_to(float x, float16& y) { y.bits = half_of_float(x); }
__device__ __forceinline__ void round_to(float x, bfloat16& y) {
    const unsigned int bits = bits_of_float(x);
    // To nearest, ties to even; a NaN must not be carried over into infinity.
    y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// N neighbouring elements, which travel in loads and stores of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    T x[N];
};

template <class T>
__device__ __forceinline__ void load(const T* from, REAL (&to)[VECTOR]) {
    const Pack<T, VECTOR> pack = *reinterpret_cast<const Pack<T, VECTOR>*>(from);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) to[v] = real(pack.x[v]);
}

template <class T>
__device__ __forceinline__ void store(const REAL (&from)[VECTOR], T* to) {
    Pack<T, VECTOR> pack;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) round_to(from[v], pack.x[v]);
    *reinterpret_cast<Pack<T, VECTOR>*>(to) = pack;
}

// The same at the end of an array, where only `left` elements remain: the others count as zero.
template <class T>
__device__ __forceinline__ void load_part(const T* from, long long left, REAL (&to)[VECTOR]) {
    if (left >= VECTOR) return load(from, to);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) to[v] = v < left ? real(from[v]) : REAL(0);
}

template <class T>
__device__ __forceinline__ void store_part(const REAL (&from)[VECTOR], long long left, T* to) {
    if (left >= VECTOR) return store(from, to);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v)
        if (v < left) round_to(from[v], to[v]);
}

template <class T>
__device__ __forceinline__ void store_zeros(T* to) {
    const REAL zeros[VECTOR] = {};
    store(zeros, to);
}

// 1 / (1 + exp(-z)), by the identity that neither overflows nor needs clipping; as the reference has it.
__device__ __forceinline__ REAL sigmoid(REAL z) { return REAL(0.5) * tanh(REAL(0.5) * z) + REAL(0.5); }

// The elementwise kernels run on a grid (B, ceil(N / (VECTOR * threads))): a block works on one row.
__device__ __forceinline__ long long row() { return blockIdx.x; }
__device__ __forceinline__ long long rows() { return gridDim.x; }
__device__ __forceinline__ long long column() {
    return ((long long)blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
}

// Kernels on one long vector run on a grid of one axis; where this thread begins, and how far a grid reaches.
__device__ __forceinline__ long long place() {
    return ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
}
__device__ __forceinline__ long long stride() { return (long long)gridDim.x * blockDim.x * VECTOR; }

// a + b into a.
__device__ __forceinline__ void add(const REAL (&b)[VECTOR], REAL (&a)[VECTOR]) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) a[v] += b[v];
}

// Whether this block's sequence has a time step t.
__device__ __forceinline__ bool is_live(const long long* lengths, long long t) {
    return lengths == nullptr || t < lengths[row()];
}
