// The 8-bit float as vectors of float32: 4 W codes at a time. Included once for each instruction set, with DECODE
// saying how: a table of floats, IEEE halves (see README), or tables of bytes (VBMI).
//
// decode() gives values that FACTOR (a power of two) times the scale makes right. `place(j, i)` says which of the codes
// lane i of vector j holds: activations are laid out to match.

constexpr int CHUNK = 4 * W;

#if DECODE == DECODE_TABLE
struct Decoder {
    float values[256];
    float factor;
};
TARGET static Decoder decoder(int mantissa) {
    Decoder d;
    for (int code = 0; code < 256; ++code) d.values[code] = value_of(code, mantissa);
    d.factor = 1.0f;
    return d;
}
constexpr int place(int j, int i) { return j * W + i; }
INLINE void decode(const Decoder &d, const uint8_t *codes, V *out) {
    for (int j = 0; j < 4; ++j) {
        const uint8_t *c = codes + j * W;
        out[j] = V{d.values[c[0]], d.values[c[1]], d.values[c[2]], d.values[c[3]]};
    }
}

#elif DECODE == DECODE_HALF
struct Decoder {
    int shift;
    short mask;
    float factor;
};
TARGET static Decoder decoder(int mantissa) {
    return {10 - mantissa, static_cast<short>((0x7F << (10 - mantissa)) - 0x8000), half_factor(mantissa)};
}
constexpr int place(int j, int i) { return j * W + i; }
// With the sign extended to 16 bits, one shift and one mask place all fields.
#if defined(WIDE)
INLINE void decode(const Decoder &d, const uint8_t *codes, V *out) {
    for (int half = 0; half < 2; ++half) {
        __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes + 32 * half));
        __m512i bits = _mm512_sll_epi16(_mm512_cvtepi8_epi16(bytes), _mm_cvtsi32_si128(d.shift));
        bits = _mm512_and_si512(bits, _mm512_set1_epi16(d.mask));
        out[2 * half] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
        out[2 * half + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    }
}
#else
INLINE void decode(const Decoder &d, const uint8_t *codes, V *out) {
    for (int half = 0; half < 2; ++half) {
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + 16 * half));
        __m256i bits = _mm256_sll_epi16(_mm256_cvtepi8_epi16(bytes), _mm_cvtsi32_si128(d.shift));
        bits = _mm256_and_si256(bits, _mm256_set1_epi16(d.mask));
        out[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
        out[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    }
}
#endif

#elif DECODE == DECODE_BYTES
// Every value fits bfloat16, the upper half of a float32. Its two bytes are looked up for 64 codes at once, by the 7 low
// bits; interleaving them gives pairs of values, which a shift and a mask make floats of.
struct Decoder {
    __m512i low[2], high[2];
    float factor;
};
TARGET static Decoder decoder(int mantissa) {
    alignas(64) uint8_t low[128], high[128];
    for (int code = 0; code < 128; ++code) {
        const float value = value_of(code, mantissa);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        low[code] = static_cast<uint8_t>(bits >> 16);
        high[code] = static_cast<uint8_t>(bits >> 24);
    }
    Decoder d;
    for (int i = 0; i < 2; ++i) {
        d.low[i] = _mm512_load_si512(low + 64 * i);
        d.high[i] = _mm512_load_si512(high + 64 * i);
    }
    d.factor = 1.0f;
    return d;
}
// Interleaving works on 16 codes apart: 8 of them in the first pair of vectors, the even ones in a pair's first.
constexpr int place(int j, int i) { return i / 4 * 16 + j / 2 * 8 + i % 4 * 2 + j % 2; }
INLINE void decode(const Decoder &d, const uint8_t *codes, V *out) {
    const __m512i sign = _mm512_set1_epi8(-128), upper = _mm512_set1_epi32(-65536);
    __m512i c = _mm512_loadu_si512(codes);
    __m512i low = _mm512_permutex2var_epi8(d.low[0], c, d.low[1]);
    __m512i high = _mm512_permutex2var_epi8(d.high[0], c, d.high[1]);
    high = _mm512_ternarylogic_epi32(high, c, sign, 0xF8); // high | (c & sign)
    __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    out[2] = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
}
#endif
