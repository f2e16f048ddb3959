// Sampling for CPUs with AVX-512: reductions over logits, draws and uniforms.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vectors.h"

namespace {

// Up to 16 values of a row from index i; the last vector is padded with minus infinity.
template <class T>
inline __m512 load_some(const T* row, int64_t i, int64_t size) {
    if (i + 16 <= size) return load(row + i);
    T some[16];
    const float nothing = -std::numeric_limits<float>::infinity();
    store(some, _mm512_set1_ps(nothing));
    std::copy(row + i, row + size, some);
    return load(some);
}

// The maximum of a row, NaN if a value is, and the index of its first occurrence.
template <class T>
void largest(const T* row, int64_t size, float* peak, int64_t* place) {
    const __m512i sixteen = _mm512_set1_epi32(16);
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), where = here;
    __m512 most = load_some(row, 0, size);
    __mmask16 bad = _mm512_cmp_ps_mask(most, most, _CMP_UNORD_Q);
    for (int64_t i = 16; i < size; i += 16) {
        const __m512 x = load_some(row, i, size);
        here = _mm512_add_epi32(here, sixteen);
        bad |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __mmask16 more = _mm512_cmp_ps_mask(x, most, _CMP_GT_OQ);
        most = _mm512_mask_mov_ps(most, more, x);
        where = _mm512_mask_mov_epi32(where, more, here);
    }
    *peak = bad ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
    const __mmask16 best = _mm512_cmp_ps_mask(most, _mm512_set1_ps(*peak), _CMP_EQ_OQ);
    *place = best ? _mm512_mask_reduce_min_epi32(best, where) : 0;
}

// exp((x - peak) * scale) of 16 values; 0 on underflow, so that a masked token keeps probability 0.
template <class T>
inline __m512 exponentials(const T* row, int64_t i, int64_t size, __m512 peak, __m512 scale) {
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(load_some(row, i, size), peak), scale);
    const __mmask16 lost = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(exponential(x), lost, _mm512_setzero_ps());
}

// The sum of a row's exponentials, which are also written to `out` unless it is null.
template <class T>
float sum_of_exponentials(const T* row, int64_t size, float peak, float scale, float* out = nullptr) {
    const __m512 peaks = _mm512_set1_ps(peak), scales = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = exponentials(row, i, size, peaks, scales);
        if (out) _mm512_mask_storeu_ps(out + i, i + 16 <= size ? 0xFFFF : (1 << (size - i)) - 1, x);
        sum = _mm512_add_ps(sum, x);
    }
    return _mm512_reduce_add_ps(sum);
}

template <class T>
void softmax(const T* logits, int64_t rows, int64_t size, const float* temperatures, float* probs) {
#pragma omp parallel for num_threads(rows > 1 ? omp_get_max_threads() : 1)
    for (int64_t r = 0; r < rows; r++) {
        float peak, *out = probs + r * size;
        int64_t place;
        largest(logits + r * size, size, &peak, &place);
        float scale = 1.0f / sum_of_exponentials(logits + r * size, size, peak, 1.0f / temperatures[r], out);
        if (!std::isfinite(peak)) scale = std::numeric_limits<float>::quiet_NaN();
        for (int64_t i = 0; i < size; i++) out[i] *= scale;
    }
}

inline double sum(const float* x, int64_t size) {
    __m512d sums = _mm512_setzero_pd();
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm256_loadu_ps(x + i)));
    double rest = 0;
    for (; i < size; i++) rest += x[i];
    return _mm512_reduce_add_pd(sums) + rest;
}

template <class T>
void all_largest(const T* logits, int64_t rows, int64_t size, T* peaks, int64_t* places) {
    for (int64_t r = 0; r < rows; r++) {
        float peak;
        largest(logits + r * size, size, &peak, places + r);
        T memory[16];
        store(memory, _mm512_set1_ps(peak));
        peaks[r] = memory[0];
    }
}

template <class T>
void all_confidences(const T* logits, int64_t rows, int64_t size, float* confidences) {
    for (int64_t r = 0; r < rows; r++) {
        float peak;
        int64_t place;
        largest(logits + r * size, size, &peak, &place);
        confidences[r] = 1.0f / sum_of_exponentials(logits + r * size, size, peak, 1.0f);
    }
}

// The first two words of Philox 4x32-10 as 8 numbers in [0, 1) with 53 bits. Counter words are the lower halves of the
// 64-bit lanes; the seed is the key.
inline __m512d philox(__m512i position, __m512i origin, __m512i role, __m512i seed) {
    __m512i c[4] = {position, origin, role, _mm512_setzero_si512()};
    __m512i key[2] = {seed, _mm512_srli_epi64(seed, 32)};
    for (int round = 0; round < 10; round++) {
        const __m512i first = _mm512_mul_epu32(c[0], _mm512_set1_epi64(0xD2511F53));
        const __m512i second = _mm512_mul_epu32(c[2], _mm512_set1_epi64(0xCD9E8D57));
        c[0] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(second, 32), c[1]), key[0]);
        c[2] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(first, 32), c[3]), key[1]);
        c[1] = second, c[3] = first;
        key[0] = _mm512_add_epi64(key[0], _mm512_set1_epi64(0x9E3779B9));
        key[1] = _mm512_add_epi64(key[1], _mm512_set1_epi64(0xBB67AE85));
    }
    const __m512i half = _mm512_set1_epi64(0xFFFFFFFF);
    const __m512i high = _mm512_slli_epi64(_mm512_srli_epi64(_mm512_and_si512(c[0], half), 5), 26);
    const __m512i bits = _mm512_add_epi64(high, _mm512_srli_epi64(_mm512_and_si512(c[1], half), 6));
    return _mm512_mul_pd(_mm512_cvtepi64_pd(bits), _mm512_set1_pd(0x1p-53));
}

}  // namespace

// ---- the interface for Python; logits are [rows, size]

extern "C" {
void largest_float32(const float* logits, int64_t rows, int64_t size, float* peaks, int64_t* places) {
    all_largest(logits, rows, size, peaks, places);
}
void largest_bfloat16(const void* logits, int64_t rows, int64_t size, void* peaks, int64_t* places) {
    all_largest(static_cast<const bf16*>(logits), rows, size, static_cast<bf16*>(peaks), places);
}

// confidences: the largest probability of each row
void confidence_float32(const float* logits, int64_t rows, int64_t size, float* confidences) {
    all_confidences(logits, rows, size, confidences);
}
void confidence_bfloat16(const void* logits, int64_t rows, int64_t size, float* confidences) {
    all_confidences(static_cast<const bf16*>(logits), rows, size, confidences);
}

// probs: [rows, size]; all NaN for rows with NaN or +inf, or with -inf only
void softmax_float32(const float* logits, int64_t rows, int64_t size, const float* temperatures, float* probs) {
    softmax(logits, rows, size, temperatures, probs);
}
void softmax_bfloat16(const void* logits, int64_t rows, int64_t size, const float* temperatures, float* probs) {
    softmax(static_cast<const bf16*>(logits), rows, size, temperatures, probs);
}

// `Dense.draw`: the first token where the cumulative sum, in float64, exceeds the uniform times the total.
void draw(const float* probs, int64_t rows, int64_t size, const double* uniforms, int64_t* tokens) {
    constexpr int64_t chunk = 64;
    for (int64_t r = 0; r < rows; r++) {
        const float* row = probs + r * size;
        double total = 0, before = 0;
        for (int64_t i = 0; i < size; i += chunk) total += sum(row + i, std::min(chunk, size - i));
        const double threshold = std::min(uniforms[r] * total, std::nextafter(total, 0.0));
        int64_t i = 0, last = 0;
        for (; i + chunk < size; i += chunk) {
            const double here = sum(row + i, chunk);
            if (before + here > threshold) break;
            before += here;
        }
        // if rounding keeps the sum below the threshold, this is the last token with a probability above 0
        for (; i < size; i++) {
            if (row[i] > 0) last = i;
            if ((before += row[i]) > threshold) break;
        }
        tokens[r] = last;
    }
}

// `race`: the first token with the smallest -log(1 - uniform) / probability. Since -log(1 - u) >= u, only tokens with
// u / probability below the best so far need a logarithm; the bound is widened so that rounding skips none of them.
void race(const float* probs, int64_t rows, int64_t size, const double* uniforms, int64_t* tokens) {
    for (int64_t r = 0; r < rows; r++) {
        const float* row = probs + r * size;
        const double* noise = uniforms + r * size;
        double least = std::numeric_limits<double>::infinity(), bound = least;
        int64_t first = 0;
        for (int64_t i = 0; i < size; i++) {
            // a token of probability 0 never wins: the right side is 0, or NaN while the bound is infinite
            if (!(noise[i] < bound * row[i])) continue;
            const double wait = -std::log1p(-noise[i]) / row[i];
            if (wait < least) least = wait, bound = wait * (1 + 0x1p-40), first = i;
        }
        tokens[r] = first;
    }
}

// out: [rows, size]. words: position, origin, role and seed, each with its strides along both axes.
void uniforms(const int64_t* const* words, const int64_t* strides, int64_t rows, int64_t size, double* out) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < size; i += 8) {
            const __mmask8 real = i + 8 <= size ? 0xFF : (1 << (size - i)) - 1;
            __m512i word[4];
            for (int w = 0; w < 4; w++) {
                const int64_t* start = words[w] + r * strides[2 * w];
                word[w] = strides[2 * w + 1] ? _mm512_maskz_loadu_epi64(real, start + i) : _mm512_set1_epi64(*start);
            }
            _mm512_mask_storeu_pd(out + r * size + i, real, philox(word[0], word[1], word[2], word[3]));
        }
    }
}
}
