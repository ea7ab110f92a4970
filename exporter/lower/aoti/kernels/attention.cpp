// softmax(q k^T * scale) v with float32 sums, block by block, without ever writing the scores to memory.
//
// The online softmax of FlashAttention (https://arxiv.org/abs/2205.14135): keys and values are packed once for each block of
// keys, then ROWS queries at a time go past it, with their scores in the first-level cache. Between blocks a query keeps its
// largest score, the sum of its weights, and its unfinished output. What is bfloat16 is multiplied by VDPBF16PS where there is
// such an instruction, and otherwise as float32.
#include <algorithm>
#include <bit>
#include <cmath>

#include "product.h"
#include "tensor.h"

namespace {

constexpr int VECTORS = 2;
#ifdef __AVX512F__
constexpr int ROWS = 12;        // 24 sums, 2 columns and 1 row of the 32 registers
constexpr int64_t BLOCK = 640;  // most keys at once: 12 rows of scores and weights take 45 KiB
#else
constexpr int ROWS = 6;         // 12 sums, 2 columns and 1 row of 16 registers
constexpr int64_t BLOCK = 256;  // keys and values of 64 features take a quarter of the second-level cache
#endif
constexpr int64_t PANEL = VECTORS * LANES;  // keys, or features of a value, of a panel
constexpr float NONE = -1e30f;              // the score of no key; of -inf the exponential below would make NaN

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What keys, values, queries and weights are multiplied as, so many of them at a step.
#ifdef __AVX512BF16__
using Kind = Halves;
using Number = half;
#else
using Kind = Singles;
using Number = float;
#endif
constexpr int64_t DEPTH = sizeof(float) / sizeof(Number);

// DEPTH features.
INLINE void read_step(const half* from, half* to) { std::memcpy(to, from, 4); }
INLINE void read_step(const half* from, float* to) { *to = std::bit_cast<float>(static_cast<uint32_t>(*from) << 16); }

// keys [n, d], `stride` apart, as panels [n / PANEL][d / DEPTH][PANEL keys][DEPTH features]; those from `live` on are zero.
void pack_keys(const half* keys, int64_t stride, int64_t live, int64_t n, int64_t d, Number* to) {
    for (int64_t key = 0; key < n; key++) {
        auto* column = to + key / PANEL * PANEL * d + key % PANEL * DEPTH;
        for (int64_t i = 0; i < d; i += DEPTH, column += PANEL * DEPTH) {
            if (key >= live) std::memset(column, 0, 4);
            else read_step(keys + key * stride + i, column);
        }
    }
}

// values [n, d] as panels [d / PANEL][n / DEPTH][PANEL features][DEPTH keys]; the last one may have but one vector of features.
void pack_values(const half* values, int64_t stride, int64_t live, int64_t n, int64_t d, Number* to) {
    for (int64_t at = 0; at < d; at += LANES) {
        int64_t panel = at / PANEL * PANEL, vectors = std::min<int64_t>(VECTORS, (d - panel + LANES - 1) / LANES);
        Live lanes = first_lanes(d - at);
        auto* column = to + panel * n + at % PANEL * DEPTH;
        for (int64_t key = 0; key < n; key += DEPTH, column += vectors * LANES * DEPTH) {
            auto row = [&](int64_t k) ALWAYS { return load(values + k * stride + at, k < live ? lanes : first_lanes(0)); };
#ifdef __AVX512BF16__
            store_ints(column, Kind::joined(row(key), row(key + 1)));
#else
            store(column, row(key), ALL);
#endif
        }
    }
}

// One head against one block of keys. `scores` and `weights` are [ROWS, n]; the rest is a query's state between blocks.
struct Block {
    int64_t d, wide, n, live;  // wide: d in whole vectors
    float scale;               // times log2 e
    const Number *keys, *values;
    float* scores;
    Number* weights;

    template <int R>
    INLINE void score(const Number* q, int64_t stride, int64_t key, float* largest) const {
        Floats sums[R * VECTORS];
        unrolled<R * VECTORS>([&](auto i) ALWAYS { sums[i] = zeros(); });
        multiply<Kind, R, VECTORS>(q, stride * sizeof(Number), keys + key * d, VECTORS * VECTOR, d / DEPTH, sums, {});
        unrolled<R>([&](auto r) ALWAYS {
            Floats top = load(largest + r * LANES, ALL);
            unrolled<VECTORS>([&](auto v) ALWAYS {
                Floats s = sums[r * VECTORS + v] * every(scale);
                s = where(first_lanes(live - key - v * LANES), s, every(NONE));
                store(scores + r * n + key + v * LANES, s, ALL);
                top = larger(top, s);
            });
            store(largest + r * LANES, top, ALL);
        });
    }

    // Scores of row r become weights; returns what older sums are multiplied by.
    float weigh(int64_t r, const float* largest, float& top, float& total) const {
        float now = std::max(top, largest_lane(load(largest, ALL)));
        float keep = std::exp2(top - now);
        Floats sum = zeros(), by = every(now);
        for (int64_t i = r * n; i < (r + 1) * n; i += PANEL) {
            Floats low = power_of_two(load(scores + i, ALL) - by);
            Floats high = power_of_two(load(scores + i + LANES, ALL) - by);
#ifdef __AVX512BF16__
            Ints both = Kind::rounded(low, high);
            store_ints(weights + i, both);
            Kind::add(sum, both, every(0x3f803f80));  // the sum of the rounded weights, so that they add up to one
#else
            store(weights + i, low, ALL);
            store(weights + i + LANES, high, ALL);
            sum = sum + low + high;
#endif
        }
        total = total * keep + sum_lanes(sum);
        top = now;
        return keep;
    }

    template <int R, int V>
    INLINE void mix(int64_t at, const float* keep, float* out) const {
        Floats sums[R * V];
        unrolled<R * V>([&](auto i) ALWAYS {
            sums[i] = load(out + i / V * wide + at + i % V * LANES, ALL) * every(keep[i / V]);
        });
        multiply<Kind, R, V>(weights, n * sizeof(Number), values + at * n, V * VECTOR, n / DEPTH, sums, {});
        unrolled<R * V>([&](auto i) ALWAYS { store(out + i / V * wide + at + i % V * LANES, sums[i], ALL); });
    }

    template <int R>
    void queries(const Number* q, int64_t stride, float* top, float* total, float* out) const {
        alignas(64) float largest[R * LANES];
        float keep[R];
        std::fill(largest, largest + R * LANES, NONE);
        for (int64_t key = 0; key < n; key += PANEL) score<R>(q, stride, key, largest);
        for (int r = 0; r < R; r++) keep[r] = weigh(r, largest + r * LANES, top[r], total[r]);
        int64_t at = 0;
        for (; at + PANEL <= wide; at += PANEL) mix<R, VECTORS>(at, keep, out);
        if (at < wide) mix<R, 1>(at, keep, out);
    }
};

// [B, H, S, D] by strides, the features side by side; `at` is where a head begins.
struct Heads {
    const Tensor& t;
    const half* at(int64_t head) const {
        return t.as<half>() + head / t.sizes[1] * t.strides[0] + head % t.sizes[1] * t.strides[1];
    }
};

// What one thread works with: one piece of memory, cut up.
struct Desk {
    Number *keys, *values, *weights, *rows;  // rows: a tile's queries, where they are not multiplied as they are stored
    float *scores, *top, *total, *sums;

    static int64_t floats(int64_t n, int64_t d, int64_t wide, int64_t queries) {
        return up((n * d + n * wide + ROWS * n) / DEPTH + ROWS * n + queries * (2 + wide) + row_floats(wide), LANES);
    }
    Desk(float* at, int64_t n, int64_t d, int64_t wide, int64_t queries) {
        auto next = [&](int64_t floats) { return std::exchange(at, at + floats); };
        keys = reinterpret_cast<Number*>(next(n * d / DEPTH));
        values = reinterpret_cast<Number*>(next(n * wide / DEPTH));
        weights = reinterpret_cast<Number*>(next(ROWS * n / DEPTH));
        rows = reinterpret_cast<Number*>(next(row_floats(wide)));
        scores = next(ROWS * n);
        sums = next(queries * wide);
        top = next(queries);
        total = next(queries);
    }

   private:
    static int64_t row_floats(int64_t wide) { return DEPTH == 1 ? ROWS * wide : 0; }
};

struct Attention {
    const Tensor &q, &k, &v, &out;
    float scale;
    int64_t d = q.sizes[3], wide = up(d, LANES), all = k.sizes[2];
    int64_t blocks = std::max<int64_t>(1, (all + BLOCK - 1) / BLOCK), n = up((all + blocks - 1) / blocks, PANEL);

    // `count` queries of one head, from `first` on.
    void run(const Desk& desk, int64_t head, int64_t first, int64_t count) const {
        const half* queries = Heads{q}.at(head) + first * q.strides[2];
        std::fill(desk.top, desk.top + count, NONE);
        std::fill(desk.total, desk.total + count, 0.0f);
        std::fill(desk.sums, desk.sums + count * wide, 0.0f);
        for (int64_t key = 0; key < all; key += n) {
            int64_t live = std::min(n, all - key), padded = up(live, PANEL);
            pack_keys(Heads{k}.at(head) + key * k.strides[2], k.strides[2], live, padded, d, desk.keys);
            pack_values(Heads{v}.at(head) + key * v.strides[2], v.strides[2], live, padded, d, desk.values);
            Block block{d, wide, padded, live, scale * LOG2E, desk.keys, desk.values, desk.scores, desk.weights};
            tiled<ROWS, 4, 2, 1>(count, [&](auto r, int64_t i) ALWAYS {
                const half* rows = queries + i * q.strides[2];
                float *top = desk.top + i, *total = desk.total + i, *sums = desk.sums + i * wide;
#ifdef __AVX512BF16__
                block.queries<r>(rows, q.strides[2], top, total, sums);
#else
                for (int64_t row = 0; row < r; row++)
                    for (int64_t c = 0; c < d; c += LANES)
                        store(desk.rows + row * wide + c, load(rows + row * q.strides[2] + c, first_lanes(d - c)), ALL);
                block.queries<r>(desk.rows, wide, top, total, sums);
#endif
            });
        }
        half* to = const_cast<half*>(Heads{out}.at(head)) + first * out.strides[2];
        for (int64_t i = 0; i < count; i++, to += out.strides[2]) {
            Floats share = every(1 / desk.total[i]);
            for (int64_t c = 0; c < d; c += LANES)
                store(to + c, load(desk.sums + i * wide + c, ALL) * share, first_lanes(d - c));
        }
    }

    void all_heads() const {
        int64_t heads = q.sizes[0] * q.sizes[1], queries = q.sizes[2];
        int64_t parts = heads < 4 * THREADS ? std::min<int64_t>(THREADS, queries) : 1, most = (queries + parts - 1) / parts;
        int64_t size = Desk::floats(n, d, wide, most);
        Room<float> room(THREADS * size);
        PARALLEL
        {
            Desk desk(room + THREAD * size, n, d, wide, most);
            EACH for (int64_t i = 0; i < heads * parts; i++) {
                int64_t first = i % parts * most;
                run(desk, i / parts, first, std::min(most, queries - first));
            }
        }
    }
};

}  // namespace

// q [B, H, S, D], k and v [B, H, T, D], bfloat16, D even; any strides, but for the features, which lie side by side.
// The output lies as [B, S, H, D] in memory, as the layer after it reads it.
extern "C" AOTITorchError aoti_torch_cpu_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double scale, AtenTensorHandle* made) {
    return guarded([&] {
        Tensor queries(q), keys(k), values(v);
        int64_t h = queries.sizes[1], s = queries.sizes[2], d = queries.sizes[3];
        Tensor out = Tensor::empty(queries.sizes, {s * h * d, d, h * d, 1}, queries.dtype, made);
        Attention{queries, keys, values, out, static_cast<float>(scale)}.all_heads();
    });
}
