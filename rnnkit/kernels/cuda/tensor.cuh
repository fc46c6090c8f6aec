// Products of a whole warp on tensor cores, with sums in float32; include common.cuh first. All 32 lanes must
// call them together. d (16, 8) += a (16, K) b (K, 8), with K = 16 for halves and 8 for TF32.
//
// Which numbers a lane holds (PTX, "Matrix Fragments for mma.m16n8k16" and "for mma.m16n8k8"), with
// g = lane / 4, k = lane % 4; a register holds one TF32, or a half and in its upper bits the half of the next
// column, in b of the next row:
//   a[0..3]   rows g, g+8, g, g+8; columns k, k, k+4, k+4, of halves 2k, 2k, 2k+8, 2k+8
//   b[0..1]   rows k, k+4, of halves 2k, 2k+8; column g
//   d[0..3]   rows g, g, g+8, g+8; columns 2k, 2k+1, 2k, 2k+1
//
// They are volatile so that the compiler moves none behind a branch that some lanes do not take.

#ifndef RNNKIT_HOST

__device__ __forceinline__ void mma_16x8x16(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a and b are what tf32() makes of float32.
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of x with 10 digits behind the point: to nearest, ties away from zero.
__device__ __forceinline__ unsigned tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

#endif
