// Vectors of 4 floats without any instruction set named. Included inside a namespace; see atlas.cpp.
typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
constexpr int W = 4, HEADS = 2;

INLINE V set1(float x) { return V{x, x, x, x}; }
INLINE V load(const float *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, V v) { std::memcpy(p, &v, sizeof v); }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE float fma1(float a, float b, float c) { return a * b + c; }
INLINE float sum_of(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE V maximum(V a, V b) { return a > b ? a : b; } // b when either is NaN
INLINE V minimum(V a, V b) { return a < b ? a : b; }
INLINE V rounded(V a) {
    for (int i = 0; i < W; ++i) a[i] = std::nearbyintf(a[i]);
    return a;
}
INLINE V two_to(V n) {
    VI bits;
    for (int i = 0; i < W; ++i) bits[i] = n[i] == n[i] ? (static_cast<int32_t>(n[i]) + 127) << 23 : 0x7FC00000;
    V v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
INLINE V zero_below(V value, V x, float limit) { return x < set1(limit) ? V{} : value; }
// `inside` where lane index + base is in [low, high), else `outside`.
INLINE V within(V inside, float outside, int base, int low, int high) {
    for (int i = 0; i < W; ++i)
        if (base + i < low || base + i >= high) inside[i] = outside;
    return inside;
}

// The first n <= W elements, zeros after them; nothing behind them is read.
template <typename T> INLINE V read(const T *p, int n) {
    V v{};
    for (int i = 0; i < (n < W ? n : W); ++i) v[i] = number(p[i]);
    return v;
}

// rows[i] lane j becomes rows[j] lane i.
INLINE void transpose(V *rows) {
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < i; ++j) {
            float kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
}
