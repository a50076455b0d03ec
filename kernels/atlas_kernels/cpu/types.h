// What the kernels and their callers share: the structs of the C interface, the small number formats, scratch memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

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

// The packed weight of reference.py and the activations it is multiplied with; everything contiguous.
struct Linear {
    const float *x; // [rows, inputs]
    int64_t rows, inputs, outputs, block, slots;
    const uint8_t *codes;  // [outputs, inputs]
    const Brain *scales;   // [outputs, inputs / block rounded up]
    const void *index;     // [outputs, slots] int16, or int32 where wide_index
    const Half *outliers;  // [outputs, slots]
    const float *bias;     // [outputs] or null
    float *out;            // [rows, outputs]
    int32_t mantissa, wide_index, level, threads;
};

// A code's value, exactly: sign, 7 - mantissa bits of exponent, mantissa; 0 in the exponent marks the subnormals.
inline float value_of(int code, int mantissa) {
    const int bias = (1 << (6 - mantissa)) - 1, exponent = (code & 0x7F) >> mantissa;
    const int fraction = code & ((1 << mantissa) - 1);
    const float size = exponent ? std::ldexp(static_cast<float>(fraction + (1 << mantissa)), exponent - bias - mantissa)
                                : std::ldexp(static_cast<float>(fraction), 1 - bias - mantissa);
    return code & 0x80 ? -size : size;
}

// The code's bits at a half's places give its value divided by this.
inline float half_factor(int mantissa) { return std::ldexp(1.0f, 16 - (1 << (6 - mantissa))); }

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

} // namespace atlas
