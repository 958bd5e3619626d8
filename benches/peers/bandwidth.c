/* Read bandwidth of the memory: the bound on decoding. Needs AVX-512.
 *
 *   gcc -O3 -march=native -fopenmp bandwidth.c -o bandwidth && ./bandwidth [threads] [megabytes] [repetitions]
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sum n floats (a multiple of 64) with four accumulators. */
static float sum(const float *a, size_t n) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t i = 0; i < n; i += 64)
        for (int j = 0; j < 4; j++)
            s[j] = _mm512_add_ps(s[j], _mm512_loadu_ps(a + i + 16 * j));
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : omp_get_max_threads();
    size_t megabytes = argc > 2 ? strtoull(argv[2], NULL, 10) : 220;
    int repetitions = argc > 3 ? atoi(argv[3]) : 51;
    size_t part = megabytes * 1000000 / sizeof(float) / threads / 64 * 64, bytes = part * threads * sizeof(float);
    float *a = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double *seconds = malloc(repetitions * sizeof(double));
    volatile float sink = 0;
    if (a == MAP_FAILED || !seconds) return 1;
    madvise(a, bytes, MADV_HUGEPAGE);
    omp_set_num_threads(threads);
#pragma omp parallel
    for (size_t i = 0, lo = part * omp_get_thread_num(); i < part; i++) a[lo + i] = 1;
    for (int r = 0; r < repetitions; r++) {
        float total = 0;
        double start = omp_get_wtime();
#pragma omp parallel reduction(+ : total)
        total += sum(a + part * omp_get_thread_num(), part);
        seconds[r] = omp_get_wtime() - start;
        sink += total;
    }
    qsort(seconds, repetitions, sizeof(double), ascending);
    printf("read %zu MB, %d threads: median %.1f GB/s, best %.1f GB/s\n", megabytes, threads, bytes / seconds[repetitions / 2] / 1e9,
           bytes / seconds[0] / 1e9);
}
