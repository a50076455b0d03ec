// Partial attention over one split of a paged context. Included once for each instruction set; see atlas.cpp.
//
// A unit of work is one KV head and one split: all rows and the query heads that share the KV head. A row's numbers come
// from the same operations in the same order whatever other rows there are: keys that a row does not see are left out,
// not multiplied by zero.

// e^x for x <= 88; 0 below -87.3. Cody and Waite's reduction, then the Taylor polynomial: about 1 unit in the last place.
INLINE V exponential(V x) {
    V held = maximum(set1(-87.33f), x);
    V n = rounded(held * set1(1.44269504f));
    V r = fma(n, set1(-0.693359375f), held);
    r = fma(n, set1(2.12194440e-4f), r);
    V y = fma(set1(1.0f / 5040), r, set1(1.0f / 720));
    y = fma(y, r, set1(1.0f / 120));
    y = fma(y, r, set1(1.0f / 24));
    y = fma(y, r, set1(1.0f / 6));
    y = fma(y, r, set1(0.5f));
    y = fma(y, r, set1(1.0f));
    y = fma(y, r, set1(1.0f));
    return zero_below(y * two_to(n), x, -87.33f);
}

INLINE float exponential1(float x) {
    float lanes[W];
    store(lanes, exponential(set1(x)));
    return lanes[0];
}

// cap · tanh(x / cap) with tanh(y) = 1 - 2 / (e^2y + 1).
INLINE V capped(V x, float cap) {
    V y = minimum(set1(40.0f), maximum(set1(-40.0f), x * set1(2.0f / cap)));
    return set1(cap) * (set1(1.0f) - set1(2.0f) / (exponential(y) + set1(1.0f)));
}

INLINE float largest_of(V v) {
    float x[W];
    store(x, v);
    float best = x[0];
    for (int i = 1; i < W; ++i)
        if (!(x[i] <= best)) best = x[i];
    return best;
}

// K [n, D] of one head, keys as columns: out [D rounded up, 64]. Keys from n on are zeros.
template <typename T> TARGET static void columns(const T *keys, const Half *scales, int n, int dim, float *out) {
    for (int k = 0; k < kBlock; k += W)
        for (int d = 0; d < dim; d += W) {
            V tile[W];
            for (int i = 0; i < W; ++i) {
                tile[i] = k + i < n ? read(keys + static_cast<int64_t>(k + i) * dim + d, dim - d) : set1(0.0f);
                if (scales && k + i < n) tile[i] = tile[i] * set1(number(scales[k + i]));
            }
            transpose(tile);
            for (int i = 0; i < W; ++i) store(out + (d + i) * kBlock + k, tile[i]);
        }
}

// V [n, D] of one head as floats: out [n, D rounded up].
template <typename T> TARGET static void rows(const T *values, const Half *scales, int n, int dim, float *out) {
    const int padded = (dim + W - 1) / W * W;
    for (int k = 0; k < n; ++k) {
        V scale = set1(scales ? number(scales[k]) : 1.0f);
        for (int d = 0; d < dim; d += W) {
            V v = read(values + static_cast<int64_t>(k) * dim + d, dim - d);
            store(out + static_cast<int64_t>(k) * padded + d, scales ? v * scale : v);
        }
    }
}

template <typename T>
TARGET static const float *unpack(const Attention &a, int64_t block, int64_t head, int n, float *keys, float *values) {
    const int64_t size = kBlock * a.dim;
    const T *base = reinterpret_cast<const T *>(a.blocks[block] + a.offset);
    const T *k = base + head * size, *v = base + (a.kv_heads + head) * size;
    const Half *scales = nullptr, *value_scales = nullptr;
    if (a.dtype == kInt8) {
        scales = reinterpret_cast<const Half *>(base + 2 * a.kv_heads * size) + head * kBlock;
        value_scales = scales + a.kv_heads * kBlock;
    }
    const int dim = static_cast<int>(a.dim);
    columns(k, scales, n, dim, keys);
    if (a.dtype == kFloat32 && dim % W == 0) return reinterpret_cast<const float *>(v);
    rows(v, value_scales, n, dim, values);
    return values;
}

// Scores of J heads with the block's 64 keys: q [J, D], already scaled → out [J, 64].
template <int J> TARGET static void scores(const float *q, int dim, const float *keys, Ahead &ahead, float *out) {
    for (int k = 0; k < kBlock; k += 4 * W) {
        V acc[J][4];
        for (int j = 0; j < J; ++j)
            for (int i = 0; i < 4; ++i) acc[j][i] = set1(0.0f);
        for (int d = 0; d < dim; ++d) {
            ahead.step();
            const float *at = keys + d * kBlock + k;
            V key[4] = {load(at), load(at + W), load(at + 2 * W), load(at + 3 * W)};
            for (int j = 0; j < J; ++j) {
                V x = set1(q[j * dim + d]);
                for (int i = 0; i < 4; ++i) acc[j][i] = fma(x, key[i], acc[j][i]);
            }
        }
        for (int j = 0; j < J; ++j)
            for (int i = 0; i < 4; ++i) store(out + j * kBlock + k + i * W, acc[j][i]);
    }
}

// One head's scores become weights e^(s - m) of the keys in [low, high), zero outside; m and the sum of weights are
// brought up to date. Returns what earlier sums are to be multiplied by.
INLINE float weigh(float *s, int low, int high, float cap, float &m, float &sum) {
    V best = set1(-INFINITY);
    for (int k = 0; k < kBlock; k += W) {
        V x = load(s + k);
        if (cap > 0.0f) x = capped(x, cap);
        x = within(x, -INFINITY, k, low, high);
        store(s + k, x);
        best = maximum(best, x);
    }
    const float top = largest_of(best);
    const float next = top > m || top != top ? top : m;
    if (next == -INFINITY) { // every score is: no weight at all
        for (int k = 0; k < kBlock; k += W) store(s + k, set1(0.0f));
        return 1.0f;
    }
    const float fade = next == m ? 1.0f : exponential1(m - next);
    V total = set1(0.0f);
    for (int k = 0; k < kBlock; k += W) {
        V p = within(exponential(load(s + k) - set1(next)), 0.0f, k, low, high);
        store(s + k, p);
        total = total + p;
    }
    sum = sum * fade + sum_of(total);
    m = next;
    return fade;
}

// acc [J, padded] = acc · fade + weights [J, 64] · values over keys [low, high), N vectors of it from column d.
template <int J, int N>
TARGET static void gather(float *acc, const float *fade, const float *weights, const float *values, int padded, int d,
                          int low, int high) {
    V sum[J][N];
    for (int j = 0; j < J; ++j)
        for (int i = 0; i < N; ++i) sum[j][i] = load(acc + j * padded + d + i * W) * set1(fade[j]);
    for (int k = low; k < high; ++k) {
        V v[N];
        for (int i = 0; i < N; ++i) v[i] = load(values + static_cast<int64_t>(k) * padded + d + i * W);
        for (int j = 0; j < J; ++j) {
            V p = set1(weights[j * kBlock + k]);
            for (int i = 0; i < N; ++i) sum[j][i] = fma(p, v[i], sum[j][i]);
        }
    }
    for (int j = 0; j < J; ++j)
        for (int i = 0; i < N; ++i) store(acc + j * padded + d + i * W, sum[j][i]);
}

struct Tile { // J heads of one row
    const float *q;
    float *acc, *top, *sum;
};

template <int J>
TARGET static void attend_tile(const Tile &t, const float *keys, const float *values, int dim, int low, int high,
                               float cap, Ahead &ahead) {
    const int padded = (dim + W - 1) / W * W;
    alignas(64) float s[J * kBlock];
    float fade[J];
    scores<J>(t.q, dim, keys, ahead, s);
    for (int j = 0; j < J; ++j) fade[j] = weigh(s + j * kBlock, low, high, cap, t.top[j], t.sum[j]);
    int d = 0;
    for (; d + 4 * W <= padded; d += 4 * W) gather<J, 4>(t.acc, fade, s, values, padded, d, low, high);
    for (; d < padded; d += W) gather<J, 1>(t.acc, fade, s, values, padded, d, low, high);
}

// All rows against one block, whose keys [0, n) are there.
TARGET static void attend_block(const Attention &a, int64_t base, const float *keys, const float *values, Scratch &s) {
    const int dim = static_cast<int>(a.dim), padded = (dim + W - 1) / W * W;
    const int group = static_cast<int>(a.heads / a.kv_heads);
    for (int64_t t = 0; t < a.rows; ++t) {
        int low, high;
        seen(a, a.positions[t], base, low, high);
        if (low >= high) continue;
        for (int j = 0; j < group;) {
            const int64_t r = t * group + j;
            const Tile tile{s.q + r * dim, s.acc + r * padded, s.top + r, s.sum + r};
            if (group - j >= HEADS) {
                attend_tile<HEADS>(tile, keys, values, dim, low, high, a.softcap, s.ahead);
                j += HEADS;
            } else if (HEADS > 2 && group - j >= 2) {
                attend_tile<2>(tile, keys, values, dim, low, high, a.softcap, s.ahead);
                j += 2;
            } else {
                attend_tile<1>(tile, keys, values, dim, low, high, a.softcap, s.ahead);
                ++j;
            }
        }
    }
}

TARGET static void load_queries(const Attention &a, int64_t head, Scratch &s) {
    const int64_t group = a.heads / a.kv_heads, padded = (a.dim + W - 1) / W * W;
    for (int64_t r = 0; r < a.rows * group; ++r) {
        const float *q = a.q + (r / group) * a.q_row_stride + (head * group + r % group) * a.q_head_stride;
        for (int64_t d = 0; d < a.dim; ++d) s.q[r * a.dim + d] = q[d] * a.scale;
        for (int64_t d = 0; d < padded; ++d) s.acc[r * padded + d] = 0.0f;
        s.top[r] = -INFINITY;
        s.sum[r] = 0.0f;
    }
}

TARGET static void store_partial(const Attention &a, int64_t head, const Scratch &s, float *out, float *lse) {
    const int64_t group = a.heads / a.kv_heads, padded = (a.dim + W - 1) / W * W;
    for (int64_t r = 0; r < a.rows * group; ++r) {
        const int64_t t = r / group, h = head * group + r % group;
        const bool none = s.sum[r] == 0.0f;
        for (int64_t d = 0; d < a.dim; ++d)
            out[(t * a.heads + h) * a.dim + d] = none ? 0.0f : s.acc[r * padded + d] / s.sum[r];
        lse[h * a.rows + t] = none ? -INFINITY : s.top[r] + std::log(s.sum[r]);
    }
}

// out [T, H, D] and lse [H, T]: those of KV head `head`, over the blocks [first, last) of the list.
TARGET static void attend_unit(const Attention &a, int64_t head, int64_t first, int64_t last, Scratch &s, float *out,
                               float *lse) {
    load_queries(a, head, s);
    for (int64_t b = first; b < last; ++b) {
        const int64_t base = a.first + b * kBlock;
        const int n = keys_in(a, base);
        if (n == 0) continue;
        const float *values = nullptr;
        switch (a.dtype) {
        case kFloat32: values = unpack<float>(a, b, head, n, s.keys, s.values); break;
        case kFloat16: values = unpack<Half>(a, b, head, n, s.keys, s.values); break;
        case kBFloat16: values = unpack<Brain>(a, b, head, n, s.keys, s.values); break;
        default: values = unpack<int8_t>(a, b, head, n, s.keys, s.values); break;
        }
        const int soon = b + 1 < last ? keys_in(a, base + kBlock) : 0;
        const int64_t group = a.heads / a.kv_heads;
        s.ahead = soon ? ahead_of(a, b + 1, head, soon, a.rows * ((group + HEADS - 1) / HEADS) * a.dim) : Ahead{};
        attend_block(a, base, s.keys, values, s);
    }
    store_partial(a, head, s, out, lse);
}

// Row (t, h) of partials [S, T, H, D] with lse [S, H, T] → out [T, H, D], lse [H, T], in ascending order of splits.
TARGET static void merge_row(const Merge &m, int64_t t, int64_t h) {
    float *out = m.out + (t * m.heads + h) * m.dim, total = -INFINITY;
    for (int64_t d = 0; d < m.dim; ++d) out[d] = 0.0f;
    for (int64_t s = 0; s < m.splits; ++s) {
        const float *part = m.parts + ((s * m.rows + t) * m.heads + h) * m.dim;
        const float lse = m.part_lse[(s * m.heads + h) * m.rows + t];
        if (lse == -INFINITY) continue;
        const float high = total > lse ? total : lse, low = total > lse ? lse : total;
        const float next = high + std::log1p(exponential1(low - high));
        const float kept = exponential1(total - next), added = exponential1(lse - next);
        for (int64_t d = 0; d < m.dim; ++d) out[d] = total == -INFINITY ? part[d] : out[d] * kept + part[d] * added;
        total = total == -INFINITY ? lse : next;
    }
    if (m.sinks && total != -INFINITY) { // a sink takes weight and gives nothing
        const float sink = m.sinks[h], high = total > sink ? total : sink, low = total > sink ? sink : total;
        const float next = high + std::log1p(exponential1(low - high)), kept = exponential1(total - next);
        for (int64_t d = 0; d < m.dim; ++d) out[d] *= kept;
        total = next;
    }
    m.lse[h * m.rows + t] = total;
}
