// Runs CUDA kernels on a processor, one thread of a block after the other: each is a fiber that gives way at barriers and
// warp exchanges. Slow and exact; for tests of ops_mlx_kernels.cu where there is no GPU.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define KVDB_EMULATED
#define DEVICE static inline
#define KERNEL static void
#define FULL 0xffffffffu
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define __syncthreads() block_barrier()
#define __syncwarp() warp_barrier()

struct dim3 { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
static float4 dynamic[1 << 14];

struct Fiber { ucontext_t context; std::vector<char> stack; unsigned id, exchanges; bool done; };
struct Warp { uint64_t slots[2][32][8]; unsigned arrived, generation, alive; };
static std::vector<Fiber> fibers;
static std::vector<Warp> warps_;
static ucontext_t scheduler;
static unsigned current, arrived, generation, alive;
static std::function<void()> body;

static void give_way() { swapcontext(&fibers[current].context, &scheduler); }

static void block_barrier() {
    unsigned mine = generation;
    if (++arrived == alive) { arrived = 0; generation++; return; }
    while (generation == mine) give_way();
}

static void warp_barrier() {
    Warp& warp = warps_[current / 32];
    unsigned mine = warp.generation;
    if (++warp.arrived == warp.alive) { warp.arrived = 0; warp.generation++; return; }
    while (warp.generation == mine) give_way();
}

// Everyone's value, by lane. Two sets of slots alternate: nobody fills one before everybody has read it.
template <class T> static uint64_t (*exchange(T value))[8] {
    unsigned parity = fibers[current].exchanges++ & 1;
    Warp& warp = warps_[current / 32];
    memset(warp.slots[parity][current % 32], 0, sizeof(uint64_t) * 8);
    memcpy(warp.slots[parity][current % 32], &value, sizeof value);
    warp_barrier();
    return warp.slots[parity];
}
template <class T> static T lane_value(uint64_t (*slots)[8], unsigned lane) {
    T value;
    memcpy(&value, slots[lane], sizeof value);
    return value;
}
template <class T> static T __shfl_xor_sync(unsigned, T v, int mask) {
    return lane_value<T>(exchange(v), (current % 32) ^ mask);
}
template <class T> static T __shfl_up_sync(unsigned, T v, int by) {
    unsigned lane = current % 32;
    return lane_value<T>(exchange(v), (int)lane >= by ? lane - by : lane);
}
static unsigned __ballot_sync(unsigned, bool v) {
    auto slots = exchange((unsigned)v);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++) bits |= lane_value<unsigned>(slots, lane) << lane;
    return bits;
}
static int __popc(unsigned v) { return __builtin_popcount(v); }
static unsigned atomicAdd(unsigned* at, unsigned v) { unsigned old = *at; *at += v; return old; }
static unsigned atomicMax(unsigned* at, unsigned v) { unsigned old = *at; *at = std::max(old, v); return old; }
static float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
static float half_to_float(uint16_t h) { _Float16 v; memcpy(&v, &h, 2); return (float)v; }
static uint16_t float_to_half(float f) { _Float16 v = (_Float16)f; uint16_t h; memcpy(&h, &v, 2); return h; }
static unsigned bf16_bits(float f) { unsigned v = __float_as_uint(f); return (v + 0x7FFFu + (v >> 16 & 1)) >> 16; }
static unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

struct Fragments { unsigned a[4], b[2]; };
static void mma_bf16(float* c, const unsigned* a, const unsigned* b) {
    Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    auto slots = exchange(mine);
    unsigned lane = current % 32;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4 + (i / 2) * 8, column = (lane % 4) * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            unsigned shift = k % 2 * 16, part = k % 8 / 2;
            auto left = lane_value<Fragments>(slots, (row % 8) * 4 + part);
            auto right = lane_value<Fragments>(slots, column * 4 + part);
            c[i] += __uint_as_float((left.a[row / 8 + 2 * (k / 8)] >> shift & 0xFFFF) << 16) *
                    __uint_as_float((right.b[k / 8] >> shift & 0xFFFF) << 16);
        }
    }
}

static void enter() {
    body();
    Fiber& fiber = fibers[current];
    fiber.done = true;
    Warp& warp = warps_[current / 32];
    if (--warp.alive && warp.arrived == warp.alive) { warp.arrived = 0; warp.generation++; }
    if (--alive && arrived == alive) { arrived = 0; generation++; }
    give_way();
}

static void run_grid(unsigned grid_x, unsigned grid_y, unsigned threads, std::function<void()> kernel) {
    body = kernel;
    gridDim = {grid_x, grid_y, 1};
    blockDim = {threads, 1, 1};
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned block = 0; block < grid_x * grid_y; block++) {
        blockIdx = {block % grid_x, block / grid_x, 0};
        warps_.assign((threads + 31) / 32, Warp{});
        alive = threads, arrived = generation = 0;
        memset(dynamic, 0xFF, sizeof dynamic);  // NaN: nobody may read what nobody wrote
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = fibers[i];
            fiber.stack.resize(64 << 10);
            fiber.id = i, fiber.exchanges = 0, fiber.done = false;
            warps_[i / 32].alive++;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, enter, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (current = 0; current < threads; current++) {
                if (fibers[current].done) continue;
                left = true;
                threadIdx = {current, 0, 0};
                swapcontext(&scheduler, &fibers[current].context);
            }
        }
    }
}
