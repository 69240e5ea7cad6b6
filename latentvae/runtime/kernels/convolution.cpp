// 3x3 convolutions of maps (B, H, W, C) by a bilinear scheme (winograd.py), in blocks of tiles that stay in a core's
// cache: norm and SiLU while a block is read, bias, sum and the next norm's statistics while it is written. It
// computes in float32, whatever maps are stored in. Compiled at first use by compiled.py, which puts the schemes'
// matrices before this text: Scheme0 (convolution) and Scheme1 (after nearest x2 upsampling), each with POINTS,
// REACH, OUTPUTS, STEP, OFFSET, a, b and g.
#include <sched.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24, WIDEST = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12, WIDEST = 2;
#else
constexpr int LANES = 4, SUMS = 24, WIDEST = 4;
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

struct Work {  // as in compiled.py; strides in values
    const void *x, *plus;                               // (B, H, W, C); what is added to the result, or null
    void *out;                                          // (B, H', W', K), contiguous
    const void *weight;                                 // (K, C, 3, 3), of x's kind
    const float *bias, *scale, *shift;                  // (K); (B, C), or null: norm and SiLU before
    float *factors;                                     // packed by `prepare`
    double *means, *variances, *counts;                 // of the result's blocks, (B, blocks, K) and (blocks), or null
    int64_t batch, height, width, inside, outside;      // of x
    int64_t x_image, x_row, x_pixel, plus_image, plus_row, plus_pixel;
    int64_t weight_out, weight_in, weight_row, weight_column;
    int64_t rows, columns;                              // tiles of a block; in `measure` and `apply` rows of pixels
    int64_t upsample, bf16, activate;
    int64_t prepared, done, next;                       // what the next thread that asks does, and what is done
};

static inline V spread(float value) { return value - V{}; }
static inline V load(const float *from) { V v; memcpy(&v, from, sizeof v); return v; }
static inline V load(const uint16_t *from) {
    H h; memcpy(&h, from, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}
static inline void store(float *to, V v) { memcpy(to, &v, sizeof v); }
static inline void store(uint16_t *to, V v) {  // to the nearest, ties to even; NaN stays NaN
    U bits = (U)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    H h = __builtin_convertvector(v == v ? rounded : (U{} + 0x7fc0), H);
    memcpy(to, &h, sizeof h);
}
static inline float value(const float *from) { return *from; }
static inline float value(const uint16_t *from) {
    uint32_t bits = (uint32_t)*from << 16; float f; memcpy(&f, &bits, 4); return f;
}
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline V silu(V x) {  // x / (1 + exp(-x)), to 1.5e-7 of x
    V t = x * -1.44269504f;
    t = t < 126.f ? t : spread(126.f);
    t = t > -126.f ? t : spread(-126.f);
    V whole = (t + 12582912.f) - 12582912.f, r = t - whole;  // to the nearest whole number
    V p = spread(1.54035304e-4f);                            // 2^r by Taylor, |r| <= 0.5
    p = p * r + 1.33335581e-3f;
    p = p * r + 9.61812911e-3f;
    p = p * r + 5.55041087e-2f;
    p = p * r + 2.40226507e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.f;
    U power = __builtin_convertvector(whole + 127.f, U) << 23;
    return x / (1.f + p * (V)power);
}

// y[o] = sum of matrix[o][i] * x[i]
template <int N, int M> static inline void combine(const float (&matrix)[N][M], const V *x, int from, V *y, int to) {
#pragma GCC unroll 8
    for (int o = 0; o < N; o++) {
        V sum = {};
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
            if (matrix[o][i] != 0.f) sum += matrix[o][i] * x[i * from];
        y[o * to] = sum;
    }
}
template <int N, int M> static inline void both_ways(const float (&matrix)[N][M], const V *x, V *y) {  // (M, M) to (N, N)
    V half[N * M];
#pragma GCC unroll 8
    for (int j = 0; j < M; j++) combine(matrix, x + j, M, half + j, M);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) combine(matrix, half + i * M, 1, y + i * N, 1);
}

// From one point's values to the next's: never a power of two, or all would fall into the same lines of a cache.
static inline int64_t apart(int64_t rows, int64_t columns) { return rows * columns + LANES; }

// The outputs' channels are computed in parts of so many vectors, of as equal widths as can be.
static inline int64_t parts(int64_t outside) { return (outside / LANES + WIDEST - 1) / WIDEST; }
static inline int64_t part_start(int64_t outside, int64_t part) {
    return outside / LANES * part / parts(outside) * LANES;
}

// The factors of one vector of outputs' channels.
template <class S, class T> static void make_factors(const Work *w, int64_t k) {
    constexpr int P = S::POINTS;
    int64_t part = 0, C = w->inside;
    while (part_start(w->outside, part + 1) <= k) part++;
    int64_t first = part_start(w->outside, part), width = part_start(w->outside, part + 1) - first;
    float *to = w->factors + first * C + k - first;
    for (int64_t c = 0; c < C; c += LANES) {
        float turned[LANES][9][LANES];  // read along the inputs' channels, as they lie in channels_last
        for (int lane = 0; lane < LANES; lane++)
            for (int tap = 0; tap < 9; tap++) {
                const T *from = (const T *)w->weight + (k + lane) * w->weight_out + c * w->weight_in +
                                tap / 3 * w->weight_row + tap % 3 * w->weight_column;
                for (int i = 0; i < LANES; i++) turned[i][tap][lane] = value(from + i * w->weight_in);
            }
        for (int i = 0; i < LANES; i++) {
            V taps[9], points[P * P];
            for (int tap = 0; tap < 9; tap++) taps[tap] = load(turned[i][tap]);
            both_ways(S::g, taps, points);
            for (int p = 0; p < P * P; p++) store(to + p * apart(C, w->outside) + (c + i) * width, points[p]);
        }
    }
}

// Values of a block's pixels and those around it, zeros outside of the map.
template <class T> static void read(const Work *w, float *to, int64_t image, int64_t top, int64_t left, int64_t height,
                                    int64_t width) {
    const T *x = (const T *)w->x + image * w->x_image;
    const float *scale = w->scale ? w->scale + image * w->inside : nullptr, *shift = w->shift + image * w->inside;
    int64_t C = w->inside;
    for (int64_t row = top; row < top + height; row++) {
        bool outside = row < 0 || row >= w->height;
        for (int64_t column = left; column < left + width; column++, to += C) {
            if (outside || column < 0 || column >= w->width) {
                memset(to, 0, 4 * C);
                continue;
            }
            const T *from = x + row * w->x_row + column * w->x_pixel;
            if (scale)
                for (int64_t c = 0; c < C; c += LANES)
                    store(to + c, silu(load(from + c) * load(scale + c) + load(shift + c)));
            else
                for (int64_t c = 0; c < C; c += LANES) store(to + c, load(from + c));
        }
    }
}

// (tiles, C) x (C, N vectors)
template <int N> static void multiply(const float *a, const float *b, float *to, int64_t tiles, int64_t C) {
    constexpr int M = SUMS / N;
    for (int64_t tile = 0; tile < tiles; tile += M) {
        tile = least(tile, tiles - M);  // the last ones again rather than fewer: buffers hold M at least
        const float *row = a + tile * C;
        V sums[M][N] = {};
        for (int64_t c = 0; c < C; c++) {
            V factor[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) factor[n] = load(b + (c * N + n) * LANES);
#pragma GCC unroll 24
            for (int m = 0; m < M; m++) {
                V x = spread(row[m * C + c]);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sums[m][n] += x * factor[n];
            }
        }
#pragma GCC unroll 24
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) store(to + ((tile + m) * N + n) * LANES, sums[m][n]);
    }
}

struct Statistics {  // of the pixels of a block, for one vector of channels: sums around the first value
    V first;
    double sum[LANES] = {}, square[LANES] = {};
    bool begun = false;
    void put(const Work *w, int64_t block, int64_t channels, int64_t k, double count) const {
        for (int lane = 0; lane < LANES; lane++) {
            double mean = sum[lane] / count;
            w->means[block * channels + k + lane] = first[lane] + mean;
            w->variances[block * channels + k + lane] = square[lane] / count - mean * mean;
        }
    }
};

// One tile's outputs of a vector of channels, from (top, left) on, where they are in the map; as they are stored.
template <class S, class T> static inline void write(const Work *w, const V *products, int64_t image, int64_t top,
                                                     int64_t left, int64_t k, Statistics *statistics) {
    constexpr int N = S::OUTPUTS;
    int64_t height = w->height * N / S::STEP, width = w->width * N / S::STEP;
    V tile[N * N], bias = load(w->bias + k), sum = {}, square = {};
    both_ways(S::a, products, tile);
    T *out = (T *)w->out + ((image * height + top) * width + left) * w->outside + k;
    const T *plus = w->plus ? (const T *)w->plus + image * w->plus_image + top * w->plus_row + left * w->plus_pixel + k
                            : nullptr;
    int first_row = most(0, -top), first_column = most(0, -left);
    int rows = least(N, height - top), columns = least(N, width - left);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        if (i < first_row || i >= rows) continue;
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            if (j < first_column || j >= columns) continue;
            V v = tile[i * N + j] + bias;
            if (plus) v += load(plus + i * w->plus_row + j * w->plus_pixel);
            T *place = out + (i * width + j) * w->outside;
            store(place, v);
            if (!statistics) continue;
            V stored = load(place);
            if (!statistics->begun) statistics->begun = true, statistics->first = stored;
            sum += stored - statistics->first;
            square += (stored - statistics->first) * (stored - statistics->first);
        }
    }
    if (statistics)
        for (int lane = 0; lane < LANES; lane++) {
            statistics->sum[lane] += sum[lane];
            statistics->square[lane] += square[lane];
        }
}

template <class S> struct Tiles {  // how a map is cut into blocks of tiles
    int64_t down, along, blocks_along, blocks;
    Tiles(const Work *w) {
        down = (w->height * S::OUTPUTS / S::STEP + S::OFFSET + S::OUTPUTS - 1) / S::OUTPUTS;
        along = (w->width * S::OUTPUTS / S::STEP + S::OFFSET + S::OUTPUTS - 1) / S::OUTPUTS;
        blocks_along = (along + w->columns - 1) / w->columns;
        blocks = (down + w->rows - 1) / w->rows * blocks_along;
    }
};

template <class S, class T> static void block(const Work *w, float *buffers, int64_t image, int64_t number) {
    constexpr int P = S::POINTS * S::POINTS, R = S::REACH, N = S::OUTPUTS;
    Tiles<S> all(w);
    int64_t top = number / all.blocks_along * w->rows, left = number % all.blocks_along * w->columns;  // in tiles
    int64_t rows = least(w->rows, all.down - top), columns = least(w->columns, all.along - left);
    int64_t tiles = rows * columns, room = most(w->rows * w->columns, SUMS), C = w->inside;
    int64_t across = columns * S::STEP + R - S::STEP;
    float *values = buffers, *products = values + P * apart(room, C);
    float *inputs = products + P * apart(room, WIDEST * LANES);
    read<T>(w, inputs, image, top * S::STEP - 1, left * S::STEP - 1, rows * S::STEP + R - S::STEP, across);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const float *corner = inputs + (tile / columns * across + tile % columns) * S::STEP * C;
        for (int64_t c = 0; c < C; c += LANES) {
            V patch[R * R], points[P];
#pragma GCC unroll 8
            for (int i = 0; i < R; i++)
#pragma GCC unroll 8
                for (int j = 0; j < R; j++) patch[i * R + j] = load(corner + (i * across + j) * C + c);
            both_ways(S::b, patch, points);
#pragma GCC unroll 36
            for (int p = 0; p < P; p++) store(values + p * apart(room, C) + tile * C + c, points[p]);
        }
    }
    if (tiles < SUMS)
        for (int p = 0; p < P; p++) memset(values + p * apart(room, C) + tiles * C, 0, 4 * (SUMS - tiles) * C);
    int64_t height = w->height * N / S::STEP, width = w->width * N / S::STEP;  // of the result
    int64_t bottom = least((top + rows) * N - S::OFFSET, height), right = least((left + columns) * N - S::OFFSET, width);
    double count = (double)(bottom - most(0, top * N - S::OFFSET)) * (right - most(0, left * N - S::OFFSET));
    if (w->means) w->counts[number] = count;
    for (int64_t part = 0; part < parts(w->outside); part++) {
        int64_t first = part_start(w->outside, part), channels = part_start(w->outside, part + 1) - first;
        for (int p = 0; p < P; p++) {
            const float *a = values + p * apart(room, C), *b = w->factors + p * apart(C, w->outside) + first * C;
            float *to = products + p * apart(room, channels);
            switch (channels / LANES) {
                case 1: multiply<1>(a, b, to, most(tiles, SUMS), C); break;
                case 2: multiply<2>(a, b, to, most(tiles, SUMS / 2), C); break;
                case 3: multiply<3>(a, b, to, most(tiles, SUMS / 3), C); break;
                case 4: multiply<4>(a, b, to, most(tiles, SUMS / 4), C); break;
            }
        }
        for (int64_t k = 0; k < channels; k += LANES) {
            Statistics statistics;
            for (int64_t tile = 0; tile < tiles; tile++) {
                V points[P];
#pragma GCC unroll 36
                for (int p = 0; p < P; p++) points[p] = load(products + p * apart(room, channels) + tile * channels + k);
                write<S, T>(w, points, image, (top + tile / columns) * N - S::OFFSET,
                            (left + tile % columns) * N - S::OFFSET, first + k, w->means ? &statistics : nullptr);
            }
            if (w->means) statistics.put(w, image * all.blocks + number, w->outside, first + k, count);
        }
    }
}

static inline int64_t take(int64_t *from) { return __atomic_fetch_add(from, 1, __ATOMIC_RELAXED); }

template <class S, class T> static void work(Work *w, float *buffers) {
    int64_t vectors = w->outside / LANES, blocks = Tiles<S>(w).blocks, number;
    while ((number = take(&w->prepared)) < vectors) {
        make_factors<S, T>(w, number * LANES);
        __atomic_fetch_add(&w->done, 1, __ATOMIC_RELEASE);
    }
    // who prepares runs already, so that nobody waits for a thread that has not begun; on shared cores it may be
    // waiting for this one
    while (__atomic_load_n(&w->done, __ATOMIC_ACQUIRE) < vectors) sched_yield();
    while ((number = take(&w->next)) < w->batch * blocks) block<S, T>(w, buffers, number / blocks, number % blocks);
}

// Means and variances of x in blocks of rows, and x normalised, a block at a time.
template <class T> static void measure_rows(Work *w, double *buffers) {
    int64_t C = w->inside, blocks = (w->height + w->rows - 1) / w->rows, number;
    while ((number = take(&w->next)) < w->batch * blocks) {
        int64_t top = number % blocks * w->rows, bottom = least(top + w->rows, w->height);
        const T *x = (const T *)w->x + number / blocks * w->x_image + top * w->x_row;
        double count = (double)(bottom - top) * w->width;
        w->counts[number % blocks] = count;
        memset(buffers, 0, 16 * C);
        for (int64_t row = top; row < bottom; row++)
            for (int64_t column = 0; column < w->width; column += 16) {
                const T *from = x + (row - top) * w->x_row + column * w->x_pixel;
                int64_t end = least(16, w->width - column);
                for (int64_t c = 0; c < C; c += LANES) {
                    V first = load(x + c), sum = {}, square = {};
                    for (int64_t i = 0; i < end; i++) {
                        V away = load(from + i * w->x_pixel + c) - first;
                        sum += away;
                        square += away * away;
                    }
                    for (int lane = 0; lane < LANES; lane++) {
                        buffers[c + lane] += sum[lane];
                        buffers[C + c + lane] += square[lane];
                    }
                }
            }
        for (int64_t c = 0; c < C; c += LANES) {
            Statistics statistics;
            statistics.first = load(x + c);
            memcpy(statistics.sum, buffers + c, sizeof statistics.sum);
            memcpy(statistics.square, buffers + C + c, sizeof statistics.square);
            statistics.put(w, number, C, c, count);
        }
    }
}
template <class T> static void apply_rows(Work *w) {
    int64_t C = w->inside, number;
    while ((number = take(&w->next)) < w->batch * w->height) {
        int64_t image = number / w->height;
        const T *x = (const T *)w->x + image * w->x_image + number % w->height * w->x_row;
        const float *scale = w->scale + image * C, *shift = w->shift + image * C;
        T *to = (T *)w->out + number * w->width * C;
        for (int64_t column = 0; column < w->width; column++, x += w->x_pixel, to += C)
            for (int64_t c = 0; c < C; c += LANES) {
                V v = load(x + c) * load(scale + c) + load(shift + c);
                store(to + c, w->activate ? silu(v) : v);
            }
    }
}

extern "C" {
int64_t lanes() { return LANES; }
int64_t room(const Work *w) {  // values of a thread's buffers for `convolve`
    int64_t points = w->upsample ? Scheme1::POINTS : Scheme0::POINTS, step = w->upsample ? Scheme1::STEP : Scheme0::STEP;
    int64_t more = (w->upsample ? Scheme1::REACH : Scheme0::REACH) - step;
    int64_t tiles = most(w->rows * w->columns, SUMS);
    return points * points * (apart(tiles, w->inside) + apart(tiles, WIDEST * LANES)) +
           (w->rows * step + more) * (w->columns * step + more) * w->inside;
}
int64_t factors(const Work *w) {  // values of all threads' buffer
    int64_t points = w->upsample ? Scheme1::POINTS : Scheme0::POINTS;
    return points * points * apart(w->inside, w->outside);
}
int64_t blocks(const Work *w) { return w->upsample ? Tiles<Scheme1>(w).blocks : Tiles<Scheme0>(w).blocks; }
void convolve(Work *w, float *buffers) {
    if (w->upsample) w->bf16 ? work<Scheme1, uint16_t>(w, buffers) : work<Scheme1, float>(w, buffers);
    else w->bf16 ? work<Scheme0, uint16_t>(w, buffers) : work<Scheme0, float>(w, buffers);
}
void measure(Work *w, double *buffers) { w->bf16 ? measure_rows<uint16_t>(w, buffers) : measure_rows<float>(w, buffers); }
void apply(Work *w, double *) { w->bf16 ? apply_rows<uint16_t>(w) : apply_rows<float>(w); }

// The scale and shift of every channel, (B, C), that normalise x by groups, from its blocks' statistics (Chan et al.).
void normalise(const double *means, const double *variances, const double *counts, int64_t batch, int64_t blocks,
               int64_t channels, int64_t groups, double eps, const float *weight, const float *bias, float *scale,
               float *shift) {
    int64_t of_group = channels / groups;
    for (int64_t image = 0; image < batch; image++, means += blocks * channels, variances += blocks * channels)
        for (int64_t group = 0; group < groups; group++) {
            double mean = 0, variance = 0, count = 0;
            int64_t first = group * of_group, last = first + of_group;
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t c = first; c < last; c++) mean += counts[b] * means[b * channels + c], count += counts[b];
            mean /= count;
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t c = first; c < last; c++) {
                    double away = means[b * channels + c] - mean;
                    variance += counts[b] * (variances[b * channels + c] + away * away);
                }
            double factor = 1 / __builtin_sqrt(variance / count + eps);
            for (int64_t c = first; c < last; c++) {
                scale[image * channels + c] = weight[c] * factor;
                shift[image * channels + c] = bias[c] - mean * factor * weight[c];
            }
        }
}
}
