// Kernels for the CPU behind a plain C interface. One translation unit: the bodies in attention.h and linear.h are
// compiled once for each instruction set, and what the processor has is asked at run time. No option of the compiler
// names an instruction set, so the same file runs everywhere.
//
// Numbers: float32 throughout. Every function returns 0, or a negative code (see Status).

#include "pool.h"
#include "types.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace atlas {

#define INLINE TARGET static inline __attribute__((always_inline))

#define DECODE_TABLE 0
#define DECODE_HALF 1
#define DECODE_BYTES 2

namespace portable {
#define TARGET
#define DECODE DECODE_TABLE
#include "simd_portable.h"
#include "attention.h"
#include "decode.h"
#include "linear.h"
#include "panel.h"
#undef DECODE
#undef TARGET
} // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define DECODE DECODE_HALF
#include "simd_avx2.h"
#include "attention.h"
#include "decode.h"
#include "linear.h"
#include "panel.h"
#undef DECODE
#undef TARGET
} // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define DECODE DECODE_HALF
#define WIDE
#include "simd_avx512.h"
#include "attention.h"
#include "decode.h"
#include "linear.h"
#include "panel.h"
#undef WIDE
#undef DECODE
#undef TARGET
} // namespace avx512

namespace vbmi {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#define DECODE DECODE_BYTES
#include "simd_avx512.h"
#include "decode.h"
#include "linear.h"
#undef DECODE
#undef TARGET
} // namespace vbmi
#endif

using Unit = void (*)(const Attention &, int64_t, int64_t, int64_t, Scratch &, float *, float *);
using Row = void (*)(const Merge &, int64_t, int64_t);

using Arrange = void (*)(const Linear &, int64_t, float *);
using Outputs = void (*)(const Linear &, const float *, int64_t, int64_t, int64_t, float *);
using Panel = void (*)(const Linear &, int64_t, int64_t, float *);
using Read = float (*)(const float *, int64_t);

struct Kernels {
    Unit unit;
    Row row;
    Arrange arrange;
    Outputs outputs;
    Panel panel;
    Read read;
};

inline int best_level() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C); // older compilers do not know it by name
    __builtin_cpu_init();
    if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
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
        {portable::attend_unit, portable::merge_row, portable::arrange, portable::linear_unit, portable::panel_unit,
         portable::read_unit},
#if defined(__x86_64__)
        {avx2::attend_unit, avx2::merge_row, avx2::arrange, avx2::linear_unit, avx2::panel_unit, avx2::read_unit},
        {avx512::attend_unit, avx512::merge_row, avx512::arrange, avx512::linear_unit, avx512::panel_unit,
         avx512::read_unit},
        {avx512::attend_unit, avx512::merge_row, vbmi::arrange, vbmi::linear_unit, avx512::panel_unit,
         vbmi::read_unit},
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

constexpr int64_t kLinearStep = 64; // a multiple of every CHUNK

struct Rows { // the units of one call: runs of outputs
    const Linear *a;
    const Kernels *k;
    const float *x;
    int64_t stride, each;
    float *scratch; // [pieces, stride], or null where no unit needs any
};

inline void run_rows(void *context, int64_t piece) {
    const Rows &all = *static_cast<Rows *>(context);
    const int64_t from = piece * all.each, to = from + all.each;
    float *w = all.scratch ? all.scratch + piece * all.stride : nullptr;
    all.k->outputs(*all.a, all.x, all.stride, from, to < all.a->outputs ? to : all.a->outputs, w);
}

inline int run_linear(const Linear &a, const Kernels *k) {
    Rows all;
    all.a = &a;
    all.k = k;
    all.stride = (a.inputs + kLinearStep - 1) / kLinearStep * kLinearStep;
    all.each = ((1 << 16) / a.inputs + 4) / 4 * 4; // some 64 KiB of codes
    const int64_t pieces = (a.outputs + all.each - 1) / all.each;
    const bool any = a.block % kLinearStep != 0;
    Floats memory = floats((a.rows + (any ? pieces : 0)) * all.stride);
    if (!memory) return kNoMemory;
    all.x = memory.get();
    all.scratch = any ? memory.get() + a.rows * all.stride : nullptr;
    k->arrange(a, all.stride, memory.get());
    const bool small = a.inputs * a.outputs * (a.rows + 3) < (1 << 20); // less than some 20 us
    pool().run(run_rows, &all, pieces, small ? 1 : a.threads);
    return kDone;
}

struct Decoding { // the units of one call: runs of outputs of [from, to)
    const Linear *a;
    const Kernels *k;
    int64_t from, to, each;
};

inline void run_panel(void *context, int64_t piece) {
    const Decoding &all = *static_cast<Decoding *>(context);
    const int64_t from = all.from + piece * all.each, to = from + all.each;
    all.k->panel(*all.a, from, to < all.to ? to : all.to, all.a->out + (from - all.from) * all.a->inputs);
}

struct Reading {
    const float *at;
    int64_t count;
    const Kernels *k;
    std::atomic<float> sum{0.0f};
};

constexpr int64_t kReadPiece = 1 << 16;

inline void run_read(void *context, int64_t piece) {
    Reading &r = *static_cast<Reading *>(context);
    const int64_t from = piece * kReadPiece, rest = r.count - from;
    r.sum = r.k->read(r.at + from, rest < kReadPiece ? rest : kReadPiece); // stored so that it is not left out
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

// x [rows, inputs] times the packed weight transposed, plus bias: out [rows, outputs].
EXPORT int atlas_linear(const atlas::Linear *a) {
    const atlas::Kernels *k = atlas::kernels(a->level);
    return k ? atlas::run_linear(*a, k) : atlas::kNoSuchLevel;
}

// Outputs [from, to) of the weight as floats: a->out [to - from, inputs]. The activations are not used.
EXPORT int atlas_panel(const atlas::Linear *a, int64_t from, int64_t to) {
    const atlas::Kernels *k = atlas::kernels(a->level);
    if (!k) return atlas::kNoSuchLevel;
    atlas::Decoding all{a, k, from, to, (1 << 15) / a->inputs + 1};
    atlas::pool().run(atlas::run_panel, &all, (to - from + all.each - 1) / all.each, a->threads);
    return atlas::kDone;
}

// Reads `count` floats once, on up to `threads` threads: the limit that a benchmark sets the kernels against.
EXPORT int atlas_read(const float *at, int64_t count, int level, int threads) {
    const atlas::Kernels *k = atlas::kernels(level);
    if (!k) return atlas::kNoSuchLevel;
    atlas::Reading r;
    r.at = at;
    r.count = count;
    r.k = k;
    atlas::pool().run(atlas::run_read, &r, (count + atlas::kReadPiece - 1) / atlas::kReadPiece, threads);
    return atlas::kDone;
}
