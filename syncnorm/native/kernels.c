/* The normalisation layer on a CPU: the passes over x, and with each all the arithmetic on numbers per channel.

   The functions are those of syncnorm.maths.kernels.composed; see there for what each computes. They return 0, or 1
   where no memory could be had. Types: 0 float, 1 double, 2 bfloat16, 3 float16. Masks, (outer, inner), have the
   type of the arithmetic: double with double elements, else float. */
#include "kernels.h"

static inline float from_bfloat(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline floats from_bfloats(const uint16_t *p) {
  shorts h;
  memcpy(&h, p, sizeof h);
  return (floats)(__builtin_convertvector(h, words) << 16);
}

static inline full_floats from_full_bfloats(const uint16_t *p) {
  full_shorts h;
  memcpy(&h, p, sizeof h);
  return (full_floats)(__builtin_convertvector(h, full_words) << 16);
}

static inline void to_full_bfloats(uint16_t *p, full_floats v) {
  full_words bits = (full_words)v, is_nan = (full_words)(v != v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  full_shorts h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), full_shorts);
  memcpy(p, &h, sizeof h);
}

static inline full_floats from_full_floats(const float *p) {
  full_floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline floats from_floats(const float *p) {
  floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline doubles from_doubles(const double *p) {
  doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}

#define T float
#define W float
#define WS full_floats
#define LOAD(p) (*(p))
#define LOADS(p) from_floats(p)
#define LOADF(p) from_full_floats(p)
#define STORE(p, v) (*(p) = (v))
#define STOREF(p, v) do { full_floats s = (v); memcpy(p, &s, sizeof s); } while (0)
#define NAME(f) f##_float
#include "passes.h"

#define T double
#define W double
#define WS doubles
#define LOAD(p) (*(p))
#define LOADS(p) from_doubles(p)
#define LOADF(p) from_doubles(p)
#define STORE(p, v) (*(p) = (v))
#define STOREF(p, v) do { doubles s = (v); memcpy(p, &s, sizeof s); } while (0)
#define NAME(f) f##_double
#include "passes.h"

#define T uint16_t
#define W float
#define WS full_floats
#define LOAD(p) from_bfloat(*(p))
#define LOADS(p) from_bfloats(p)
#define LOADF(p) from_full_bfloats(p)
#define STORE(p, v) (*(p) = to_bfloat(v))
#define STOREF(p, v) to_full_bfloats(p, v)
#define NAME(f) f##_bfloat
#include "passes.h"

#ifdef __FLT16_MAX__
typedef _Float16 half;
typedef _Float16 halves __attribute__((vector_size(2 * LANES)));
typedef _Float16 full_halves __attribute__((vector_size(4 * LANES)));

#if defined(__AVX512F__)
#include <immintrin.h>
static inline floats from_halves(const half *p) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline full_floats from_full_halves(const half *p) {
  return (full_floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline void to_full_halves(half *p, full_floats v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0));
}
#elif defined(__F16C__)
#include <immintrin.h>
static inline floats from_halves(const half *p) { return (floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)); }
static inline full_floats from_full_halves(const half *p) {
  return (full_floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline void to_full_halves(half *p, full_floats v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
static inline floats from_halves(const half *p) {
  halves h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, floats);
}

static inline full_floats from_full_halves(const half *p) {
  full_halves h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, full_floats);
}

static inline void to_full_halves(half *p, full_floats v) {
  full_halves h = __builtin_convertvector(v, full_halves);
  memcpy(p, &h, sizeof h);
}
#endif

#define T half
#define W float
#define WS full_floats
#define LOAD(p) ((float)*(p))
#define LOADS(p) from_halves(p)
#define LOADF(p) from_full_halves(p)
#define STORE(p, v) (*(p) = (half)(v))
#define STOREF(p, v) to_full_halves(p, v)
#define NAME(f) f##_half
#include "passes.h"
#endif

typedef struct {
  syncnorm_part sums, map;
  void (*widen)(const void *, double *, long);
  void (*narrow)(const double *, void *, long);
  int bytes; /* of W */
} element;

#define ELEMENT(name, W) {sums_unit_##name, map_unit_##name, widen_##name, narrow_##name, sizeof(W)}
static const element elements[] = {
    ELEMENT(float, float), ELEMENT(double, double), ELEMENT(bfloat, float),
#ifdef __FLT16_MAX__
    ELEMENT(half, float),
#endif
};

/* The sources that this was built from. */
const char *syncnorm_digest(void) { return SYNCNORM_DIGEST; }

/* The number of element types that this compiler knew. */
int syncnorm_types(void) { return sizeof elements / sizeof *elements; }

static long at_most(long v, long most) { return v < most ? v : most; }
static long at_least(long v, long least) { return v > least ? v : least; }

static layout layout_of(long outer, long channels, long inner, int has_mask) {
  layout at = {outer, channels, inner, 0, 0, 0, 1, 1};
  long rows = outer, size = outer * channels * inner, row = channels * inner;
  if (inner < SHORT && !(has_mask && inner > 1)) {
    at.repeat = has_mask ? 1 : at_least(at_most(at_most(TILE / at_least(row, 1), 1 + 8 * LANES / row), outer), 1);
    at.width = at.repeat * row;
    at.tile = TILE - TILE % inner;
    at.groups = (at.width + at.tile - 1) / at.tile;
    rows = outer / at.repeat;
  }
  at.chunks = at_least(at_most(at_most(size / GRAIN, UNITS), rows), 1);
  if (!at.repeat) at.groups = at_least(at_most(size / GRAIN / at.chunks, channels), 1);
  return at;
}

static void run(syncnorm_part unit, pass *p, int threads) {
  long units = p->at.chunks * p->at.groups;
  syncnorm_parallel(unit, p, units, units > 1 ? threads : 1);
}

/* Adds the chunks' sums: (2, channels). */
static void total(const pass *p, double *out) {
  long n = 2 * p->at.channels;
  memcpy(out, p->parts, sizeof *out * n);
  for (long chunk = 1; chunk < p->at.chunks; chunk++)
    for (long i = 0; i < n; i++) out[i] += p->parts[chunk * n + i];
}

static int sum(const void *x, const void *g, const void *mask, int type, long outer, long channels, long inner, double *out,
               int threads) {
  pass p = {layout_of(outer, channels, inner, mask != 0), x, g, mask, 0, 0, out};
  if (p.at.chunks > 1) p.parts = malloc(sizeof *out * 2 * channels * p.at.chunks);
  if (!p.parts) return 1;
  run(elements[type].sums, &p, threads);
  if (p.parts != out) total(&p, out), free(p.parts);
  return 0;
}

static int map(const void *x, const void *g, const void *mask, void *out, int type, long outer, long channels, long inner,
               const double *coefficients, int threads) {
  pass p = {layout_of(outer, channels, inner, mask != 0), x, g, mask, out, coefficients, 0};
  const element *e = &elements[type];
  void *narrow = 0;
  if (e->bytes != sizeof(double)) {
    size_t size = 4 * channels * e->bytes + ALIGNMENT - 1;
    if (!(narrow = aligned_alloc(ALIGNMENT, size - size % ALIGNMENT))) return 1;
    elements[0].narrow(coefficients, narrow, (g ? 4 : 3) * channels);
    p.coefficients = narrow;
  }
  run(e->map, &p, threads);
  free(narrow);
  return 0;
}

/* The sum of the weights; NaN if one is negative or not finite. */
static double count(const void *mask, int type, long n) {
  double s = 0, is_fault = 0;
  if (elements[type].bytes == sizeof(double)) {
    for (const double *w = mask; n--; w++) s += *w, is_fault += !(*w >= 0 && *w < INFINITY);
  } else {
    for (const float *w = mask; n--; w++) s += *w, is_fault += !(*w >= 0 && *w < INFINITY);
  }
  return is_fault ? NAN : s;
}

/* sums: [sum wx, sum wx^2, sum w], (2 channels + 1). */
int syncnorm_moments(const void *x, int type, long outer, long channels, long inner, const void *mask, double *sums,
                     int threads) {
  sums[2 * channels] = mask ? count(mask, type, outer * inner) : (double)(outer * inner);
  return sum(x, 0, mask, type, outer, channels, inner, sums, threads);
}

/* The reference of renormalisation's r and d; bounds as they are, or by a schedule. */
typedef struct {
  const void *running_mean, *running_var;
  const double *r_max, *d_max;
  const int64_t *step;
  double r_end, d_end;
  int64_t warmup, r_steps, d_steps;
  int mean_type, var_type;
} reference;

static double ramp(int64_t step, int64_t warmup, double start, double end, int64_t end_step) {
  if (step >= end_step) return end;
  if (end_step == warmup) return start;
  double progress = fmin(fmax((double)(step - warmup) / (double)(end_step - warmup), 0), 1);
  return fmin(start + (end - start) * progress, end);
}

typedef struct {
  double n, inverse;
  const double *first, *second;
  int is_raw;
} batch;

static batch batch_of(const double *numbers, int is_raw, long channels) {
  double n = numbers[2 * channels];
  return (batch){n, n == 0 ? 0 : 1 / n, numbers, numbers + channels, is_raw};
}

/* mean and m2, each (channels). */
static void moments_of(const batch *b, long channels, double *restrict mean, double *restrict m2) {
  const double *restrict first = b->first, *restrict second = b->second, inverse = b->inverse;
  if (!b->is_raw) {
    memcpy(mean, first, sizeof *mean * channels), memcpy(m2, second, sizeof *m2 * channels);
    return;
  }
  /* A single value has no variance, whatever its weight: at most a rounding error. */
  const double share = b->n <= 1 ? 16 * DBL_EPSILON : 0;
  for (long c = 0; c < channels; c++) {
    double sum = first[c], square = second[c];
    mean[c] = sum * inverse;
    square -= sum * mean[c];
    m2[c] = square <= share * second[c] ? 0 : square;
  }
}

/* 1 / sqrt(var + eps); 0 where no value or a single one counts. */
static void invstd_of(const batch *b, long channels, const double *restrict m2, double eps, double *restrict invstd) {
  double inverse = b->inverse;
  for (long c = 0; c < channels; c++) invstd[c] = 1 / sqrt(m2[c] * inverse + eps);
  if (b->n <= 1)
    for (long c = 0; c < channels; c++)
      if (m2[c] == 0) invstd[c] = 0;
}

/* A vector of this type as doubles; `missing` throughout where there is none. */
static void widened(const void *from, int type, double *to, long n, double missing) {
  if (from)
    elements[type].widen(from, to, n);
  else
    for (long i = 0; i < n; i++) to[i] = missing;
}

static double clamp(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

/* The rounded mean: x - mean is taken first, and a shift makes up for the rounding. */
static void centres(const double *restrict mean, double *restrict centre, long channels, int type) {
  if (elements[type].bytes == sizeof(double))
    memcpy(centre, mean, sizeof *mean * channels);
  else
    for (long c = 0; c < channels; c++) centre[c] = (float)mean[c];
}

/* Rows 3 to 8: r, d, running mean and variance, r_max, d_max. */
static void correct(const reference *to, const batch *b, long channels, double eps, double *rows) {
  double *r = rows + 3 * channels, *d = r + channels, *at = d + channels, *var = at + channels;
  double r_max = to->step ? ramp(*to->step, to->warmup, 1, to->r_end, to->r_steps) : *to->r_max;
  double d_max = to->step ? ramp(*to->step, to->warmup, 0, to->d_end, to->d_steps) : *to->d_max;
  elements[to->mean_type].widen(to->running_mean, at, channels);
  elements[to->var_type].widen(to->running_var, var, channels);
  for (long c = 0; c < channels; c++) {
    double sigma = sqrt(var[c] + eps);
    r[c] = b->n == 0 ? 1 : clamp(sqrt(rows[channels + c] * b->inverse + eps) / sigma, 1 / r_max, r_max);
    d[c] = b->n == 0 ? 0 : clamp((rows[c] - at[c]) / sigma, -d_max, d_max);
    rows[7 * channels + c] = r_max, rows[8 * channels + c] = d_max;
  }
}

/* y, and rows: (3, channels), or (9, channels) with a reference. */
int syncnorm_normalize(const void *x, void *y, int type, long outer, long channels, long inner, const double *numbers,
                       int is_raw, const void *weight, int weight_type, const void *bias, int bias_type, double eps,
                       double *rows, const reference *to, int threads) {
  double *k = malloc(sizeof *k * 4 * channels);
  if (!k) return 1;
  double *restrict centre = k, *restrict scale = k + channels, *restrict shift = k + 2 * channels, *restrict b = k + 3 * channels;
  const double *restrict mean = rows, *restrict invstd = rows + 2 * channels, *restrict r = rows + 3 * channels;
  batch of = batch_of(numbers, is_raw, channels);
  moments_of(&of, channels, rows, rows + channels);
  invstd_of(&of, channels, rows + channels, eps, rows + 2 * channels);
  widened(weight, weight_type, scale, channels, 1);
  widened(bias, bias_type, b, channels, 0);
  centres(mean, centre, channels, type);
  if (to) {
    correct(to, &of, channels, eps, rows);
    for (long c = 0; c < channels; c++) b[c] += scale[c] * r[channels + c], scale[c] *= r[c];
  }
  for (long c = 0; c < channels; c++) {
    scale[c] *= invstd[c];
    shift[c] = b[c] + (centre[c] - mean[c]) * scale[c];
  }
  int failed = map(x, 0, 0, y, type, outer, channels, inner, k, threads);
  free(k);
  return failed;
}

/* local: [sum g, sum g xhat], (2, channels); the gradients of weight and bias where they are wanted. */
int syncnorm_backward_sums(const void *g, const void *x, int type, long outer, long channels, long inner, const double *rows,
                           int is_corrected, double *local, void *grad_weight, int weight_type, void *grad_bias, int bias_type,
                           int threads) {
  if (sum(x, g, 0, type, outer, channels, inner, local, threads)) return 1;
  double *restrict first = local, *restrict second = local + channels;
  const double *restrict mean = rows, *restrict invstd = rows + 2 * channels, *restrict r = rows + 3 * channels;
  for (long c = 0; c < channels; c++) second[c] = (second[c] - mean[c] * first[c]) * invstd[c];
  if (grad_bias) elements[bias_type].narrow(first, grad_bias, channels);
  if (!grad_weight) return 0;
  if (!is_corrected) {
    elements[weight_type].narrow(second, grad_weight, channels);
    return 0;
  }
  double *restrict corrected = malloc(sizeof *corrected * channels);
  if (!corrected) return 1;
  for (long c = 0; c < channels; c++) corrected[c] = r[c] * second[c] + r[channels + c] * first[c];
  elements[weight_type].narrow(corrected, grad_weight, channels);
  free(corrected);
  return 0;
}

/* The gradient of x, from totals [sum g, sum g xhat] of all workers and their count, or from means. */
int syncnorm_backward_input(const void *g, const void *x, void *out, int type, long outer, long channels, long inner,
                            const void *mask, const double *rows, int is_corrected, const void *weight, int weight_type,
                            const double *restrict totals, const double *n, int threads) {
  double *k = malloc(sizeof *k * 4 * channels), inverse = n ? *n == 0 ? 0 : 1 / *n : 1;
  if (!k) return 1;
  double *restrict centre = k, *restrict scale = k + channels, *restrict slope = k + 2 * channels, *restrict part = k + 3 * channels;
  const double *restrict mean = rows, *restrict invstd = rows + 2 * channels, *restrict r = rows + 3 * channels;
  widened(weight, weight_type, scale, channels, 1);
  centres(mean, centre, channels, type);
  if (is_corrected)
    for (long c = 0; c < channels; c++) scale[c] *= r[c];
  for (long c = 0; c < channels; c++) {
    scale[c] *= invstd[c];
    slope[c] = scale[c] * totals[channels + c] * inverse * invstd[c];
    part[c] = scale[c] * totals[c] * inverse + slope[c] * (centre[c] - mean[c]);
  }
  int failed = map(x, g, mask, out, type, outer, channels, inner, k, threads);
  free(k);
  return failed;
}

/* From a to b by a share of the way; the square root. By the operations of syncnorm.maths.moments and renorm: workers
   without this library have the same bits. */
static inline double lerp(double a, double b, double factor) {
  return factor < 0.5 ? a + factor * (b - a) : b - (b - a) * (1 - factor);
}
static inline double root(double x) { return 1 / (1 / sqrt(x)); }

/* Counts the batch, and has the running statistics follow it; `momentum` NaN: a cumulative average. */
int syncnorm_update_running(void *running_mean, int mean_type, void *running_var, int var_type, int64_t *counter,
                            const double *numbers, int is_raw, long channels, double momentum, double eps, int is_std) {
  batch b = batch_of(numbers, is_raw, channels);
  if (!(b.n > 0)) return 0;
  double *mean = malloc(sizeof *mean * 3 * channels), *m2 = mean + channels, *restrict running = mean + 2 * channels;
  if (!mean) return 1;
  if (counter) ++*counter;
  double factor = momentum;
  if (momentum != momentum) factor = counter ? 1 / (double)(*counter > 1 ? *counter : 1) : 1;
  moments_of(&b, channels, mean, m2);
  elements[mean_type].widen(running_mean, running, channels);
  for (long c = 0; c < channels; c++) running[c] = lerp(running[c], mean[c], factor);
  elements[mean_type].narrow(running, running_mean, channels);
  if (b.n > 1) {
    elements[var_type].widen(running_var, running, channels);
    for (long c = 0; c < channels; c++) {
      if (is_std) {
        double sigma = root(running[c] + eps);
        sigma += factor * (root(m2[c] * b.inverse + eps) - sigma);
        sigma = sigma * sigma - eps;
        running[c] = sigma < 0 ? 0 : sigma;
      } else
        running[c] = lerp(running[c], m2[c] * (1 / (b.n - 1)), factor);
    }
    elements[var_type].narrow(running, running_var, channels);
  }
  free(mean);
  return 0;
}

/* The averages of sync="lagged", as of syncnorm.maths.lagged. */
int syncnorm_follow_moments(const double *numbers, int is_raw, long channels, double *mean, double *var, int64_t *updates,
                            int64_t *waits, double eps, double max_drift, double max_ratio, double rate) {
  batch b = batch_of(numbers, is_raw, channels);
  double *new_mean = malloc(sizeof *new_mean * 2 * channels), *m2 = new_mean + channels;
  int is_finite = 1, has_drifted = 0;
  if (!new_mean) return 1;
  moments_of(&b, channels, new_mean, m2);
  for (long c = 0; c < channels; c++) {
    double before = var[c] + eps, now = m2[c] * b.inverse + eps, distance = new_mean[c] - mean[c];
    has_drifted |= distance * distance > before * (max_drift * max_drift);
    has_drifted |= now > before * max_ratio || before > now * max_ratio;
    is_finite &= isfinite(new_mean[c]) && isfinite(m2[c]);
  }
  if (b.n > 0 && is_finite) {
    *waits = has_drifted || !*updates;
    if (!*updates) rate = 1;
    for (long c = 0; c < channels; c++)
      mean[c] += rate * (new_mean[c] - mean[c]), var[c] += rate * (m2[c] * b.inverse - var[c]);
    ++*updates;
  } else
    *waits |= !is_finite;
  free(new_mean);
  return 0;
}

/* sums: [sum g, sum g xhat, n] of all workers. */
void syncnorm_follow_gradients(const double *sums, long channels, double *gradient, int64_t *updates, double rate) {
  double n = sums[2 * channels], inverse = 1 / n;
  int is_new = n > 0;
  for (long i = 0; i < 2 * channels; i++) is_new &= isfinite(sums[i]) != 0;
  if (!is_new) return;
  if (!*updates) rate = 1;
  for (long i = 0; i < 2 * channels; i++) gradient[i] += rate * (sums[i] * inverse - gradient[i]);
  ++*updates;
}
