// Vectors of 16 floats. Included inside a namespace with TARGET set; see atlas.cpp.
using V = __m512;
constexpr int W = 16, HEADS = 4; // query heads in one tile: HEADS x 4 accumulators fit the 32 registers

INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1 << n) - 1); }
INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, V v) { _mm512_storeu_ps(p, v); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float sum_of(V v) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
INLINE V maximum(V a, V b) { return _mm512_max_ps(a, b); } // b when either is NaN
INLINE V minimum(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V rounded(V a) { return _mm512_roundscale_ps(a, 0); }
INLINE V two_to(V n) { return _mm512_scalef_ps(set1(1.0f), n); }
INLINE V zero_below(V value, V x, float limit) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, set1(limit), _CMP_LT_OQ), _mm512_setzero_ps());
}
// `inside` where lane index + base is in [low, high), else `outside`.
INLINE V within(V inside, float outside, int base, int low, int high) {
    __m512i index = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                     _mm512_set1_epi32(base));
    __mmask16 in = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(low)) &
                   _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(high));
    return _mm512_mask_mov_ps(set1(outside), in, inside);
}

// The first n <= W elements, zeros after them; nothing behind them is read.
INLINE V read(const float *p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
INLINE V read(const Half *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE V read(const Brain *p, int n) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE V read(const int8_t *p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
}

// rows[i] lane j becomes rows[j] lane i.
INLINE void transpose(V *rows) {
    V a[16];
    for (int i = 0; i < 16; i += 4) {
        V lo01 = _mm512_unpacklo_ps(rows[i], rows[i + 1]), hi01 = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        V lo23 = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), hi23 = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
        a[i] = _mm512_shuffle_ps(lo01, lo23, 0x44);
        a[i + 1] = _mm512_shuffle_ps(lo01, lo23, 0xEE);
        a[i + 2] = _mm512_shuffle_ps(hi01, hi23, 0x44);
        a[i + 3] = _mm512_shuffle_ps(hi01, hi23, 0xEE);
    }
    for (int i = 0; i < 4; ++i) { // a[i + 4g] holds columns i, i + 4, i + 8, i + 12 of rows 4g .. 4g + 3
        V x = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), y = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        V z = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD), w = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xDD);
        rows[i] = _mm512_shuffle_f32x4(x, y, 0x88);
        rows[i + 4] = _mm512_shuffle_f32x4(z, w, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(x, y, 0xDD);
        rows[i + 12] = _mm512_shuffle_f32x4(z, w, 0xDD);
    }
}
