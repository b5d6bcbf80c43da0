/* What the kernels of all element types share: types, vectors, and the layout of a tensor.

   A tensor is (outer, channels, inner), densely packed: planes (N, C, L) as they are, rows (R, C) with inner = 1.
   Sums are taken in double: the products of two floats are exact there, so that no pivot is needed. Work is cut into
   units by its shape alone, and their sums are added in order: the bits do not depend on the number of threads. */
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

/* As many doubles as a register holds: wider vectors are taken apart by compilers, and badly. */
#ifdef __AVX512F__
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
/* As many floats as fit there. */
typedef float full_floats __attribute__((vector_size(8 * LANES)));
typedef uint32_t full_words __attribute__((vector_size(8 * LANES)));
typedef uint16_t full_shorts __attribute__((vector_size(4 * LANES)));

/* Planes shorter than this are treated as rows: a vector holds elements of several channels. */
#define SHORT 16
/* Columns of rows that are worked on at a time, at most, and rows whose sums stay in registers. */
#define TILE 1024
#define ROWS 4
/* Elements that are worth a unit of work, and units at most. */
#define GRAIN 65536
#define UNITS 64
/* Bytes that a pass asks for before their turn. Processors stop asking by themselves at the end of a page, and wait
   for the lines that they write to as for those that they read. */
#define FETCH_AHEAD 4096
#define ALIGNMENT 64 /* of what is read again and again: a line of the cache */

typedef struct {
  long outer, channels, inner; /* of the tensor */
  long repeat;                 /* rows that are one row of `width` columns; 0: planes */
  long width;
  long tile; /* columns of a unit: all of a channel's `inner` ones */
  long chunks, groups; /* units: parts of the outer dimension times parts of the channels, or tiles of the columns */
} layout;

typedef struct {
  layout at;
  const void *x, *g, *mask;
  void *out;
  const void *coefficients; /* (4, channels): see each pass */
  double *parts;            /* (chunks, 2, channels) sums */
} pass;

static inline long channel_of(const layout *at, long column) { return column / at->inner % at->channels; }

static inline void will_read_after(const void *p, uintptr_t bytes) {
  __builtin_prefetch((const void *)((uintptr_t)p + bytes), 0);
}
static inline void will_read(const void *p) { will_read_after(p, FETCH_AHEAD); }
static inline void will_write(const void *p) { __builtin_prefetch((const void *)((uintptr_t)p + FETCH_AHEAD), 1); }

static inline double lanes(doubles v) {
  double s = 0;
  for (int i = 0; i < LANES / 2; i++) s += v[i] + v[LANES / 2 + i];
  return s;
}
