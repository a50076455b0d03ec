// Rows of a packed weight as float32, for a matrix product over many rows of activations. Included where decode() keeps
// the order of the codes; see atlas.cpp.

template <typename I> INLINE void add_outliers(const Linear &a, const I *index, int64_t n, float *out) {
    for (int64_t s = n * a.slots; s < (n + 1) * a.slots; ++s) {
        const uint64_t k = static_cast<uint64_t>(static_cast<int64_t>(index[s]));
        if (k < static_cast<uint64_t>(a.inputs)) out[k] += number(a.outliers[s]);
    }
}

// Outputs [from, to) → out [to - from, K].
TARGET static void panel_unit(const Linear &a, int64_t from, int64_t to, float *out) {
    static const Decoder formats[3] = {decoder(3), decoder(4), decoder(5)};
    const Decoder &d = formats[a.mantissa - 3];
    const int64_t groups = (a.inputs + a.block - 1) / a.block;
    for (int64_t n = from; n < to; ++n, out += a.inputs) {
        const uint8_t *codes = a.codes + n * a.inputs;
        for (int64_t g = 0, k = 0; g < groups; ++g) {
            const int64_t end = (g + 1) * a.block < a.inputs ? (g + 1) * a.block : a.inputs;
            const V scale = set1(number(a.scales[n * groups + g]) * d.factor);
            V w[4];
            for (; k + CHUNK <= end; k += CHUNK) {
                decode(d, codes + k, w);
                for (int j = 0; j < 4; ++j) store(out + k + j * W, w[j] * scale);
            }
            if (k == end) continue;
            uint8_t rest[CHUNK] = {};
            float values[CHUNK];
            std::memcpy(rest, codes + k, static_cast<size_t>(end - k));
            decode(d, rest, w);
            for (int j = 0; j < 4; ++j) store(values + j * W, w[j] * scale);
            std::memcpy(out + k, values, static_cast<size_t>(end - k) * sizeof(float));
            k = end;
        }
        if (a.wide_index) add_outliers(a, static_cast<const int32_t *>(a.index), n, out);
        else add_outliers(a, static_cast<const int16_t *>(a.index), n, out);
    }
}
