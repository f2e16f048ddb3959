// Decoder layers of the Llama and Gemma families for CPUs with AVX-512, in float32 and bfloat16.
//
// A decode step of a small model is bound by weight bandwidth. So each projection reads its weights once, sequentially,
// for up to MAX_TILE tokens: several tokens cost as much as one. A token's result does not depend on the number of
// tokens in the batch or on how a prompt was chunked, because the order of every sum is fixed: over the input dimension
// in projections, over positions in attention. So verifying a draft is bit-identical to plain decoding.
//
// Products are accumulated in float32 and rounded to the model's dtype between the parts of a layer. Those with quantized
// weights are computed by quantized.cpp, in the same blocks.

#include <omp.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "quantized.h"
#include "vectors.h"

// ---- projections, as in the interface for Python below

extern "C" {

// Blocks `first` to `end` - 1 of a projection, quantized. weights: as packed by cpp.py. kind: a quantized::Kind.
struct Part {
    const void* weights;
    int64_t kind, first, end;
};

// weight: in the layout of `pack`, unless there are parts. bias: [out] or null.
struct Projection {
    const void *weight, *bias;
    int64_t in, out, num_parts;
    Part parts[3];
};
}

namespace {

constexpr int64_t BLOCK = quantized::BLOCK;  // outputs per block of a projection: two vectors
constexpr int64_t MAX_TILE = 12;  // tokens per tile of a projection: their sums use 24 of the 32 registers
constexpr int64_t KEYS = 16;      // positions per vector of scores
constexpr int64_t MAX_TOGETHER = 8, MAX_HEAD_DIM = 256;  // bounds on the queries of an attention tile and their size

// Number of threads for a product with this many weights. Distributing little work costs more than doing it, above all
// on a busy machine.
inline int64_t threads_for(int64_t weights, int64_t tokens, int64_t num_threads) {
    constexpr int64_t weights_per_thread = 1 << 16;
    const int64_t num_tiles = (tokens + MAX_TILE - 1) / MAX_TILE;
    return std::max<int64_t>(1, std::min(num_threads, weights * num_tiles / weights_per_thread));
}

// Whether to bypass the caches when reading weights: if they are read once and do not fit, they would only evict other
// data, such as the draft model's weights.
inline bool bypasses_cache(int64_t bytes, int64_t tokens) { return bytes > (16 << 20) && tokens <= MAX_TILE; }

// Barrier for the threads of a team. OpenMP barriers spin for milliseconds: on a busy machine, a step with hundreds of
// barriers then takes ten times as long. This one yields the processor after a short spin.
class Barrier {
    std::atomic<int64_t> arrived{0}, passed{0};

   public:
    void wait() {
        const int64_t threads = omp_get_num_threads(), before = passed.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            passed.store(before + 1, std::memory_order_release);
            return;
        }
        constexpr int spins = 1000;  // tens of microseconds: longer than the imbalance between threads in a layer
        for (int i = 0; passed.load(std::memory_order_acquire) == before; i++) i < spins ? _mm_pause() : (void)sched_yield();
    }
};

// x times the logistic function of z
inline __m512 gated(__m512 x, __m512 z) {
    const __m512 bounded = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), _mm512_set1_ps(87.0f));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(bounded)));
}

inline __m512 silu(__m512 x) { return gated(x, x); }

// GELU with the approximation by tanh, written as a logistic function: (1 + tanh(y)) / 2 = logistic(2 y)
inline __m512 gelu_tanh(__m512 x) {
    constexpr float linear = 1.5957691216f;  // 2 sqrt(2 / pi)
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 factor = _mm512_fmadd_ps(square, _mm512_set1_ps(linear * 0.044715f), _mm512_set1_ps(linear));
    return gated(x, _mm512_mul_ps(x, factor));
}

// cap * tanh(x / cap)
inline __m512 capped(__m512 x, float cap) {
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / cap)), size = _mm512_abs_ps(y);
    const __m512 faded = exponential(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f))), one = _mm512_set1_ps(1.0f);
    const __m512 large = _mm512_div_ps(_mm512_sub_ps(one, faded), _mm512_add_ps(one, faded));
    const __m512 square = _mm512_mul_ps(y, y);  // near 0 that difference cancels: a Taylor polynomial
    __m512 small = _mm512_set1_ps(62.0f / 2835);
    for (float c : {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) small = _mm512_fmadd_ps(small, square, _mm512_set1_ps(c));
    small = _mm512_mul_ps(small, size);
    const __mmask16 is_small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.25f), _CMP_LT_OQ);
    const __m512 tanh = _mm512_mask_mov_ps(large, is_small, small), signs = _mm512_set1_ps(-0.0f);
    return _mm512_mul_ps(_mm512_or_ps(tanh, _mm512_and_ps(y, signs)), _mm512_set1_ps(cap));
}

// ---- projections

// acc[m][0..32) = dot products of token m's inputs with a block of weights [in / S][32][S], S inputs at a time
template <int M, bool PASSING>
inline void products(const float* weights, const float* inputs, int64_t in, float (*acc)[BLOCK]) {
    __m512 sum[M][2];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k++) {
        const __m512 low = load(weights + k * BLOCK), high = load(weights + k * BLOCK + 16);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            const __m512 x = _mm512_set1_ps(inputs[m * in + k]);
            sum[m][0] = _mm512_fmadd_ps(low, x, sum[m][0]);
            sum[m][1] = _mm512_fmadd_ps(high, x, sum[m][1]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) store(acc[m], sum[m][0]), store(acc[m] + 16, sum[m][1]);
}

template <int M, bool PASSING>
inline void products(const bf16* weights, const bf16* inputs, int64_t in, float (*acc)[BLOCK]) {
#ifdef __AVX512BF16__
    __m512 sum[M][2];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 2) {
        const bf16* pair = weights + k * BLOCK;
        constexpr auto hint = PASSING ? _MM_HINT_NTA : _MM_HINT_T0;
        _mm_prefetch(reinterpret_cast<const char*>(pair) + 4096, hint);
        _mm_prefetch(reinterpret_cast<const char*>(pair) + 4160, hint);
        const __m512bh low = (__m512bh)_mm512_loadu_si512(pair), high = (__m512bh)_mm512_loadu_si512(pair + 32);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            int32_t two;
            std::memcpy(&two, inputs + m * in + k, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], low, x);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], high, x);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) store(acc[m], sum[m][0]), store(acc[m] + 16, sum[m][1]);
#endif
}

template <class T>
using Products = void (*)(const T*, const T*, int64_t, float (*)[BLOCK]);

template <class T, bool PASSING>
Products<T> products_for(int64_t tile) {
    static constexpr Products<T> table[MAX_TILE] = {
        products<1, PASSING>, products<2, PASSING>,  products<3, PASSING>,  products<4, PASSING>,
        products<5, PASSING>, products<6, PASSING>,  products<7, PASSING>,  products<8, PASSING>,
        products<9, PASSING>, products<10, PASSING>, products<11, PASSING>, products<12, PASSING>};
    return table[tile - 1];
}

template <class T>
Products<T> products_of(int64_t tile, bool bypasses) {
    return bypasses ? products_for<T, true>(tile) : products_for<T, false>(tile);
}

// Tokens per tile, such that all tiles have about the same size.
inline int64_t tile_of(int64_t tokens) {
    const int64_t num_tiles = (tokens + MAX_TILE - 1) / MAX_TILE;
    return (tokens + num_tiles - 1) / num_tiles;
}

// A type of the interface of quantized.cpp.
inline const float* raw(const float* x) { return x; }
inline const uint16_t* raw(const bf16* x) { return &x->bits; }

// What a projection multiplies: its inputs, and if its weights are quantized, the same in fixed point.
template <class T>
struct Operand {
    const T* values;
    const quantized::Inputs* fixed;

    // buffer: of the calling thread. Each thread converts all tokens itself, which is faster than a barrier.
    Operand(const Projection& projection, const T* x, int64_t tokens, quantized::Inputs* buffer)
        : values(x), fixed(projection.num_parts ? buffer : nullptr) {
        if (fixed) quantized::convert(raw(x), tokens, projection.in, buffer);
    }
};

// acc[m] = products of token first + m with one block, for `count` tokens, MAX_TILE at most
template <class T>
void block_products(const Projection& projection, const Operand<T>& x, int64_t first, int64_t count, int64_t block,
                    bool bypasses, float (*acc)[BLOCK]) {
    const int64_t in = projection.in;
    if (!x.fixed) {
        const T* weights = static_cast<const T*>(projection.weight) + block * in * BLOCK;
        return products_of<T>(count, bypasses)(weights, x.values + first * in, in, acc);
    }
    const Part* part = projection.parts;
    while (block >= part->end) part++;
    quantized::products(static_cast<quantized::Kind>(part->kind), static_cast<const uint8_t*>(part->weights),
                        x.fixed + first * (in / quantized::GROUP), count, in, block - part->first, acc);
}

// Calls finish(token, block, sums of 32 outputs) for all tokens of one block.
template <class T, class Finish>
void project_block(const Projection& projection, const Operand<T>& x, int64_t tokens, int64_t block, bool bypasses,
                   Finish finish) {
    const int64_t tile = tile_of(tokens);
    alignas(64) float acc[MAX_TILE][BLOCK];
    for (int64_t first = 0; first < tokens; first += tile) {
        const int64_t count = std::min(tile, tokens - first);
        block_products(projection, x, first, count, block, bypasses, acc);
        for (int64_t m = 0; m < count; m++) finish(first + m, block, acc[m]);
    }
}

// `project_block` for all blocks, distributed over the threads without a barrier.
template <class T, class Finish>
void project(const Projection& projection, const Operand<T>& x, int64_t tokens, int64_t blocks, bool bypasses,
             Finish finish) {
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks; block++) project_block(projection, x, tokens, block, bypasses, finish);
}

template <class T>
inline void store_block(T* out, const float* sums, const T* bias, int64_t block, const T* residual = nullptr,
                        float scale = 1) {
    for (int64_t half = 0; half < BLOCK; half += 16) {
        __m512 x = load(sums + half);
        if (bias) x = _mm512_add_ps(x, load(bias + block * BLOCK + half));
        if (residual) x = _mm512_fmadd_ps(x, _mm512_set1_ps(scale), load(residual + half));
        store(out + half, x);
    }
}

// ---- normalization, rotary embedding, attention

// weight: of type T multiplies the rounded quotient, as in Llama; a float weight of a bf16 state multiplies before the
// only rounding, as in Gemma.
template <class T, class W>
inline void rms_norm(const T* x, const W* weight, float epsilon, int64_t size, T* out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + epsilon));
    for (int64_t i = 0; i < size; i += 16)
        store(out + i, _mm512_mul_ps(rounded<W>(_mm512_mul_ps(load(x + i), scale)), load(weight + i)));
}

template <class T>
inline void rotate(const T* x, const T* cos, const T* sin, int64_t size, T* out) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const __m512 first = load(x + i), second = load(x + half + i);
        store(out + i, _mm512_fnmadd_ps(second, load(sin + i), _mm512_mul_ps(first, load(cos + i))));
        store(out + half + i,
              _mm512_fmadd_ps(first, load(sin + half + i), _mm512_mul_ps(second, load(cos + half + i))));
    }
}

// one vector of the sums of sixteen
inline __m512 sums(const __m512 a[16]) {
    __m512 four[4];
    for (int i = 0; i < 4; i++) {
        const __m512* b = a + 4 * i;
        const __m512 p = _mm512_add_ps(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
        const __m512 q = _mm512_add_ps(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3]));
        const __m512d pd = _mm512_castps_pd(p), qd = _mm512_castps_pd(q);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pd, qd)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(pd, qd)));
    }
    __m512 two[2];
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xDD));
}

// A query and its products with a key, in 16 lanes that are still to be summed.
template <class T, int VECTORS>
struct Query {
    __m512 parts[VECTORS];
    explicit Query(const T* query) {
        for (int v = 0; v < VECTORS; v++) parts[v] = load(query + v * 16);
    }
    __m512 products(const T* key) const {
        __m512 dots = _mm512_mul_ps(parts[0], load(key));
        for (int v = 1; v < VECTORS; v++) dots = _mm512_fmadd_ps(parts[v], load(key + v * 16), dots);
        return dots;
    }
};

#ifdef __AVX512BF16__
template <int VECTORS>
struct Query<bf16, VECTORS> {  // multiplies bfloat16 pairs without conversion
    __m512bh parts[VECTORS / 2];
    static __m512bh pairs(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
    explicit Query(const bf16* query) {
        for (int v = 0; v < VECTORS / 2; v++) parts[v] = pairs(query + v * 32);
    }
    __m512 products(const bf16* key) const {
        __m512 dots = _mm512_setzero_ps();
        for (int v = 0; v < VECTORS / 2; v++) dots = _mm512_dpbf16_ps(dots, parts[v], pairs(key + v * 32));
        return dots;
    }
};
#endif

// The positions that the queries of a tile attend to: query q to those from first[q] and below seen[q]. Position p is
// in cache column p, except in a tree: there, position shared + i is that of column shared + paths[q][i], the i-th node
// on the path to q. Columns are counted modulo `ring`, the number of columns that the cache has.
struct Sight {
    int64_t first[MAX_TOGETHER], seen[MAX_TOGETHER], shared, ring;
    const int64_t* paths[MAX_TOGETHER];
    int64_t wrapped(int64_t column) const { return column < ring ? column : column % ring; }
    int64_t place(int64_t q, int64_t position) const {
        return wrapped(position < shared ? position : shared + paths[q][position - shared]);
    }
};

// Attention of one head for up to TILE consecutive queries of one row. Sums run over positions in order, in lanes by
// the position modulo KEYS, whatever the column of a position and the first position of the tile: so a token behind the
// wrap of a ring, or a node of a tree, is bit-identical to plain decoding.
// queries, outputs: [count][head_dim]. scores: a buffer of TILE * (the largest number of positions + 2 * KEYS) numbers.
// softcap: the bound of the scores, or 0.
template <class T, int VECTORS, int TILE, int PART>
void attend(const T* queries, const T* keys, const T* values, const Sight& sight, int64_t count, float scaling,
            float softcap, float* scores, T* outputs) {
    const int64_t* seen = sight.seen;
    constexpr int64_t size = VECTORS * 16;
    const int64_t most = *std::max_element(seen, seen + count), least = *std::min_element(sight.first, sight.first + count);
    const int64_t begin = least / KEYS * KEYS, room = (most - begin + KEYS - 1) / KEYS * KEYS, end = begin + room;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto sees = [&](int64_t q, int64_t j) {
        const __m512i past_first = _mm512_set1_epi32(static_cast<int>(std::max<int64_t>(sight.first[q] - j, 0)));
        return _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32(static_cast<int>(seen[q] - j))) &
               _mm512_cmpge_epi32_mask(lanes, past_first);
    };
    __m512 peak[TILE];
    for (int64_t q = 0; q < count; q++) {
        const Query<T, VECTORS> query(queries + q * size);
        peak[q] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t j = begin; j < end; j += KEYS) {
            __m512 dots[KEYS];
            const int64_t column = sight.wrapped(j), last = most - 1 - j;
            if ((most <= sight.shared || j + KEYS <= sight.shared) && column + std::min(last, KEYS - 1) < sight.ring)
                for (int64_t i = 0; i < KEYS; i++)
                    dots[i] = query.products(keys + (column + std::min(i, last)) * size);
            else
                for (int64_t i = 0; i < KEYS; i++)
                    dots[i] = query.products(keys + sight.place(q, std::min(j + i, seen[q] - 1)) * size);
            __m512 score = _mm512_mul_ps(sums(dots), _mm512_set1_ps(scaling));
            if (softcap) score = capped(score, softcap);
            peak[q] = _mm512_mask_max_ps(peak[q], sees(q, j), peak[q], score);
            store(scores + q * room + j - begin, score);
        }
    }
    __m512 total[TILE];
    for (int64_t q = 0; q < TILE; q++) {
        total[q] = _mm512_setzero_ps();
        if (q >= count) {  // an unused query has weights of 0
            std::memset(scores + q * room, 0, room * sizeof(float));
            continue;
        }
        const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(peak[q]));
        for (int64_t j = begin; j < end; j += KEYS) {
            float* row = scores + q * room + j - begin;
            const __m512 weight = _mm512_maskz_mov_ps(sees(q, j), exponential(_mm512_sub_ps(load(row), highest)));
            total[q] = _mm512_add_ps(total[q], weight);
            store(row, weight);
        }
    }
    const auto weight_of = [&](int64_t q, int64_t j) { return _mm512_set1_ps(scores[q * room + j - begin]); };
    for (int64_t part = 0; part < size; part += PART * 16) {  // of a head: its sums are in registers
        __m512 sum[TILE][PART];
        for (int64_t q = 0; q < TILE; q++)
            for (int v = 0; v < PART; v++) sum[q][v] = _mm512_setzero_ps();
        const int64_t shared = std::min(most, sight.shared);
        for (int64_t j = least; j < shared;) {
            const int64_t column = sight.wrapped(j), stop = std::min(shared, j + sight.ring - column);  // of a run
            for (const T* at = values + column * size + part; j < stop; j++, at += size) {
                __m512 value[PART];
                for (int v = 0; v < PART; v++) value[v] = load(at + v * 16);
#pragma GCC unroll 8
                for (int q = 0; q < TILE; q++) {
                    const __m512 weight = weight_of(q, j);
#pragma GCC unroll 16
                    for (int v = 0; v < PART; v++) sum[q][v] = _mm512_fmadd_ps(weight, value[v], sum[q][v]);
                }
            }
        }
        for (int64_t j = std::max(least, sight.shared); j < most; j++) {
#pragma GCC unroll 8
            for (int q = 0; q < TILE; q++) {
                if (q >= count || j >= seen[q] || j < sight.first[q]) continue;
                const __m512 weight = weight_of(q, j);
                const T* value = values + sight.place(q, j) * size + part;
#pragma GCC unroll 16
                for (int v = 0; v < PART; v++) sum[q][v] = _mm512_fmadd_ps(weight, load(value + v * 16), sum[q][v]);
            }
        }
        for (int64_t q = 0; q < count; q++) {
            const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total[q]));
            for (int v = 0; v < PART; v++)
                store(outputs + q * size + part + v * 16, _mm512_mul_ps(sum[q][v], scale));
        }
    }
}

template <class T>
using Attend = void (*)(const T*, const T*, const T*, const Sight&, int64_t, float, float, float*, T*);

template <class T>
Attend<T> attend_of(int64_t head_dim, bool is_narrow) {  // tiles such that the sums use up to 16 registers
    switch (head_dim) {
        case 32: return is_narrow ? attend<T, 2, 1, 2> : attend<T, 2, 8, 2>;
        case 64: return is_narrow ? attend<T, 4, 1, 4> : attend<T, 4, 4, 4>;
        case 96: return is_narrow ? attend<T, 6, 1, 6> : attend<T, 6, 2, 6>;
        case 128: return is_narrow ? attend<T, 8, 1, 8> : attend<T, 8, 2, 8>;
        case 160: return is_narrow ? attend<T, 10, 1, 10> : attend<T, 10, 3, 5>;
        case 192: return is_narrow ? attend<T, 12, 1, 12> : attend<T, 12, 4, 4>;
        case 256: return is_narrow ? attend<T, 16, 1, 16> : attend<T, 16, 4, 4>;
        default: return nullptr;
    }
}

// Number of queries per tile, of `queries` with the same keys and values.
inline int64_t queries_together(int64_t head_dim, int64_t queries) {
    if (queries == 1) return 1;
    switch (head_dim) {
        case 32: return 8;
        case 96: case 128: return 2;
        case 160: return 3;
        default: return 4;
    }
}

}  // namespace

// ---- the interface for Python; unless stated otherwise, pointers are to arrays of the type in the function's name

extern "C" {

// Missing norms are null; those after attention and MLP are of their outputs, before the residual is added. Norms are
// float arrays if has_float_norms, see `rms_norm`. softcap: the bound of attention scores, or 0. residual_scale: of the
// outputs of attention and MLP. activation: an Activation.
struct Layer {
    Projection qkv, output, gate_up, down;
    const void *norm_before_attention, *norm_after_attention, *norm_before_mlp, *norm_after_mlp, *query_norm, *key_norm;
    float epsilon, scaling, softcap, residual_scale;
    int64_t num_heads, num_kv_heads, head_dim, activation, has_float_norms;
};

enum Activation : int64_t { SILU, GELU_TANH };

// Layers of one shape, one after the other.
// hidden: [rows * width, hidden]. inputs: [rows * width, in], the input of the first layer's query, key and value
// projections; null for its normalized hidden states. results: for each layer where to write its output, of the shape of
// hidden; null where only the next layer reads it. cos, sin: of each layer [n, head_dim]. angles: int64 [rows * width],
// each token's row in them. positions: int64 [rows * width]. keys, values: of each layer [rows, num_kv_heads, columns,
// head_dim], a ring: a token's column is taken modulo the number of columns. windows: of each layer, the number of
// positions that a token attends to, up to its own.
// places: int64 [rows * width], the columns to write, which are the positions except in a tree. starts: int64 [rows],
// where a tree begins; paths: int64 [width * longest_path], the columns on the path to each token; null without a tree.
struct Call {
    const void *hidden, *inputs;
    const int64_t *angles, *positions, *places, *starts, *paths;
    const Layer* const* layers;
    void *const *cos, *const *sin, *const *keys, *const *values;
    const int64_t *columns, *windows;
    void* const* results;
    int64_t num_layers, rows, width, longest_path, num_threads;
};
}

namespace {

// Sizes and buffers shared by the layers of a call.
template <class T>
struct Work {
    const Call& call;
    int64_t tokens, size, dim, heads, kv_heads, wide, attended_size, mlp_size, max_seen;
    int64_t group, together, num_tiles;  // query heads per key/value head, queries per tile, tiles per row
    int64_t weights;  // number per layer
    int64_t num_fixed;  // groups of inputs in fixed point, of all tokens, of the widest quantized projection
    bool bypasses;    // see `bypasses_cache`
    std::unique_ptr<T[]> memory;
    T *qkv, *attended, *activated, *projected, *spare[2];
    mutable Barrier barrier;

    explicit Work(const Call& given) : call(given) {
        const Layer& layer = *call.layers[0];
        tokens = call.rows * call.width, size = layer.output.out, dim = layer.head_dim;
        heads = layer.num_heads, kv_heads = layer.num_kv_heads, wide = layer.qkv.out;
        attended_size = heads * dim, mlp_size = layer.down.in;
        weights = size * (wide + attended_size + 3 * mlp_size);
        bypasses = bypasses_cache(call.num_layers * weights * sizeof(T), tokens);
        max_seen = *std::max_element(call.positions, call.positions + tokens) + 1;
        group = heads / kv_heads, together = queries_together(dim, call.width * group);
        num_tiles = (call.width * group + together - 1) / together;
        num_fixed = 0;
        for (int64_t i = 0; i < call.num_layers; i++)
            for (const Projection* each : {&call.layers[i]->qkv, &call.layers[i]->output, &call.layers[i]->gate_up,
                                           &call.layers[i]->down})
                if (each->num_parts) num_fixed = std::max(num_fixed, tokens * each->in / quantized::GROUP);
        memory.reset(new T[tokens * (3 * size + wide + attended_size + mlp_size)]);
        spare[0] = memory.get(), spare[1] = spare[0] + tokens * size, projected = spare[1] + tokens * size;
        qkv = projected + tokens * size, attended = qkv + tokens * wide, activated = attended + tokens * attended_size;
    }
};

// A layer of a call, with its cache and its rotary embedding.
template <class T>
struct Place {
    const Layer& layer;
    const T *cos, *sin;
    T *keys, *values;
    int64_t columns, window;

    Place(const Call& call, int64_t i)
        : layer(*call.layers[i]), cos(static_cast<const T*>(call.cos[i])), sin(static_cast<const T*>(call.sin[i])),
          keys(static_cast<T*>(call.keys[i])), values(static_cast<T*>(call.values[i])), columns(call.columns[i]),
          window(call.windows[i]) {}
};

template <class T>
void apply_norm(const Layer& layer, const void* weight, const T* x, int64_t size, T* out) {
    if (layer.has_float_norms)
        rms_norm(x, static_cast<const float*>(weight), layer.epsilon, size, out);
    else
        rms_norm(x, static_cast<const T*>(weight), layer.epsilon, size, out);
}

// Each thread normalizes all tokens itself, which is faster than a barrier.
template <class T>
void rms_norm_all(const Work<T>& work, const Layer& layer, const void* weight, const T* x, T* normed) {
    const int64_t size = work.size;
    if (!weight) {
        std::memcpy(normed, x, work.tokens * size * sizeof(T));
        return;
    }
    for (int64_t t = 0; t < work.tokens; t++) apply_norm(layer, weight, x + t * size, size, normed + t * size);
}

// Rotates a query in place, or writes a rotated key, or a value, to the cache.
template <class T>
void place_head(const Work<T>& work, const Place<T>& at, int64_t t, int64_t head) {
    const int64_t dim = work.dim, heads = work.heads, kv_heads = work.kv_heads, column = work.call.places[t];
    T* x = work.qkv + t * work.wide + head * dim;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const int64_t kv_head = is_value ? head - heads - kv_heads : head - heads;
    const int64_t block = (t / work.call.width * kv_heads + kv_head) * at.columns;
    const int64_t place = (block + (column < at.columns ? column : column % at.columns)) * dim;
    if (is_value) {
        std::memcpy(at.values + place, x, dim * sizeof(T));
        return;
    }
    const void* norm = is_query ? at.layer.query_norm : at.layer.key_norm;
    if (norm) apply_norm(at.layer, norm, x, dim, x);
    alignas(64) T rotated_head[MAX_HEAD_DIM];
    const int64_t angle = work.call.angles[t] * dim;
    rotate(x, at.cos + angle, at.sin + angle, dim, rotated_head);
    std::memcpy(is_query ? x : at.keys + place, rotated_head, dim * sizeof(T));
}

// The thread that computes a head of queries, keys or values also rotates and stores it.
template <class T>
void project_and_place(const Work<T>& work, const Place<T>& at, const Operand<T>& x) {
    const int64_t blocks = work.dim / BLOCK;
    const Projection& qkv = at.layer.qkv;
    const auto keep = [&](int64_t t, int64_t block, const float* sums) {
        T* out = work.qkv + t * work.wide + block * BLOCK;
        store_block(out, sums, static_cast<const T*>(qkv.bias), block);
    };
#pragma omp for schedule(static) nowait
    for (int64_t head = 0; head < work.heads + 2 * work.kv_heads; head++) {
        for (int64_t block = head * blocks; block < (head + 1) * blocks; block++)
            project_block(qkv, x, work.tokens, block, work.bypasses, keep);
        for (int64_t t = 0; t < work.tokens; t++) place_head(work, at, t, head);
    }
}

// All query heads of a group have the same keys and values, so their queries are computed in the same tiles.
template <class T>
void attend_all(const Work<T>& work, const Place<T>& at) {
    const int64_t dim = work.dim, width = work.call.width, group = work.group, queries_of_head = width * group;
    const Attend<T> attend_tile = attend_of<T>(dim, queries_of_head == 1);
    const std::unique_ptr<float[]> scores(new float[work.together * (work.max_seen + 2 * KEYS)]);
    alignas(64) T queries[MAX_TOGETHER * MAX_HEAD_DIM], outputs[MAX_TOGETHER * MAX_HEAD_DIM];
    Sight sight;
    sight.ring = at.columns;
#pragma omp for schedule(static) collapse(3) nowait
    for (int64_t row = 0; row < work.call.rows; row++)
        for (int64_t kv_head = 0; kv_head < work.kv_heads; kv_head++)
            for (int64_t tile = 0; tile < work.num_tiles; tile++) {
                const int64_t first = tile * work.together, count = std::min(work.together, queries_of_head - first);
                const auto token = [&](int64_t q) { return row * width + (first + q) / group; };
                const auto place = [&](int64_t q) { return (kv_head * group + (first + q) % group) * dim; };
                sight.shared = work.call.starts ? work.call.starts[row] : work.max_seen;
                for (int64_t q = 0; q < count; q++) {
                    sight.seen[q] = work.call.positions[token(q)] + 1;
                    sight.first[q] = std::max<int64_t>(0, sight.seen[q] - at.window);
                    if (work.call.paths) sight.paths[q] = work.call.paths + (first + q) / group * work.call.longest_path;
                    std::memcpy(queries + q * dim, work.qkv + token(q) * work.wide + place(q), dim * sizeof(T));
                }
                const int64_t block = (row * work.kv_heads + kv_head) * at.columns * dim;
                attend_tile(queries, at.keys + block, at.values + block, sight, count, at.layer.scaling,
                            at.layer.softcap, scores.get(), outputs);
                for (int64_t q = 0; q < count; q++)
                    std::memcpy(work.attended + token(q) * work.attended_size + place(q), outputs + q * dim,
                                dim * sizeof(T));
            }
}

// activation(gate) * up. A thread computes corresponding blocks of both, so that no intermediate result is stored.
template <class T>
void gate_and_up(const Work<T>& work, const Layer& layer, const Operand<T>& x) {
    const T* bias = static_cast<const T*>(layer.gate_up.bias);
    const int64_t blocks = work.mlp_size / BLOCK, tile = tile_of(work.tokens);
    alignas(64) float gates[MAX_TILE][BLOCK], ups[MAX_TILE][BLOCK];
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t first = 0; first < work.tokens; first += tile) {
            const int64_t count = std::min(tile, work.tokens - first);
            block_products(layer.gate_up, x, first, count, block, work.bypasses, gates);
            block_products(layer.gate_up, x, first, count, blocks + block, work.bypasses, ups);
            for (int64_t m = 0; m < count; m++)
                for (int64_t half = 0; half < BLOCK; half += 16) {
                    __m512 gate = load(gates[m] + half), up = load(ups[m] + half);
                    if (bias) {
                        gate = _mm512_add_ps(gate, load(bias + block * BLOCK + half));
                        up = _mm512_add_ps(up, load(bias + (blocks + block) * BLOCK + half));
                    }
                    gate = layer.activation == GELU_TANH ? gelu_tanh(gate) : silu(gate);
                    store(work.activated + (first + m) * work.mlp_size + block * BLOCK + half, _mm512_mul_ps(gate, up));
                }
        }
}

// out = projection(x) * scale + residual; without a residual, projection(x)
template <class T>
void project_onto(const Work<T>& work, const Projection& projection, const Operand<T>& x, const T* residual,
                  float scale, T* out) {
    project(projection, x, work.tokens, work.size / BLOCK, work.bypasses,
            [&](int64_t t, int64_t block, const float* sums) {
                const int64_t place = t * work.size + block * BLOCK;
                store_block(out + place, sums, static_cast<const T*>(projection.bias), block,
                            residual ? residual + place : nullptr, scale);
            });
}

// hidden + norm(projection(x)), with a barrier after the product. It is returned in `shared` without a norm. With one,
// which needs a token's whole product, every thread adds all tokens itself, in its buffer `own`.
template <class T>
const T* added(const Work<T>& work, const Layer& layer, const Projection& projection, const void* norm,
               const Operand<T>& x, const T* hidden, T* shared, T* own) {
    const int64_t size = work.size;
    project_onto(work, projection, x, norm ? nullptr : hidden, layer.residual_scale, norm ? work.projected : shared);
    work.barrier.wait();
    if (!norm) return shared;
    for (int64_t t = 0; t < work.tokens; t++) {
        T *of_token = own + t * size, *normed = own + work.tokens * size;
        apply_norm(layer, norm, work.projected + t * size, size, normed);
        for (int64_t i = 0; i < size; i += 16)
            store(of_token + i, _mm512_add_ps(load(hidden + t * size + i), load(normed + i)));
    }
    return own;
}

// Called by all threads of a team, with buffers of the calling thread: `normed` of all tokens, `own` of them and one
// more, and `fixed` for an `Operand`. Returns the layer's output, which is in `shared` or `own`.
template <class T>
const T* run_layer(const Work<T>& work, const Place<T>& at, const T* hidden, const T* inputs, T* normed, T* shared,
                   T* own, quantized::Inputs* fixed) {
    const Layer& layer = at.layer;
    const auto operand = [&](const Projection& by, const T* x) { return Operand<T>(by, x, work.tokens, fixed); };
    if (!inputs) rms_norm_all(work, layer, layer.norm_before_attention, hidden, normed);
    project_and_place(work, at, operand(layer.qkv, inputs ? inputs : normed));
    work.barrier.wait();
    attend_all(work, at);
    work.barrier.wait();
    hidden = added<T>(work, layer, layer.output, layer.norm_after_attention, operand(layer.output, work.attended), hidden,
                      shared, own);
    rms_norm_all(work, layer, layer.norm_before_mlp, hidden, normed);
    gate_and_up(work, layer, operand(layer.gate_up, normed));
    work.barrier.wait();
    return added<T>(work, layer, layer.down, layer.norm_after_mlp, operand(layer.down, work.activated), hidden, shared,
                    own);
}

template <class T>
void run_layers(const Call& call) {
    const Work<T> work(call);
    const int64_t size = work.tokens * work.size;
#pragma omp parallel num_threads(threads_for(work.weights, work.tokens, call.num_threads))
    {
        const std::unique_ptr<T[]> normed(new T[size]), own(new T[size + work.size]);
        const std::unique_ptr<quantized::Inputs[]> fixed(new quantized::Inputs[work.num_fixed]);
        const T* hidden = static_cast<const T*>(call.hidden);
        for (int64_t i = 0; i < call.num_layers; i++) {
            T *wanted = static_cast<T*>(call.results[i]), *shared = wanted ? wanted : work.spare[i % 2];
            const T* inputs = i == 0 ? static_cast<const T*>(call.inputs) : nullptr;
            hidden = run_layer(work, Place<T>(call, i), hidden, inputs, normed.get(), shared, own.get(),
                               fixed.get());
            if (wanted && hidden != wanted && omp_get_thread_num() == 0) std::memcpy(wanted, hidden, size * sizeof(T));
        }
    }
}

template <class T>
void run_projection(const Projection& projection, const T* inputs, T* outputs, int64_t tokens, int64_t num_threads) {
    const int64_t out = (projection.out + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t num_fixed = projection.num_parts ? tokens * projection.in / quantized::GROUP : 0;
    const std::unique_ptr<quantized::Inputs[]> fixed(new quantized::Inputs[num_fixed]);
    const Operand<T> x(projection, inputs, tokens, fixed.get());
#pragma omp parallel num_threads(threads_for(projection.in * out, tokens, num_threads))
    project(projection, x, tokens, out / BLOCK, bypasses_cache(projection.in * out * sizeof(T), tokens),
            [&](int64_t t, int64_t block, const float* sums) {
                store_block(outputs + t * out + block * BLOCK, sums, static_cast<const T*>(projection.bias), block);
            });
}

template <class T, class W>
void norm_rows(const T* x, const W* weight, float epsilon, int64_t rows, int64_t size, T* out) {
    for (int64_t r = 0; r < rows; r++) rms_norm(x + r * size, weight, epsilon, size, out + r * size);
}

template <class T>
void cap_all(T* x, int64_t n, float cap) {
    for (int64_t i = 0; i < n; i += 16) {
        T some[16] = {};
        const int64_t count = std::min<int64_t>(16, n - i);
        std::memcpy(some, x + i, count * sizeof(T));
        store(some, capped(load(some), cap));
        std::memcpy(x + i, some, count * sizeof(T));
    }
}

}  // namespace

extern "C" {
void layers_float32(const Call* call) { run_layers<float>(*call); }
void layers_bfloat16(const Call* call) { run_layers<bf16>(*call); }

// Moves row r's entry at starts[r] + path[r, i] to starts[r] + i in blocks [slots, heads, capacity, bytes]. path
// [rows, num] ascends, so no entry is overwritten before it is moved.
void keep(void* const* blocks, const int64_t* starts, const int64_t* path, int64_t num_blocks, int64_t rows,
          int64_t heads, int64_t capacity, int64_t bytes, int64_t num) {
    for (int64_t block = 0; block < num_blocks; block++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t head = 0; head < heads; head++) {
                char* row = static_cast<char*>(blocks[block]) + ((r * heads + head) * capacity + starts[r]) * bytes;
                for (int64_t i = 0; i < num; i++)
                    if (path[r * num + i] != i) std::memcpy(row + i * bytes, row + path[r * num + i] * bytes, bytes);
            }
}

// outputs: [tokens, out rounded up to a multiple of 32]
void project_float32(const Projection* p, const float* x, float* y, int64_t tokens, int64_t num_threads) {
    run_projection<float>(*p, x, y, tokens, num_threads);
}
void project_bfloat16(const Projection* p, const void* x, void* y, int64_t tokens, int64_t num_threads) {
    run_projection<bf16>(*p, static_cast<const bf16*>(x), static_cast<bf16*>(y), tokens, num_threads);
}

// weight: of the type of x; in the last variant float, see `rms_norm`
void rms_norm_float32(const float* x, const float* weight, float epsilon, int64_t tokens, int64_t size, float* out) {
    norm_rows(x, weight, epsilon, tokens, size, out);
}
void rms_norm_bfloat16(const void* x, const void* weight, float epsilon, int64_t tokens, int64_t size, void* out) {
    norm_rows(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), epsilon, tokens, size,
              static_cast<bf16*>(out));
}
void rms_norm_once_bfloat16(const void* x, const float* weight, float epsilon, int64_t tokens, int64_t size, void* out) {
    norm_rows(static_cast<const bf16*>(x), weight, epsilon, tokens, size, static_cast<bf16*>(out));
}

// cap * tanh(x / cap) of n numbers, in place
void softcap_float32(float* x, int64_t n, float cap) { cap_all(x, n, cap); }
void softcap_bfloat16(void* x, int64_t n, float cap) { cap_all(static_cast<bf16*>(x), n, cap); }
}
