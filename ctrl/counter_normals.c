/* The numbers of ctrl/counter_normals.py, operation by operation: see there for what they are.
   Compile without contraction of a * b + c, or the last bits differ. */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float arithmetic must round at every operation"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are split as on little-endian machines"
#endif

#define HALF 128 /* pairs in a group of 256 numbers */

static void philox(const uint64_t *key, uint64_t step, uint64_t call, int calls, uint64_t *words) {
  for (int i = 0; i < calls; i++) {
    uint64_t a = call + i, b = step, c = 0, d = 0, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
      unsigned __int128 p = (unsigned __int128)0xD2E7470EE14C6C93u * a;
      unsigned __int128 q = (unsigned __int128)0xCA5A826395121157u * c;
      a = (uint64_t)(q >> 64) ^ b ^ k0;
      b = (uint64_t)q;
      c = (uint64_t)(p >> 64) ^ d ^ k1;
      d = (uint64_t)p;
      k0 += 0x9E3779B97F4A7C15u;
      k1 += 0xBB67AE8584CAA73Bu;
    }
    words[4 * i] = a, words[4 * i + 1] = b, words[4 * i + 2] = c, words[4 * i + 3] = d;
  }
}

static void normals32(const uint32_t *restrict w, float *restrict z, float scale) {
  for (int i = 0; i < HALF; i++) {
    uint32_t v = w[i], q = w[HALF + i];
    float u = ((float)(int32_t)(v >> 1) + 0.5f) * 0x1p-31f;
    int32_t bits;
    memcpy(&bits, &u, 4);
    int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= e * 0x800000;
    float m;
    memcpy(&m, &bits, 4);
    float s = (m - 1) / (m + 1), s2 = s * s, p = (float)(1.0 / 9);
    p = p * s2 + (float)(1.0 / 7);
    p = p * s2 + (float)(1.0 / 5);
    p = p * s2 + (float)(1.0 / 3);
    p = p * s2 + 1;
    float r = sqrtf((float)e * (float)-1.3862943611198906 - s * 4 * p);
    r = v & 1 ? -r : r;
    float a = ((float)((int32_t)(q >> 8) - 0x800000) + 0.5f) * (float)9.362675707309822e-08;
    float a2 = a * a, sine = (float)(1.0 / 362880), cosine = (float)(-1.0 / 3628800);
    sine = sine * a2 + (float)(-1.0 / 5040);
    sine = sine * a2 + (float)(1.0 / 120);
    sine = sine * a2 + (float)(-1.0 / 6);
    sine = sine * a2 + 1;
    sine = sine * a;
    cosine = cosine * a2 + (float)(1.0 / 40320);
    cosine = cosine * a2 + (float)(-1.0 / 720);
    cosine = cosine * a2 + (float)(1.0 / 24);
    cosine = cosine * a2 + -0.5f;
    cosine = cosine * a2 + 1;
    z[i] = r * (q & 1 ? sine : cosine) * scale;
    z[HALF + i] = r * (q & 1 ? cosine : sine) * scale;
  }
}

static void normals64(const uint64_t *restrict w, double *restrict z, double scale) {
  for (int i = 0; i < HALF; i++) {
    uint64_t v = w[i], q = w[HALF + i], bits = v >> 12 | 0x3ff0000000000000u;
    double u;
    memcpy(&u, &bits, 8);
    u = u - 1 + 0x1p-53;
    int64_t high;
    memcpy(&high, &u, 8);
    int32_t e = (int32_t)((uint64_t)(high - 0x3fe6a09e667f3bcd + 0x4000000000000000) >> 52) - 1024;
    high -= (int64_t)((uint64_t)(int64_t)e << 52);
    double m;
    memcpy(&m, &high, 8);
    double s = (m - 1) / (m + 1), s2 = s * s, p = 1.0 / 21;
    p = p * s2 + 1.0 / 19;
    p = p * s2 + 1.0 / 17;
    p = p * s2 + 1.0 / 15;
    p = p * s2 + 1.0 / 13;
    p = p * s2 + 1.0 / 11;
    p = p * s2 + 1.0 / 9;
    p = p * s2 + 1.0 / 7;
    p = p * s2 + 1.0 / 5;
    p = p * s2 + 1.0 / 3;
    p = p * s2 + 1;
    double r = sqrt((double)e * -1.3862943611198906 - s * 4 * p);
    r = v & 1 ? -r : r;
    bits = q >> 12 | 0x3ff0000000000000u;
    double a;
    memcpy(&a, &bits, 8);
    a = (a - 1.5 + 0x1p-53) * 1.5707963267948966;
    double a2 = a * a, sine = 1.0 / 355687428096000, cosine = 1.0 / 20922789888000;
    sine = sine * a2 + -1.0 / 1307674368000;
    sine = sine * a2 + 1.0 / 6227020800;
    sine = sine * a2 + -1.0 / 39916800;
    sine = sine * a2 + 1.0 / 362880;
    sine = sine * a2 + -1.0 / 5040;
    sine = sine * a2 + 1.0 / 120;
    sine = sine * a2 + -1.0 / 6;
    sine = sine * a2 + 1;
    sine = sine * a;
    cosine = cosine * a2 + -1.0 / 87178291200;
    cosine = cosine * a2 + 1.0 / 479001600;
    cosine = cosine * a2 + -1.0 / 3628800;
    cosine = cosine * a2 + 1.0 / 40320;
    cosine = cosine * a2 + -1.0 / 720;
    cosine = cosine * a2 + 1.0 / 24;
    cosine = cosine * a2 + -0.5;
    cosine = cosine * a2 + 1;
    z[i] = r * (q & 1 ? sine : cosine) * scale;
    z[HALF + i] = r * (q & 1 ? cosine : sine) * scale;
  }
}

/* Consecutive groups of one row. */
static void fill(void *out, int wide, int64_t groups, const uint64_t *key, uint64_t row,
                 uint64_t group, double scale) {
  uint64_t words[2 * HALF];
  int calls = wide ? HALF / 2 : HALF / 4;
  for (int64_t g = 0; g < groups; g++) {
    philox(key, row, 1 + (group + g) * calls, calls, words);
    if (wide)
      normals64(words, (double *)out + 2 * HALF * g, scale);
    else
      normals32((const uint32_t *)words, (float *)out + 2 * HALF * g, (float)scale);
  }
}

/* Rows that several threads draw, in pieces that each is taken by one of them. The caller takes
   those of the row that it waits for; the others begin `lead` rows after it, so that what they
   write has left their own cache when the caller reads it. */
typedef struct {
  char *out;            /* [rows, groups * 256] */
  const double *scales; /* [rows], what each row is multiplied by */
  int32_t *done;        /* [rows], pieces that are there */
  int8_t *taken;        /* [rows, pieces] */
  int64_t rows, groups, piece; /* groups of a piece */
  int64_t wide;         /* 0: float32, 1: float64 */
  uint64_t key[2], row, group; /* first row, first group */
  int64_t lead;
  int64_t waited; /* row that the caller has waited for last */
  int64_t ahead;  /* piece that the others have come to */
  int64_t stopped;
} Rows;

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)

static int64_t pieces(const Rows *r) { return (r->groups + r->piece - 1) / r->piece; }

/* Draw a piece, unless another thread has taken it. */
static int draw(Rows *r, int64_t which) {
  if (LOAD(r->taken[which]) || __atomic_exchange_n(&r->taken[which], 1, __ATOMIC_RELAXED))
    return 0;
  int64_t k = which / pieces(r), first = which % pieces(r) * r->piece;
  int64_t many = r->groups - first < r->piece ? r->groups - first : r->piece;
  int64_t place = (k * r->groups + first) * 2 * HALF * (r->wide ? 8 : 4);
  fill(r->out + place, r->wide, many, r->key, r->row + k, r->group + first, r->scales[k]);
  __atomic_fetch_add(&r->done[k], 1, __ATOMIC_RELEASE);
  return 1;
}

/* Draw the first piece from `which` on that is left; 0 if none is. */
static int draw_next(Rows *r, int64_t which) {
  for (int64_t all = r->rows * pieces(r); which < all; which++)
    if (draw(r, which))
      return 1;
  return 0;
}

/* Draw until all is taken. */
void draw_all(Rows *r) {
  int64_t all = r->rows * pieces(r);
  while (!LOAD(r->stopped)) {
    int64_t waited = LOAD(r->waited), here = LOAD(r->ahead);
    int64_t next = (waited + r->lead) * pieces(r);
    next = here > next ? here : next;
    if (next >= all) {
      if (!draw_next(r, waited * pieces(r)))
        return;
    } else if (__atomic_compare_exchange_n(&r->ahead, &here, next + 1, 0, __ATOMIC_RELAXED,
                                           __ATOMIC_RELAXED))
      draw(r, next);
  }
}

/* Return when row k is there; until then draw along. */
void wait_for(Rows *r, int64_t k) {
  int64_t first = k * pieces(r), end = first + pieces(r);
  __atomic_store_n(&r->waited, k, __ATOMIC_RELAXED);
  for (int64_t which = first; which < end; which++)
    draw(r, which);
  while (__atomic_load_n(&r->done[k], __ATOMIC_ACQUIRE) < pieces(r))
    if (!draw_next(r, end))
      sched_yield();
}

/* Let the others take no other piece. */
void stop(Rows *r) { __atomic_store_n(&r->stopped, 1, __ATOMIC_RELAXED); }
