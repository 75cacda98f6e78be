// SPDX-License-Identifier: Apache-2.0
// Integer and dequantizing matrix products for x86-64 with AVX2, built on the host by native.py.
//
// Weights are read as the operators take them, [K, N] with N innermost, so nothing is kept twice. A task is a range of
// columns of one group of rows (an expert; a dense product is one group), or a range of inputs (int8_by_inputs):
//
//   few rows    the weight streams past once; integer sums stay in the L1 cache, float sums in registers
//   many rows   a panel of the weight is put into cache (int8: the four inputs of a column side by side; else dequantized
//               to float32) and multiplied by tiles of registers
//
// int8 products are exact: vpmaddubsw adds |w| * +-x of two inputs in 16 bits, which holds 2 * 128 * 127, and an input of
// -128 is corrected afterwards. Everything after the integer sum is one rounding per written operation (-ffp-contract=off),
// in the order of the reference, so results are equal bit for bit. Float products are fused and may differ in the order of
// their sum.

#include <immintrin.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __AVX2__
#error "AVX2 is needed"
#endif

typedef int64_t i64;

enum { BF16 = 0, F16 = 1, F32 = 2, I32 = 3 };

#define LANES 32         // columns of integers that are interleaved at a time
#define FEW_INTEGERS 16  // rows of integers that are "few"
#define FEW_SUMS 8192    // their sums in a task: an L1 cache
#define BY_INPUTS 2      // rows of integers whose weight may be cut along its inputs
#define LEAST_INPUTS 64  // of a thread for each row then: with fewer, its sums dominate
#define TILE 12          // rows of an integer tile: a register of sums for each
#define BLOCK 128        // columns of an integer panel
#define CHUNK 640        // inputs of an integer panel, at most
#define MOST_COLS 256    // columns of a task with many rows of integers
#define MOST_ROWS 264    // rows of a task
#define FEW 4            // rows of floats that are "few"
#define FEW_COLS 512     // their columns in a task
#define NR 16            // columns of floats that are dequantized at a time
#define MR 6             // rows of a float tile
#define MAX_COLS 128     // columns of a float panel
#define KF 128           // inputs of a float panel

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

// ---------------------------------------------------------------------------------------------------------- conversions

ALWAYS_INLINE __m256 load8(const void *p, i64 at, int dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)p + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + at));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

ALWAYS_INLINE float load1(const void *p, i64 at, int dtype) {
    if (dtype == F32) return ((const float *)p)[at];
    uint16_t half = ((const uint16_t *)p)[at];
    if (dtype == F16) return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// float32 -> bfloat16, half to even, in the high half; the low half is undefined. NaN stays NaN.
ALWAYS_INLINE __m256i rounded_high(__m256 v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

// float32 rounded to bfloat16, still in float32.
ALWAYS_INLINE __m256 round_bf16(__m256 v) {
    return _mm256_castsi256_ps(_mm256_and_si256(rounded_high(v), _mm256_set1_epi32((int)0xffff0000)));
}

ALWAYS_INLINE __m256 round_f16(__m256 v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// The high halves of round_bf16, in 32 bits each; NaN stays NaN.
ALWAYS_INLINE __m256i bf16_bits(__m256 v) {
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16), _mm256_set1_epi32(0x7fc0), nan);
}

ALWAYS_INLINE void store16_bf16(uint16_t *p, __m256 low, __m256 high) {
    __m256i both = _mm256_packus_epi32(bf16_bits(low), bf16_bits(high));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
}

ALWAYS_INLINE void store8(void *p, i64 at, __m256 v, int dtype) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)p + at, v);
        return;
    }
    __m128i half;
    if (dtype == F16) {
        half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    } else {
        __m256i bits = bf16_bits(v);
        half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)p + at), half);
}

ALWAYS_INLINE i64 width_of(int dtype) { return dtype == F32 || dtype == I32 ? 4 : 2; }

// Eight columns, or the `n` first of them.
ALWAYS_INLINE void store_cols(void *p, i64 at, __m256 v, int dtype, i64 n) {
    if (n >= 8) {
        store8(p, at, v, dtype);
        return;
    }
    char eight[32];
    store8(eight, 0, v, dtype);
    memcpy((char *)p + at * width_of(dtype), eight, n * width_of(dtype));
}

ALWAYS_INLINE __m256 load_cols(const float *p, i64 n) {
    if (n >= 8) return _mm256_loadu_ps(p);
    float eight[8] = {0};
    memcpy(eight, p, n * 4);
    return _mm256_loadu_ps(eight);
}

ALWAYS_INLINE __m256i load_cols_i32(const int32_t *p, i64 n) {
    return _mm256_castps_si256(load_cols((const float *)p, n));
}

// -------------------------------------------------------------------------------------------------------- dynamic quant

static void quant_row(const uint16_t *x, int dtype, i64 cols, int8_t *y, float *scale) {
    // Magnitudes of 16-bit floats order like their bits, and NaN is above infinity.
    __m256i most = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    i64 k = 0;
    for (; k + 16 <= cols; k += 16)
        most = _mm256_max_epi16(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + k)), magnitude));
    uint16_t lanes[16], top = 0;
    _mm256_storeu_si256((__m256i *)lanes, most);
    for (int i = 0; i < 16; i++) top = lanes[i] > top ? lanes[i] : top;
    for (; k < cols; k++) top = (x[k] & 0x7fff) > top ? (x[k] & 0x7fff) : top;

    float largest = load1(&top, 0, dtype), factor = 127.0f / largest;
    *scale = largest / 127.0f;
    const __m256 f = _mm256_set1_ps(factor), low = _mm256_set1_ps(-128.0f), high = _mm256_set1_ps(127.0f);
    for (k = 0; k < cols; k += 16) {
        uint16_t tail[16] = {0};
        int8_t out[16];
        i64 n = MIN(cols - k, 16);
        const uint16_t *from = x + k;
        if (n < 16) {
            memcpy(tail, from, n * 2);
            from = tail;
        }
        __m256i q[2];
        for (int h = 0; h < 2; h++) {
            __m256 v = _mm256_mul_ps(load8(from, 8 * h, dtype), f);
            v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q)); // NaN becomes 0
            q[h] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high));
        }
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
        __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        if (n == 16) {
            _mm_storeu_si128((__m128i *)(y + k), bytes);
        } else {
            _mm_storeu_si128((__m128i *)out, bytes);
            memcpy(y + k, out, n);
        }
    }
}

// Symmetric int8 per row. x: bfloat16 or float16 [rows, cols]; y: int8; scale: float32 [rows].
void nq_dynamic_quant(const uint16_t *x, i64 dtype, i64 rows, i64 cols, int8_t *y, float *scale) {
#pragma omp parallel for schedule(static) if (rows * cols > 32768)
    for (i64 m = 0; m < rows; m++) {
        if (dtype == BF16)
            quant_row(x + m * cols, BF16, cols, y + m * cols, scale + m);
        else
            quant_row(x + m * cols, F16, cols, y + m * cols, scale + m);
    }
}

// ------------------------------------------------------------------------------------------------------------- arguments

// What native.py fills in; the fields are explained there.
typedef struct {
    const void *x;
    const void *weight;
    const float *scale;
    const int32_t *bias_int;
    const float *bias_float;
    const float *token_scale;
    const void *antiquant_scale;
    const void *antiquant_offset;
    void *out;
    const i64 *groups; // [count][3]: expert, first row, end
    i64 count, depth, width, int4, x_dtype, out_dtype;
    i64 group_size; // inputs per scale; the depth for one scale per column
    i64 scale_step; // 0: one scale for all columns, 1: one for each
    i64 kind;
} Product;

enum { INT8 = 0, WEIGHT_ONLY = 1, INT8_INT4 = 2, INT4 = 3 };

typedef struct {
    const uint8_t *weight;
    i64 row_bytes, groups;
    const float *scale;
    const int32_t *bias_int;
    const float *bias_float;
    const char *antiquant_scale, *antiquant_offset;
} Expert;

static Expert expert_of(const Product *p, i64 e) {
    i64 row_bytes = p->int4 ? p->width / 2 : p->width, groups = (p->depth + p->group_size - 1) / p->group_size;
    i64 scales = p->kind == INT8 ? (p->scale_step ? p->width : 1) : groups * p->width;
    Expert x = {.weight = (const uint8_t *)p->weight + e * p->depth * row_bytes, .row_bytes = row_bytes, .groups = groups};
    if (p->scale) x.scale = p->scale + e * scales;
    if (p->bias_int) x.bias_int = p->bias_int + e * p->width;
    if (p->bias_float) x.bias_float = p->bias_float + e * p->width;
    i64 antiquant = 2 * e * (p->scale_step ? groups * p->width : 1);
    if (p->antiquant_scale) x.antiquant_scale = (const char *)p->antiquant_scale + antiquant;
    if (p->antiquant_offset) x.antiquant_offset = (const char *)p->antiquant_offset + antiquant;
    return x;
}

// Sixteen weights of a row as int8, from column `j` on (even; a multiple of 16 from the start of the row is not needed).
ALWAYS_INLINE __m128i weights16(const uint8_t *row, i64 j, int int4) {
    if (!int4) return _mm_loadu_si128((const __m128i *)(row + j));
    __m128i pairs = _mm_loadl_epi64((const __m128i *)(row + j / 2)); // the even column in the low nibble
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i nibbles = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    return _mm_sub_epi8(_mm_xor_si128(nibbles, eight), eight);
}

// The same, of which only `n` columns exist; the others are 0.
ALWAYS_INLINE __m128i weights_tail(const uint8_t *row, i64 j, int int4, i64 n) {
    if (n >= NR) return weights16(row, j, int4);
    uint8_t bytes[16] = {0};
    memcpy(bytes, row + (int4 ? j / 2 : j), int4 ? (n + 1) / 2 : n);
    return weights16(bytes, 0, int4);
}

// --------------------------------------------------------------------------------------------------------------- integers

#if defined(DOT4) // a test defines its own
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DOT4 _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define DOT4 _mm256_dpbusd_avx_epi32
#endif

// Adds the products of four inputs to the sums of eight columns. Exact: |w| is at most 128 and |x| at most 127, so two
// products fit into the 16 bits of vpmaddubsw. `small`: |w| and |x| are at most 8, and sums stay in sixteen 16-bit numbers.
ALWAYS_INLINE __m256i dot4(__m256i sums, __m256i w, __m256i magnitude, __m256i x, int small) {
    __m256i signed_x = _mm256_sign_epi8(x, w);
#ifdef DOT4
    (void)small;
    return DOT4(sums, magnitude, signed_x);
#else
    __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_x);
    if (small) return _mm256_add_epi16(sums, pairs);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// 16-bit sums of pairs of inputs -> 32-bit sums.
ALWAYS_INLINE __m256i whole_sums(__m256i sums, int small) {
#ifndef DOT4
    if (small) return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
    (void)small;
    return sums;
}

ALWAYS_INLINE __m256i four_inputs(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

// 32 int4 in 16 bytes, the even ones in the low nibbles -> int8.
ALWAYS_INLINE __m256i widened(__m128i pairs) {
    const __m128i low = _mm_set1_epi8(15);
    const __m256i eight = _mm256_set1_epi8(8);
    __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
    __m256i nibbles = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    return _mm256_sub_epi8(_mm256_xor_si256(nibbles, eight), eight);
}

// 32 weights of a row from column `j` (even) on as int8, of which only `n` exist; the others are 0.
ALWAYS_INLINE __m256i weights32(const uint8_t *row, i64 j, int int4, i64 n) {
    uint8_t bytes[LANES] = {0};
    const uint8_t *from = row + (int4 ? j / 2 : j);
    if (n < LANES) from = memcpy(bytes, from, int4 ? (n + 1) / 2 : n);
    return int4 ? widened(_mm_loadu_si128((const __m128i *)from)) : _mm256_loadu_si256((const __m256i *)from);
}

// Four inputs of 32 columns -> the four inputs of a column side by side. Register i has the columns 4 i to 4 i + 3 and
// 16 + 4 i to 16 + 4 i + 3. Inputs from `depth` on are 0.
ALWAYS_INLINE void interleaved(const uint8_t *row, i64 row_bytes, i64 depth, i64 j, int int4, i64 n, __m256i w[4]) {
    __m256i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        r[i] = i < depth ? weights32(row + i * row_bytes, j, int4, n) : _mm256_setzero_si256();
    __m256i a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
    __m256i c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
    w[0] = _mm256_unpacklo_epi16(a, c);
    w[1] = _mm256_unpackhi_epi16(a, c);
    w[2] = _mm256_unpacklo_epi16(b, d);
    w[3] = _mm256_unpackhi_epi16(b, d);
}

// ----------------------------------------------------------------------------------------------------- integers, few rows

// sums[m * stride + j] += x[m * x_stride ...] @ weight[:, first + j] for 32 columns at a time, in the order of `interleaved`.
// The weight streams past once; the sums stay in the L1 cache.
ALWAYS_INLINE void stream_int(const int8_t *x, i64 x_stride, const uint8_t *weight, i64 row_bytes, i64 depth, i64 first,
                              i64 cols, i64 n, i64 rows, int32_t *sums, i64 stride) {
    enum { STEP = 8, AHEAD = 16384 };
    // The next rows are prefetched in memory order if they are contiguous and fit into half of an L1 cache; else a line of
    // each, because a row may be a page away from the one before.
    const int in_order = row_bytes - cols < LANES && STEP * row_bytes <= AHEAD;
    for (i64 k = 0; k < depth; k += STEP) {
        const char *ahead = (const char *)weight + (k + STEP) * row_bytes + first;
        for (i64 j = 0; j < cols; j += LANES) {
            const uint8_t *row = weight + k * row_bytes;
            if (j % 64 == 0)
                for (int i = 0; i < STEP; i++)
                    _mm_prefetch(in_order ? ahead + STEP * j + 64 * i : ahead + i * row_bytes + j, _MM_HINT_T0);
            __m256i w[2][4];
            if (depth - k >= STEP) {
                interleaved(row, row_bytes, 4, first + j, 0, n, w[0]);
                interleaved(row + 4 * row_bytes, row_bytes, 4, first + j, 0, n, w[1]);
            } else {
                interleaved(row, row_bytes, depth - k, first + j, 0, n, w[0]);
                interleaved(row + 4 * row_bytes, row_bytes, depth - k - 4, first + j, 0, n, w[1]);
            }
            for (i64 m = 0; m < rows; m++) {
                __m256i x0 = four_inputs(x + m * x_stride + k), x1 = four_inputs(x + m * x_stride + k + 4);
                __m256i *to = (__m256i *)(sums + m * stride + j);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    __m256i sum = dot4(to[i], w[0][i], _mm256_abs_epi8(w[0][i]), x0, 0);
                    to[i] = dot4(sum, w[1][i], _mm256_abs_epi8(w[1][i]), x1, 0);
                }
            }
        }
    }
}

// From the order of `interleaved` to that of the columns.
static void in_column_order(int32_t *sums, i64 cols) {
    for (i64 j = 0; j < cols; j += LANES) {
        __m256i *at = (__m256i *)(sums + j), a = at[0], b = at[1], c = at[2], d = at[3];
        at[0] = _mm256_permute2x128_si256(a, b, 0x20);
        at[1] = _mm256_permute2x128_si256(c, d, 0x20);
        at[2] = _mm256_permute2x128_si256(a, b, 0x31);
        at[3] = _mm256_permute2x128_si256(c, d, 0x31);
    }
}

// ---------------------------------------------------------------------------------------------------- integers, many rows

// A panel: for every 32 columns, for every register of `interleaved`, for every four inputs.
ALWAYS_INLINE void pack_int(const uint8_t *weight, i64 row_bytes, i64 depth, i64 first, i64 cols, int int4, int8_t *panel) {
    enum { AHEAD = 32 };
    i64 quads = (depth + 3) / 4;
    for (i64 q = 0; q < quads; q++) {
        const uint8_t *row = weight + 4 * q * row_bytes;
        for (i64 j = 0; j < cols; j += LANES) {
            if (j % (int4 ? 128 : 64) == 0)
                for (int i = AHEAD; i < AHEAD + 4; i++)
                    _mm_prefetch((const char *)row + i * row_bytes + (first + j) / (1 + int4), _MM_HINT_T0);
            __m256i w[4], *to = (__m256i *)panel + 4 * quads * (j / LANES) + q;
            if (cols - j >= LANES && depth - 4 * q >= 4)
                interleaved(row, row_bytes, 4, first + j, int4, LANES, w);
            else
                interleaved(row, row_bytes, depth - 4 * q, first + j, int4, cols - j, w);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) _mm256_store_si256(to + i * quads, w[i]);
        }
    }
}

// sums[m][0..4) and [16..20) (+)= x[m] @ a register of the panel, over `quads` times four inputs. Sums are [.][BLOCK].
ALWAYS_INLINE void tile_int(const int8_t *x, i64 stride, const int8_t *panel, i64 quads, int32_t *sums, const int rows,
                            int small, int fresh) {
    __m256i c[TILE];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) c[m] = _mm256_setzero_si256();
    const int8_t *from[3] = {x, x + 4 * stride, x + 8 * stride};
    const i64 third = 3 * stride;
    for (i64 q = 0; q < quads; q++, panel += 32) {
        __m256i w = _mm256_load_si256((const __m256i *)panel), magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++)
            c[m] = dot4(c[m], w, magnitude, four_inputs(from[m / 4] + (m % 4 == 3 ? third : m % 4 * stride)), small);
#pragma GCC unroll 3
        for (int i = 0; i < rows / 4; i++) from[i] += 4;
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        __m256i sum = whole_sums(c[m], small);
        __m128i *low = (__m128i *)(sums + m * BLOCK), *high = low + 4;
        if (!fresh) sum = _mm256_add_epi32(sum, _mm256_set_m128i(*high, *low));
        *low = _mm256_castsi256_si128(sum);
        *high = _mm256_extracti128_si256(sum, 1);
    }
}

// Rows are done four at a time at least: x and sums have room for that. A tile's inputs stay in the L1 cache while the
// panel streams past.
ALWAYS_INLINE void block_int(const int8_t *x, i64 stride, const int8_t *panel, i64 depth, int32_t *sums, i64 rows, i64 cols,
                             int small, int fresh) {
    i64 quads = (depth + 3) / 4;
    for (i64 m = 0; m < rows; m += TILE) {
        const int8_t *from = x + m * stride, *w = panel;
        for (i64 j = 0; j < cols; j += LANES)
            for (int i = 0; i < 4; i++, w += 32 * quads) {
                int32_t *to = sums + m * BLOCK + j + 4 * i;
                switch ((MIN(rows - m, TILE) + 3) / 4) {
                case 1: tile_int(from, stride, w, quads, to, 4, small, fresh); break;
                case 2: tile_int(from, stride, w, quads, to, 8, small, fresh); break;
                case 3: tile_int(from, stride, w, quads, to, 12, small, fresh); break;
                }
            }
    }
}

// Inputs of a panel: parts of nearly equal size.
static i64 chunk_of(i64 depth) {
    i64 parts = (depth + CHUNK - 1) / CHUNK;
    return ((depth + parts - 1) / parts + 3) / 4 * 4;
}

// int8 inputs with -127 in the place of -128. Returns whether there was one.
static int copy_inputs(const int8_t *x, i64 depth, int8_t *to) {
    const __m256i least = _mm256_set1_epi8(-128);
    __m256i found = _mm256_setzero_si256();
    i64 k = 0;
    for (; k + 32 <= depth; k += 32) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(x + k)), is = _mm256_cmpeq_epi8(v, least);
        found = _mm256_or_si256(found, is);
        _mm256_storeu_si256((__m256i *)(to + k), _mm256_sub_epi8(v, is));
    }
    int any = !_mm256_testz_si256(found, found);
    for (; k < depth; k++) {
        any |= x[k] == -128;
        to[k] = x[k] == -128 ? -127 : x[k];
    }
    return any;
}

// Corrects the sums of one row for the inputs of -128 that `copy_inputs` replaced.
static void add_least_inputs(const int8_t *x, const Expert *e, i64 depth, i64 first, i64 cols, int32_t *sums) {
    for (const int8_t *at = x; (at = memchr(at, 0x80, x + depth - at)); at++) {
        const int8_t *row = (const int8_t *)e->weight + (at - x) * e->row_bytes + first;
        for (i64 j = 0; j < cols; j++) sums[j] -= row[j];
    }
}

// -------------------------------------------------------------------------------------------------------------- epilogues

// Eight outputs from their exact sums; `n` columns are left from `j` on.
ALWAYS_INLINE __m256 scaled(const Product *p, const Expert *e, __m256i sums, __m256 token_scale, i64 j, i64 n, int per_column,
                            int per_token) {
    if (e->bias_int) sums = _mm256_add_epi32(sums, load_cols_i32(e->bias_int + j, n));
    if (p->out_dtype == I32) return _mm256_castsi256_ps(sums);
    __m256 v = _mm256_cvtepi32_ps(sums);
    v = _mm256_mul_ps(v, per_column ? load_cols(e->scale + j, n) : _mm256_set1_ps(e->scale[0]));
    if (per_token) v = _mm256_mul_ps(v, token_scale);
    return e->bias_float ? _mm256_add_ps(v, load_cols(e->bias_float + j, n)) : v;
}

// out[row][first..first + cols) from the exact sums of one row.
static void finish_int8(const Product *p, const Expert *e, const int32_t *sums, i64 row, i64 first, i64 cols) {
    const Product call = *p; // copies: the compiler has to assume that a store to `out` changes *p and *e
    const Expert of = *e;
    const int dtype = call.out_dtype == I32 ? F32 : (int)call.out_dtype;
    const __m256 token_scale = call.token_scale ? _mm256_set1_ps(call.token_scale[row]) : _mm256_setzero_ps();
    i64 j = 0, at = row * call.width + first;
    if (dtype == BF16 && call.scale_step && call.token_scale)
        for (; j + 16 <= cols; j += 16) {
            __m256 v[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                v[h] = scaled(&call, &of, _mm256_loadu_si256((const __m256i *)(sums + j + 8 * h)), token_scale,
                              first + j + 8 * h, 8, 1, 1);
            store16_bf16((uint16_t *)call.out + at + j, v[0], v[1]);
        }
    for (; j < cols; j += 8) {
        i64 n = cols - j;
        __m256 v = scaled(&call, &of, _mm256_loadu_si256((const __m256i *)(sums + j)), token_scale, first + j, n,
                          call.scale_step != 0, call.token_scale != NULL);
        store_cols(call.out, at + j, v, dtype, n);
    }
}

// --------------------------------------------------------------------------------------------------------- scratch memory

// A thread's memory, kept for its next task and freed when the thread ends.
typedef struct {
    char *memory; // also the thread's value of `scratch_key`
    i64 bytes;
    void *panel;   // int8 [CHUNK * BLOCK], or float [KF][MAX_COLS]
    int32_t *sums; // [2 * MOST_ROWS][BLOCK]; float [MOST_ROWS][MAX_COLS] for products of floats
    float *totals; // [2 * MOST_ROWS][BLOCK]
    void *x;       // of the size that `get_scratch` got
} Scratch;

_Static_assert(KF * MAX_COLS * 4 <= CHUNK * BLOCK && MAX_COLS <= 2 * BLOCK, "products of floats use the same memory");
_Static_assert(CHUNK / 4 * 2 * 8 * 8 <= INT16_MAX, "int4 sums of a panel stay in 16 bits");
_Static_assert(FEW_INTEGERS * MOST_COLS <= FEW_SUMS, "experts with few rows beside others with many");

static __thread Scratch scratch;
static pthread_key_t scratch_key; // its destructor is `free`
static pthread_once_t scratch_key_once = PTHREAD_ONCE_INIT;
static int has_scratch_key;

static void make_scratch_key(void) { has_scratch_key = !pthread_key_create(&scratch_key, free); }

// NULL if memory is short.
static Scratch *get_scratch(i64 x_bytes) {
    const i64 panel = CHUNK * BLOCK, sums = 2 * MOST_ROWS * BLOCK * 4;
    i64 bytes = panel + 2 * sums + (x_bytes + 127) / 64 * 64;
    if (scratch.bytes < bytes) {
        pthread_once(&scratch_key_once, make_scratch_key);
        char *memory = has_scratch_key ? aligned_alloc(64, bytes) : NULL;
        if (!memory || pthread_setspecific(scratch_key, memory)) {
            free(memory);
            return NULL;
        }
        free(scratch.memory);
        scratch.memory = memory;
        scratch.bytes = bytes;
    }
    scratch.panel = scratch.memory;
    scratch.sums = (int32_t *)(scratch.memory + panel);
    scratch.totals = (float *)(scratch.memory + panel + sums);
    scratch.x = scratch.memory + panel + 2 * sums;
    return &scratch;
}

// Bytes of a row of int8 inputs: not a multiple of the page, whose rows would share one set of the L1 cache.
static i64 stride_of(i64 depth) { return (depth + 63) / 64 * 64 + 64; }

// ------------------------------------------------------------------------------------------------------------ int8 x int8

static int int8_few(const Product *p, const Expert *e, i64 start, i64 rows, i64 first, i64 cols) {
    int32_t sums[FEW_SUMS] __attribute__((aligned(64)));
    i64 whole = cols / LANES * LANES, wide = (cols + LANES - 1) / LANES * LANES, stride = stride_of(p->depth);
    Scratch *s = get_scratch(rows * stride);
    if (!s) return 0;
    const int8_t *from = (const int8_t *)p->x + start * p->depth;
    int8_t *x = s->x;
    int least[FEW_INTEGERS];
    for (i64 m = 0; m < rows; m++) least[m] = copy_inputs(from + m * p->depth, p->depth, x + m * stride);
    memset(sums, 0, rows * wide * sizeof sums[0]);
    stream_int(x, stride, e->weight, e->row_bytes, p->depth, first, whole, LANES, rows, sums, wide);
    if (whole < cols)
        stream_int(x, stride, e->weight, e->row_bytes, p->depth, first + whole, LANES, cols - whole, rows, sums + whole, wide);
    for (i64 m = 0; m < rows; m++) {
        int32_t *row = sums + m * wide;
        in_column_order(row, wide);
        if (least[m]) add_least_inputs(from + m * p->depth, e, p->depth, first, cols, row);
        finish_int8(p, e, row, start + m, first, cols);
    }
    return 1;
}

// One or two rows of one group: every thread goes through whole rows of its part of the weight, because reading half of each
// row wastes the processor's prefetches. Returns 0 if memory is short.
static int int8_by_inputs(const Product *p, const Expert *e, i64 start, i64 rows, int threads) {
    i64 wide = (p->width + LANES - 1) / LANES * LANES, whole = p->width / LANES * LANES, stride = stride_of(p->depth);
    Scratch *s = get_scratch(rows * (stride + threads * wide * 4));
    if (!s) return 0;
    const int8_t *from = (const int8_t *)p->x + start * p->depth;
    int8_t *x = s->x;
    int32_t *sums = (int32_t *)(x + rows * stride); // [threads][rows][wide]
    int least[BY_INPUTS];
    for (i64 m = 0; m < rows; m++) least[m] = copy_inputs(from + m * p->depth, p->depth, x + m * stride);
#pragma omp parallel num_threads(threads)
    {
        i64 number = omp_get_thread_num(), of = omp_get_num_threads(), steps = (p->depth + 7) / 8, lanes = wide / LANES;
        i64 k = steps * number / of * 8, depth = MIN(steps * (number + 1) / of * 8, p->depth) - k;
        i64 most = FEW_SUMS / rows / LANES * LANES;
        const uint8_t *weight = e->weight + k * e->row_bytes;
        int32_t *own = sums + number * rows * wide;
        memset(own, 0, rows * wide * sizeof own[0]);
        for (i64 j = 0; j < whole; j += most)
            stream_int(x + k, stride, weight, e->row_bytes, depth, j, MIN(whole - j, most), LANES, rows, own + j, wide);
        if (whole < wide)
            stream_int(x + k, stride, weight, e->row_bytes, depth, whole, LANES, p->width - whole, rows, own + whole, wide);
#pragma omp barrier
        i64 first = lanes * number / of * LANES, stop = lanes * (number + 1) / of * LANES;
        for (i64 m = 0; m < rows; m++) {
            int32_t *row = sums + m * wide + first;
            for (i64 t = 1; t < of; t++)
                for (i64 j = 0; j < stop - first; j++) row[j] += row[t * rows * wide + j];
            i64 cols = MIN(stop, p->width) - first;
            in_column_order(row, stop - first);
            if (least[m]) add_least_inputs(from + m * p->depth, e, p->depth, first, cols, row);
            finish_int8(p, e, row, start + m, first, cols);
        }
    }
    return 1;
}

static int int8_many(const Product *p, const Expert *e, i64 start, i64 rows, i64 first, i64 cols) {
    i64 stride = stride_of(p->depth), chunk = chunk_of(p->depth);
    Scratch *s = get_scratch((rows + 3) * stride);
    if (!s) return 0;
    const int8_t *from = (const int8_t *)p->x + start * p->depth;
    int8_t *x = s->x, least[MOST_ROWS];
    for (i64 m = 0; m < rows; m++) least[m] = copy_inputs(from + m * p->depth, p->depth, x + m * stride);
    for (i64 j = first; j < first + cols; j += BLOCK) {
        i64 n = MIN(first + cols - j, BLOCK);
        for (i64 k = 0; k < p->depth; k += chunk) {
            i64 depth = MIN(p->depth - k, chunk);
            pack_int(e->weight + k * e->row_bytes, e->row_bytes, depth, j, n, 0, s->panel);
            block_int(x + k, stride, s->panel, depth, s->sums, rows, n, 0, k == 0);
        }
        for (i64 m = 0; m < rows; m++) {
            int32_t *row = s->sums + m * BLOCK;
            if (least[m]) add_least_inputs(from + m * p->depth, e, p->depth, j, n, row);
            finish_int8(p, e, row, start + m, j, n);
        }
    }
    return 1;
}

// --------------------------------------------------------------------------------------------- int4 weights, integer inputs

// float32 [rows][BLOCK] += the products of one group times its scales. `halves`: rounded to float16 before and after the
// addition, as on a unit that keeps its sums in float16.
static void add_group(const int32_t *sums, const float *scale, float *totals, i64 rows, i64 first, i64 cols, int halves,
                      int fresh) {
    for (i64 m = 0; m < rows; m++)
        for (i64 j = 0; j < cols; j += 8) {
            __m256 v = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(sums + m * BLOCK + j)));
            v = _mm256_mul_ps(v, load_cols(scale + first + j, cols - j));
            float *total = totals + m * BLOCK + j;
            __m256 old = fresh ? _mm256_setzero_ps() : _mm256_load_ps(total);
            v = halves ? round_f16(_mm256_add_ps(old, round_f16(v))) : _mm256_add_ps(old, v);
            _mm256_store_ps(total, v);
        }
}

// int8 = 16 * high + low + 8, both in [-8, 7].
static void split_inputs(const int8_t *x, i64 depth, int8_t *high, int8_t *low) {
    const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    memcpy(low, x, depth);
    for (i64 k = 0; k < depth; k += 32) { // up to the end of the row's room
        __m256i v = _mm256_loadu_si256((const __m256i *)(low + k));
        __m256i top = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), eight);
        _mm256_storeu_si256((__m256i *)(high + k), _mm256_sub_epi8(top, eight));
        _mm256_storeu_si256((__m256i *)(low + k), _mm256_sub_epi8(_mm256_and_si256(v, nibble), eight));
    }
}

static int packed_int4(const Product *p, const Expert *e, i64 start, i64 rows, i64 first, i64 cols) {
    int halves = p->kind == INT8_INT4;
    i64 stride = stride_of(p->depth), chunk = chunk_of(p->group_size), all = halves ? 2 * rows : rows;
    Scratch *s = get_scratch((all + 3) * stride);
    if (!s) return 0;
    int8_t *x = s->x;
    for (i64 m = 0; m < rows; m++) {
        if (halves) {
            split_inputs((const int8_t *)p->x + (start + m) * p->depth, p->depth, x + m * stride, x + (rows + m) * stride);
            continue;
        }
        const uint8_t *from = (const uint8_t *)p->x + (start + m) * p->depth / 2;
        for (i64 k = 0; k < p->depth; k += LANES)
            _mm256_storeu_si256((__m256i *)(x + m * stride + k), weights32(from, k, 1, p->depth - k));
    }
    for (i64 j = first; j < first + cols; j += BLOCK) {
        i64 n = MIN(first + cols - j, BLOCK);
        for (i64 g = 0; g < e->groups; g++) {
            for (i64 inner = 0; inner < p->group_size; inner += chunk) {
                i64 depth = MIN(p->group_size - inner, chunk), k = g * p->group_size + inner;
                pack_int(e->weight + k * e->row_bytes, e->row_bytes, depth, j, n, 1, s->panel);
                block_int(x + k, stride, s->panel, depth, s->sums, all, n, 1, inner == 0);
            }
            add_group(s->sums, e->scale + g * p->width, s->totals, all, j, n, halves, g == 0);
        }
        for (i64 m = 0; m < rows; m++)
            for (i64 i = 0; i < n; i += 8) {
                __m256 v = _mm256_load_ps(s->totals + m * BLOCK + i);
                if (halves) {
                    __m256 low = _mm256_load_ps(s->totals + (rows + m) * BLOCK + i);
                    v = _mm256_add_ps(_mm256_mul_ps(v, _mm256_set1_ps(16.0f)), low);
                    v = _mm256_add_ps(v, load_cols(e->bias_float + j + i, n - i));
                }
                if (p->token_scale) v = _mm256_mul_ps(v, _mm256_set1_ps(p->token_scale[start + m]));
                store_cols(p->out, (start + m) * p->width + j + i, v, (int)p->out_dtype, n - i);
            }
    }
    return 1;
}

// ------------------------------------------------------------------------------------------------------------ weight-only

typedef struct {
    __m256 scale[2], offset[2];
} Antiquant;

// Scales and offsets of sixteen columns.
ALWAYS_INLINE Antiquant antiquant_of(const Product *p, const Expert *e, i64 group, i64 j, i64 n, int dtype) {
    Antiquant a;
    for (int h = 0; h < 2; h++) {
        if (!p->scale_step) {
            a.scale[h] = _mm256_set1_ps(load1(e->antiquant_scale, 0, dtype));
            a.offset[h] = e->antiquant_offset ? _mm256_set1_ps(load1(e->antiquant_offset, 0, dtype)) : _mm256_setzero_ps();
            continue;
        }
        i64 at = group * p->width + j + 8 * h, left = n - 8 * h;
        if (left >= 8) {
            a.scale[h] = load8(e->antiquant_scale, at, dtype);
            a.offset[h] = e->antiquant_offset ? load8(e->antiquant_offset, at, dtype) : _mm256_setzero_ps();
        } else {
            uint16_t scale[8] = {0}, offset[8] = {0};
            if (left > 0) {
                memcpy(scale, (const uint16_t *)e->antiquant_scale + at, left * 2);
                if (e->antiquant_offset) memcpy(offset, (const uint16_t *)e->antiquant_offset + at, left * 2);
            }
            a.scale[h] = load8(scale, 0, dtype);
            a.offset[h] = load8(offset, 0, dtype);
        }
    }
    return a;
}

// (w + offset) * scale with the device's roundings: both operations to float16, or float32 and one rounding to bfloat16.
ALWAYS_INLINE __m256 dequantized(__m128i eight, __m256 scale, __m256 offset, int has_offset, int dtype) {
    __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    if (has_offset) {
        v = _mm256_add_ps(v, offset);
        if (dtype == F16) v = round_f16(v);
    }
    v = _mm256_mul_ps(v, scale);
    return dtype == F16 ? round_f16(v) : round_bf16(v);
}

ALWAYS_INLINE void weight_only_few(const Product *p, const Expert *e, const float *const *x, i64 start, i64 first, i64 cols,
                                   const int rows, int dtype, int int4, int has_offset) {
    enum { STRIPE = 64, DEPTH = 128 }; // a stripe's lines stay in the L1 cache while its columns are processed
    for (i64 stripe = 0; stripe < cols; stripe += STRIPE) {
        i64 wide = MIN(cols - stripe, STRIPE);
        float sums[FEW][STRIPE];
        memset(sums, 0, sizeof sums);
        for (i64 k0 = 0; k0 < p->depth;) {
            i64 group = k0 / p->group_size, stop = MIN(MIN((group + 1) * p->group_size, p->depth), k0 + DEPTH);
            for (i64 j = 0; j < wide; j += NR) {
                i64 column = first + stripe + j, n = wide - j;
                Antiquant a = antiquant_of(p, e, group, column, n, dtype);
                __m256 c[FEW][2];
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    c[m][0] = _mm256_loadu_ps(sums[m] + j);
                    c[m][1] = _mm256_loadu_ps(sums[m] + j + 8);
                }
                const uint8_t *row = e->weight + k0 * e->row_bytes;
                const i64 ahead = j == 0 ? DEPTH * e->row_bytes : 0; // the lines of the next block of inputs
#define STEP(WEIGHTS)                                                                                                         \
    for (i64 k = k0; k < stop; k++, row += e->row_bytes) {                                                                    \
        __m128i w = WEIGHTS;                                                                                                  \
        _mm_prefetch((const char *)row + ahead + column / (1 + int4), _MM_HINT_T0);                                           \
        __m256 w0 = dequantized(w, a.scale[0], a.offset[0], has_offset, dtype);                                               \
        __m256 w1 = dequantized(_mm_unpackhi_epi64(w, w), a.scale[1], a.offset[1], has_offset, dtype);                        \
        for (int m = 0; m < rows; m++) {                                                                                      \
            __m256 value = _mm256_broadcast_ss(x[m] + k);                                                                     \
            c[m][0] = _mm256_fmadd_ps(value, w0, c[m][0]);                                                                    \
            c[m][1] = _mm256_fmadd_ps(value, w1, c[m][1]);                                                                    \
        }                                                                                                                     \
    }
                if (n >= NR) {
                    STEP(weights16(row, column, int4))
                } else {
                    STEP(weights_tail(row, column, int4, n))
                }
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    _mm256_storeu_ps(sums[m] + j, c[m][0]);
                    _mm256_storeu_ps(sums[m] + j + 8, c[m][1]);
                }
            }
            k0 = stop;
        }
        for (int m = 0; m < rows; m++)
            for (i64 j = 0; j < wide; j += 8) {
                i64 column = first + stripe + j;
                __m256 v = _mm256_loadu_ps(sums[m] + j);
                if (e->bias_float) v = _mm256_add_ps(v, load_cols(e->bias_float + column, wide - j));
                store_cols(p->out, (start + m) * p->width + column, v, (int)p->out_dtype, wide - j);
            }
    }
}

// Sixteen rows of 64 int4 -> for each byte of a row, sixteen rows side by side: register i has the columns 2 i and 2 i + 1 in
// its first half, and 32 + 2 i and 33 + 2 i in its second.
ALWAYS_INLINE void transposed(const uint8_t *row, i64 row_bytes, __m256i *to) {
    __m256i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        a[i] = _mm256_loadu_si256((const __m256i *)row);
        row += row_bytes;
        __asm__("" : "+r"(row)); // keeps the compiler from putting sixteen offsets on the stack
    }
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; stage++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm256_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm256_unpackhi_epi8(a[i], a[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) to[i] = a[i];
}

// The values of a column's sixteen codes in bfloat16, of two columns: the low and the high bytes in the order of the codes.
typedef struct {
    __m256i low, high;
} Values;

ALWAYS_INLINE __m256i even_and_odd(__m256i even, __m256i odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

// One number for each half.
ALWAYS_INLINE __m256 halves(float first, float second) {
    return _mm256_blend_ps(_mm256_set1_ps(first), _mm256_set1_ps(second), 0xf0);
}

ALWAYS_INLINE __m256 twice(float a, float b, float c, float d) { return _mm256_setr_ps(a, b, c, d, a, b, c, d); }

ALWAYS_INLINE Values values_of(__m256 scale, __m256 offset) {
#define OF(...) rounded_high(_mm256_mul_ps(_mm256_add_ps(twice(__VA_ARGS__), offset), scale))
    __m256i a = even_and_odd(OF(0, 2, 4, 6), OF(1, 3, 5, 7)), b = even_and_odd(OF(-8, -6, -4, -2), OF(-7, -5, -3, -1));
#undef OF
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    a = _mm256_shuffle_epi8(a, bytes), b = _mm256_shuffle_epi8(b, bytes);
    return (Values){_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)};
}

// The same for finite scales and no offset: eight magnitudes, and a sign for the codes of -8 to -1.
ALWAYS_INLINE Values symmetric_values(__m256 scale) {
    __m256i words = even_and_odd(rounded_high(_mm256_mul_ps(twice(1, 3, 5, 7), scale)),
                                 rounded_high(_mm256_mul_ps(twice(2, 4, 6, 8), scale)));
    const __m256i low =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 0, 2, 4, 6, 8, 10, 12, 14, 12, 10, 8, 6, 4, 2, 0));
    const __m256i high =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 1, 3, 5, 7, 9, 11, 13, 15, 13, 11, 9, 7, 5, 3, 1));
    const __m256i sign = _mm256_set_epi64x((i64)0x8080808080808080, 0, (i64)0x8080808080808080, 0);
    return (Values){_mm256_shuffle_epi8(words, low), _mm256_xor_si256(_mm256_shuffle_epi8(words, high), sign)};
}

// The scales or offsets of 64 columns. Returns whether all are finite.
ALWAYS_INLINE int to_float64(const char *from, i64 at, i64 step, float *to) {
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    __m256i special = _mm256_setzero_si256();
    for (i64 j = 0; j < 64; j += 8) {
        __m256 v = step ? load8(from, at + j, BF16) : _mm256_set1_ps(load1(from, at, BF16));
        __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), exponent);
        special = _mm256_or_si256(special, _mm256_cmpeq_epi32(bits, exponent));
        _mm256_storeu_ps(to + j, v);
    }
    return _mm256_testz_si256(special, special);
}

// Adds the products of sixteen inputs to the sums of two columns.
ALWAYS_INLINE void look_up(const float *x, __m256i code, Values of, __m256 *even, __m256 *odd) {
    const __m256i top = _mm256_set1_epi32((int)0xffff0000);
    __m256i l = _mm256_shuffle_epi8(of.low, code), h = _mm256_shuffle_epi8(of.high, code);
    __m256i w0 = _mm256_unpacklo_epi8(l, h), w1 = _mm256_unpackhi_epi8(l, h);
#define FOUR(I) _mm256_broadcast_ps((const __m128 *)(x + 4 * I))
    *even = _mm256_fmadd_ps(FOUR(0), _mm256_castsi256_ps(_mm256_slli_epi32(w0, 16)), *even);
    *odd = _mm256_fmadd_ps(FOUR(1), _mm256_castsi256_ps(_mm256_and_si256(w0, top)), *odd);
    *even = _mm256_fmadd_ps(FOUR(2), _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16)), *even);
    *odd = _mm256_fmadd_ps(FOUR(3), _mm256_castsi256_ps(_mm256_and_si256(w1, top)), *odd);
#undef FOUR
}

// One row of x times int4 weights in bfloat16; 64 divides `cols`, and 16 the depth and the group size. A column of a group
// has sixteen values at most: they are computed once, and inputs are looked up by their codes, sixteen of two columns at a
// time. x: in the order of `in_lookup_order`.
static void int4_row(const Product *p, const Expert *e, const float *x, i64 row_of_x, i64 first, i64 cols) {
    enum { STRIPE = 64, DEPTH = 128, STEP = 16 };
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 sums[FEW_COLS / 2]; // of a stripe's columns j and 32 + j
    for (i64 j = 0; j < cols / 2; j++) sums[j] = _mm256_setzero_ps();
    for (i64 k = 0, stop; k < p->depth; k = stop) {
        i64 group = k / p->group_size;
        stop = MIN(MIN((group + 1) * p->group_size, p->depth), k + DEPTH);
        i64 steps = (stop - k) / STEP;
        __m256 *sum = sums;
        for (i64 stripe = first; stripe < first + cols; stripe += STRIPE) {
            i64 at = p->scale_step ? group * p->width + stripe : 0;
            float scale[STRIPE], offset[STRIPE] = {0};
            Values values[STRIPE / 2];
            if (to_float64(e->antiquant_scale, at, p->scale_step, scale) && !e->antiquant_offset) {
                for (int j = 0; j < STRIPE / 2; j++) values[j] = symmetric_values(halves(scale[j], scale[32 + j]));
            } else {
                if (e->antiquant_offset) to_float64(e->antiquant_offset, at, p->scale_step, offset);
                for (int j = 0; j < STRIPE / 2; j++)
                    values[j] = values_of(halves(scale[j], scale[32 + j]), halves(offset[j], offset[32 + j]));
            }
            __m256i rows[DEPTH / STEP][16];
            const uint8_t *row = e->weight + k * e->row_bytes + stripe / 2;
            for (i64 s = 0; s < steps; s++, row += STEP * e->row_bytes) {
                for (int i = 0; i < STEP; i++) // the lines of the next block of inputs
                    _mm_prefetch((const char *)row + (stop - k + i) * e->row_bytes, _MM_HINT_T1);
                transposed(row, e->row_bytes, rows[s]);
            }
            for (int j = 0; j < STRIPE / 2; j += 2, sum += 2) {
                Values a = values[j], b = values[j + 1];
                __m256 a0 = sum[0], a1 = _mm256_setzero_ps(), b0 = sum[1], b1 = a1;
                const float *inputs = x + k;
#pragma GCC unroll 2
                for (i64 s = 0; s < steps; s++, inputs += STEP) {
                    __m256i codes = rows[s][j / 2];
                    look_up(inputs, _mm256_and_si256(codes, nibble), a, &a0, &a1);
                    look_up(inputs, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), b, &b0, &b1);
                }
                sum[0] = _mm256_add_ps(a0, a1);
                sum[1] = _mm256_add_ps(b0, b1);
            }
        }
    }
    for (i64 stripe = 0; stripe < cols; stripe += STRIPE) {
        float totals[STRIPE];
        for (int j = 0; j < STRIPE / 2; j++) {
            __m256 two = sums[stripe / 2 + j];
            two = _mm256_hadd_ps(two, two);
            two = _mm256_hadd_ps(two, two);
            totals[j] = _mm256_cvtss_f32(two);
            totals[32 + j] = _mm_cvtss_f32(_mm256_extractf128_ps(two, 1));
        }
        for (i64 j = 0; j < STRIPE; j += 8) {
            __m256 v = _mm256_loadu_ps(totals + j);
            if (e->bias_float) v = _mm256_add_ps(v, _mm256_loadu_ps(e->bias_float + first + stripe + j));
            store8(p->out, row_of_x * p->width + first + stripe + j, v, (int)p->out_dtype);
        }
    }
}

// The order in which `int4_row` meets sixteen inputs.
static void in_lookup_order(const float *x, i64 depth, float *to) {
    static const uint8_t order[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    for (i64 k = 0; k < depth; k += 16)
        for (int i = 0; i < 16; i++) to[k + i] = x[k + order[i]];
}

// Whether a row is computed by `int4_row`: from 32 inputs per scale on, for which its tables clearly pay off.
static int looks_up(const Product *p, i64 rows) {
    return rows == 1 && p->kind == WEIGHT_ONLY && p->int4 && p->x_dtype == BF16 && p->depth % 16 == 0 &&
           p->group_size % 16 == 0 && p->group_size >= 32;
}

ALWAYS_INLINE void pack_float(const Product *p, const Expert *e, i64 k0, i64 depth, i64 first, i64 cols, int dtype, int int4,
                              int has_offset, float *panel) {
    for (i64 j = 0; j < cols; j += NR) {
        i64 n = cols - j;
        for (i64 k = k0; k < k0 + depth;) {
            i64 group = k / p->group_size, stop = MIN((group + 1) * p->group_size, k0 + depth);
            Antiquant a = antiquant_of(p, e, group, first + j, n, dtype);
            for (; k < stop; k++, panel += NR) {
                __m128i w = weights_tail(e->weight + k * e->row_bytes, first + j, int4, n);
                _mm256_store_ps(panel, dequantized(w, a.scale[0], a.offset[0], has_offset, dtype));
                w = _mm_unpackhi_epi64(w, w);
                _mm256_store_ps(panel + 8, dequantized(w, a.scale[1], a.offset[1], has_offset, dtype));
            }
        }
    }
}

ALWAYS_INLINE void tile_float(const float *x, i64 stride, const float *panel, i64 depth, float *sums, const int rows,
                              int fresh) {
    __m256 c[MR][2];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        c[m][0] = fresh ? _mm256_setzero_ps() : _mm256_load_ps(sums + m * MAX_COLS);
        c[m][1] = fresh ? _mm256_setzero_ps() : _mm256_load_ps(sums + m * MAX_COLS + 8);
    }
    for (i64 k = 0; k < depth; k++, panel += NR) {
        __m256 w0 = _mm256_load_ps(panel), w1 = _mm256_load_ps(panel + 8);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            __m256 value = _mm256_broadcast_ss(x + m * stride + k);
            c[m][0] = _mm256_fmadd_ps(value, w0, c[m][0]);
            c[m][1] = _mm256_fmadd_ps(value, w1, c[m][1]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        _mm256_store_ps(sums + m * MAX_COLS, c[m][0]);
        _mm256_store_ps(sums + m * MAX_COLS + 8, c[m][1]);
    }
}

static void block_float(const float *x, const float *panel, i64 depth, float *sums, i64 rows, i64 cols, int fresh) {
    for (i64 j = 0; j < cols; j += NR, panel += depth * NR) {
        i64 m = 0;
        for (; m + MR <= rows; m += MR) tile_float(x + m * KF, KF, panel, depth, sums + m * MAX_COLS + j, MR, fresh);
        const float *rest = x + m * KF;
        float *to = sums + m * MAX_COLS + j;
        switch (rows - m) {
        case 1: tile_float(rest, KF, panel, depth, to, 1, fresh); break;
        case 2: tile_float(rest, KF, panel, depth, to, 2, fresh); break;
        case 3: tile_float(rest, KF, panel, depth, to, 3, fresh); break;
        case 4: tile_float(rest, KF, panel, depth, to, 4, fresh); break;
        case 5: tile_float(rest, KF, panel, depth, to, 5, fresh); break;
        }
    }
}

static void to_float(const uint16_t *x, i64 count, int dtype, float *to) {
    i64 k = 0;
    for (; k + 8 <= count; k += 8) _mm256_storeu_ps(to + k, load8(x, k, dtype));
    for (; k < count; k++) to[k] = load1(x, k, dtype);
}

ALWAYS_INLINE int weight_only_many(const Product *p, const Expert *e, i64 start, i64 rows, i64 first, i64 cols, int dtype,
                                   int int4, int has_offset) {
    Scratch *s = get_scratch(rows * KF * 4);
    if (!s) return 0;
    float *x = s->x, *panel = s->panel, *sums = (float *)s->sums;
    for (i64 k = 0; k < p->depth; k += KF) {
        i64 depth = MIN(p->depth - k, KF);
        for (i64 m = 0; m < rows; m++)
            to_float((const uint16_t *)p->x + (start + m) * p->depth + k, depth, dtype, x + m * KF);
        pack_float(p, e, k, depth, first, cols, dtype, int4, has_offset, panel);
        block_float(x, panel, depth, sums, rows, cols, k == 0);
    }
    for (i64 m = 0; m < rows; m++)
        for (i64 j = 0; j < cols; j += 8) {
            __m256 v = _mm256_load_ps(sums + m * MAX_COLS + j);
            if (e->bias_float) v = _mm256_add_ps(v, load_cols(e->bias_float + first + j, cols - j));
            store_cols(p->out, (start + m) * p->width + first + j, v, (int)p->out_dtype, cols - j);
        }
    return 1;
}

// Every combination compiled for itself: the branches on dtype, width and offset are not taken per weight.
#define WEIGHT_ONLY_TASK(NAME, DTYPE, INT4, OFFSET)                                                                           \
    static int NAME(const Product *p, const Expert *e, i64 start, i64 rows, i64 first, i64 cols, const float *const *x) {     \
        if (rows > FEW) return weight_only_many(p, e, start, rows, first, cols, DTYPE, INT4, OFFSET);                         \
        switch (rows) {                                                                                                       \
        case 1: weight_only_few(p, e, x, start, first, cols, 1, DTYPE, INT4, OFFSET); break;                                  \
        case 2: weight_only_few(p, e, x, start, first, cols, 2, DTYPE, INT4, OFFSET); break;                                  \
        case 3: weight_only_few(p, e, x, start, first, cols, 3, DTYPE, INT4, OFFSET); break;                                  \
        case 4: weight_only_few(p, e, x, start, first, cols, 4, DTYPE, INT4, OFFSET); break;                                  \
        }                                                                                                                     \
        return 1;                                                                                                             \
    }

WEIGHT_ONLY_TASK(bf16_int8, BF16, 0, 0)
WEIGHT_ONLY_TASK(bf16_int8_offset, BF16, 0, 1)
WEIGHT_ONLY_TASK(bf16_int4, BF16, 1, 0)
WEIGHT_ONLY_TASK(bf16_int4_offset, BF16, 1, 1)
WEIGHT_ONLY_TASK(f16_int8, F16, 0, 0)
WEIGHT_ONLY_TASK(f16_int8_offset, F16, 0, 1)
WEIGHT_ONLY_TASK(f16_int4, F16, 1, 0)
WEIGHT_ONLY_TASK(f16_int4_offset, F16, 1, 1)

typedef int (*WeightOnlyTask)(const Product *, const Expert *, i64, i64, i64, i64, const float *const *);
static const WeightOnlyTask weight_only_tasks[8] = {bf16_int8, bf16_int8_offset, bf16_int4, bf16_int4_offset,
                                                    f16_int8,  f16_int8_offset,  f16_int4,  f16_int4_offset};

// ------------------------------------------------------------------------------------------------------------------ tasks

// At most FEW rows times a range of columns, the weight dequantized.
static int weight_only_rows(const Product *p, const Expert *e, WeightOnlyTask task, i64 start, i64 rows, i64 first, i64 cols) {
    float *wide = malloc((rows + 1) * p->depth * 4);
    if (!wide) return 0;
    const float *x[FEW];
    for (i64 m = 0; m < rows; m++) {
        x[m] = wide + m * p->depth;
        to_float((const uint16_t *)p->x + (start + m) * p->depth, p->depth, (int)p->x_dtype, wide + m * p->depth);
    }
    if (looks_up(p, rows)) {
        i64 whole = cols / 64 * 64;
        float *ordered = wide + rows * p->depth;
        in_lookup_order(x[0], p->depth, ordered);
        int4_row(p, e, ordered, start, first, whole);
        first += whole;
        cols -= whole;
    }
    int done = !cols || task(p, e, start, rows, first, cols, x);
    free(wide);
    return done;
}

// Rows of one group times a range of columns.
static int run_task(const Product *p, i64 expert, i64 start, i64 rows, i64 first, i64 cols) {
    Expert e = expert_of(p, expert);
    if (p->kind == INT8_INT4 || p->kind == INT4) return packed_int4(p, &e, start, rows, first, cols);
    if (p->kind == INT8)
        return rows > FEW_INTEGERS ? int8_many(p, &e, start, rows, first, cols) : int8_few(p, &e, start, rows, first, cols);
    WeightOnlyTask task =
        weight_only_tasks[4 * (p->x_dtype == F16) + 2 * (p->int4 != 0) + (p->antiquant_offset != NULL)];
    if (rows > FEW) return task(p, &e, start, rows, first, cols, NULL);
    return weight_only_rows(p, &e, task, start, rows, first, cols);
}

// Columns per task: whole tiles, at most `most`, and as many tasks as fill the threads evenly.
static i64 columns_per_task(i64 width, i64 most, i64 tile, i64 groups, i64 threads) {
    i64 tasks = (width + most - 1) / most;
    if (groups < 2 * threads) tasks = (tasks + threads - 1) / threads * threads;
    i64 cols = (width + tasks - 1) / tasks;
    return MIN((cols + tile - 1) / tile * tile, most);
}

// The parts of at most MOST_ROWS rows, and of nearly equal size, into which a group's rows are cut.
static i64 parts_of(const i64 *group) { return (group[2] - group[1] + MOST_ROWS - 1) / MOST_ROWS; }

// Returns 1, or 0 if memory is short.
i64 nq_product(const Product *p) {
    i64 most_rows = 0, parts = 0;
    double work = 0;
    for (i64 g = 0; g < p->count; g++) {
        i64 rows = p->groups[3 * g + 2] - p->groups[3 * g + 1];
        most_rows = rows > most_rows ? rows : most_rows;
        parts += parts_of(p->groups + 3 * g);
        work += (double)rows * p->depth * p->width;
    }
    i64(*part)[3] = malloc((parts + 1) * sizeof *part); // expert, first row, rows
    if (!part) return 0;
    parts = 0;
    for (i64 g = 0; g < p->count; g++) {
        const i64 *group = p->groups + 3 * g;
        i64 start = group[1], left = parts_of(group);
        for (; left; left--) {
            i64 rows = ((group[2] - start + left - 1) / left + TILE - 1) / TILE * TILE;
            rows = MIN(MIN(rows, MOST_ROWS), group[2] - start);
            part[parts][0] = group[0], part[parts][1] = start, part[parts++][2] = rows;
            start += rows;
        }
    }
    int threads = work < 65536 ? 1 : omp_get_max_threads(), integers = p->kind != WEIGHT_ONLY;
    int few = p->kind == INT8 ? most_rows <= FEW_INTEGERS : p->kind == WEIGHT_ONLY && most_rows <= FEW;
    if (p->kind == INT8 && parts == 1 && most_rows <= BY_INPUTS && threads > 1 &&
        p->depth >= most_rows * threads * LEAST_INPUTS) {
        Expert e = expert_of(p, part[0][0]);
        i64 start = part[0][1];
        free(part);
        return int8_by_inputs(p, &e, start, most_rows, threads);
    }
    i64 most = integers ? MOST_COLS : MAX_COLS;
    if (few) most = integers ? FEW_SUMS / (most_rows ? most_rows : 1) / BLOCK * BLOCK : FEW_COLS;
    i64 tile = integers ? LANES : few ? 64 : NR; // 64: int4_row
    i64 cols = columns_per_task(p->width, most, tile, parts, threads);
    i64 per_part = (p->width + cols - 1) / cols, tasks = per_part * parts, failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : failed)
    for (i64 t = 0; t < tasks; t++) {
        const i64 *of = part[t / per_part], first = t % per_part * cols;
        failed += !run_task(p, of[0], of[1], of[2], first, MIN(p->width - first, cols));
    }
    free(part);
    return !failed;
}
