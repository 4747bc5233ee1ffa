/* How many operations a second a processor can do at most: multiply-adds between registers, nothing loaded or stored.

   limit KIND SECONDS            KIND: fp32, bf16 or int8, by the vector units; bf16-amx or int8-amx, by the matrix units;
                                 prints Gop/s over all usable cores, one thread pinned to each
   exit 3: this processor (or compiler, or kernel) lacks the instructions

   One multiply-add counts as two operations. The accumulators are independent and as many as hide the latency; the empty asm keeps the
   compiler from seeing through them. Tiles that are zero throughout take as long as any.
   Compiled by limit.py: gcc -O3 -march=native -pthread. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX
#endif

#define ROUNDS 100000

/* The accumulators are single variables: gcc keeps an array in memory. */
#define FIRST_12(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#if defined(__AVX512F__)
#define ACCUMULATORS 24
#define EACH(F) FIRST_12(F) F(12) F(13) F(14) F(15) F(16) F(17) F(18) F(19) F(20) F(21) F(22) F(23)
#else
#define ACCUMULATORS 12
#define EACH(F) FIRST_12(F)
#endif

#define BEGIN(I) VECTOR acc##I = ZERO;
#define ONE(I) acc##I = STEP(acc##I); __asm__ volatile("" : "+v"(acc##I));
#define LOOP                                                                  \
    EACH(BEGIN)                                                               \
    for (long round = 0; round < ROUNDS; round++) { EACH(ONE) }

/* Each returns the operations of one call. */

#if defined(__AVX512F__)
static double fp32(void) {
    __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
    __asm__ volatile("" : "+v"(a), "+v"(b));
#define VECTOR __m512
#define ZERO _mm512_setzero_ps()
#define STEP(ACC) _mm512_fmadd_ps(a, b, ACC)
    LOOP
#undef VECTOR
#undef ZERO
#undef STEP
    return 2.0 * 16 * ACCUMULATORS * ROUNDS;
}
#elif defined(__AVX2__) && defined(__FMA__)
static double fp32(void) {
    __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    __asm__ volatile("" : "+v"(a), "+v"(b));
#define VECTOR __m256
#define ZERO _mm256_setzero_ps()
#define STEP(ACC) _mm256_fmadd_ps(a, b, ACC)
    LOOP
#undef VECTOR
#undef ZERO
#undef STEP
    return 2.0 * 8 * ACCUMULATORS * ROUNDS;
}
#else
static double fp32(void) { return 0; }
#endif

#if defined(__AVX512BF16__)
static double bf16(void) {
    __m512 ones = _mm512_set1_ps(0.5f);
    __m512bh a = (__m512bh)ones, b = (__m512bh)ones;
    __asm__ volatile("" : "+v"(a), "+v"(b));
#define VECTOR __m512
#define ZERO _mm512_setzero_ps()
#define STEP(ACC) _mm512_dpbf16_ps(ACC, a, b)
    LOOP
#undef VECTOR
#undef ZERO
#undef STEP
    return 2.0 * 32 * ACCUMULATORS * ROUNDS;
}
#else
static double bf16(void) { return 0; }
#endif

#if defined(__AVX512VNNI__)
static double int8(void) {
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
    __asm__ volatile("" : "+v"(a), "+v"(b));
#define VECTOR __m512i
#define ZERO _mm512_setzero_si512()
#define STEP(ACC) _mm512_dpbusd_epi32(ACC, a, b)
    LOOP
#undef VECTOR
#undef ZERO
#undef STEP
    return 2.0 * 64 * ACCUMULATORS * ROUNDS;
}
#elif defined(__AVXVNNI__)
static double int8(void) {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(2);
    __asm__ volatile("" : "+v"(a), "+v"(b));
#define VECTOR __m256i
#define ZERO _mm256_setzero_si256()
#define STEP(ACC) _mm256_dpbusd_avx_epi32(ACC, a, b)
    LOOP
#undef VECTOR
#undef ZERO
#undef STEP
    return 2.0 * 32 * ACCUMULATORS * ROUNDS;
}
#else
static double int8(void) { return 0; }
#endif

#if defined(HAS_AMX)
#define TILES 8
#define TILE_ROWS 16
#define TILE_BYTES 64 /* of a row */
#define XFEATURE_TILEDATA 18

/* Each thread says what its tiles look like; each process asks the kernel for them once. */
static int amx_begin(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {
        .palette = 1,
        .bytes = {[0 ... TILES - 1] = TILE_BYTES},
        .rows = {[0 ... TILES - 1] = TILE_ROWS},
    };
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, XFEATURE_TILEDATA)) return 0;
    _tile_loadconfig(&shape);
    return 1;
}

/* Tiles 0 to 5 accumulate, 6 and 7 are multiplied. */
#define EACH_TILE(F) F(0, 6, 7); F(1, 6, 7); F(2, 6, 7); F(3, 6, 7); F(4, 6, 7); F(5, 6, 7);
#define AMX(NAME, STEP, DEPTH)                                                \
    static double NAME(void) {                                                \
        if (!amx_begin()) return 0;                                           \
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);           \
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);           \
        for (long round = 0; round < ROUNDS; round++) { EACH_TILE(STEP) }     \
        _tile_release();                                                      \
        return 2.0 * TILE_ROWS * (TILE_BYTES / 4) * (DEPTH) * 6 * ROUNDS;     \
    }
AMX(bf16_amx, _tile_dpbf16ps, TILE_BYTES / 2)
AMX(int8_amx, _tile_dpbusd, TILE_BYTES)
#else
static double bf16_amx(void) { return 0; }
static double int8_amx(void) { return 0; }
#endif

static const struct {
    const char *name;
    double (*work)(void);
} KINDS[] = {{"fp32", fp32}, {"bf16", bf16}, {"int8", int8}, {"bf16-amx", bf16_amx}, {"int8-amx", int8_amx}};

typedef struct {
    int core;
    double seconds, gop_per_second;
    double (*work)(void);
} Share;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *run(void *argument) {
    Share *share = argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(share->core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    share->work(); /* wakes the wide units */
    double operations = 0, begun = now(), ended;
    do {
        operations += share->work();
        ended = now();
    } while (ended - begun < share->seconds);
    share->gop_per_second = 1e-9 * operations / (ended - begun);
    return NULL;
}

int main(int count, char **arguments) {
    double (*work)(void) = NULL;
    for (size_t i = 0; count == 3 && i < sizeof KINDS / sizeof *KINDS; i++)
        if (!strcmp(arguments[1], KINDS[i].name)) work = KINDS[i].work;
    if (!work) {
        fprintf(stderr, "usage: limit fp32|bf16|int8|bf16-amx|int8-amx SECONDS\n");
        return 2;
    }
    if (work() == 0) return 3;
    cpu_set_t usable;
    sched_getaffinity(0, sizeof usable, &usable);
    Share shares[CPU_SETSIZE];
    pthread_t threads[CPU_SETSIZE];
    int cores = 0;
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &usable)) shares[cores++] = (Share){.core = core, .seconds = atof(arguments[2]), .work = work};
    double sum = 0;
    for (int i = 0; i < cores; i++) pthread_create(&threads[i], NULL, run, &shares[i]);
    for (int i = 0; i < cores; i++) {
        pthread_join(threads[i], NULL);
        sum += shares[i].gop_per_second;
    }
    printf("%.1f\n", sum);
    return 0;
}
