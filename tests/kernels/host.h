// A device made of fibers: enough of CUDA C++ for g++ to compile a kernel file and host.cpp to run it.
//
// It shows wrong arithmetic, wrong addresses, missing and divergent barriers, reads of memory that nobody
// wrote, and races (races.h). It cannot show what a real device makes of fences, bank conflicts, or speed.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define RNNKIT_HOST
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED(type, name) type* const name = reinterpret_cast<type*>(host::shared_memory())

struct dim3 {
    unsigned x, y, z;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
const int warpSize = 32;

// ---------------------------------------------------------------------------------------- barriers

namespace host {

unsigned char* shared_memory();
// Each waits until all that it concerns are at the same line; what others brought is then in `lanes`.
void block_barrier(int line);
void whole_grid_barrier(int line);
const uint64_t* warp_barrier(unsigned mask, uint64_t value, int line, bool orders = false);
unsigned block_count(bool predicate, int line);  // how many threads of the block say yes
void yield(int line);  // ends the turn of a thread that spins
unsigned lane();
void count_poll(int line);
void announce(const void* where, std::size_t size, bool write, const void* from = nullptr);
void release(const void* where, bool add);
void acquire(const void* where);
// A warp-wide product d += a b, made when all lanes have arrived; bit patterns as PTX lays out fragments.
enum Multiply { NOTHING, FLOAT16, BFLOAT16, TF32 };
void multiply(Multiply what, float* d, const unsigned* a, const unsigned* b, int line);
// 16 bytes to shared memory, NaN from the copy to the wait; null stands for zeros.
void copy_async(void* shared, const void* global, int line);
void copy_commit();
void copy_wait(unsigned later);
[[noreturn]] void fail(const char* what, int line);

template <class T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const uint64_t* lanes = warp_barrier(mask, bits, line);
    if (!(mask >> source & 1)) fail("a shuffle reads from a lane that is not in its mask", line);
    std::memcpy(&value, &lanes[source], sizeof(T));
    return value;
}

template <class T>
unsigned ballot(unsigned mask, T predicate, int line) {
    const uint64_t* lanes = warp_barrier(mask, predicate ? 1 : 0, line);
    unsigned votes = 0;
    for (unsigned k = 0; k < 32; ++k)
        if (mask >> k & 1 && lanes[k]) votes |= 1u << k;
    return votes;
}

// Where a shuffle reads within a segment of `width` lanes; its own lane where that is out of the segment.
inline unsigned in_segment(long source, unsigned width) {
    const long first = lane() / width * width;
    return source < first || source >= first + long(width) ? lane() : unsigned(source);
}

}  // namespace host

#define __syncthreads() host::block_barrier(__LINE__)
#define __syncthreads_or(p) (host::block_count(p, __LINE__) != 0)
#define __syncthreads_count(p) int(host::block_count(p, __LINE__))
#define __syncwarp(...) ((void)host::warp_barrier(host::mask_of(__VA_ARGS__), 0, __LINE__, true))
#define __shfl_sync(mask, value, source, ...) \
    host::shuffle(mask, value, host::first_of(source, ##__VA_ARGS__), __LINE__)
#define __shfl_xor_sync(mask, value, lanes) host::shuffle(mask, value, host::lane() ^ (lanes), __LINE__)
#define __shfl_down_sync(mask, value, n) \
    host::shuffle(mask, value, host::in_segment(long(host::lane()) + (n), 32), __LINE__)
#define __shfl_up_sync(mask, value, n) \
    host::shuffle(mask, value, host::in_segment(long(host::lane()) - (n), 32), __LINE__)
#define __ballot_sync(mask, p) host::ballot(mask, p, __LINE__)
#define __any_sync(mask, p) (host::ballot(mask, p, __LINE__) != 0)
#define __all_sync(mask, p) (host::ballot(mask, !(p), __LINE__) == 0)
#define grid_barrier() host::whole_grid_barrier(__LINE__)
// A thread that spins on memory sleeps in between, or no other would run.
#define __nanosleep(ns) host::yield(__LINE__)

namespace host {
inline unsigned mask_of(unsigned mask = 0xffffffffu) { return mask; }
inline unsigned first_of(unsigned source, unsigned width = 32) {
    return lane() / width * width + source % width;
}
}  // namespace host

// ------------------------------------------------------------------------------ memory and numbers

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) {
    return *p;
}
// Atomic accesses race with nobody, and order nothing but by release and acquire; see races.h.
#define ATOMIC __attribute__((no_sanitize("thread"))) inline
template <class T>
ATOMIC T replace(T* p, T value) {
    const T before = *p;
    *p = value;
    return before;
}
template <class T>
ATOMIC T atomicAdd(T* p, T value) {
    return replace(p, *p + value);
}
template <class T>
ATOMIC T atomicMax(T* p, T value) {
    return replace(p, *p < value ? value : *p);
}
template <class T>
ATOMIC T atomicExch(T* p, T value) {
    return replace(p, value);
}
template <class T>
ATOMIC T atomicCAS(T* p, T expected, T value) {
    return replace(p, *p == expected ? value : *p);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

using std::exp;
using std::log;
using std::sqrt;
using std::tanh;

inline float float_of_bits(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned bits_of_float(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}
float float_of_half(unsigned short bits);
unsigned short half_of_float(float x);

// ------------------------------------------------------------------------ of sync.cuh and tensor.cuh

struct float16;
struct bfloat16;

ATOMIC unsigned load_acquire(const unsigned* p, int line = __builtin_LINE()) {
    host::count_poll(line);
    host::acquire(p);
    return *p;
}
ATOMIC void store_release(unsigned* p, unsigned value) {
    host::release(p, false);
    *p = value;
}
ATOMIC unsigned add_release(unsigned* p, unsigned value) {
    host::release(p, true);
    return replace(p, *p + value);
}
ATOMIC unsigned load_system(const unsigned* p) { return *p; }
ATOMIC void store_system(unsigned* p, unsigned value) { *p = value; }
inline void pause(int line = __builtin_LINE()) { host::yield(line); }
inline void copy_async(void* shared, const void* global, bool there, int line = __builtin_LINE()) {
    if (global == nullptr) host::fail("a copy from nowhere", line);
    if (std::size_t(global) % 16) host::fail("a misaligned copy", line);  // also of nothing
    host::copy_async(shared, there ? global : nullptr, line);
}
inline void copy_commit() { host::copy_commit(); }
template <int LATER>
void copy_wait() {
    host::copy_wait(LATER);
}

template <class Half>  // float16 or bfloat16
void mma_16x8x16(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Half, int line = __builtin_LINE()) {
    constexpr bool is_float16 = std::is_same_v<Half, float16>;
    static_assert(is_float16 || std::is_same_v<Half, bfloat16>, "of half precision");
    host::multiply(is_float16 ? host::FLOAT16 : host::BFLOAT16, d, a, b, line);
}
inline void mma_16x8x8(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
    host::multiply(host::TF32, d, a, b, line);
}
// To nearest, ties away from zero, as cvt.rna does; a NaN stays one.
inline unsigned tf32(float x) {
    const unsigned bits = bits_of_float(x);
    return x != x ? 0x7fffe000 : (bits + (std::isinf(x) ? 0 : 0x1000)) & 0xffffe000;
}

// --------------------------------------------------------------------- how Python reaches a kernel

namespace host {

// A letter a type: Python compares them with the arguments that it was given. Capital: may be written.
template <class T>
constexpr char letter() {
    using std::is_same_v;
    return is_same_v<T, float> ? 'f' : is_same_v<T, double> ? 'd' : is_same_v<T, float16> ? 'h'
         : is_same_v<T, bfloat16> ? 'b' : is_same_v<T, long long> ? 'q' : is_same_v<T, int> ? 'i'
         : is_same_v<T, bool> ? 'o' : is_same_v<T, unsigned> ? 'u' : '?';
}
template <class T>
struct Argument {
    static constexpr char kind = '=', type = letter<T>();
};
template <class T>
struct Argument<T*> {
    static constexpr char kind = '*', type = letter<T>();
};
template <class T>
struct Argument<const T*> {
    static constexpr char kind = '&', type = letter<T>();
};

template <class... A>
struct Kernel {
    static constexpr char signature[] = {Argument<A>::kind..., '|', Argument<A>::type..., 0};
    template <std::size_t... K>
    static void call(void (*kernel)(A...), void** args, std::index_sequence<K...>) {
        kernel(*static_cast<A*>(args[K])...);
    }
    static void call(void (*kernel)(A...), void** args) {
        call(kernel, args, std::index_sequence_for<A...>());
    }
};
template <class... A>
Kernel<A...> kernel_of(void (*)(A...));

}  // namespace host

#define EXPORT(name)                                                                               \
    extern "C" void name##_call(void** args) { decltype(host::kernel_of(&name))::call(&name, args); } \
    extern "C" const char* name##_signature() { return decltype(host::kernel_of(&name))::signature; }
