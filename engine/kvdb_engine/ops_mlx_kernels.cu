// Fused kernels of the MLX back end for CUDA (ops_mlx_cuda.py launches them; ops_mlx.py decides when).
//
// Every kernel has an op-level twin: the composition it replaces, in hyper.py, compressor.py, attention.py, moe.py or
// ops_mlx.py. Parameters come in the order inputs, outputs, scalars. Vectors are float32, kept rows f16; weights are
// MLX affine codes (8, 4 or 2 bit; scales and biases bf16, or f16 where `halves` is 1), e2m1 or e4m3 codes with an E8M0
// scale per 32 (mxfp4, mxfp8), or bf16.
//
// Deterministic: no float atomics, every sum has a fixed order that follows from the shapes alone.
// No headers, so that NVRTC needs none; KVDB_EMULATED compiles the same text for a processor (tests/engine).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef unsigned char u8;

#ifndef KVDB_EMULATED
#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define FULL 0xffffffffu
DEVICE float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
// Two floats as bf16, the first in the low half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE void mma_bf16(float* c, const u32* a, const u32* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

DEVICE float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }

// A scale or bias of a group: f16 or bf16.
DEVICE float scale_to_float(u16 h, int halves) { return halves ? half_to_float(h) : bf16_to_float(h); }

// Four f16 values of a row, from value 4 i on.
DEVICE float4 four_halves(const u16* row, int i) {
    uint2 p = ((const uint2*)row)[i];
    return make_float4(half_to_float((u16)p.x), half_to_float((u16)(p.x >> 16)), half_to_float((u16)p.y),
                       half_to_float((u16)(p.y >> 16)));
}

DEVICE float warp_sum(float v) {
    for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(FULL, v, step);
    return v;
}

// The sum over all threads of a block, in every thread. scratch: 32 floats of shared memory.
DEVICE float block_sum(float v, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = (blockDim.x + 31) >> 5;
    v = warp_sum(v);
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    v = warp_sum(lane < n_warps ? scratch[lane] : 0.0f);
    __syncthreads();
    return v;
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

DEVICE float swiglu(float gate, float up, float limit) {
    gate = fminf(gate, limit);
    return gate * sigmoid(gate) * fminf(fmaxf(up, -limit), limit);
}

// ---------------------------------------------------------------------------------------------------------- mHC

// mixes[j] = fn[j] . x / sqrt(mean(x^2) + eps) for one token. fn: (outputs, inner); inner a multiple of 4.
// One block per output.
KERNEL kvdb_hc_mix(const float* x, const float* fn, float* mixes, int inner, float eps) {
    __shared__ float scratch[32];
    const float4* a = (const float4*)x;
    const float4* w = (const float4*)(fn + (u64)blockIdx.x * inner);
    float dot = 0.0f, square = 0.0f;
    for (int i = threadIdx.x; i < inner / 4; i += blockDim.x) {
        float4 v = a[i], u = w[i];
        dot = fmaf(v.x, u.x, fmaf(v.y, u.y, fmaf(v.z, u.z, fmaf(v.w, u.w, dot))));
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, square))));
    }
    dot = block_sum(dot, scratch);
    square = block_sum(square, scratch);
    if (threadIdx.x == 0) mixes[blockIdx.x] = dot / sqrtf(square / inner + eps);
}

// Sinkhorn of one 4 x 4 matrix, element (lane / 4, lane % 4) in lanes 0 to 15; lanes 16 to 31 repeat them.
DEVICE float sinkhorn_4(float m, int iterations, float eps) {
    for (int i = 0; i < iterations; i++) {
        if (i) {
            float row = m + __shfl_xor_sync(FULL, m, 1);
            m = m / (row + __shfl_xor_sync(FULL, row, 2) + eps);
        }
        float column = m + __shfl_xor_sync(FULL, m, 4);
        m = m / (column + __shfl_xor_sync(FULL, column, 8) + eps);
    }
    return m;
}

// Four streams: x = rmsnorm(sum pre_i stream_i) * weight, post (T, 4), comb (T, 4, 4). One block per token.
KERNEL kvdb_hc_split(const float* mixes, const float* streams, const float* base, const float* weight, float* x,
                     float* post, float* comb, int dim, float scale_pre, float scale_post, float scale_comb,
                     float hc_eps, float norm_eps, int iterations) {
    __shared__ float scratch[32];
    int t = blockIdx.x;
    const float* mix = mixes + (u64)t * 24;
    const float* h = streams + (u64)t * 4 * dim;
    float pre[4];
    for (int i = 0; i < 4; i++) pre[i] = sigmoid(mix[i] * scale_pre + base[i]) + hc_eps;
    if (threadIdx.x < 32) {
        int lane = threadIdx.x, e = lane & 15;
        float m = mix[8 + e] * scale_comb + base[8 + e];
        float top = fmaxf(m, __shfl_xor_sync(FULL, m, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        m = expf(m - top);
        float row = m + __shfl_xor_sync(FULL, m, 1);
        row = row + __shfl_xor_sync(FULL, row, 2);
        m = sinkhorn_4(m / row + hc_eps, iterations, hc_eps);
        if (lane < 16) comb[(u64)t * 16 + lane] = m;
        if (lane < 4) post[t * 4 + lane] = 2.0f * sigmoid(mix[4 + lane] * scale_post + base[4 + lane]);
    }
    float* out = x + (u64)t * dim;
    float square = 0.0f;
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float v = pre[0] * h[d];
        for (int i = 1; i < 4; i++) v = fmaf(pre[i], h[i * dim + d], v);
        out[d] = v;
        square = fmaf(v, v, square);
    }
    float scale = 1.0f / sqrtf(block_sum(square, scratch) / dim + norm_eps);
    for (int d = threadIdx.x; d < dim; d += blockDim.x) out[d] = out[d] * scale * weight[d];
}

// Stream k becomes post[k] * (a + b) + sum_j comb[j, k] * stream j. b is added if two is 1.
KERNEL kvdb_hc_join(const float* streams, const float* a, const float* b, const float* post, const float* comb,
                    float* out, int dim, int two) {
    int t = blockIdx.y, d = blockIdx.x * blockDim.x + threadIdx.x;
    if (d >= dim) return;
    const float* h = streams + (u64)t * 4 * dim + d;
    float y = a[(u64)t * dim + d];
    if (two) y += b[(u64)t * dim + d];
    float v[4];
    for (int j = 0; j < 4; j++) v[j] = h[j * dim];
    for (int k = 0; k < 4; k++) {
        float sum = post[t * 4 + k] * y;
        for (int j = 0; j < 4; j++) sum = fmaf(comb[(u64)t * 16 + j * 4 + k], v[j], sum);
        out[(u64)t * 4 * dim + k * dim + d] = sum;
    }
}

// --------------------------------------------------------------------------------------------- rows: norm, RoPE, codes

DEVICE float to_grid(float v, int mantissa_bits, u32 smallest, float largest) {
    float magnitude = fminf(fabsf(v), largest);
    u32 exponent = __float_as_uint(magnitude) & 0x7F800000u;
    if (exponent < smallest) exponent = smallest;
    float anchor = __uint_as_float(exponent + ((u32)(23 - mantissa_bits) << 23));
    return copysignf((magnitude + anchor) - anchor, v);
}

// Biased exponent of the power of two that a block with this largest magnitude is divided by.
DEVICE u32 block_exponent(u32 largest_bits, u32 floor_bits, u32 shift, u32 limit) {
    u32 bits = largest_bits > floor_bits ? largest_bits : floor_bits;
    return (bits >> 23) - shift + ((bits & 0x7FFFFFu) > limit ? 1u : 0u);
}

#define ROWS_NORM 1
#define ROWS_WEIGHT 2
#define ROWS_KV 4
#define ROWS_INDEX 8
#define ROWS_HALF 16
#define ROWS_INVERSE 32

// out = older rows as they are, then each row of x: normalised, turned (table row = row / heads), scaled, rounded.
// older and out are f16 with ROWS_KV or ROWS_HALF, else float32.
// One block per row, one thread per value; threads beyond dim only help in the sums.
KERNEL kvdb_rows(const void* older, const float* x, const float* weight, const float* cosines, const float* sines,
                 void* out, int n_older, int dim, int heads, int pairs, float eps, float scale, int flags) {
    __shared__ float scratch[32];
    __shared__ u32 largest[16];
    __shared__ float turned[1024];
    int d = threadIdx.x, row = blockIdx.x;
    bool on = d < dim, halves = flags & (ROWS_KV | ROWS_HALF);
    u64 place = (u64)row * dim + d;
    if (row < n_older) {
        if (on && halves) ((u16*)out)[place] = ((const u16*)older)[place];
        if (on && !halves) ((float*)out)[place] = ((const float*)older)[place];
        return;
    }
    int r = row - n_older, t = r / heads;
    float v = on ? x[(u64)r * dim + d] : 0.0f;
    if (flags & ROWS_NORM) v = v / sqrtf(block_sum(v * v, scratch) / dim + eps);
    if ((flags & ROWS_WEIGHT) && on) v = v * weight[d];
    int nope = dim - 2 * pairs;
    float other = __shfl_xor_sync(FULL, v, 1);
    if (on && d >= nope) {
        int pair = (d - nope) >> 1;
        float c = cosines[(u64)t * pairs + pair], s = sines[(u64)t * pairs + pair];
        if (flags & ROWS_INVERSE) s = -s;
        v = (d & 1) ? other * s + v * c : v * c - other * s;
    }
    v = v * scale;
    if (flags & ROWS_KV) {
        if (nope % 64 == 0) {
            if (d < 16) largest[d] = 0;
            __syncthreads();
            if (d < nope) atomicMax(&largest[d >> 6], __float_as_uint(fabsf(v)));
            __syncthreads();
            if (d < nope) {
                u32 e = block_exponent(largest[d >> 6], __float_as_uint(1e-4f), 8, 0x600000u);
                float grid = to_grid(v * __uint_as_float((254u - e) << 23), 3, 121u << 23, 448.0f);
                v = grid * __uint_as_float(e << 23);
            }
        }
    }
    if (flags & ROWS_INDEX) {
        for (int h = 1; h < dim; h <<= 1) {
            turned[d] = v;
            __syncthreads();
            float p = turned[d ^ h];
            v = (d & h) ? p - v : v + p;
            __syncthreads();
        }
        v = v * (1.0f / sqrtf((float)dim));
        u32 top = __float_as_uint(fabsf(v));
        for (int step = 16; step; step >>= 1) {
            u32 next = __shfl_xor_sync(FULL, top, step);
            if (next > top) top = next;
        }
        u32 e = block_exponent(top, __float_as_uint(7.052966e-38f), 2, 0x400000u);
        float grid = to_grid(v * __uint_as_float((254u - e) << 23), 1, 127u << 23, 6.0f);
        v = grid * __uint_as_float(e << 23);
    }
    if (on && halves) ((u16*)out)[place] = float_to_half(v);
    if (on && !halves) ((float*)out)[place] = v;
}

// ---------------------------------------------------------------------------------------------------- compressor

// The open group with one more row: kv, and gate + ape[slot].
KERNEL kvdb_frontier(const float* open_kv, const float* open_score, const float* kv, const float* gate,
                     const float* ape, float* new_kv, float* new_score, int n_open, int columns, int slot) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, old = n_open * columns;
    if (i >= old + columns) return;
    if (i < old) {
        new_kv[i] = open_kv[i];
        new_score[i] = open_score[i];
    } else {
        new_kv[i] = kv[i - old];
        new_score[i] = gate[i - old] + ape[slot * columns + i - old];
    }
}

// One compressed row before its norm: per column a softmax over the group's scores times its kv. With overlap the group
// has 2 * width columns: the previous group's first halves (if there is one), then this group's second halves.
KERNEL kvdb_pool(const float* previous_kv, const float* previous_score, const float* kv, const float* score, float* out,
                 int width, int ratio, int overlap, int has_previous) {
    int d = blockIdx.x * blockDim.x + threadIdx.x;
    if (d >= width) return;
    int columns = overlap ? 2 * width : width, own = overlap ? width + d : d;
    int older = overlap && has_previous ? ratio : 0;
    float top = -1.0e30f;
    for (int i = 0; i < older; i++) top = fmaxf(top, previous_score[i * columns + d]);
    for (int i = 0; i < ratio; i++) top = fmaxf(top, score[i * columns + own]);
    float sum = 0.0f, value = 0.0f;
    for (int i = 0; i < older; i++) {
        float e = expf(previous_score[i * columns + d] - top);
        sum += e;
        value = fmaf(e, previous_kv[i * columns + d], value);
    }
    for (int i = 0; i < ratio; i++) {
        float e = expf(score[i * columns + own] - top);
        sum += e;
        value = fmaf(e, kv[i * columns + own], value);
    }
    out[d] = value / sum;
}

// ------------------------------------------------------------------------------------------------------ selection

DEVICE u32 rising(float score) {
    u32 bits = __float_as_uint(score + 0.0f);  // -0 becomes +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `count` largest of n scores per row of the grid, as ascending column numbers; ties go to the lower column.
// Radix selection finds the smallest winning key; one more pass writes the winners in order. blockDim.x = 1024 or less.
KERNEL kvdb_top_rows(const float* scores, int* out, int n, int count) {
    __shared__ u32 bins[256];
    __shared__ u32 chosen[2];
    __shared__ u32 above[32], equal[32];
    const float* s = scores + (u64)blockIdx.x * n;
    int* found = out + (u64)blockIdx.x * count;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    u32 prefix = 0, mask = 0, wanted = count;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            u32 key = rising(s[i]);
            if ((key & mask) == prefix) atomicAdd(&bins[(key >> shift) & 255u], 1u);
        }
        __syncthreads();
        if (warp == 0) {
            // Lane l sums bins 255 - 8 l and the seven below; the lane where the running count passes `wanted` decides.
            u32 sum = 0, mine;
            for (int i = 0; i < 8; i++) sum += bins[255 - 8 * lane - i];
            mine = sum;
            for (int step = 1; step < 32; step <<= 1) {
                u32 left = __shfl_up_sync(FULL, sum, step);
                if (lane >= step) sum += left;
            }
            u32 before = sum - mine;
            if (before < wanted && sum >= wanted) {
                for (int i = 0; i < 8; i++) {
                    u32 here = bins[255 - 8 * lane - i];
                    if (before + here >= wanted) {
                        chosen[0] = 255 - 8 * lane - i;
                        chosen[1] = wanted - before;
                        break;
                    }
                    before += here;
                }
            }
        }
        __syncthreads();
        prefix |= chosen[0] << shift;
        mask |= 255u << shift;
        wanted = chosen[1];
        __syncthreads();
    }
    // Keys above `prefix` all win, and the first `wanted` columns whose key equals it.
    u32 n_above = 0, n_equal = 0;
    for (int first = 0; first < n; first += blockDim.x) {
        int i = first + threadIdx.x;
        u32 key = i < n ? rising(s[i]) : 0u;
        bool over = i < n && key > prefix, same = i < n && key == prefix;
        u32 over_lanes = __ballot_sync(FULL, over), same_lanes = __ballot_sync(FULL, same);
        if (lane == 0) {
            above[warp] = __popc(over_lanes);
            equal[warp] = __popc(same_lanes);
        }
        __syncthreads();
        u32 my_above = n_above, my_equal = n_equal;
        for (int w = 0; w < n_warps; w++) {
            if (w < warp) {
                my_above += above[w];
                my_equal += equal[w];
            }
            n_above += above[w];
            n_equal += equal[w];
        }
        u32 lower = (1u << lane) - 1u;
        my_above += __popc(over_lanes & lower);
        my_equal += __popc(same_lanes & lower);
        u32 taken_equal = my_equal < wanted ? my_equal : wanted;
        if (over || (same && my_equal < wanted)) found[my_above + taken_equal] = i;
        __syncthreads();
    }
}

// score[n] = sum_h share[h] * max(0, queries[h] . rows[n]) for one token. One thread per row; dim a multiple of 4, at most
// 128; heads * dim floats of dynamic shared memory.
KERNEL kvdb_index_scores(const float* queries, const float* share, const u16* rows, float* scores, int n, int heads,
                         int dim) {
    extern __shared__ float4 dynamic[];
    int parts = dim / 4;
    for (int i = threadIdx.x; i < heads * parts; i += blockDim.x) dynamic[i] = ((const float4*)queries)[i];
    __syncthreads();
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n) return;
    float4 own[32];
#pragma unroll
    for (int i = 0; i < 32; i++)
        own[i] = i < parts ? four_halves(rows + (u64)row * dim, i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float score = 0.0f;
    for (int h = 0; h < heads; h++) {
        float a = 0.0f, b = 0.0f;  // two chains of additions hide each other's latency
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
            if (i < parts) {
                float4 q = dynamic[h * parts + i];
                a = fmaf(q.x, own[i].x, fmaf(q.y, own[i].y, fmaf(q.z, own[i].z, fmaf(q.w, own[i].w, a))));
            }
            if (i + 1 < parts) {
                float4 q = dynamic[h * parts + i + 1];
                b = fmaf(q.x, own[i + 1].x, fmaf(q.y, own[i + 1].y, fmaf(q.z, own[i + 1].z, fmaf(q.w, own[i + 1].w, b))));
            }
        }
        score = fmaf(share[h], fmaxf(a + b, 0.0f), score);
    }
    scores[row] = score;
}

// Experts of each token: the best k of score + bias (ties to the lower id), or those of `given`; their shares.
// One warp per token; n_experts floats of dynamic shared memory, twice.
KERNEL kvdb_route(const float* logits, const float* bias, const int* given, int* ids, float* share, int n_experts, int k,
                  int has_bias, int has_given, float floor, float route_scale) {
    extern __shared__ float4 dynamic[];
    float* score = (float*)dynamic;
    float* biased = score + n_experts;
    int t = blockIdx.x, lane = threadIdx.x;
    for (int e = lane; e < n_experts; e += 32) {
        float z = logits[(u64)t * n_experts + e];
        float s = sqrtf(fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))));
        score[e] = s;
        biased[e] = has_bias ? s + bias[e] : s;
    }
    __syncwarp();
    float sum = 0.0f, mine = 0.0f;
    int my_id = 0;
    for (int j = 0; j < k; j++) {
        int best = 0x7FFFFFFF;
        if (has_given) {
            best = given[(u64)t * k + j];
        } else {
            float top = -3.0e38f;
            for (int e = lane; e < n_experts; e += 32)
                if (biased[e] > top) {
                    top = biased[e];
                    best = e;
                }
            for (int step = 16; step; step >>= 1) {
                float next = __shfl_xor_sync(FULL, top, step);
                int id = __shfl_xor_sync(FULL, best, step);
                if (next > top || (next == top && id < best)) {
                    top = next;
                    best = id;
                }
            }
            __syncwarp();
            if (lane == 0) biased[best] = -3.3e38f;
            __syncwarp();
        }
        sum += score[best];
        if (lane == j) {
            my_id = best;
            mine = score[best];
        }
    }
    if (lane < k) {
        ids[(u64)t * k + lane] = my_id;
        share[(u64)t * k + lane] = mine / fmaxf(sum, floor) * route_scale;
    }
}

// ------------------------------------------------------------------------------- matrix times vector, one token

// x lies in shared memory so that lane l finds its 16 values of a run of 512 without bank conflicts: value
// 16 l + 4 c + i of run r is at ((r * 4 + c) * 32 + l) * 4 + i.
DEVICE void place_x(const float* x, float* placed, int inner) {
    for (int i = threadIdx.x; i < inner / 4; i += blockDim.x) {
        int run = i >> 7, lane = (i >> 2) & 31, c = i & 3;
        ((float4*)placed)[(run * 4 + c) * 32 + lane] = ((const float4*)x)[i];
    }
}

DEVICE void take_x(const float* placed, int run, int lane, float* x) {
    for (int c = 0; c < 4; c++) {
        float4 v = ((const float4*)placed)[(run * 4 + c) * 32 + lane];
        x[4 * c] = v.x;
        x[4 * c + 1] = v.y;
        x[4 * c + 2] = v.z;
        x[4 * c + 3] = v.w;
    }
}

DEVICE float sum_16(const float* x) {
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}

// 2^23 + q in float has q in its last bits: two cheap instructions instead of a slow conversion.
#define MAGIC 0x4B000000u
#define MAGIC_FLOAT 8388608.0f

DEVICE float dot_q8(uint4 q, const float* x) {
    const u32 words[4] = {q.x, q.y, q.z, q.w};
    float dot = 0.0f;
    for (int w = 0; w < 4; w++)
        for (int i = 0; i < 4; i++)
            dot = fmaf(__uint_as_float(__byte_perm(words[w], MAGIC, 0x7440u | i)) - MAGIC_FLOAT, x[4 * w + i], dot);
    return dot;
}

DEVICE float dot_q2(u32 q, const float* x) {
    float dot = 0.0f;
    for (int i = 0; i < 16; i++)
        dot = fmaf(__uint_as_float(((q >> (2 * i)) & 3u) | MAGIC) - MAGIC_FLOAT, x[i], dot);
    return dot;
}

// How the codes of routed experts are written: affine with 2 or 4 bits, or e2m1.
#define CODES_2 0
#define CODES_4 1
#define CODES_E2M1 2

DEVICE float e8m0_to_float(u8 e) { return __uint_as_float(e ? (u32)e << 23 : 0x400000u); }

// Twice the magnitudes of four e2m1 codes (the low four nibbles of q) as bytes: 0 1 2 3 4 6 8 12, looked up by __byte_perm.
DEVICE u32 e2m1_bytes(u32 q) { return __byte_perm(0x03020100u, 0x0C080604u, q & 0x7777u); }

// The value, doubled, of nibble i of q; bytes: e2m1_bytes of the four nibbles that i is in.
DEVICE float e2m1_value(u32 q, u32 bytes, int i) {
    float magnitude = __uint_as_float(__byte_perm(bytes, MAGIC, 0x7440u | (i & 3))) - MAGIC_FLOAT;
    return __uint_as_float(__float_as_uint(magnitude) | ((q >> (4 * i)) & 8u) << 28);
}

// Codes of 16 neighbouring values; piece counts such runs.
template <int CODES>
DEVICE uint2 codes_16(const u32* w, u64 piece) {
    if (CODES == CODES_2) return make_uint2(w[piece], 0);
    return ((const uint2*)w)[piece];
}

// Value i (0 to 15) of codes_16, before scale and bias.
template <int CODES>
DEVICE float code_value(uint2 q, int i) {
    if (CODES == CODES_2) return __uint_as_float(((q.x >> (2 * i)) & 3u) | MAGIC) - MAGIC_FLOAT;
    u32 word = i < 8 ? q.x : q.y;
    if (CODES == CODES_4) return __uint_as_float(((word >> (4 * (i & 7))) & 15u) | MAGIC) - MAGIC_FLOAT;
    return e2m1_value(word, e2m1_bytes(i & 4 ? word >> 16 : word), i & 7);
}

template <int CODES>
DEVICE float group_scale(const u16* s, u64 at, int halves) {
    return CODES == CODES_E2M1 ? 0.5f * e8m0_to_float(((const u8*)s)[at]) : scale_to_float(s[at], halves);
}

template <int CODES>
DEVICE float group_bias(const u16* b, u64 at, int halves) {
    return CODES == CODES_E2M1 ? 0.0f : scale_to_float(b[at], halves);
}

template <int CODES>
DEVICE float dot_16(const u32* w, u64 piece, const float* x) {
    if (CODES == CODES_2) return dot_q2(w[piece], x);
    uint2 q = codes_16<CODES>(w, piece);
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) dot = fmaf(code_value<CODES>(q, i), x[i], dot);
    return dot;
}

// Calls function<CODES>(arguments) for the CODES that a kernel was given.
#define BY_CODES(function, ...)                            \
    if (codes == CODES_2) function<CODES_2>(__VA_ARGS__);  \
    else if (codes == CODES_4) function<CODES_4>(__VA_ARGS__); \
    else function<CODES_E2M1>(__VA_ARGS__)

// e4m3: a code moved into the place of a float's bits is too small by 2^120, its subnormal values included.
DEVICE float dot_e4m3(uint4 q, const float* x) {
    const u32 words[4] = {q.x, q.y, q.z, q.w};
    float dot = 0.0f;
    for (int w = 0; w < 4; w++)
        for (int i = 0; i < 4; i++) {
            u32 code = words[w] >> (8 * i);
            dot = fmaf(__uint_as_float((code & 0x7Fu) << 20 | (code & 0x80u) << 24) * 1.329227995784916e36f, x[4 * w + i],
                       dot);
        }
    return dot;
}

#define GEMV_ROWS 2

// 8-bit codes, or e4m3 with an E8M0 scale per group where is_e4m3 is 1. Up to two matrices with the same x (n1 = 0: one). Rows of a matrix whose row / per_x differs take another
// x: grouped products have per_x = rows of a group. Blocks of 128 threads make 8 outputs; inner a multiple of 512.
KERNEL kvdb_gemv_q8(const float* x, const u32* w0, const u16* s0, const u16* b0, const u32* w1, const u16* s1,
                    const u16* b1, float* out0, float* out1, int inner, int group, int n0, int n1, int per_x,
                    int halves, int is_e4m3) {
    extern __shared__ float4 dynamic[];
    float* placed = (float*)dynamic;
    int lane = threadIdx.x & 31, first = blockIdx.x * 4 * GEMV_ROWS;
    const u32* w = w0;
    const u16 *s = s0, *b = b0;
    float* out = out0;
    if (first >= n0) {
        first -= n0;
        w = w1;
        s = s1;
        b = b1;
        out = out1;
    }
    place_x(x + (u64)(first / per_x) * inner, placed, inner);
    __syncthreads();
    int row = first + (threadIdx.x >> 5) * GEMV_ROWS, groups = inner / group;
    float sums[GEMV_ROWS] = {0.0f, 0.0f};
#pragma unroll 4
    for (int run = 0; run < inner / 512; run++) {
        float v[16];
        take_x(placed, run, lane, v);
        float total = sum_16(v);
        int g = (run * 512 + lane * 16) / group;
#pragma unroll
        for (int r = 0; r < GEMV_ROWS; r++) {
            uint4 q = ((const uint4*)w)[(u64)(row + r) * (inner / 16) + run * 32 + lane];
            u64 at = (u64)(row + r) * groups + g;
            if (is_e4m3)
                sums[r] += e8m0_to_float(((const u8*)s)[at]) * dot_e4m3(q, v);
            else
                sums[r] += scale_to_float(s[at], halves) * dot_q8(q, v) + scale_to_float(b[at], halves) * total;
        }
    }
    for (int r = 0; r < GEMV_ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0) out[row + r] = sum;
    }
}

// bf16 weights, up to five matrices with the same x (n = 0: not there). Blocks of 128 threads make 8 outputs.
KERNEL kvdb_gemv_bf16(const float* x, const u16* w0, const u16* w1, const u16* w2, const u16* w3, const u16* w4,
                      float* out0, float* out1, float* out2, float* out3, float* out4, int inner, int n0, int n1,
                      int n2, int n3) {
    extern __shared__ float4 dynamic[];
    float* placed = (float*)dynamic;
    int lane = threadIdx.x & 31, first = blockIdx.x * 4 * GEMV_ROWS;
    const u16* w = w0;
    float* out = out0;
    if (first >= n0) {
        first -= n0;
        w = w1;
        out = out1;
        if (first >= n1) {
            first -= n1;
            w = w2;
            out = out2;
            if (first >= n2) {
                first -= n2;
                w = w3;
                out = out3;
                if (first >= n3) {
                    first -= n3;
                    w = w4;
                    out = out4;
                }
            }
        }
    }
    place_x(x, placed, inner);
    __syncthreads();
    int row = first + (threadIdx.x >> 5) * GEMV_ROWS;
    float sums[GEMV_ROWS] = {0.0f, 0.0f};
#pragma unroll 4
    for (int run = 0; run < inner / 512; run++) {
        float v[16];
        take_x(placed, run, lane, v);
#pragma unroll
        for (int r = 0; r < GEMV_ROWS; r++) {
            const uint4* at = (const uint4*)(w + (u64)(row + r) * inner + run * 512 + lane * 16);
            uint4 p = at[0], q = at[1];
            const u32 words[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
            for (int i = 0; i < 8; i++) {
                sums[r] = fmaf(__uint_as_float(words[i] << 16), v[2 * i], sums[r]);
                sums[r] = fmaf(__uint_as_float(words[i] & 0xFFFF0000u), v[2 * i + 1], sums[r]);
            }
        }
    }
    for (int r = 0; r < GEMV_ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0) out[row + r] = sum;
    }
}

// silu(min(gate, limit)) * clip(up, limit), n values.
KERNEL kvdb_swiglu(const float* gate, const float* up, float* out, int n, float limit) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = swiglu(gate[i], up[i], limit);
}

// ------------------------------------------------------------------------------------------ routed experts, one token

template <int CODES>
DEVICE void up_rows(const float* placed, const int* ids, const float* share, const u32* gw, const u16* gs, const u16* gb,
                    const u32* uw, const u16* us, const u16* ub, float* middle, int inner, int width, int group,
                    float limit, int halves) {
    int lane = threadIdx.x & 31, j = blockIdx.y, groups = inner / group;
    int row = blockIdx.x * 16 + (threadIdx.x >> 5) * GEMV_ROWS;
    u64 base = (u64)ids[j] * width + row;
    float gates[GEMV_ROWS] = {0.0f, 0.0f}, ups[GEMV_ROWS] = {0.0f, 0.0f};
#pragma unroll 2
    for (int run = 0; run < inner / 512; run++) {
        float v[16];
        take_x(placed, run, lane, v);
        float total = sum_16(v);
        int g = (run * 512 + lane * 16) / group;
#pragma unroll
        for (int r = 0; r < GEMV_ROWS; r++) {
            u64 code = (base + r) * (inner / 16) + run * 32 + lane, at = (base + r) * groups + g;
            gates[r] += group_scale<CODES>(gs, at, halves) * dot_16<CODES>(gw, code, v) +
                        group_bias<CODES>(gb, at, halves) * total;
            ups[r] += group_scale<CODES>(us, at, halves) * dot_16<CODES>(uw, code, v) +
                      group_bias<CODES>(ub, at, halves) * total;
        }
    }
    for (int r = 0; r < GEMV_ROWS; r++) {
        float gate = warp_sum(gates[r]), up = warp_sum(ups[r]);
        if (lane == 0) middle[j * width + row + r] = swiglu(gate, up, limit) * share[j];
    }
}

// middle[j] = swiglu(gate_e x, up_e x) * share[j], e = ids[j]. Blocks of 256 threads make 16 outputs of expert
// blockIdx.y; inner a multiple of 512, width of 16.
KERNEL kvdb_experts_up(const float* x, const int* ids, const float* share, const u32* gw, const u16* gs, const u16* gb,
                       const u32* uw, const u16* us, const u16* ub, float* middle, int inner, int width, int group,
                       float limit, int halves, int codes) {
    extern __shared__ float4 dynamic[];
    float* placed = (float*)dynamic;
    place_x(x, placed, inner);
    __syncthreads();
    BY_CODES(up_rows, placed, ids, share, gw, gs, gb, uw, us, ub, middle, inner, width, group, limit, halves);
}

template <int CODES>
DEVICE void down_rows(const float* placed, const int* ids, const u32* w, const u16* s, const u16* b, float* out, int dim,
                      int width, int group, int count, int halves) {
    int lane = threadIdx.x & 31, groups = width / group;
    int row = blockIdx.x * 32 + (threadIdx.x >> 5) * GEMV_ROWS;
    float sums[GEMV_ROWS] = {0.0f, 0.0f};
    for (int j = 0; j < count; j++) {
        u64 base = (u64)ids[j] * dim + row;
#pragma unroll 4
        for (int run = 0; run < width / 512; run++) {
            float v[16];
            take_x(placed + j * width, run, lane, v);
            float total = sum_16(v);
            int g = (run * 512 + lane * 16) / group;
#pragma unroll
            for (int r = 0; r < GEMV_ROWS; r++) {
                u64 at = (base + r) * groups + g;
                float dot = dot_16<CODES>(w, (base + r) * (width / 16) + run * 32 + lane, v);
                sums[r] += group_scale<CODES>(s, at, halves) * dot + group_bias<CODES>(b, at, halves) * total;
            }
        }
    }
    for (int r = 0; r < GEMV_ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0) out[row + r] = sum;
    }
}

// out = sum_j down_e middle[j], e = ids[j]. Blocks of 512 threads make 32 outputs; width a multiple of 512.
KERNEL kvdb_experts_down(const float* middle, const int* ids, const u32* w, const u16* s, const u16* b, float* out,
                         int dim, int width, int group, int count, int halves, int codes) {
    extern __shared__ float4 dynamic[];
    float* placed = (float*)dynamic;
    for (int j = 0; j < count; j++) place_x(middle + j * width, placed + j * width, width);
    __syncthreads();
    BY_CODES(down_rows, placed, ids, w, s, b, out, dim, width, group, count, halves);
}

// ----------------------------------------------------------------------------------------- routed experts, many tokens

#define TILE 64   // rows of one expert that one block multiplies
#define STEP 64   // inner values per step
#define STRIDE 72 // halves per row of a tile in shared memory: no bank conflicts

// Which entry (token * k + j) each row of each tile holds. Every expert's entries, in order, fill whole tiles; rows
// without an entry and tiles without an expert hold -1. One block per expert; n_experts ints of dynamic shared memory.
KERNEL kvdb_experts_plan(const int* ids, int* tile_expert, int* row_entry, int n_entries, int n_experts, int n_tiles) {
    extern __shared__ float4 dynamic[];
    u32* counts = (u32*)dynamic;
    __shared__ float scratch[32];
    __shared__ u32 warps[32];
    int e = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    for (int i = threadIdx.x; i < n_experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_entries; i += blockDim.x) atomicAdd(&counts[ids[i]], 1u);
    __syncthreads();
    float before = 0.0f, all = 0.0f;  // whole numbers below 2^24: exact
    for (int i = threadIdx.x; i < n_experts; i += blockDim.x) {
        float tiles = (float)((counts[i] + TILE - 1) / TILE);
        all += tiles;
        if (i < e) before += tiles;
    }
    int first = (int)block_sum(before, scratch), total = (int)block_sum(all, scratch);
    int mine = (counts[e] + TILE - 1) / TILE;
    for (int i = threadIdx.x; i < mine; i += blockDim.x) tile_expert[first + i] = e;
    for (int i = counts[e] + threadIdx.x; i < mine * TILE; i += blockDim.x) row_entry[first * TILE + i] = -1;
    if (e == n_experts - 1) {
        for (int i = total + threadIdx.x; i < n_tiles; i += blockDim.x) tile_expert[i] = -1;
        for (int i = total * TILE + threadIdx.x; i < n_tiles * TILE; i += blockDim.x) row_entry[i] = -1;
    }
    int done = first * TILE;
    for (int start = 0; start < n_entries; start += blockDim.x) {
        int i = start + threadIdx.x;
        bool hit = i < n_entries && ids[i] == e;
        u32 lanes = __ballot_sync(FULL, hit);
        if (lane == 0) warps[warp] = __popc(lanes);
        __syncthreads();
        int at = done;
        for (int w = 0; w < n_warps; w++) {
            if (w < warp) at += warps[w];
            done += warps[w];
        }
        if (hit) row_entry[at + __popc(lanes & ((1u << lane) - 1u))] = i;
        __syncthreads();
    }
}

// acc += A (TILE rows) x B (128 columns, of which 0..63 are matrix rows first0.. of w0 and 64..127 rows first1.. of w1),
// over all of inner.
// a_rows: for each row of the tile its place in A, -1 for zeros. 256 threads: warps 2 (rows) x 4 (columns); each has 32
// rows and columns c .. c + 15 of both halves, acc[half][row block][column block].
template <int CODES>
DEVICE void tile_product(const u16* a, const int* a_rows, const u32* w0, const u16* s0, const u16* b0, u64 first0,
                         const u32* w1, const u16* s1, const u16* b1, u64 first1, int inner, int group, int halves,
                         u16* a_tile, u16* b_tile, float acc[2][2][2][4]) {
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int warp_row = (warp >> 2) * 32, warp_column = (warp & 3) * 16;
    // This thread copies 16 values of A rows (tid / 8) and (tid / 8 + 32), and the codes of B column tid / 2.
    int a_part = tid & 7, a_row = tid >> 3, column = tid >> 1, half = tid & 1;
    const u32* w = column < 64 ? w0 : w1;
    const u16* s = column < 64 ? s0 : s1;
    const u16* b = column < 64 ? b0 : b1;
    u64 row = column < 64 ? first0 + column : first1 + column - 64;
    u64 pieces = row * (inner / 16), groups = row * (inner / group);
    int source[2] = {a_rows[a_row], a_rows[a_row + 32]};
    uint4 next_a[2];
    uint2 next_b[2];
    float next_scale[2], next_bias[2];
    for (int k = -STEP; k < inner; k += STEP) {
        if (k >= 0) {
            __syncthreads();  // the last step's tiles are read
            for (int i = 0; i < 2; i++)
                *(uint4*)(a_tile + (a_row + 32 * i) * STRIDE + a_part * 8) = next_a[i];
            for (int i = 0; i < 2; i++) {
                u32 packed[8];
                for (int p = 0; p < 8; p++) {
                    float low = code_value<CODES>(next_b[i], 2 * p), high = code_value<CODES>(next_b[i], 2 * p + 1);
                    packed[p] = pack_bf16(fmaf(low, next_scale[i], next_bias[i]), fmaf(high, next_scale[i], next_bias[i]));
                }
                uint4* to = (uint4*)(b_tile + column * STRIDE + (half * 2 + i) * 16);
                to[0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
                to[1] = make_uint4(packed[4], packed[5], packed[6], packed[7]);
            }
            __syncthreads();
        }
        int n = k + STEP;
        if (n < inner) {
            for (int i = 0; i < 2; i++) {
                next_a[i] = make_uint4(0, 0, 0, 0);
                if (source[i] >= 0) next_a[i] = *(const uint4*)(a + (u64)source[i] * inner + n + a_part * 8);
                int at = n + (half * 2 + i) * 16;
                next_b[i] = codes_16<CODES>(w, pieces + at / 16);
                next_scale[i] = group_scale<CODES>(s, groups + at / group, halves);
                next_bias[i] = group_bias<CODES>(b, groups + at / group, halves);
            }
        }
        if (k < 0) continue;
#pragma unroll
        for (int inner_step = 0; inner_step < STEP; inner_step += 16) {
            u32 af[2][4];
            for (int m = 0; m < 2; m++) {
                const u16* from = a_tile + (warp_row + m * 16 + (lane >> 2)) * STRIDE + inner_step + (lane & 3) * 2;
                af[m][0] = *(const u32*)from;
                af[m][1] = *(const u32*)(from + 8 * STRIDE);
                af[m][2] = *(const u32*)(from + 8);
                af[m][3] = *(const u32*)(from + 8 * STRIDE + 8);
            }
            for (int h = 0; h < 2; h++)
                for (int c = 0; c < 2; c++) {
                    u32 bf[2];
                    const u16* from =
                        b_tile + (h * 64 + warp_column + c * 8 + (lane >> 2)) * STRIDE + inner_step + (lane & 3) * 2;
                    bf[0] = *(const u32*)from;
                    bf[1] = *(const u32*)(from + 8);
                    for (int m = 0; m < 2; m++) mma_bf16(acc[h][m][c], af[m], bf);
                }
        }
    }
}

// middle[row] = swiglu(gate x, up x) * share as bf16, per tile. x: (tokens, inner) bf16. Grid: (width / 64, tiles).
KERNEL kvdb_experts_up_tiles(const u16* x, const int* tile_expert, const int* row_entry, const float* share,
                             const u32* gw, const u16* gs, const u16* gb, const u32* uw, const u16* us, const u16* ub,
                             u16* middle, int inner, int width, int group, int k, float limit, int halves,
                             int codes) {
    __shared__ __align__(16) u16 a_tile[TILE * STRIDE];
    __shared__ __align__(16) u16 b_tile[128 * STRIDE];
    __shared__ int rows[TILE];
    int tile = blockIdx.y, e = tile_expert[tile];
    if (e < 0) return;
    if (threadIdx.x < TILE) {
        int entry = row_entry[tile * TILE + threadIdx.x];
        rows[threadIdx.x] = entry < 0 ? -1 : entry / k;
    }
    __syncthreads();
    u64 first = (u64)e * width + blockIdx.x * 64;
    float acc[2][2][2][4];
    for (int i = 0; i < 32; i++) ((float*)acc)[i] = 0.0f;
    BY_CODES(tile_product, x, rows, gw, gs, gb, first, uw, us, ub, first, inner, group, halves, a_tile, b_tile, acc);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int m = 0; m < 2; m++)
        for (int upper = 0; upper < 2; upper++) {
            int row = (warp >> 2) * 32 + m * 16 + upper * 8 + (lane >> 2);
            int entry = row_entry[tile * TILE + row];
            float part = entry < 0 ? 0.0f : share[entry];
            for (int c = 0; c < 2; c++) {
                const float *g = acc[0][m][c] + upper * 2, *u = acc[1][m][c] + upper * 2;
                int column = blockIdx.x * 64 + (warp & 3) * 16 + c * 8 + (lane & 3) * 2;
                *(u32*)(middle + ((u64)tile * TILE + row) * width + column) =
                    pack_bf16(swiglu(g[0], u[0], limit) * part, swiglu(g[1], u[1], limit) * part);
            }
        }
}

// out[entry] = down middle[row]. Grid: (dim / 128, tiles).
KERNEL kvdb_experts_down_tiles(const u16* middle, const int* tile_expert, const int* row_entry, const u32* w,
                               const u16* s, const u16* b, float* out, int dim, int width, int group, int halves,
                               int codes) {
    __shared__ __align__(16) u16 a_tile[TILE * STRIDE];
    __shared__ __align__(16) u16 b_tile[128 * STRIDE];
    __shared__ int rows[TILE];
    int tile = blockIdx.y, e = tile_expert[tile];
    if (e < 0) return;
    if (threadIdx.x < TILE)
        rows[threadIdx.x] = row_entry[tile * TILE + threadIdx.x] < 0 ? -1 : tile * TILE + (int)threadIdx.x;
    __syncthreads();
    u64 first = (u64)e * dim + blockIdx.x * 128;
    float acc[2][2][2][4];
    for (int i = 0; i < 32; i++) ((float*)acc)[i] = 0.0f;
    BY_CODES(tile_product, middle, rows, w, s, b, first, w, s, b, first + 64, width, group, halves, a_tile, b_tile, acc);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int m = 0; m < 2; m++)
        for (int upper = 0; upper < 2; upper++) {
            int entry = row_entry[tile * TILE + (warp >> 2) * 32 + m * 16 + upper * 8 + (lane >> 2)];
            if (entry < 0) continue;
            for (int h = 0; h < 2; h++)
                for (int c = 0; c < 2; c++) {
                    int column = blockIdx.x * 128 + h * 64 + (warp & 3) * 16 + c * 8 + (lane & 3) * 2;
                    float2* to = (float2*)(out + (u64)entry * dim + column);
                    *to = make_float2(acc[h][m][c][upper * 2], acc[h][m][c][upper * 2 + 1]);
                }
        }
}

// ------------------------------------------------------------------------------------------------ attention, one token

#define ATTEND_WARPS 16
#define ATTEND_PARTS 4  // float4s per lane: head_dim <= 512

// One query per head over the window rows `near`, then the rows of `far` (those that `picked` names, or the first
// n_far), and a sink; the result is turned back by the token's angles. head_dim a multiple of 128.
KERNEL kvdb_attend(const float* queries, const u16* near, const u16* far, const int* picked, const float* sinks,
                   const float* cosines, const float* sines, float* out, int dim, int n_near, int n_far, int has_picked,
                   int pairs) {
    __shared__ float tops[ATTEND_WARPS], sums[ATTEND_WARPS];
    extern __shared__ float4 dynamic[];  // ATTEND_WARPS * dim floats
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x, parts = dim / 128;
    float4 q[ATTEND_PARTS], acc[ATTEND_PARTS];
#pragma unroll
    for (int c = 0; c < ATTEND_PARTS; c++) {
        acc[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        q[c] = c < parts ? ((const float4*)(queries + (u64)head * dim))[c * 32 + lane] : acc[c];
    }
    float top = -1.0e30f, sum = 0.0f;
    int n = n_near + n_far;
#pragma unroll 2
    for (int i = warp; i < n; i += ATTEND_WARPS) {
        const u16* row = near + (u64)i * dim;
        if (i >= n_near) row = far + (u64)(has_picked ? picked[i - n_near] : i - n_near) * dim;
        float4 v[ATTEND_PARTS];
        float score = 0.0f;
#pragma unroll
        for (int c = 0; c < ATTEND_PARTS; c++) {
            v[c] = c < parts ? four_halves(row, c * 32 + lane) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            score = fmaf(v[c].x, q[c].x, fmaf(v[c].y, q[c].y, fmaf(v[c].z, q[c].z, fmaf(v[c].w, q[c].w, score))));
        }
        score = warp_sum(score);
        float higher = fmaxf(top, score), old = expf(top - higher), e = expf(score - higher);
        top = higher;
        sum = sum * old + e;
#pragma unroll
        for (int c = 0; c < ATTEND_PARTS; c++) {
            acc[c].x = fmaf(e, v[c].x, acc[c].x * old);
            acc[c].y = fmaf(e, v[c].y, acc[c].y * old);
            acc[c].z = fmaf(e, v[c].z, acc[c].z * old);
            acc[c].w = fmaf(e, v[c].w, acc[c].w * old);
        }
    }
    if (lane == 0) {
        tops[warp] = top;
        sums[warp] = sum;
    }
#pragma unroll
    for (int c = 0; c < ATTEND_PARTS; c++)
        if (c < parts) dynamic[warp * (dim / 4) + c * 32 + lane] = acc[c];
    __syncthreads();
    float highest = sinks[head], total = 0.0f;
    for (int w = 0; w < ATTEND_WARPS; w++) highest = fmaxf(highest, tops[w]);
    for (int w = 0; w < ATTEND_WARPS; w++) total += sums[w] * expf(tops[w] - highest);
    total += expf(sinks[head] - highest);
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        // Both values of a RoPE pair: each thread of a pair adds up both.
        int nope = dim - 2 * pairs, even = d & ~1;
        float a = 0.0f, b = 0.0f;
        for (int w = 0; w < ATTEND_WARPS; w++) {
            float share = expf(tops[w] - highest);
            a = fmaf(share, ((float*)dynamic)[w * dim + even], a);
            b = fmaf(share, ((float*)dynamic)[w * dim + even + 1], b);
        }
        a = a / total;
        b = b / total;
        float v = d & 1 ? b : a;
        if (d >= nope) {
            float c = cosines[(d - nope) >> 1], s = -sines[(d - nope) >> 1];
            v = d & 1 ? a * s + b * c : a * c - b * s;
        }
        out[(u64)head * dim + d] = v;
    }
}
