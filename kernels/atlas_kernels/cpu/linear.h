// The quantized linear layer for few rows of activations. Included once for each instruction set; see atlas.cpp.
//
// For each (output, row) a block of codes is summed in one vector and its scale multiplied in once: the order of a row's
// sum depends on K and the block size alone.

constexpr int MOST = 8;                // rows of activations in one tile
constexpr int FEW = 2, FEW_R = W / 4;   // up to FEW rows, FEW_R outputs in a tile
constexpr int MANY_R = W == 16 ? 2 : 1; // with more, up to 4; beyond, one output: sums and totals fill the registers

// Adds Σ outlier · activation of output n to y [M], the rows from m0 on.
template <int M, typename I> INLINE void outliers(const Linear &a, const I *index, int64_t n, int64_t m0, float *y) {
    for (int64_t s = 0; s < a.slots; s += W) {
        const int count = static_cast<int>(a.slots - s < W ? a.slots - s : W);
        float value[W];
        store(value, read(a.outliers + n * a.slots + s, count));
        for (int i = 0; i < count; ++i) {
            const uint64_t at = static_cast<uint64_t>(static_cast<int64_t>(index[n * a.slots + s + i]));
            const uint64_t k = at < static_cast<uint64_t>(a.inputs) ? at : 0; // a wrong index must not read elsewhere
            const float *x = a.x + m0 * a.inputs + k;
            for (int m = 0; m < M; ++m) y[m] = fma1(value[i], x[m * a.inputs], y[m]);
        }
    }
}

template <int M> INLINE void finish(const Linear &a, int64_t n, int64_t m0, const V *sum) {
    float y[M];
    for (int m = 0; m < M; ++m) y[m] = sum_of(sum[m]);
    if (a.wide_index) outliers<M>(a, static_cast<const int32_t *>(a.index), n, m0, y);
    else outliers<M>(a, static_cast<const int16_t *>(a.index), n, m0, y);
    const float bias = a.bias ? a.bias[n] : 0.0f;
    for (int m = 0; m < M; ++m) a.out[(m0 + m) * a.outputs + n] = y[m] + bias;
}

// CHUNK codes of R outputs times M rows of activations, added to sum.
template <int R, int M>
INLINE void chunk(const Decoder &d, const uint8_t *const *codes, const float *x, int64_t stride, V (*sum)[M]) {
    if constexpr (M <= FEW) { // the activations stay in registers
        V at[M][4];
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) at[m][j] = load(x + m * stride + j * W);
        for (int r = 0; r < R; ++r) {
            V w[4];
            decode(d, codes[r], w);
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < 4; ++j) sum[r][m] = fma(w[j], at[m][j], sum[r][m]);
        }
    } else { // the weights do
        V w[R][4];
        for (int r = 0; r < R; ++r) decode(d, codes[r], w[r]);
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) {
                V at = load(x + m * stride + j * W);
                for (int r = 0; r < R; ++r) sum[r][m] = fma(w[r][j], at, sum[r][m]);
            }
    }
}

// Outputs [n, n + R) for M rows from m0 on, whose activations lie at x [M, stride] in the decoder's order. The block
// size is a multiple of CHUNK.
template <int R, int M>
TARGET static void tile(const Linear &a, const Decoder &d, const float *x, int64_t stride, int64_t n, int64_t m0) {
    const int64_t groups = (a.inputs + a.block - 1) / a.block;
    const uint8_t *codes[R];
    V total[R][M], sum[R][M];
    for (int r = 0; r < R; ++r) {
        codes[r] = a.codes + (n + r) * a.inputs;
        for (int m = 0; m < M; ++m) total[r][m] = set1(0.0f);
    }
    for (int64_t g = 0, k = 0; g < groups; ++g) {
        const int64_t end = (g + 1) * a.block < a.inputs ? (g + 1) * a.block : a.inputs;
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) sum[r][m] = set1(0.0f);
        for (; k + CHUNK <= end; k += CHUNK) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(codes[r] + R * a.inputs, 0, 2); // the next tile's
            chunk<R, M>(d, codes, x + k, stride, sum);
            for (int r = 0; r < R; ++r) codes[r] += CHUNK;
        }
        if (k < end) { // the end of the row
            uint8_t rest[R][CHUNK] = {};
            for (int r = 0; r < R; ++r) {
                std::memcpy(rest[r], codes[r], static_cast<size_t>(end - k));
                codes[r] = rest[r];
            }
            chunk<R, M>(d, codes, x + k, stride, sum);
        }
        for (int r = 0; r < R; ++r) {
            const V scale = set1(number(a.scales[(n + r) * groups + g]) * d.factor);
            for (int m = 0; m < M; ++m) total[r][m] = fma(scale, sum[r][m], total[r][m]);
        }
    }
    for (int r = 0; r < R; ++r) finish<M>(a, n + r, m0, total[r]);
}

template <int M>
TARGET static void outputs_of(const Linear &a, const Decoder &d, const float *x, int64_t stride, int64_t from,
                              int64_t to, int64_t m0) {
    constexpr int R = M <= FEW ? FEW_R : M <= 4 ? MANY_R : 1;
    int64_t n = from;
    for (; n + R <= to; n += R) tile<R, M>(a, d, x, stride, n, m0);
    for (; n < to; ++n) tile<1, M>(a, d, x, stride, n, m0);
}

// Any block size: a row of weights is decoded to w [stride] first.
TARGET static void any_blocks(const Linear &a, const float *x, int64_t stride, int64_t from, int64_t to, float *w) {
    const int64_t groups = (a.inputs + a.block - 1) / a.block;
    float values[256];
    for (int code = 0; code < 256; ++code) values[code] = value_of(code, a.mantissa);
    for (int64_t k = a.inputs; k < stride; ++k) w[k] = 0.0f;
    for (int64_t n = from; n < to; ++n) {
        const uint8_t *codes = a.codes + n * a.inputs;
        for (int64_t k = 0; k < a.inputs; ++k) w[k] = values[codes[k]] * number(a.scales[n * groups + k / a.block]);
        for (int64_t m = 0; m < a.rows; ++m) {
            V sum = set1(0.0f);
            for (int64_t k = 0; k < stride; k += W) sum = fma(load(w + k), load(x + m * stride + k), sum);
            finish<1>(a, n, m, &sum);
        }
    }
}

// Activations [M, K] in the decoder's order, with zeros up to the stride.
TARGET static void arrange(const Linear &a, int64_t stride, float *x) {
    const bool plain = a.block % CHUNK != 0;
    for (int64_t m = 0; m < a.rows; ++m, x += stride) {
        const float *from = a.x + m * a.inputs;
        const int64_t whole = a.inputs / CHUNK * CHUNK;
        if (plain) {
            std::memcpy(x, from, static_cast<size_t>(a.inputs) * sizeof(float));
            std::memset(x + a.inputs, 0, static_cast<size_t>(stride - a.inputs) * sizeof(float));
            continue;
        }
        for (int64_t k = 0; k < whole; k += CHUNK)
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < W; ++i) x[k + j * W + i] = from[k + place(j, i)];
        for (int64_t k = whole; k < stride; k += CHUNK)
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < W; ++i) {
                    const int64_t at = k + place(j, i);
                    x[k + j * W + i] = at < a.inputs ? from[at] : 0.0f;
                }
    }
}

// Outputs [from, to) for all rows. x: what arrange() made. w: scratch [stride].
TARGET static void linear_unit(const Linear &a, const float *x, int64_t stride, int64_t from, int64_t to, float *w) {
    if (a.block % CHUNK) return any_blocks(a, x, stride, from, to, w);
    static const Decoder formats[3] = {decoder(3), decoder(4), decoder(5)};
    const Decoder &d = formats[a.mantissa - 3];
    for (int64_t m = 0; m < a.rows; m += MOST, x += MOST * stride) {
        switch (a.rows - m) {
        case 1: outputs_of<1>(a, d, x, stride, from, to, m); break;
        case 2: outputs_of<2>(a, d, x, stride, from, to, m); break;
        case 3: outputs_of<3>(a, d, x, stride, from, to, m); break;
        case 4: outputs_of<4>(a, d, x, stride, from, to, m); break;
        case 5: outputs_of<5>(a, d, x, stride, from, to, m); break;
        case 6: outputs_of<6>(a, d, x, stride, from, to, m); break;
        case 7: outputs_of<7>(a, d, x, stride, from, to, m); break;
        default: outputs_of<MOST>(a, d, x, stride, from, to, m); break;
        }
    }
}

// The sum of all words, to measure what reading costs.
TARGET static float read_unit(const float *at, int64_t count) {
    V sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = set1(0.0f);
    int64_t k = 0;
    for (; k + 8 * W <= count; k += 8 * W)
        for (int j = 0; j < 8; ++j) sum[j] = sum[j] + load(at + k + j * W);
    float total = 0.0f;
    for (; k < count; ++k) total += at[k];
    for (int j = 0; j < 8; ++j) total += sum_of(sum[j]);
    return total;
}
