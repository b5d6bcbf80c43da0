/* The passes over x for one element type. Included once for each, with
     T            the element
     W, WS        the type of arithmetic on elements, and a register of them
     LOAD, STORE  one element
     LOADS        LANES elements in any type that converts to double
     LOADF, STOREF  a register of elements, from and to WS
     NAME(f)      the name of f for this type */

static inline doubles NAME(wide)(const T *p) { return __builtin_convertvector(LOADS(p), doubles); }

/* LANES weights, as doubles. */
static inline doubles NAME(some_wide)(const W *p) {
  W v __attribute__((vector_size(sizeof(W) * LANES)));
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, doubles);
}

/* Coefficients or weights for as many elements as a register holds. */
static inline WS NAME(some)(const W *p) {
  WS v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* Adds sum a and sum a b of n elements, with b = x, and a = x, g, or w x: a forward or a backward pass, or a mask. */
static inline void NAME(run_sums)(const T *x, const T *g, const W *w, long n, double *sum, double *product, int has_g,
                                  int has_w) {
  doubles s0 = {0}, s1 = {0}, p0 = {0}, p1 = {0};
  long i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    will_read(x + i);
    if (has_g) will_read(g + i);
    doubles b0 = NAME(wide)(x + i), b1 = NAME(wide)(x + i + LANES);
    doubles a0 = has_g ? NAME(wide)(g + i) : b0, a1 = has_g ? NAME(wide)(g + i + LANES) : b1;
    if (has_w) a0 *= NAME(some_wide)(w + i), a1 *= NAME(some_wide)(w + i + LANES);
    s0 += a0, s1 += a1, p0 += a0 * b0, p1 += a1 * b1;
  }
  for (; i + LANES <= n; i += LANES) {
    doubles b0 = NAME(wide)(x + i), a0 = has_g ? NAME(wide)(g + i) : b0;
    if (has_w) a0 *= NAME(some_wide)(w + i);
    s0 += a0, p0 += a0 * b0;
  }
  double s = lanes(s0 + s1), p = lanes(p0 + p1);
  for (; i < n; i++) {
    double b = LOAD(x + i), a = has_g ? (double)LOAD(g + i) : b;
    if (has_w) a *= w[i];
    s += a, p += a * b;
  }
  *sum += s, *product += p;
}

/* The same for each of `columns` columns of `rows` rows; w has a weight for each row. */
static inline void NAME(column_sums)(const T *x, const T *g, const W *w, long rows, long width, long columns,
                                     double *sum, double *product, int has_g, int has_w) {
  /* The rows after these: the same columns of these are about to be read. */
  uintptr_t next = ROWS * width * sizeof(T), ahead = next > FETCH_AHEAD ? next : FETCH_AHEAD;
  for (long first = 0; first < rows; first += ROWS) {
    long last = first + ROWS < rows ? first + ROWS : rows, k = 0;
    for (; k + 2 * LANES <= columns; k += 2 * LANES) {
      doubles s0 = {0}, s1 = {0}, p0 = {0}, p1 = {0}, before;
      for (long r = first; r < last; r++) {
        long i = r * width + k;
        will_read_after(x + i, ahead);
        if (has_g) will_read_after(g + i, ahead);
        doubles b0 = NAME(wide)(x + i), b1 = NAME(wide)(x + i + LANES);
        doubles a0 = has_g ? NAME(wide)(g + i) : b0, a1 = has_g ? NAME(wide)(g + i + LANES) : b1;
        if (has_w) a0 *= (double)w[r], a1 *= (double)w[r];
        s0 += a0, s1 += a1, p0 += a0 * b0, p1 += a1 * b1;
      }
#define ADD(to, v) memcpy(&before, to, sizeof before), before += v, memcpy(to, &before, sizeof before)
      ADD(sum + k, s0), ADD(sum + k + LANES, s1), ADD(product + k, p0), ADD(product + k + LANES, p1);
#undef ADD
    }
    for (; k < columns; k++)
      for (long r = first; r < last; r++) {
        double b = LOAD(x + r * width + k), a = has_g ? (double)LOAD(g + r * width + k) : b;
        if (has_w) a *= w[r];
        sum[k] += a, product[k] += a * b;
      }
  }
}

static inline void NAME(plane_unit)(const pass *p, long chunk, long group, int has_g, int has_w) {
  const layout *at = &p->at;
  long c0 = at->channels * group / at->groups, c1 = at->channels * (group + 1) / at->groups;
  long n0 = at->outer * chunk / at->chunks, n1 = at->outer * (chunk + 1) / at->chunks;
  double *sum = p->parts + chunk * 2 * at->channels, *product = sum + at->channels;
  for (long c = c0; c < c1; c++) sum[c] = product[c] = 0;
  for (long n = n0; n < n1; n++)
    for (long c = c0; c < c1; c++) {
      long i = (n * at->channels + c) * at->inner;
      NAME(run_sums)((const T *)p->x + i, (const T *)p->g + i, (const W *)p->mask + n * at->inner, at->inner, sum + c,
                     product + c, has_g, has_w);
    }
}

/* Rows that are left where `repeat` does not divide them. */
static inline void NAME(rest_sums)(const pass *p, long row, double *sum, double *product, long k0, long k1, int has_g) {
  const layout *at = &p->at;
  long size = (at->outer - row * at->repeat) * at->channels * at->inner;
  for (long k = k0; k < k1 && k < size; k++) {
    double b = LOAD((const T *)p->x + row * at->width + k), a = has_g ? (double)LOAD((const T *)p->g + row * at->width + k) : b;
    sum[k - k0] += a, product[k - k0] += a * b;
  }
}

static inline void NAME(tile_unit)(const pass *p, long chunk, long tile, int has_g, int has_w) {
  const layout *at = &p->at;
  long k0 = tile * at->tile, k1 = k0 + at->tile < at->width ? k0 + at->tile : at->width;
  long rows = at->outer / at->repeat, r0 = rows * chunk / at->chunks, r1 = rows * (chunk + 1) / at->chunks;
  double *sum = p->parts + chunk * 2 * at->channels, *product = sum + at->channels;
  double columns[2][TILE];
  memset(columns[0], 0, sizeof(double) * (k1 - k0)), memset(columns[1], 0, sizeof(double) * (k1 - k0));
  long i = r0 * at->width + k0;
  NAME(column_sums)((const T *)p->x + i, (const T *)p->g + i, (const W *)p->mask + r0, r1 - r0, at->width, k1 - k0,
                    columns[0], columns[1], has_g, has_w);
  if (chunk == at->chunks - 1) NAME(rest_sums)(p, rows, columns[0], columns[1], k0, k1, has_g);
  if (at->repeat == 1 && at->inner == 1) {
    memcpy(sum + k0, columns[0], sizeof(double) * (k1 - k0)), memcpy(product + k0, columns[1], sizeof(double) * (k1 - k0));
    return;
  }
  /* No other tile has elements of these channels. */
  long c0 = at->repeat > 1 ? 0 : k0 / at->inner, c1 = at->repeat > 1 ? at->channels : k1 / at->inner;
  for (long c = c0; c < c1; c++) sum[c] = product[c] = 0;
  for (long k = k0; k < k1; k++) {
    long c = channel_of(at, k);
    sum[c] += columns[0][k - k0], product[c] += columns[1][k - k0];
  }
}

static void NAME(sums_unit)(void *work, long unit) {
  const pass *p = work;
  long chunk = unit / p->at.groups, group = unit % p->at.groups;
  /* Constants, for which the compiler makes a loop each. */
#define UNIT(kind)                                                                                     \
  (p->g ? NAME(kind)(p, chunk, group, 1, 0) : p->mask ? NAME(kind)(p, chunk, group, 0, 1) : NAME(kind)(p, chunk, group, 0, 0))
  if (p->at.repeat)
    UNIT(tile_unit);
  else
    UNIT(plane_unit);
#undef UNIT
}

/* y = (x - c0) c1 + c2, or with g: c1 g - w ((x - c0) c2 + c3). */
#define MANY ((long)(sizeof(WS) / sizeof(W)))
static inline WS NAME(values)(WS x, WS g, WS w, WS c0, WS c1, WS c2, WS c3, int has_g, int has_w) {
  if (!has_g) return (x - c0) * c1 + c2;
  WS part = (x - c0) * c2 + c3;
  return c1 * g - (has_w ? w * part : part);
}

static inline W NAME(value)(W x, W g, W w, W c0, W c1, W c2, W c3, int has_g, int has_w) {
  if (!has_g) return (x - c0) * c1 + c2;
  W part = (x - c0) * c2 + c3;
  return c1 * g - (has_w ? w * part : part);
}

static inline void NAME(plane_map)(const pass *p, long chunk, long group, int has_g, int has_w) {
  const layout *at = &p->at;
  long c0 = at->channels * group / at->groups, c1 = at->channels * (group + 1) / at->groups;
  long n0 = at->outer * chunk / at->chunks, n1 = at->outer * (chunk + 1) / at->chunks;
  const W *k = p->coefficients;
  for (long n = n0; n < n1; n++)
    for (long c = c0; c < c1; c++) {
      long at0 = (n * at->channels + c) * at->inner, i = 0;
      const T *x = (const T *)p->x + at0, *g = (const T *)p->g + at0;
      const W *w = (const W *)p->mask + n * at->inner;
      T *out = (T *)p->out + at0;
      W k0 = k[c], k1 = k[at->channels + c], k2 = k[2 * at->channels + c], k3 = has_g ? k[3 * at->channels + c] : 0;
      WS v0 = k0 - (WS){0}, v1 = k1 - (WS){0}, v2 = k2 - (WS){0}, v3 = k3 - (WS){0}, none = {0};
      for (; i + MANY <= at->inner; i += MANY) {
        will_read(x + i), will_write(out + i);
        if (has_g) will_read(g + i);
        STOREF(out + i, NAME(values)(LOADF(x + i), has_g ? LOADF(g + i) : none, has_w ? NAME(some)(w + i) : none, v0, v1, v2,
                                     v3, has_g, has_w));
      }
      for (; i < at->inner; i++)
        STORE(out + i, NAME(value)(LOAD(x + i), has_g ? LOAD(g + i) : 0, has_w ? w[i] : 0, k0, k1, k2, k3, has_g, has_w));
    }
}

static inline void NAME(tile_map)(const pass *p, long chunk, long tile, int has_g, int has_w) {
  const layout *at = &p->at;
  long first = tile * at->tile, columns = first + at->tile < at->width ? at->tile : at->width - first;
  long rows = at->outer / at->repeat, r0 = rows * chunk / at->chunks, r1 = rows * (chunk + 1) / at->chunks;
  long rest = at->outer * at->channels * at->inner - rows * at->width - first; /* elements of a last, partial row */
  const W *k = p->coefficients;
  /* A column of its own for each channel: as they are. Else a row of them is written out. */
  W table[4][TILE];
  const W *c[4] = {table[0], table[1], table[2], table[3]};
  int each_is_own = at->repeat == 1 && at->inner == 1, many = has_g ? 4 : 3;
  for (int i = 0; each_is_own && i < many; i++) c[i] = k + i * at->channels + first;
  for (long j = 0, channel = channel_of(at, first), left = at->inner; !each_is_own && j < columns; j++) {
    for (int i = 0; i < many; i++) table[i][j] = k[i * at->channels + channel];
    if (--left == 0) left = at->inner, channel = channel + 1 < at->channels ? channel + 1 : 0;
  }
  if (chunk == at->chunks - 1 && rest > 0) r1++;
  for (long r = r0; r < r1; r++) {
    long i = r * at->width + first, j = 0, n = r < rows ? columns : rest < columns ? rest : columns;
    const T *x = (const T *)p->x + i, *g = (const T *)p->g + i;
    T *out = (T *)p->out + i;
    W w = has_w ? ((const W *)p->mask)[r] : 0;
    WS ws = w - (WS){0}, none = {0};
    for (; j + MANY <= n; j += MANY) {
      will_read(x + j), will_write(out + j);
      if (has_g) will_read(g + j);
      STOREF(out + j, NAME(values)(LOADF(x + j), has_g ? LOADF(g + j) : none, ws, NAME(some)(c[0] + j), NAME(some)(c[1] + j),
                                   NAME(some)(c[2] + j), has_g ? NAME(some)(c[3] + j) : none, has_g, has_w));
    }
    for (; j < n; j++)
      STORE(out + j, NAME(value)(LOAD(x + j), has_g ? LOAD(g + j) : 0, w, c[0][j], c[1][j], c[2][j], has_g ? c[3][j] : 0, has_g,
                                 has_w));
  }
}

static void NAME(map_unit)(void *work, long unit) {
  const pass *p = work;
  long chunk = unit / p->at.groups, group = unit % p->at.groups;
#define UNIT(kind)                                                                                          \
  (!p->g ? NAME(kind)(p, chunk, group, 0, 0) : p->mask ? NAME(kind)(p, chunk, group, 1, 1) : NAME(kind)(p, chunk, group, 1, 0))
  if (p->at.repeat)
    UNIT(tile_map);
  else
    UNIT(plane_map);
#undef UNIT
}

static void NAME(widen)(const void *from, double *to, long n) {
  for (long i = 0; i < n; i++) to[i] = LOAD((const T *)from + i);
}

static void NAME(narrow)(const double *from, void *to, long n) {
  for (long i = 0; i < n; i++) STORE((T *)to + i, (W)from[i]);
}

#undef MANY
#undef T
#undef W
#undef WS
#undef LOAD
#undef LOADS
#undef LOADF
#undef STORE
#undef STOREF
#undef NAME
