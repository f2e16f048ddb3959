// Products of activations with quantized weights: the interface between quantized.cpp and decoder_layer.cpp.

#pragma once

#include <cstdint>

namespace quantized {

constexpr int64_t GROUP = 32;  // inputs with one scale
constexpr int64_t BLOCK = 32;  // outputs per block

// The kinds of weights, numbered as in cpp.py. Values are scale * (code - zero) + minimum, see `Format`.
enum Kind : int64_t { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, NUM_KINDS };

// A group of a token's inputs in fixed point: input i is scale * value i, where scale is the power of two that gives
// the largest one 15 bits. So of bfloat16 inputs, those above 1/128 of the largest are exact. scale is NaN if one of
// them is not finite.
struct Inputs {
#ifdef __AVX512VNNI__
    int8_t high[GROUP], low[GROUP];  // value = 256 * high + low
#else
    int16_t values[GROUP];
#endif
    int32_t sums[2];  // of each half's values
    float scale;
};

// Converts tokens [tokens, in] of float32, or of bfloat16 as its bits, to inputs [tokens, in / GROUP].
void convert(const float* x, int64_t tokens, int64_t in, Inputs* inputs);
void convert(const uint16_t* x, int64_t tokens, int64_t in, Inputs* inputs);

// sums[t][0..32) = products of token t's inputs with one block of 32 outputs. weights: as packed by cpp.py.
void products(Kind kind, const uint8_t* weights, const Inputs* inputs, int64_t tokens, int64_t in, int64_t block,
              float (*sums)[BLOCK]);

}  // namespace quantized
