// Vectors of 8 floats. Included inside a namespace with TARGET set; see atlas.cpp.
using V = __m256;
constexpr int W = 8, HEADS = 2; // query heads in one tile: HEADS x 4 accumulators fit the 16 registers

INLINE V set1(float x) { return _mm256_set1_ps(x); }
INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, V v) { _mm256_storeu_ps(p, v); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float sum_of(V v) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
INLINE V maximum(V a, V b) { return _mm256_max_ps(a, b); } // b when either is NaN
INLINE V minimum(V a, V b) { return _mm256_min_ps(a, b); }
INLINE V rounded(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V two_to(V n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE V zero_below(V value, V x, float limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(limit), _CMP_LT_OQ), value);
}
INLINE __m256i lane_index(int base) {
    return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
}
// `inside` where lane index + base is in [low, high), else `outside`.
INLINE V within(V inside, float outside, int base, int low, int high) {
    __m256i index = lane_index(base);
    __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), index),
                                  _mm256_cmpgt_epi32(index, _mm256_set1_epi32(high - 1)));
    return _mm256_blendv_ps(inside, set1(outside), _mm256_castsi256_ps(out));
}

// The first n <= W elements, zeros after them; nothing behind them is read.
INLINE V read(const float *p, int n) {
    if (n >= W) return load(p);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_index(0)));
}
INLINE __m128i sixteen_bits(const void *p, int n) {
    alignas(16) uint16_t part[8] = {};
    if (n >= W) return _mm_loadu_si128(static_cast<const __m128i *>(p));
    std::memcpy(part, p, static_cast<size_t>(n) * 2);
    return _mm_load_si128(reinterpret_cast<const __m128i *>(part));
}
INLINE V read(const Half *p, int n) { return _mm256_cvtph_ps(sixteen_bits(p, n)); }
INLINE V read(const Brain *p, int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen_bits(p, n)), 16));
}
INLINE V read(const int8_t *p, int n) {
    int64_t part = 0;
    std::memcpy(&part, p, static_cast<size_t>(n < W ? n : W));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(part)));
}

// rows[i] lane j becomes rows[j] lane i.
INLINE void transpose(V *rows) {
    V a[8];
    for (int i = 0; i < 8; i += 4) {
        V lo01 = _mm256_unpacklo_ps(rows[i], rows[i + 1]), hi01 = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        V lo23 = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]), hi23 = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        a[i] = _mm256_shuffle_ps(lo01, lo23, 0x44);
        a[i + 1] = _mm256_shuffle_ps(lo01, lo23, 0xEE);
        a[i + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
        a[i + 3] = _mm256_shuffle_ps(hi01, hi23, 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
}
