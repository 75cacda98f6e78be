// SPDX-License-Identifier: Apache-2.0
// Integer and dequantizing matrix products for x86-64 with AVX2, built on the host by native.py.
//
// Weights are read as the operators take them, [K, N] with N innermost, so nothing is kept twice. A task is a range of
// columns of one group of rows (an expert; a dense product is one group):
//
//   few rows    columns are accumulated while the weight streams past once
//   many rows   a panel of the weight is widened (int8 -> int16 pairs, or dequantized -> float32) into cache and
//               multiplied by 6 x 16 register tiles
//
// vpmaddwd adds two products of 16-bit numbers in 32 bits, so int8 x int8 is exact; vpmaddubsw, twice as dense, would
// saturate. Everything after the integer sum is one rounding per written operation (-ffp-contract=off), in the order of
// the reference, so results are equal bit for bit. Float products are fused and may differ in the order of their sum.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __AVX2__
#error "AVX2 is needed"
#endif

typedef int64_t i64;

enum { BF16 = 0, F16 = 1, F32 = 2, I32 = 3 };

#define MR 6         // rows of a register tile
#define NR 16        // columns of a register tile
#define MAX_COLS 128 // columns of a task with many rows
#define MAX_ROWS 256 // rows that are multiplied by one panel
#define KC 256       // depth of an integer panel
#define KF 128       // depth of a float panel
#define FEW 4        // up to here rows are "few"
#define FEW_COLS 512 // columns of a task with few rows of floats
#define FEW_SUMS 4096 // accumulators of a task with few rows of integers: half of the first cache

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

// float32 rounded to bfloat16, half to even, still in float32. NaN stays NaN.
ALWAYS_INLINE __m256 round_bf16(__m256 v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
}

ALWAYS_INLINE __m256 round_f16(__m256 v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

ALWAYS_INLINE void store8(void *p, i64 at, __m256 v, int dtype) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)p + at, v);
        return;
    }
    __m128i half;
    if (dtype == F16) {
        half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    } else {
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16);
        bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), nan);
        bits = _mm256_packus_epi32(bits, bits);
        half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(bits, 0x08));
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

ALWAYS_INLINE __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sum, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// ----------------------------------------------------------------------------------------------------- integers, few rows

// sums[m * stride + j] += x[m] @ weight[:, first + j] for `cols` (a multiple of 16) columns.
// x: int16, one pointer per row, with a zero after an odd number of inputs.
ALWAYS_INLINE void stream_int(const int16_t *const *x, const uint8_t *weight, i64 row_bytes, i64 depth, i64 first, i64 cols,
                              const int rows, int32_t *sums, i64 stride) {
    enum { PAIRS = 4 };
    for (i64 k = 0; k < depth; k += 2 * PAIRS) {
        i64 left = (depth - k + 1) / 2;
        int pairs = left < PAIRS ? (int)left : PAIRS;
        for (i64 j = 0; j < cols; j += NR) {
            const uint8_t *row = weight + k * row_bytes;
            if (j % 64 == 0) // the next rows' lines: a row may be a page away from the one before
                for (int p = 0; p < 2 * PAIRS; p++)
                    _mm_prefetch((const char *)row + (2 * PAIRS + p) * row_bytes + first + j, _MM_HINT_T0);
            __m256i c[FEW][2];
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                c[m][0] = _mm256_loadu_si256((const __m256i *)(sums + m * stride + j));
                c[m][1] = _mm256_loadu_si256((const __m256i *)(sums + m * stride + j + 8));
            }
            for (int p = 0; p < pairs; p++, row += 2 * row_bytes) {
                __m128i upper = weights16(row, first + j, 0);
                // After an odd number of inputs x has a zero, so any weight does.
                __m128i lower = weights16(k + 2 * p + 1 < depth ? row + row_bytes : row, first + j, 0);
                __m256i w0 = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(upper, lower));
                __m256i w1 = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(upper, lower));
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    int32_t pair;
                    memcpy(&pair, x[m] + k + 2 * p, 4);
                    __m256i a = _mm256_set1_epi32(pair);
                    c[m][0] = multiply_add(c[m][0], a, w0);
                    c[m][1] = multiply_add(c[m][1], a, w1);
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                _mm256_storeu_si256((__m256i *)(sums + m * stride + j), c[m][0]);
                _mm256_storeu_si256((__m256i *)(sums + m * stride + j + 8), c[m][1]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------- integers, many rows

// A panel: for every NR columns, for every pair of inputs, NR pairs of int16.
ALWAYS_INLINE void pack_int(const uint8_t *weight, i64 row_bytes, i64 depth, i64 first, i64 cols, int int4, int16_t *panel) {
    for (i64 j = 0; j < cols; j += NR) {
        i64 n = cols - j;
        for (i64 k = 0; k < depth; k += 2, panel += 2 * NR) {
            const uint8_t *row = weight + k * row_bytes;
            __m128i upper = weights_tail(row, first + j, int4, n);
            __m128i lower = k + 1 < depth ? weights_tail(row + row_bytes, first + j, int4, n) : _mm_setzero_si128();
            _mm256_store_si256((__m256i *)panel, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(upper, lower)));
            _mm256_store_si256((__m256i *)(panel + NR), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(upper, lower)));
        }
    }
}

// sums[m][0..16) (+)= x[m] @ panel, over `pairs` pairs of inputs.
ALWAYS_INLINE void tile_int(const int16_t *x, i64 stride, const int16_t *panel, i64 pairs, int32_t *sums, i64 sums_stride,
                            const int rows, int fresh) {
    __m256i c[MR][2];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        c[m][0] = fresh ? _mm256_setzero_si256() : _mm256_load_si256((const __m256i *)(sums + m * sums_stride));
        c[m][1] = fresh ? _mm256_setzero_si256() : _mm256_load_si256((const __m256i *)(sums + m * sums_stride + 8));
    }
    for (i64 p = 0; p < pairs; p++, panel += 2 * NR) {
        __m256i w0 = _mm256_load_si256((const __m256i *)panel), w1 = _mm256_load_si256((const __m256i *)(panel + NR));
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            int32_t pair;
            memcpy(&pair, x + m * stride + 2 * p, 4);
            __m256i a = _mm256_set1_epi32(pair);
            c[m][0] = multiply_add(c[m][0], a, w0);
            c[m][1] = multiply_add(c[m][1], a, w1);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        _mm256_store_si256((__m256i *)(sums + m * sums_stride), c[m][0]);
        _mm256_store_si256((__m256i *)(sums + m * sums_stride + 8), c[m][1]);
    }
}

static void block_int(const int16_t *x, i64 stride, const int16_t *panel, i64 depth, int32_t *sums, i64 rows, i64 cols,
                      int fresh) {
    i64 pairs = (depth + 1) / 2;
    for (i64 j = 0; j < cols; j += NR, panel += pairs * 2 * NR) {
        i64 m = 0;
        for (; m + MR <= rows; m += MR)
            tile_int(x + m * stride, stride, panel, pairs, sums + m * MAX_COLS + j, MAX_COLS, MR, fresh);
        const int16_t *rest = x + m * stride;
        int32_t *to = sums + m * MAX_COLS + j;
        switch (rows - m) {
        case 1: tile_int(rest, stride, panel, pairs, to, MAX_COLS, 1, fresh); break;
        case 2: tile_int(rest, stride, panel, pairs, to, MAX_COLS, 2, fresh); break;
        case 3: tile_int(rest, stride, panel, pairs, to, MAX_COLS, 3, fresh); break;
        case 4: tile_int(rest, stride, panel, pairs, to, MAX_COLS, 4, fresh); break;
        case 5: tile_int(rest, stride, panel, pairs, to, MAX_COLS, 5, fresh); break;
        }
    }
}

// int8 -> int16, and a zero after an odd number of inputs.
static void widen(const int8_t *x, i64 depth, int16_t *to) {
    i64 k = 0;
    for (; k + 16 <= depth; k += 16)
        _mm256_storeu_si256((__m256i *)(to + k), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + k))));
    for (; k < depth; k++) to[k] = x[k];
    if (depth % 2) to[depth] = 0;
}

// int4 pairs of a byte, the even input in the low nibble -> int16. `first` is even.
static void widen_int4(const uint8_t *x, i64 depth, int16_t *to) {
    for (i64 k = 0; k < depth; k++) {
        int nibble = (x[k / 2] >> (k % 2 * 4)) & 15;
        to[k] = (int16_t)((nibble ^ 8) - 8);
    }
    if (depth % 2) to[depth] = 0;
}

// -------------------------------------------------------------------------------------------------------------- epilogues

// out[row][first..first + cols) from the exact sums of one row.
static void finish_int8(const Product *p, const Expert *e, const int32_t *sums, i64 row, i64 first, i64 cols) {
    for (i64 j = 0; j < cols; j += 8) {
        i64 n = cols - j, at = row * p->width + first + j;
        __m256i acc = _mm256_loadu_si256((const __m256i *)(sums + j));
        if (e->bias_int) acc = _mm256_add_epi32(acc, load_cols_i32(e->bias_int + first + j, n));
        if (p->out_dtype == I32) {
            if (n >= 8)
                _mm256_storeu_si256((__m256i *)((int32_t *)p->out + at), acc);
            else
                store_cols(p->out, at, _mm256_castsi256_ps(acc), F32, n);
            continue;
        }
        __m256 v = _mm256_cvtepi32_ps(acc);
        v = _mm256_mul_ps(v, p->scale_step ? load_cols(e->scale + first + j, n) : _mm256_set1_ps(e->scale[0]));
        if (p->token_scale) v = _mm256_mul_ps(v, _mm256_set1_ps(p->token_scale[row]));
        if (e->bias_float) v = _mm256_add_ps(v, load_cols(e->bias_float + first + j, n));
        store_cols(p->out, at, v, (int)p->out_dtype, n);
    }
}

// --------------------------------------------------------------------------------------------------------- scratch memory

typedef struct {
    int16_t *x;     // [2 * MAX_ROWS][KC], or float [MAX_ROWS][KF]
    int16_t *panel; // [KC][MAX_COLS] int16, or float [KF][MAX_COLS]
    int32_t *sums;  // [2 * MAX_ROWS][MAX_COLS]
    float *totals;  // [2 * MAX_ROWS][MAX_COLS]
} Scratch;

static __thread Scratch scratch;

static int get_scratch(Scratch *to) {
    if (!scratch.x) {
        i64 x = 2 * MAX_ROWS * KC * 2, panel = KC * MAX_COLS * 2, sums = 2 * MAX_ROWS * MAX_COLS * 4;
        char *memory = aligned_alloc(64, x + panel + 2 * sums);
        if (!memory) return 0;
        scratch.x = (int16_t *)memory;
        scratch.panel = (int16_t *)(memory + x);
        scratch.sums = (int32_t *)(memory + x + panel);
        scratch.totals = (float *)(memory + x + panel + sums);
    }
    *to = scratch;
    return 1;
}

// ------------------------------------------------------------------------------------------------------------ int8 x int8

static void int8_few(const Product *p, const Expert *e, i64 start, i64 rows, i64 first, i64 cols, const int16_t *const *x) {
    int32_t sums[FEW_SUMS] __attribute__((aligned(64)));
    i64 whole = cols / NR * NR;
    memset(sums, 0, rows * cols * sizeof sums[0]);
    switch (rows) {
    case 1: stream_int(x, e->weight, e->row_bytes, p->depth, first, whole, 1, sums, cols); break;
    case 2: stream_int(x, e->weight, e->row_bytes, p->depth, first, whole, 2, sums, cols); break;
    case 3: stream_int(x, e->weight, e->row_bytes, p->depth, first, whole, 3, sums, cols); break;
    case 4: stream_int(x, e->weight, e->row_bytes, p->depth, first, whole, 4, sums, cols); break;
    }
    for (i64 j = whole; j < cols; j++)
        for (int m = 0; m < rows; m++) {
            int32_t sum = 0;
            for (i64 k = 0; k < p->depth; k++) sum += x[m][k] * (int8_t)e->weight[k * e->row_bytes + first + j];
            sums[m * cols + j] = sum;
        }
    for (int m = 0; m < rows; m++) finish_int8(p, e, sums + m * cols, start + m, first, cols);
}

static int int8_many(const Product *p, const Expert *e, i64 start, i64 end, i64 first, i64 cols) {
    Scratch s;
    if (!get_scratch(&s)) return 0;
    for (i64 m = start; m < end; m += MAX_ROWS) {
        i64 rows = MIN(end - m, MAX_ROWS);
        for (i64 k = 0; k < p->depth; k += KC) {
            i64 depth = MIN(p->depth - k, KC);
            for (i64 r = 0; r < rows; r++) widen((const int8_t *)p->x + (m + r) * p->depth + k, depth, s.x + r * KC);
            pack_int(e->weight + k * e->row_bytes, e->row_bytes, depth, first, cols, 0, s.panel);
            block_int(s.x, KC, s.panel, depth, s.sums, rows, cols, k == 0);
        }
        for (i64 r = 0; r < rows; r++) finish_int8(p, e, s.sums + r * MAX_COLS, m + r, first, cols);
    }
    return 1;
}

// --------------------------------------------------------------------------------------------- int4 weights, integer inputs

// float32 [rows][MAX_COLS] += the products of one group times its scales. `halves`: rounded to float16 before and after the
// addition, as on a unit that keeps its sums in float16.
static void add_group(const int32_t *sums, const float *scale, float *totals, i64 rows, i64 first, i64 cols, int halves,
                      int fresh) {
    for (i64 m = 0; m < rows; m++)
        for (i64 j = 0; j < cols; j += 8) {
            __m256 v = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(sums + m * MAX_COLS + j)));
            v = _mm256_mul_ps(v, load_cols(scale + first + j, cols - j));
            float *total = totals + m * MAX_COLS + j;
            __m256 old = fresh ? _mm256_setzero_ps() : _mm256_load_ps(total);
            v = halves ? round_f16(_mm256_add_ps(old, round_f16(v))) : _mm256_add_ps(old, v);
            _mm256_store_ps(total, v);
        }
}

static int packed_int4(const Product *p, const Expert *e, i64 start, i64 end, i64 first, i64 cols) {
    Scratch s;
    if (!get_scratch(&s)) return 0;
    int halves = p->kind == INT8_INT4;
    for (i64 m = start; m < end; m += MAX_ROWS) {
        i64 rows = MIN(end - m, MAX_ROWS), all = halves ? 2 * rows : rows;
        for (i64 g = 0; g < e->groups; g++) {
            for (i64 inner = 0; inner < p->group_size; inner += KC) {
                i64 depth = MIN(p->group_size - inner, KC), k = g * p->group_size + inner;
                for (i64 r = 0; r < rows; r++) {
                    if (!halves) {
                        widen_int4((const uint8_t *)p->x + ((m + r) * p->depth + k) / 2, depth, s.x + r * KC);
                        continue;
                    }
                    // x = 16 * high + low + 8, both in [-8, 7]
                    int16_t *high = s.x + r * KC, *low = s.x + (rows + r) * KC;
                    widen((const int8_t *)p->x + (m + r) * p->depth + k, depth, high);
                    for (i64 i = 0; i < depth; i++) {
                        low[i] = (int16_t)((high[i] & 15) - 8);
                        high[i] = (int16_t)(high[i] >> 4);
                    }
                    if (depth % 2) low[depth] = 0;
                }
                pack_int(e->weight + k * e->row_bytes, e->row_bytes, depth, first, cols, 1, s.panel);
                block_int(s.x, KC, s.panel, depth, s.sums, all, cols, inner == 0);
            }
            add_group(s.sums, e->scale + g * p->width, s.totals, all, first, cols, halves, g == 0);
        }
        for (i64 r = 0; r < rows; r++)
            for (i64 j = 0; j < cols; j += 8) {
                i64 n = cols - j;
                __m256 v = _mm256_load_ps(s.totals + r * MAX_COLS + j);
                if (halves) {
                    __m256 low = _mm256_load_ps(s.totals + (rows + r) * MAX_COLS + j);
                    v = _mm256_add_ps(_mm256_mul_ps(v, _mm256_set1_ps(16.0f)), low);
                    v = _mm256_add_ps(v, load_cols(e->bias_float + first + j, n));
                }
                if (p->token_scale) v = _mm256_mul_ps(v, _mm256_set1_ps(p->token_scale[m + r]));
                store_cols(p->out, (m + r) * p->width + first + j, v, (int)p->out_dtype, n);
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
    enum { STRIPE = 64, DEPTH = 128 }; // a stripe's lines stay in the first cache while its columns are gone through
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

// One row of x times int4 weights in bfloat16; `cols` is a multiple of sixteen, 32 divides the depth and the group size. A
// group's column has sixteen values at most: they are computed once, and 32 inputs at a time are looked up by their nibbles.
// x: in the order of `in_lookup_order`.
ALWAYS_INLINE void int4_row(const Product *p, const Expert *e, const float *x, i64 row_of_x, i64 first, i64 cols,
                            int has_offset) {
    enum { STRIPE = 128, DEPTH = 128, STEP = 32 };
    const __m128i positive = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i negative = _mm_sub_epi8(positive, _mm_set1_epi8(8));
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
    const __m256i top = _mm256_set1_epi32((int)0xffff0000);
    const __m256i by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (i64 stripe = 0; stripe < cols; stripe += STRIPE) {
        i64 wide = MIN(cols - stripe, STRIPE);
        __m256 sums[STRIPE];
        for (i64 j = 0; j < wide; j++) sums[j] = _mm256_setzero_ps();
        for (i64 k0 = 0; k0 < p->depth;) {
            i64 group = k0 / p->group_size, stop = MIN(MIN((group + 1) * p->group_size, p->depth), k0 + DEPTH);
            i64 steps = (stop - k0) / STEP;
            const uint8_t *ahead = e->weight + (k0 + DEPTH) * e->row_bytes + (first + stripe) / 2;
            for (i64 k = k0; k < stop; k++, ahead += e->row_bytes) // the lines of the next block of inputs
                _mm_prefetch((const char *)ahead, _MM_HINT_T0);
            for (i64 j = 0; j < wide; j += NR) {
                i64 column = first + stripe + j;
                __m256i codes[8][DEPTH / STEP]; // two columns in the nibbles of every byte, 32 inputs in the bytes
                const uint8_t *row = e->weight + k0 * e->row_bytes + column / 2;
                for (i64 b = 0; b < steps; b++) {
                    __m256i half[2][4];
#pragma GCC unroll 4
                    for (int q = 0; q < 4; q++) {
                        __m128i r[8];
#pragma GCC unroll 8
                        for (int i = 0; i < 8; i++) {
                            r[i] = _mm_loadl_epi64((const __m128i *)row);
                            row += e->row_bytes;
                            __asm__("" : "+r"(row)); // else there are 32 offsets, on the stack
                        }
                        __m128i u = _mm_unpacklo_epi32(r[0], r[1]), v = _mm_unpacklo_epi32(r[2], r[3]);
                        __m128i y = _mm_unpacklo_epi32(r[4], r[5]), z = _mm_unpacklo_epi32(r[6], r[7]);
                        __m256i left = _mm256_set_m128i(_mm_unpacklo_epi64(y, z), _mm_unpacklo_epi64(u, v));
                        __m256i right = _mm256_set_m128i(_mm_unpackhi_epi64(y, z), _mm_unpackhi_epi64(u, v));
                        half[0][q] = _mm256_shuffle_epi8(left, by_byte);
                        half[1][q] = _mm256_shuffle_epi8(right, by_byte);
                    }
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        __m256i u = _mm256_unpacklo_epi32(half[h][0], half[h][1]);
                        __m256i v = _mm256_unpackhi_epi32(half[h][0], half[h][1]);
                        __m256i y = _mm256_unpacklo_epi32(half[h][2], half[h][3]);
                        __m256i z = _mm256_unpackhi_epi32(half[h][2], half[h][3]);
                        codes[4 * h][b] = _mm256_unpacklo_epi64(u, y);
                        codes[4 * h + 1][b] = _mm256_unpackhi_epi64(u, y);
                        codes[4 * h + 2][b] = _mm256_unpacklo_epi64(v, z);
                        codes[4 * h + 3][b] = _mm256_unpackhi_epi64(v, z);
                    }
                }
                for (int c = 0; c < NR; c += 2) { // the two columns of a byte: they share the inputs, and hide each other's latency
                    __m256i low[2], high[2];
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        i64 at = p->scale_step ? group * p->width + column + c + h : 0;
                        __m256 scale = _mm256_set1_ps(load1(e->antiquant_scale, at, BF16));
                        __m256 offset =
                            has_offset ? _mm256_set1_ps(load1(e->antiquant_offset, at, BF16)) : _mm256_setzero_ps();
                        __m256i w = _mm256_castps_si256(dequantized(positive, scale, offset, has_offset, BF16));
                        __m256i below = _mm256_castps_si256(dequantized(negative, scale, offset, has_offset, BF16));
                        w = _mm256_packus_epi32(_mm256_srli_epi32(w, 16), _mm256_srli_epi32(below, 16));
                        w = _mm256_permute4x64_epi64(w, 0xd8); // sixteen bfloat16 in the order of their codes
                        w = _mm256_packus_epi16(_mm256_and_si256(w, byte), _mm256_srli_epi16(w, 8));
                        w = _mm256_permute4x64_epi64(w, 0xd8);
                        low[h] = _mm256_permute2x128_si256(w, w, 0x00);
                        high[h] = _mm256_permute2x128_si256(w, w, 0x11);
                    }
                    __m256 s0[2] = {sums[j + c], sums[j + c + 1]}, s1[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
                    const float *inputs = x + k0;
                    for (i64 b = 0; b < steps; b++, inputs += STEP) {
                        __m256 x0 = _mm256_loadu_ps(inputs), x1 = _mm256_loadu_ps(inputs + 8);
                        __m256 x2 = _mm256_loadu_ps(inputs + 16), x3 = _mm256_loadu_ps(inputs + 24);
#pragma GCC unroll 2
                        for (int h = 0; h < 2; h++) {
                            __m256i code = codes[c / 2][b];
                            code = _mm256_and_si256(h ? _mm256_srli_epi16(code, 4) : code, nibble);
                            __m256i l = _mm256_shuffle_epi8(low[h], code), g = _mm256_shuffle_epi8(high[h], code);
                            __m256i w0 = _mm256_unpacklo_epi8(l, g), w1 = _mm256_unpackhi_epi8(l, g);
                            s0[h] = _mm256_fmadd_ps(x0, _mm256_castsi256_ps(_mm256_slli_epi32(w0, 16)), s0[h]);
                            s1[h] = _mm256_fmadd_ps(x1, _mm256_castsi256_ps(_mm256_and_si256(w0, top)), s1[h]);
                            s0[h] = _mm256_fmadd_ps(x2, _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16)), s0[h]);
                            s1[h] = _mm256_fmadd_ps(x3, _mm256_castsi256_ps(_mm256_and_si256(w1, top)), s1[h]);
                        }
                    }
                    sums[j + c] = _mm256_add_ps(s0[0], s1[0]);
                    sums[j + c + 1] = _mm256_add_ps(s0[1], s1[1]);
                }
            }
            k0 = stop;
        }
        for (i64 j = 0; j < wide; j += 8) {
            float eight[8];
            for (int c = 0; c < 8; c++) {
                float lanes[8];
                _mm256_storeu_ps(lanes, sums[j + c]);
                eight[c] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
            }
            i64 column = first + stripe + j;
            __m256 v = _mm256_loadu_ps(eight);
            if (e->bias_float) v = _mm256_add_ps(v, load_cols(e->bias_float + column, 8));
            store_cols(p->out, row_of_x * p->width + column, v, (int)p->out_dtype, 8);
        }
    }
}

// The order in which `int4_row` meets 32 inputs.
static void in_lookup_order(const float *x, i64 depth, float *to) {
    static const uint8_t order[16] = {0, 2, 8, 10, 4, 6, 12, 14, 1, 3, 9, 11, 5, 7, 13, 15};
    for (i64 k = 0; k < depth; k += 16)
        for (int i = 0; i < 16; i++) to[k + i] = x[k + order[i]];
}

// Below 64 inputs to a scale the tables cost more than they save.
static int looks_up(const Product *p, i64 rows) {
    return rows == 1 && p->kind == WEIGHT_ONLY && p->int4 && p->x_dtype == BF16 && p->depth % 32 == 0 &&
           p->group_size % 32 == 0 && p->group_size >= 64;
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

ALWAYS_INLINE int weight_only_many(const Product *p, const Expert *e, i64 start, i64 end, i64 first, i64 cols, int dtype,
                                   int int4, int has_offset) {
    Scratch s;
    if (!get_scratch(&s)) return 0;
    float *x = (float *)s.x, *panel = (float *)s.panel, *sums = s.totals;
    for (i64 m = start; m < end; m += MAX_ROWS) {
        i64 rows = MIN(end - m, MAX_ROWS);
        for (i64 k = 0; k < p->depth; k += KF) {
            i64 depth = MIN(p->depth - k, KF);
            for (i64 r = 0; r < rows; r++) to_float((const uint16_t *)p->x + (m + r) * p->depth + k, depth, dtype, x + r * KF);
            pack_float(p, e, k, depth, first, cols, dtype, int4, has_offset, panel);
            block_float(x, panel, depth, sums, rows, cols, k == 0);
        }
        for (i64 r = 0; r < rows; r++)
            for (i64 j = 0; j < cols; j += 8) {
                __m256 v = _mm256_load_ps(sums + r * MAX_COLS + j);
                if (e->bias_float) v = _mm256_add_ps(v, load_cols(e->bias_float + first + j, cols - j));
                store_cols(p->out, (m + r) * p->width + first + j, v, (int)p->out_dtype, cols - j);
            }
    }
    return 1;
}

// Every combination compiled for itself: the branches on dtype, width and offset are not taken per weight.
#define WEIGHT_ONLY_TASK(NAME, DTYPE, INT4, OFFSET)                                                                           \
    static int NAME(const Product *p, const Expert *e, i64 start, i64 end, i64 first, i64 cols, const float *const *x) {      \
        i64 rows = end - start;                                                                                               \
        if (rows > FEW) return weight_only_many(p, e, start, end, first, cols, DTYPE, INT4, OFFSET);                          \
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

// One group's rows times a range of columns.
static int run_task(const Product *p, i64 group, i64 first, i64 cols) {
    Expert e = expert_of(p, p->groups[3 * group]);
    i64 start = p->groups[3 * group + 1], end = p->groups[3 * group + 2], rows = end - start;
    if (p->kind == INT8_INT4 || p->kind == INT4) return packed_int4(p, &e, start, end, first, cols);
    if (p->kind == INT8 && rows > FEW) return int8_many(p, &e, start, end, first, cols);
    WeightOnlyTask task =
        weight_only_tasks[4 * (p->x_dtype == F16) + 2 * (p->int4 != 0) + (p->antiquant_offset != NULL)];
    if (p->kind == WEIGHT_ONLY && rows > FEW) return task(p, &e, start, end, first, cols, NULL);

    char *wide = malloc(rows * (p->depth + 1) * 4);
    if (!wide) return 0;
    const int16_t *integers[FEW];
    const float *floats[FEW];
    for (i64 m = 0; m < rows; m++) {
        if (p->kind == INT8) {
            int16_t *to = (int16_t *)wide + m * (p->depth + p->depth % 2);
            widen((const int8_t *)p->x + (start + m) * p->depth, p->depth, to);
            integers[m] = to;
        } else {
            float *to = (float *)wide + m * p->depth;
            to_float((const uint16_t *)p->x + (start + m) * p->depth, p->depth, (int)p->x_dtype, to);
            floats[m] = to;
        }
    }
    int done = 1;
    i64 whole = cols / NR * NR;
    if (p->kind == INT8) {
        int8_few(p, &e, start, rows, first, cols, integers);
    } else if (looks_up(p, rows)) {
        float *ordered = malloc(p->depth * 4);
        done = ordered != NULL;
        if (done) {
            in_lookup_order(floats[0], p->depth, ordered);
            if (p->antiquant_offset)
                int4_row(p, &e, ordered, start, first, whole, 1);
            else
                int4_row(p, &e, ordered, start, first, whole, 0);
            if (whole < cols) task(p, &e, start, end, first + whole, cols - whole, floats);
        }
        free(ordered);
    } else {
        done = task(p, &e, start, end, first, cols, floats);
    }
    free(wide);
    return done;
}

// Columns per task: whole tiles, at most `most`, and as many tasks as fill the threads evenly.
static i64 columns_per_task(i64 width, i64 most, i64 groups, i64 threads) {
    i64 tasks = (width + most - 1) / most;
    if (groups < 2 * threads) tasks = (tasks + threads - 1) / threads * threads;
    i64 cols = (width + tasks - 1) / tasks;
    return (cols + NR - 1) / NR * NR;
}

// Returns 1, or 0 where memory is short.
i64 nq_product(const Product *p) {
    i64 most_rows = 0;
    double work = 0;
    for (i64 g = 0; g < p->count; g++) {
        i64 rows = p->groups[3 * g + 2] - p->groups[3 * g + 1];
        most_rows = rows > most_rows ? rows : most_rows;
        work += (double)rows * p->depth * p->width;
    }
    int threads = work < 65536 ? 1 : omp_get_max_threads();
    int few = most_rows <= FEW && (p->kind == INT8 || p->kind == WEIGHT_ONLY);
    i64 most = !few ? MAX_COLS : p->kind == INT8 ? FEW_SUMS / (most_rows ? most_rows : 1) / NR * NR : FEW_COLS;
    i64 cols = columns_per_task(p->width, most, p->count, threads);
    if (cols > most) cols = most;
    i64 per_group = (p->width + cols - 1) / cols, tasks = per_group * p->count;
    i64 failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : failed)
    for (i64 t = 0; t < tasks; t++) {
        i64 first = t % per_group * cols;
        failed += !run_task(p, t / per_group, first, MIN(p->width - first, cols));
    }
    return !failed;
}
