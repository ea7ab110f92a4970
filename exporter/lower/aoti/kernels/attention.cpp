// softmax(q k^T * scale) v in bfloat16 with float32 sums, block by block, without ever writing the scores to memory.
//
// The online softmax of FlashAttention (https://arxiv.org/abs/2205.14135) on VDPBF16PS: keys and values are packed once
// for each block of keys, then ROWS queries at a time go past it, with their scores in the first-level cache. Between
// blocks a query keeps its largest score, the sum of its weights, and its unfinished output.
#include <algorithm>
#include <cmath>

#include "product.h"
#include "tensor.h"

namespace {

constexpr int ROWS = 12, VECTORS = 2;       // 24 sums, 2 columns and 1 row of the 32 registers
constexpr int64_t PANEL = VECTORS * LANES;  // keys, or features of a value, of a panel
constexpr int64_t BLOCK = 640;              // most keys at once: 12 rows of scores and weights take 45 KiB
constexpr float NONE = -1e30f;              // the score of no key; of -inf the exponential below would make NaN

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// keys [n, d], `stride` apart, as panels [n / PANEL][d / 2][VECTORS][16 keys][2 features]; those from `live` on are zero.
void pack_keys(const half* keys, int64_t stride, int64_t live, int64_t n, int64_t d, half* to) {
    for (int64_t key = 0; key < n; key++) {
        half* column = to + key / PANEL * PANEL * d + key % PANEL * 2;
        for (int64_t i = 0; i < d; i += 2, column += PANEL * 2) {
            if (key < live) std::memcpy(column, keys + key * stride + i, 4);
            else std::memset(column, 0, 4);
        }
    }
}

// values [n, d] as panels [d / 16 / V][n / 2][V][16 features][2 keys]; V is VECTORS but in the last one.
void pack_values(const half* values, int64_t stride, int64_t live, int64_t n, int64_t d, half* to) {
    for (int64_t at = 0; at < d; at += LANES) {
        int64_t panel = at / PANEL * PANEL, vectors = std::min<int64_t>(VECTORS, (d - panel + LANES - 1) / LANES);
        __mmask16 lanes = first_lanes(d - at);
        half* column = to + panel * n + at % PANEL * 2;
        for (int64_t key = 0; key < n; key += 2, column += vectors * 32) {
            auto row = [&](int64_t k) {
                return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k < live ? lanes : 0, values + k * stride + at));
            };
            _mm512_storeu_si512(column, _mm512_or_si512(row(key), _mm512_slli_epi32(row(key + 1), 16)));
        }
    }
}

// One head against one block of keys. `scores` and `weights` are [ROWS, n]; the rest is a query's state between blocks.
struct Block {
    int64_t d, wide, n, live, stride;  // wide: d in whole vectors; stride: of queries
    float scale;                       // times log2 e
    const half *keys, *values;
    float* scores;
    half* weights;

    template <int R>
    INLINE void score(const half* q, int64_t key, float* largest) const {
        __m512 sums[R * VECTORS];
        unrolled<R * VECTORS>([&](auto i) ALWAYS { sums[i] = _mm512_setzero_ps(); });
        multiply<Halves, R, VECTORS>(q, stride * 2, keys + key * d, d / 2, sums);
        unrolled<R>([&](auto r) ALWAYS {
            __m512 top = _mm512_loadu_ps(largest + r * LANES);
            unrolled<VECTORS>([&](auto v) ALWAYS {
                __m512 s = _mm512_mul_ps(sums[r * VECTORS + v], _mm512_set1_ps(scale));
                __mmask16 exist = first_lanes(live - key - v * LANES);
                s = _mm512_mask_mov_ps(_mm512_set1_ps(NONE), exist, s);
                _mm512_storeu_ps(scores + r * n + key + v * LANES, s);
                top = _mm512_max_ps(top, s);
            });
            _mm512_storeu_ps(largest + r * LANES, top);
        });
    }

    // Scores of row r become weights; returns what older sums are multiplied by.
    float weigh(int64_t r, const float* largest, float& top, float& total) const {
        float now = std::max(top, _mm512_reduce_max_ps(_mm512_loadu_ps(largest)));
        float keep = std::exp2(top - now);
        __m512 sum = _mm512_setzero_ps(), by = _mm512_set1_ps(now);
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        for (int64_t i = r * n; i < (r + 1) * n; i += PANEL) {
            __m512 low = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + i), by));
            __m512 high = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + i + LANES), by));
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_storeu_si512(weights + i, both);
            Halves::add(sum, both, ones);  // the sum of the rounded weights, so that they add up to one
        }
        total = total * keep + _mm512_reduce_add_ps(sum);
        top = now;
        return keep;
    }

    template <int R, int V>
    INLINE void mix(int64_t at, const float* keep, float* out) const {
        __m512 sums[R * V];
        unrolled<R * V>([&](auto i) ALWAYS {
            float* old = out + i / V * wide + at + i % V * LANES;
            sums[i] = _mm512_mul_ps(_mm512_loadu_ps(old), _mm512_set1_ps(keep[i / V]));
        });
        multiply<Halves, R, V>(weights, n * 2, values + at * n, n / 2, sums);
        unrolled<R * V>([&](auto i) ALWAYS { _mm512_storeu_ps(out + i / V * wide + at + i % V * LANES, sums[i]); });
    }

    template <int R>
    void queries(const half* q, float* top, float* total, float* out) const {
        alignas(64) float largest[R * LANES];
        float keep[R];
        std::fill(largest, largest + R * LANES, NONE);
        for (int64_t key = 0; key < n; key += PANEL) score<R>(q, key, largest);
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
    half *keys, *values, *weights;
    float *scores, *top, *total, *sums;

    static int64_t floats(int64_t n, int64_t d, int64_t wide, int64_t queries) {
        return up((n * d + n * wide + ROWS * n) / 2 + ROWS * n + queries * (2 + wide), LANES);
    }
    Desk(float* at, int64_t n, int64_t d, int64_t wide, int64_t queries) {
        auto next = [&](int64_t floats) { return std::exchange(at, at + floats); };
        keys = reinterpret_cast<half*>(next(n * d / 2));
        values = reinterpret_cast<half*>(next(n * wide / 2));
        weights = reinterpret_cast<half*>(next(ROWS * n / 2));
        scores = next(ROWS * n);
        sums = next(queries * wide);
        top = next(queries);
        total = next(queries);
    }
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
            Block block{d, wide, padded, live, q.strides[2], scale * LOG2E, desk.keys, desk.values, desk.scores, desk.weights};
            tiled<ROWS, 4, 2, 1>(count, [&](auto r, int64_t i) ALWAYS {
                block.queries<r>(queries + i * q.strides[2], desk.top + i, desk.total + i, desk.sums + i * wide);
            });
        }
        half* to = const_cast<half*>(Heads{out}.at(head)) + first * out.strides[2];
        for (int64_t i = 0; i < count; i++, to += out.strides[2]) {
            __m512 share = _mm512_set1_ps(1 / desk.total[i]);
            for (int64_t c = 0; c < d; c += LANES)
                store(to + c, _mm512_mul_ps(_mm512_loadu_ps(desk.sums + i * wide + c), share), first_lanes(d - c));
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
