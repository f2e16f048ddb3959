// Products of activations with quantized weights, in integers.
//
// Weights are codes of 4, 6 or 8 bits with a scale for each group of 32 inputs, or of 16, as in GGUF files. Activations
// are converted to fixed point, group by group (see `Inputs`), so a group's products are integers and their sum is exact.
// In float32, group after group, it is multiplied by the scales and added up. That order does not depend on the number
// of tokens, and every implementation below has the same bits: with AVX512-VNNI, with AVX2, and in plain C++.

#include "quantized.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace quantized {
namespace {

constexpr int64_t LANES = 16;  // outputs per vector
constexpr int STEPS = 8;       // of four inputs per group: a dword of each lane
constexpr int64_t LINE = 64;   // bytes of a cache line
constexpr int64_t GROUPS = 8;  // of a super-block, whose groups have scales in 8 bits

// How a kind stores a block of outputs: super-blocks, if there are any, with a scale and a minimum of each output as
// float16, then groups: codes, scales and minima of each output, as float16 or, in a super-block, as bytes.
// Codes are stored for 16 outputs, then for the other 16. 4-bit codes: dword `lane` of vector i has the inputs 4i to
// 4i + 3 in its low nibbles and 4i + 16 to 4i + 19 in the high ones. 6-bit codes: the same, then two vectors with the
// upper two bits: bits 2f and 2f + 1 of a byte of vector i belong to step 4i + f. HAS_HALVES: there are two scales per
// group, of 16 inputs each, which are signed bytes.
template <int BITS_, int ZERO_, bool HAS_MINIMUM_, bool IS_SUPER_ = false, bool HAS_HALVES_ = false>
struct Format {
    static constexpr int BITS = BITS_, ZERO = ZERO_;
    static constexpr bool HAS_MINIMUM = HAS_MINIMUM_, IS_SUPER = IS_SUPER_, HAS_HALVES = HAS_HALVES_;
    static constexpr int64_t CODE_BYTES = BITS * GROUP * BLOCK / 8;
    static constexpr int64_t NUM_SCALES = 1 + (HAS_MINIMUM || HAS_HALVES);
    static constexpr int64_t GROUP_BYTES = CODE_BYTES + NUM_SCALES * BLOCK * (IS_SUPER ? 1 : 2);
    static constexpr int64_t SUPER_BYTES = IS_SUPER ? 2 * BLOCK * (1 + HAS_MINIMUM) : 0;
    static constexpr int64_t bytes(int64_t in) {  // of a block
        return in / GROUP * GROUP_BYTES + (IS_SUPER ? in / GROUP / GROUPS * SUPER_BYTES : 0);
    }
};

#ifdef __AVX512VNNI__

using Floats = __m512;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats fma(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
inline Floats product(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline __m128i bytes(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
inline Floats unsigned_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(p))); }
inline Floats signed_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(p))); }

struct Codes {
    __m512i steps[STEPS];

    template <int BITS>
    static inline Codes unpack(const uint8_t* p) {
        Codes codes;
        const auto vector = [&](int i) { return _mm512_loadu_si512(p + 64 * i); };
        if constexpr (BITS == 8) {
            for (int i = 0; i < STEPS; i++) codes.steps[i] = vector(i);
            return codes;
        }
        const __m512i nibble = _mm512_set1_epi8(15), two = _mm512_set1_epi8(48);
        for (int i = 0; i < 4; i++) {
            codes.steps[i] = _mm512_and_si512(vector(i), nibble);
            codes.steps[i + 4] = _mm512_and_si512(_mm512_srli_epi16(vector(i), 4), nibble);
        }
        if constexpr (BITS == 6)
            for (int i = 0; i < STEPS; i++) {
                const __m512i upper = vector(4 + i / 4);
                const int shift = 2 * (i % 4) - 4;  // to bits 4 and 5
                const __m512i moved = shift < 0 ? _mm512_slli_epi16(upper, -shift) : _mm512_srli_epi16(upper, shift);
                codes.steps[i] = _mm512_or_si512(codes.steps[i], _mm512_and_si512(moved, two));
            }
        return codes;
    }
};

// start + the products of the inputs of steps FIRST to END - 1, as float
template <int FIRST, int END>
inline void dot(const Codes* codes, const Inputs& x, int32_t start, Floats* out) {
    const auto four = [](const int8_t* p) {
        int32_t value;
        std::memcpy(&value, p, 4);
        return _mm512_set1_epi32(value);
    };
    __m512i high[2] = {}, low[2] = {_mm512_set1_epi32(start), _mm512_set1_epi32(start)};
#pragma GCC unroll 8
    for (int i = FIRST; i < END; i++) {
        const __m512i of_high = four(x.high + 4 * i), of_low = four(x.low + 4 * i);
        for (int h = 0; h < 2; h++) {
            high[h] = _mm512_dpbusd_epi32(high[h], codes[h].steps[i], of_high);
            low[h] = _mm512_dpbusd_epi32(low[h], codes[h].steps[i], of_low);
        }
    }
    for (int h = 0; h < 2; h++)
        out[h] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[h], 8), low[h]));
}

#else

struct Floats {
    float x[LANES];
};

template <class Function>
inline Floats each(Function function) {
    Floats result;
    for (int64_t i = 0; i < LANES; i++) result.x[i] = function(i);
    return result;
}

inline float half(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * mantissa * 0x1p-24f;
    const uint32_t wide = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline Floats load(const float* p) { return each([&](int64_t i) { return p[i]; }); }
inline void store(float* p, const Floats& x) { std::memcpy(p, x.x, sizeof x.x); }
inline Floats fma(const Floats& x, const Floats& y, const Floats& z) {
    return each([&](int64_t i) { return __builtin_fmaf(x.x[i], y.x[i], z.x[i]); });
}
inline Floats product(const Floats& x, const Floats& y) { return each([&](int64_t i) { return x.x[i] * y.x[i]; }); }
inline Floats all(float x) { return each([&](int64_t) { return x; }); }
inline Floats halves(const uint8_t* p) {
    return each([&](int64_t i) { return half(static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8)); });
}
inline Floats unsigned_bytes(const uint8_t* p) { return each([&](int64_t i) { return float(p[i]); }); }
inline Floats signed_bytes(const uint8_t* p) { return each([&](int64_t i) { return float(int8_t(p[i])); }); }

struct Codes {
    uint8_t steps[STEPS][4 * LANES];

    template <int BITS>
    static inline Codes unpack(const uint8_t* p) {
        Codes codes;
        for (int i = 0; i < STEPS; i++)
            for (int64_t j = 0; j < 4 * LANES; j++) {
                const uint8_t *row = p + (BITS == 8 ? i : i % 4) * 4 * LANES + j, *upper = p + (4 + i / 4) * 4 * LANES + j;
                uint8_t code = BITS == 8 ? *row : i < 4 ? *row & 15 : *row >> 4;
                if constexpr (BITS == 6) code |= (*upper >> 2 * (i % 4) & 3) << 4;
                codes.steps[i][j] = code;
            }
        return codes;
    }
};

template <int FIRST, int END>
inline Floats dot_of_lanes(const Codes& codes, const Inputs& x, int32_t start) {
    alignas(32) int32_t sums[LANES];
#ifdef __AVX2__
    __m256i pairs[4] = {};  // two sums of each of four lanes
    for (int i = FIRST; i < END; i++) {
        int64_t four;
        std::memcpy(&four, x.values + 4 * i, 8);
        const __m256i inputs = _mm256_set1_epi64x(four);
        for (int part = 0; part < 4; part++) {
            const __m128i some = _mm_loadu_si128((const __m128i*)(codes.steps[i] + 16 * part));
            pairs[part] = _mm256_add_epi32(pairs[part], _mm256_madd_epi16(_mm256_cvtepu8_epi16(some), inputs));
        }
    }
    for (int part = 0; part < 4; part += 2) {
        const __m256i mixed = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[part], pairs[part + 1]), 0xD8);
        _mm256_store_si256((__m256i*)(sums + 4 * part), _mm256_add_epi32(mixed, _mm256_set1_epi32(start)));
    }
#else
    for (int64_t lane = 0; lane < LANES; lane++) {
        sums[lane] = start;
        for (int i = FIRST; i < END; i++)
            for (int k = 0; k < 4; k++) sums[lane] += int32_t(codes.steps[i][4 * lane + k]) * x.values[4 * i + k];
    }
#endif
    return each([&](int64_t i) { return float(sums[i]); });
}

template <int FIRST, int END>
inline void dot(const Codes* codes, const Inputs& x, int32_t start, Floats* out) {
    for (int h = 0; h < 2; h++) out[h] = dot_of_lanes<FIRST, END>(codes[h], x, start);
}

#endif

// The scales of a group, of 16 outputs. second: of the second 16 inputs, or the minimum.
template <class F>
struct Scales {
    Floats first, second;

    static Scales read(const uint8_t* stored, int64_t half, const Scales& of_super) {
        if constexpr (!F::IS_SUPER) return read_halves(stored, half);
        stored += half * LANES;
        if constexpr (F::HAS_HALVES)
            return {product(signed_bytes(stored), of_super.first), product(signed_bytes(stored + BLOCK), of_super.first)};
        return {product(unsigned_bytes(stored), of_super.first),
                product(unsigned_bytes(stored + BLOCK), of_super.second)};
    }
    static Scales read_halves(const uint8_t* stored, int64_t half) {
        stored += half * 2 * LANES;
        return {halves(stored), F::HAS_MINIMUM ? halves(stored + 2 * BLOCK) : all(0)};
    }
};

template <class F>
inline void add_group(const Codes* codes, const Scales<F>* scales, const Inputs& x, float* sums) {
    const int32_t total = x.sums[0] + x.sums[1];
    const Floats scale = all(x.scale), minimum_factor = all(float(total) * x.scale);
    Floats first[2], second[2];
    dot<0, F::HAS_HALVES ? 4 : 8>(codes, x, -F::ZERO * (F::HAS_HALVES ? x.sums[0] : total), first);
    if constexpr (F::HAS_HALVES) dot<4, 8>(codes, x, -F::ZERO * x.sums[1], second);
    for (int h = 0; h < 2; h++) {
        Floats sum = fma(product(first[h], scale), scales[h].first, load(sums + h * LANES));
        if constexpr (F::HAS_HALVES) sum = fma(product(second[h], scale), scales[h].second, sum);
        if constexpr (F::HAS_MINIMUM) sum = fma(minimum_factor, scales[h].second, sum);
        store(sums + h * LANES, sum);
    }
}

// How the weights of later groups are prefetched: those in up to 6 bits far ahead, a whole group at once. In 8 bits that
// would exhaust the outstanding requests of the core's first-level cache. For one or two tokens, which wait for memory,
// these are prefetched shortly ahead, into the second-level cache; for more, far ahead, in parts during the first three
// tokens. The functions must be inlined: GCC removes calls of functions that only prefetch.
enum Ahead { FAR, CLOSE, DISTRIBUTED };

template <class F>
constexpr Ahead ahead_of(int64_t tokens) {
    return F::BITS < 8 ? FAR : tokens <= 2 ? CLOSE : DISTRIBUTED;
}

template <class F>
[[gnu::always_inline]] inline void prefetch(const uint8_t* at, Ahead ahead) {
    for (int64_t i = 0; ahead == FAR && i < F::GROUP_BYTES; i += LINE) __builtin_prefetch(at + 4096 + i);
    for (int64_t i = 0; ahead == CLOSE && i < F::GROUP_BYTES; i += LINE) __builtin_prefetch(at + 512 + i, 0, 2);
}

template <class F>
[[gnu::always_inline]] inline void prefetch_share(const uint8_t* at, Ahead ahead, int64_t token) {
    if (ahead != DISTRIBUTED || token >= 3) return;
    constexpr int64_t share = (F::GROUP_BYTES / LINE + 2) / 3 * LINE;
    const int64_t end = std::min(F::GROUP_BYTES, (token + 1) * share);
    for (int64_t i = token * share; i < end; i += LINE) __builtin_prefetch(at + 4096 + i);
}

template <class F>
void products_of(const uint8_t* weights, const Inputs* inputs, int64_t tokens, int64_t in, int64_t block,
                 float (*sums)[BLOCK]) {
    const int64_t groups = in / GROUP;
    const Ahead ahead = ahead_of<F>(tokens);
    const uint8_t* at = weights + block * F::bytes(in);
    Scales<F> of_super[2] = {}, scales[2];
    Codes codes[2];
    std::memset(sums, 0, tokens * sizeof *sums);
    for (int64_t group = 0; group < groups; group++, at += F::GROUP_BYTES) {
        if (F::IS_SUPER && group % GROUPS == 0) {
            for (int h = 0; h < 2; h++) {
                of_super[h] = Scales<F>::read_halves(at, h);
                // GGUF subtracts the minima of super-blocks
                if constexpr (F::HAS_MINIMUM) of_super[h].second = product(of_super[h].second, all(-1.0f));
            }
            at += F::SUPER_BYTES;
        }
        prefetch<F>(at, ahead);
        for (int h = 0; h < 2; h++) {
            codes[h] = Codes::unpack<F::BITS>(at + h * F::CODE_BYTES / 2);
            scales[h] = Scales<F>::read(at + F::CODE_BYTES, h, of_super[h]);
        }
        for (int64_t t = 0; t < tokens; t++) {
            prefetch_share<F>(at, ahead, t);
            add_group<F>(codes, scales, inputs[t * groups + group], sums[t]);
        }
    }
}

inline float as_float(float x) { return x; }
inline float as_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline float power_of_two(uint32_t biased_exponent) {
    const uint32_t bits = biased_exponent << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
void convert_group(const T* given, Inputs& group) {
    uint32_t bits[GROUP], largest = 0;
    float x[GROUP];
    for (int64_t i = 0; i < GROUP; i++) x[i] = as_float(given[i]);
    std::memcpy(bits, x, sizeof x);
    for (int64_t i = 0; i < GROUP; i++) largest = std::max(largest, bits[i] & 0x7FFFFFFF);
    // the biased exponent, plus one for a largest input above 32512 / 16384: `high` then fits
    const uint32_t found = (largest + 0x1FFFF) >> 23, exponent = std::max<uint32_t>(found, 27);
    const bool is_finite = exponent < 255;
    group.scale = is_finite ? power_of_two(exponent - 14) : std::numeric_limits<float>::quiet_NaN();
    const float factor = is_finite ? power_of_two(268 - exponent) : 0;
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the rounded number
    int32_t values[GROUP];
    for (int64_t i = 0; i < GROUP; i++) {
        const float sum = (is_finite ? x[i] * factor : 0) + shift;
        std::memcpy(&values[i], &sum, 4);
        values[i] -= 0x4B400000;
    }
    group.sums[0] = group.sums[1] = 0;
    for (int64_t i = 0; i < GROUP / 2; i++) group.sums[0] += values[i], group.sums[1] += values[i + GROUP / 2];
#ifdef __AVX512VNNI__
    for (int64_t i = 0; i < GROUP; i++) group.high[i] = static_cast<int8_t>((values[i] + 128) >> 8);
    for (int64_t i = 0; i < GROUP; i++) group.low[i] = static_cast<int8_t>(values[i]);
#else
    for (int64_t i = 0; i < GROUP; i++) group.values[i] = static_cast<int16_t>(values[i]);
#endif
}

template <class T>
void convert_all(const T* x, int64_t tokens, int64_t in, Inputs* inputs) {
    for (int64_t i = 0; i < tokens * in / GROUP; i++) convert_group(x + i * GROUP, inputs[i]);
}

}  // namespace

void convert(const float* x, int64_t tokens, int64_t in, Inputs* inputs) { convert_all(x, tokens, in, inputs); }
void convert(const uint16_t* x, int64_t tokens, int64_t in, Inputs* inputs) { convert_all(x, tokens, in, inputs); }

void products(Kind kind, const uint8_t* weights, const Inputs* inputs, int64_t tokens, int64_t in, int64_t block,
              float (*sums)[BLOCK]) {
    static constexpr decltype(&products_of<Format<4, 8, false>>) table[NUM_KINDS] = {
        products_of<Format<4, 8, false>>,      products_of<Format<4, 0, true>>,        // Q4_0, Q4_1
        products_of<Format<6, 16, false>>,     products_of<Format<6, 0, true>>,        // Q5_0, Q5_1
        products_of<Format<8, 128, false>>,                                            // Q8_0
        products_of<Format<4, 0, true, true>>, products_of<Format<6, 0, true, true>>,  // Q4_K, Q5_K
        products_of<Format<6, 32, false, true, true>>};                                // Q6_K
    table[kind](weights, inputs, tokens, in, block, sums);
}

}  // namespace quantized

extern "C" {

// outputs[t][0..32 * blocks) = products of inputs [tokens, in] with weights, for machines without decoder_layer.cpp.
// Rows of outputs are `stride` numbers apart.
void quantized_products(const uint8_t* weights, int64_t kind, const float* inputs, int64_t tokens, int64_t in,
                        int64_t blocks, int64_t stride, float* outputs, int64_t num_threads) {
    using namespace quantized;
    constexpr int64_t tile = 12;
    const std::unique_ptr<Inputs[]> fixed(new Inputs[tokens * in / GROUP]);
    convert(inputs, tokens, in, fixed.get());
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t first = 0; first < tokens; first += tile) {
            alignas(64) float sums[tile][BLOCK];
            const int64_t count = std::min(tile, tokens - first);
            products(static_cast<Kind>(kind), weights, fixed.get() + first * in / GROUP, count, in, block, sums);
            for (int64_t t = 0; t < count; t++)
                std::memcpy(outputs + (first + t) * stride + block * BLOCK, sums[t], sizeof sums[t]);
        }
}
}
