// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: read memory, and multiply int8 numbers that are in registers already.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>

// Read `count` bytes once; the sum keeps the compiler honest. Fetching ahead is up to a tenth faster than without.
int64_t read_bytes(const char *p, int64_t count) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t block = 0; block < count / 4096; block++) {
        const char *at = p + block * 4096;
        __m256i even = _mm256_setzero_si256(), odd = even;
        for (int64_t i = 0; i < 4096; i += 64) {
            _mm_prefetch(at + i + 16384, _MM_HINT_T0);
            even = _mm256_add_epi64(even, _mm256_loadu_si256((const __m256i *)(at + i)));
            odd = _mm256_add_epi64(odd, _mm256_loadu_si256((const __m256i *)(at + i + 32)));
        }
        even = _mm256_add_epi64(even, odd);
        total += _mm256_extract_epi64(even, 0) + _mm256_extract_epi64(even, 3);
    }
    return total;
}

// int8 products at the best rate at which this CPU does them exactly: VNNI where it is, else pairs of 16-bit products
// (vpmaddwd; vpmaddubsw saturates). Widening to 16 bits is not counted. Returns the multiply-adds
// done. In assembler, because compilers compute a product that does not change only once.
int64_t multiply_adds(int64_t steps) {
    int64_t lanes = 0, kept = 0;
#pragma omp parallel reduction(+ : lanes, kept)
    {
#if defined(__AVX512VNNI__)
        __m512i c[12], a = _mm512_set1_epi32(omp_get_thread_num()), b = _mm512_set1_epi32(3);
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) c[i] = _mm512_setzero_si512();
        for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++)
                __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(c[i]) : "v"(a), "v"(b));
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) kept += _mm_cvtsi128_si32(_mm512_castsi512_si128(c[i]));
        lanes += steps * 12 * 64;
#else
        __m256i c[8], a = _mm256_set1_epi32(omp_get_thread_num()), b = _mm256_set1_epi32(3);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) c[i] = _mm256_setzero_si256();
        for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                __m256i product;
                __asm__ volatile("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));
                __asm__ volatile("vpaddd %1, %0, %0" : "+x"(c[i]) : "x"(product));
            }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) kept += _mm_cvtsi128_si32(_mm256_castsi256_si128(c[i]));
        lanes += steps * 8 * 16;
#endif
    }
    return lanes + (kept == 1);
}
