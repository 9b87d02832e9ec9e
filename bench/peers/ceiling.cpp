// Prints what the processor can do at most, as one line of JSON: rates of the product instructions with their
// operands in registers, and rates of reading a large buffer and one of as many bytes as the argument says.
// Every figure is the best of several runs by all threads.
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The highest rate of `work(count)`, which does `unit * count` operations a thread, over runs of about 0.15 s.
template <class Work>
static double rate(double unit, Work work) {
  double best = 0;
  long count = 1 << 14;
  for (int run = 0; run < 6; run++) {
    double longest = 0;
#pragma omp parallel reduction(max : longest)
    {
#pragma omp barrier
      double start = now();
      work(count);
      longest = now() - start;
    }
    best = std::max(best, unit * count * omp_get_max_threads() / longest);
    if (longest < 0.1) count = long(count * std::min(16.0, 0.15 / std::max(longest, 1e-6)));
  }
  return best;
}

static void product(const char* name, double gflops) { printf(", \"%s\": %.1f", name, gflops); }

#ifdef __AMX_BF16__
struct alignas(64) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

static void amx() {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return;  // the system does not grant the tiles
  product("amx_bf16", rate(4 * 16 * 16 * 32 * 2, [](long count) {
            TileConfig config = {};
            config.palette = 1;
            for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
            asm volatile("" : : "r"(&config) : "memory");  // GCC 12 takes only its first 8 bytes as used
            _tile_loadconfig(&config);
            for (long i = 0; i < count; i++) {  // tiles 4 and 5 are zero after the configuration
              _tile_dpbf16ps(0, 4, 5);
              _tile_dpbf16ps(1, 4, 5);
              _tile_dpbf16ps(2, 4, 5);
              _tile_dpbf16ps(3, 4, 5);
            }
            _tile_release();
          }) / 1e9);
}
#endif

#ifdef __AVX512BF16__
static void dpbf16() {
  product("avx512_bf16", rate(16 * 32 * 2, [](long count) {
            __m512 sums[16] = {};
            __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
            for (long i = 0; i < count; i++)
              for (auto& sum : sums) {
                sum = _mm512_dpbf16_ps(sum, x, x);
                asm volatile("" : "+v"(sum));
              }
          }) / 1e9);
}
#endif

#ifdef __AVX512F__
typedef __m512 Vector;
static Vector multiply(Vector x, Vector sum) { return _mm512_fmadd_ps(x, x, sum); }
static Vector ones() { return _mm512_set1_ps(1); }
#elif defined(__FMA__)
typedef __m256 Vector;
static Vector multiply(Vector x, Vector sum) { return _mm256_fmadd_ps(x, x, sum); }
static Vector ones() { return _mm256_set1_ps(1); }
#endif

#ifdef __FMA__
static void fma_float() {
  const int sums_at_once = 12;
  product("fma_float32", rate(sums_at_once * sizeof(Vector) / 4 * 2, [](long count) {
            Vector sums[sums_at_once] = {}, x = ones();
            for (long i = 0; i < count; i++)
              for (auto& sum : sums) {
                sum = multiply(x, sum);
                asm volatile("" : "+x"(sum));
              }
          }) / 1e9);
}
#endif

// Bytes per second of all threads reading parts of one buffer, again and again for about half a second.
static double reading(size_t bytes) {
  size_t words = bytes / 8 / 64 * 64;
  std::unique_ptr<uint64_t[]> buffer(new uint64_t[words]);
  int threads = omp_get_max_threads();
  auto part = [&](int thread) { return words / 64 * thread / threads * 64; };
#pragma omp parallel
  std::memset(&buffer[part(omp_get_thread_num())], 1,
              (part(omp_get_thread_num() + 1) - part(omp_get_thread_num())) * 8);
  double best = 0, end = now() + 0.7;
  uint64_t total = 0;
  for (int run = 0; run < 3 || now() < end; run++) {
    double start = now();
#pragma omp parallel reduction(+ : total)
    {
      uint64_t sums[8] = {};
      for (size_t i = part(omp_get_thread_num()); i < part(omp_get_thread_num() + 1); i += 64)
        for (int line = 0; line < 8; line++)
          for (int j = 0; j < 8; j++) sums[j] += buffer[i + line * 8 + j];
      for (uint64_t sum : sums) total += sum;
    }
    best = std::max(best, words * 8.0 / (now() - start));
  }
  if (total == 1) puts("");  // so that the sum is needed
  return best;
}

int main(int count, char** arguments) {
  printf("{\"threads\": %d", omp_get_max_threads());
#ifdef __AMX_BF16__
  amx();
#endif
#ifdef __AVX512BF16__
  dpbf16();
#endif
#ifdef __FMA__
  fma_float();
#endif
  size_t small = count > 1 ? strtoull(arguments[1], nullptr, 10) : 128u << 20;
  printf(", \"read_large_gb_s\": %.2f, \"read_step_gb_s\": %.2f}\n", reading(1u << 30) / 1e9, reading(small) / 1e9);
}
