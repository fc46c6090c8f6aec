// A step of Adam, for adam.cu and clipped_adam.cu; include common.cuh first.

// What all elements have in common, computed on the host: shrink is 1 - lr * weight_decay, step_size
// lr / (1 - beta_1^t), root the square root of 1 - beta_2^t.
struct Adam {
    double beta_1, beta_2, shrink, step_size, root, eps;

    // Changes VECTOR elements of flat, mean and square, or the `left` that remain, by those of d_flat times
    // scale; the reference has the formulas.
    __device__ __forceinline__ void step(
        STORE* flat, const STORE* d_flat, REAL* mean, REAL* square, REAL scale, long long left) const {
        REAL p[VECTOR], d[VECTOR], m[VECTOR], s[VECTOR];
        load_part(flat, left, p);
        load_part(d_flat, left, d);
        load_part(mean, left, m);
        load_part(square, left, s);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            d[v] *= scale;
            m[v] = REAL(beta_1) * m[v] + REAL(1 - beta_1) * d[v];
            s[v] = REAL(beta_2) * s[v] + REAL(1 - beta_2) * d[v] * d[v];
            p[v] = REAL(shrink) * p[v] - REAL(step_size) * m[v] / (sqrt(s[v]) / REAL(root) + REAL(eps));
        }
        store_part(p, left, flat);
        store_part(m, left, mean);
        store_part(s, left, square);
    }
};
