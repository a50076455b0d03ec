// Kernels for the CPU behind a plain C interface. One translation unit: the bodies in attention.h are
// compiled once for each instruction set, and what the processor has is asked at run time. No option of the compiler
// names an instruction set, so the same file runs everywhere.
//
// Numbers: float32 throughout. Every function returns 0, or a negative code (see Status).

#include "pool.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace atlas {

enum Status : int { kDone = 0, kNoSuchLevel = -1, kNoMemory = -2 };
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kVbmi = 3 };
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3 };

constexpr int kBlock = 64;       // tokens in a KV block
constexpr int kSplitBlocks = 16; // blocks in a split

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline float number(float x) { return x; }
inline float number(int8_t x) { return x; }
inline float number(Brain x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float number(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400) return from_bits(sign | 0x3F800000) * (static_cast<float>(rest) * 0x1p-24f); // no denormal input
    return from_bits(sign | ((rest << 13) + 0x38000000));
}

// Field by field what attention_cpu.py fills in.
struct Attention {
    const float *q;                      // [rows, heads, dim] by the two strides, dim contiguous
    int64_t q_row_stride, q_head_stride; // in floats
    int64_t rows, heads, kv_heads, dim;
    const int64_t *positions; // [rows]
    // [count] addresses; `offset` bytes further lies the layer's slice: K [G, 64, D], V [G, 64, D], then for int8
    // float16 scales [2, G, 64]. The first block starts at position `first`, a multiple of 64.
    const int64_t *blocks;
    int64_t count, first, offset;
    int64_t window;           // 0: none
    const float *sinks;       // [heads] or null; used where partials are merged
    float scale, softcap;     // softcap 0: none
    int32_t dtype, level, threads;
};

struct Merge {
    const float *parts, *part_lse; // [S, T, H, D], [S, H, T]
    int64_t splits, rows, heads, dim;
    const float *sinks;
    float *out, *lse;
};

// The keys [low, high) of the block at `base` that a row at `position` sees.
inline void seen(const Attention &a, int64_t position, int64_t base, int &low, int &high) {
    const int64_t from = a.window ? position - a.window + 1 - base : 0, to = position + 1 - base;
    low = static_cast<int>(from < 0 ? 0 : from > kBlock ? kBlock : from);
    high = static_cast<int>(to < 0 ? 0 : to > kBlock ? kBlock : to);
}

// How many keys of the block are read: up to the last one that a row sees; 0 when none does.
inline int keys_in(const Attention &a, int64_t base) {
    int most = 0;
    for (int64_t t = 0; t < a.rows; ++t) {
        int low, high;
        seen(a, a.positions[t], base, low, high);
        if (low < high && high > most) most = high;
    }
    return most;
}

struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats floats(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    return Floats(static_cast<float *>(std::aligned_alloc(64, bytes ? bytes : 64)));
}

// Memory that is wanted soon: `jump` further lies a second run of the same length. Fetched a little at a time among
// the arithmetic, which would otherwise alternate with waiting.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    int64_t jump = 0;
    int lines = 0; // in one step

    void step() {
        for (int i = 0; i < lines && at < end; ++i, at += 64) {
            __builtin_prefetch(at, 0, 2);
            __builtin_prefetch(at + jump, 0, 2);
        }
    }
};

struct Scratch { // of one thread, for one unit
    float *keys, *values, *q, *acc, *top, *sum;
    Ahead ahead;
};

inline int64_t scratch_floats(const Attention &a) {
    const int64_t padded = (a.dim + 15) / 16 * 16, all = a.rows * (a.heads / a.kv_heads);
    return 2 * kBlock * padded + all * (2 * padded + 2) + 64;
}

inline Scratch divide(const Attention &a, float *at) {
    const int64_t padded = (a.dim + 15) / 16 * 16, all = a.rows * (a.heads / a.kv_heads);
    Scratch s;
    s.keys = at;
    s.values = s.keys + kBlock * padded;
    s.q = s.values + kBlock * padded;
    s.acc = s.q + all * padded;
    s.top = s.acc + all * padded;
    s.sum = s.top + all;
    return s;
}

// The next block's K and V of one head, in `steps` steps.
inline Ahead ahead_of(const Attention &a, int64_t block, int64_t head, int n, int64_t steps) {
    const int64_t width = a.dtype == kFloat32 ? 4 : a.dtype == kInt8 ? 1 : 2, size = kBlock * a.dim * width;
    Ahead next;
    next.at = reinterpret_cast<const char *>(a.blocks[block] + a.offset) + head * size;
    next.end = next.at + n * a.dim * width;
    next.jump = a.kv_heads * size;
    next.lines = static_cast<int>(n * a.dim * width / 64 / steps + 1);
    return next;
}

#define INLINE TARGET static inline __attribute__((always_inline))

namespace portable {
#define TARGET
#include "simd_portable.h"
#include "attention.h"
#undef TARGET
} // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "simd_avx2.h"
#include "attention.h"
#undef TARGET
} // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#include "simd_avx512.h"
#include "attention.h"
#undef TARGET
} // namespace avx512
#endif

using Unit = void (*)(const Attention &, int64_t, int64_t, int64_t, Scratch &, float *, float *);
using Row = void (*)(const Merge &, int64_t, int64_t);

struct Kernels {
    Unit unit;
    Row row;
};

inline int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return kPortable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return kAvx2;
    return __builtin_cpu_supports("avx512vbmi") ? kVbmi : kAvx512;
#else
    return kPortable;
#endif
}

// Null for a level that this processor has not.
inline const Kernels *kernels(int level) {
    static const int best = best_level();
    static const Kernels all[] = {
        {portable::attend_unit, portable::merge_row},
#if defined(__x86_64__)
        {avx2::attend_unit, avx2::merge_row},
        {avx512::attend_unit, avx512::merge_row},
        {avx512::attend_unit, avx512::merge_row},
#endif
    };
    return level < 0 || level > best ? nullptr : &all[level];
}

struct Splits { // the units of one call: KV heads x splits
    const Attention *a;
    const Kernels *k;
    int64_t from; // number of the split that holds the first block
    float *parts, *part_lse;
    std::atomic<bool> failed{false};
};

inline void run_split(void *context, int64_t piece) {
    Splits &all = *static_cast<Splits *>(context);
    const Attention &a = *all.a;
    const int64_t split = piece / a.kv_heads, head = piece % a.kv_heads, skipped = a.first / kBlock;
    int64_t first = (all.from + split) * kSplitBlocks - skipped, last = first + kSplitBlocks;
    if (first < 0) first = 0;
    if (last > a.count) last = a.count;
    Floats memory = floats(scratch_floats(a));
    if (!memory) {
        all.failed = true;
        return;
    }
    Scratch s = divide(a, memory.get());
    const int64_t each = a.rows * a.heads;
    all.k->unit(a, head, first, last, s, all.parts + split * each * a.dim, all.part_lse + split * each);
}

inline int64_t first_split(const Attention &a) { return a.first / kBlock / kSplitBlocks; }
inline int64_t split_count(const Attention &a) {
    return a.count ? (a.first / kBlock + a.count - 1) / kSplitBlocks - first_split(a) + 1 : 0;
}

inline int run_splits(const Attention &a, const Kernels *k, float *parts, float *part_lse) {
    Splits all;
    all.a = &a;
    all.k = k;
    all.from = first_split(a);
    all.parts = parts;
    all.part_lse = part_lse;
    // Less than some 20 us of work is not worth another thread.
    const bool small = a.count * kBlock * a.dim * (a.kv_heads + a.heads * a.rows / 4) < (1 << 19);
    pool().run(run_split, &all, split_count(a) * a.kv_heads, small ? 1 : a.threads);
    return all.failed ? kNoMemory : kDone;
}

} // namespace atlas

EXPORT int atlas_best_level() { return atlas::best_level(); }

// How many splits the blocks of the call touch.
EXPORT int64_t atlas_split_count(const atlas::Attention *a) { return atlas::split_count(*a); }

// Each split by itself: parts [S, T, H, D], lse [S, H, T]. A row that sees nothing of a split gets 0 and -inf.
EXPORT int atlas_attend_splits(const atlas::Attention *a, float *parts, float *part_lse) {
    const atlas::Kernels *k = atlas::kernels(a->level);
    return k ? atlas::run_splits(*a, k, parts, part_lse) : atlas::kNoSuchLevel;
}

// Partials of the same shape as above, joined in ascending order: out [T, H, D], lse [H, T].
EXPORT int atlas_merge(const atlas::Merge *m, int level) {
    const atlas::Kernels *k = atlas::kernels(level);
    if (!k) return atlas::kNoSuchLevel;
    atlas::NoDenormals guard;
    for (int64_t t = 0; t < m->rows; ++t)
        for (int64_t h = 0; h < m->heads; ++h) k->row(*m, t, h);
    return atlas::kDone;
}

// All splits and their merge.
EXPORT int atlas_attend(const atlas::Attention *a, float *out, float *lse) {
    const atlas::Kernels *k = atlas::kernels(a->level);
    if (!k) return atlas::kNoSuchLevel;
    const int64_t splits = atlas::split_count(*a), each = a->rows * a->heads;
    atlas::Floats memory = atlas::floats(splits * each * (a->dim + 1));
    if (!memory) return atlas::kNoMemory;
    float *parts = memory.get(), *part_lse = parts + splits * each * a->dim;
    if (int failed = atlas::run_splits(*a, k, parts, part_lse)) return failed;
    const atlas::Merge m{parts, part_lse, splits, a->rows, a->heads, a->dim, a->sinks, out, lse};
    return atlas_merge(&m, a->level);
}
