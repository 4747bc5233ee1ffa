/* Pillow's 8-bit resampling of RGB images, bit for bit, several times as fast.
 *
 * The arithmetic is that of Pillow's `Image.resize(size, filter)` of the whole image: filter weights in double precision, rounded to 22-bit
 * fixed point; one pass along each axis, rounded to 8 bits. Only a part of the result is computed, from the part of the image that it needs.
 * (Pillow's `box` would do that too, but it is in single precision, which rounds other values.) Integer sums do not depend on their order, so
 * vector code changes no bit. What differs is the layout: three bytes a pixel, read where the JPEG decoder put them, in place of Pillow's four;
 * and eight rows at once in the horizontal pass, so that one weight serves eight lanes.
 *
 * Where this module is not built, Pillow itself does the work (preprocess.py), a few of whose values differ by a level.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PRECISION_BITS (32 - 8 - 2)
#define LANES 8
#define PI 3.14159265358979323846

typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(16)));

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLES /* which Clang spells otherwise */
#endif
#if defined(__GNUC__)
#define INLINED static inline __attribute__((always_inline))
#else
#define INLINED static inline
#endif

typedef struct {
    int first;  /* of the source, the first pixel that the filter reads */
    int count;  /* how many it reads */
} span;

/* One axis of the whole image, and the part of it that is here. */
typedef struct {
    double length;  /* of the whole source */
    int resized;    /* of the whole result */
    int skipped;    /* pixels of the result before those that are wanted */
    int offset;     /* pixels of the source before those that are here */
} axis;

typedef struct {
    int size;     /* weights kept per output pixel */
    span *spans;  /* per output pixel */
    int32_t *weights;
} taps;

static double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double hamming(double x) {
    x = fabs(x);
    if (x == 0.0) return 1.0;
    if (x >= 1.0) return 0.0;
    x *= PI;
    return sin(x) / x * (0.54f + 0.46f * cos(x)); /* single precision as in Pillow */
}

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= PI;
    return sin(x) / x;
}

static double lanczos(double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

typedef struct {
    const char *name;
    double (*weight)(double);
    double support;
} filter;

static const filter filters[] = {
    {"box", box, 0.5}, {"bilinear", bilinear, 1.0}, {"hamming", hamming, 1.0}, {"bicubic", bicubic, 2.0}, {"lanczos", lanczos, 3.0}, {NULL, NULL, 0.0}};

static void free_taps(taps *t) {
    free(t->spans);
    free(t->weights);
}

/* The weights of one axis for `count` pixels of the result; the spans count from the first of the `here` pixels that are here. Returns 0 where
 * memory is short. */
static int make_taps(taps *t, const axis *a, int here, int count, const filter *f) {
    double scale = a->length / a->resized;
    double filter_scale = scale < 1.0 ? 1.0 : scale;
    double support = f->support * filter_scale;
    t->size = support < here ? (int)ceil(support) * 2 + 1 : here;
    if (t->size > here) t->size = here;
    t->spans = malloc(sizeof(span) * count);
    t->weights = calloc((size_t)count * t->size, sizeof(int32_t));
    double *exact = malloc(sizeof(double) * t->size);
    if (!t->spans || !t->weights || !exact) {
        free(exact);
        return 0;
    }
    for (int out = 0; out < count; out++) {
        double center = (a->skipped + out + 0.5) * scale;
        double inverse = 1.0 / filter_scale;
        double sum = 0.0;
        int first = (int)(center - support + 0.5);
        if (first < a->offset) first = a->offset;
        if (first > a->offset + here) first = a->offset + here;
        int last = (int)(center + support + 0.5);
        if (last > a->offset + here) last = a->offset + here;
        int taken = last - first;
        if (taken < 0) taken = 0;
        if (taken > t->size) taken = t->size;
        for (int i = 0; i < taken; i++) {
            exact[i] = f->weight((i + first - center + 0.5) * inverse);
            sum += exact[i];
        }
        for (int i = 0; i < taken; i++) {
            double weight = (sum != 0.0 ? exact[i] / sum : exact[i]) * (1 << PRECISION_BITS);
            t->weights[(size_t)out * t->size + i] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        t->spans[out].first = first - a->offset;
        t->spans[out].count = taken;
    }
    free(exact);
    return 1;
}

static inline uint8_t clip8(int32_t sum) {
    sum >>= PRECISION_BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

/* Pixels `from` to `to` of eight rows as one word a row: red, green and blue in its lower three bytes, the lanes of a pixel side by side. Four
 * pixels of a row at a time are spread to four words, and the eight rows turned about; where their sixteen bytes would reach beyond the
 * row, and for what is left over, each word is put together byte by byte. */
INLINED void transpose(const uint8_t *rows, Py_ssize_t stride, int in_width, int from, int to, lanes *columns) {
    int x = from;
#ifdef SHUFFLES
    const bytes spread = {0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0};
    for (; x + 4 <= to && x * 3 + 16 <= in_width * 3; x += 4) {
        words four[LANES];
        for (int r = 0; r < LANES; r++) {
            bytes packed;
            memcpy(&packed, rows + r * stride + (size_t)x * 3, sizeof packed);
            four[r] = (words)__builtin_shuffle(packed, spread) & 0xffffff;
        }
        words *turned = (words *)(columns + x);
        for (int half = 0; half < 2; half++) {
            const words *row = four + 4 * half;
            words low = __builtin_shuffle(row[0], row[1], (words){0, 4, 1, 5}), lower = __builtin_shuffle(row[2], row[3], (words){0, 4, 1, 5});
            words high = __builtin_shuffle(row[0], row[1], (words){2, 6, 3, 7}), higher = __builtin_shuffle(row[2], row[3], (words){2, 6, 3, 7});
            turned[half] = __builtin_shuffle(low, lower, (words){0, 1, 4, 5});
            turned[2 + half] = __builtin_shuffle(low, lower, (words){2, 3, 6, 7});
            turned[4 + half] = __builtin_shuffle(high, higher, (words){0, 1, 4, 5});
            turned[6 + half] = __builtin_shuffle(high, higher, (words){2, 3, 6, 7});
        }
    }
#endif
    (void)in_width;
    for (; x < to; x++) {
        const uint8_t *at = rows + (size_t)x * 3;
        for (int r = 0; r < LANES; r++, at += stride) columns[x][r] = at[0] | at[1] << 8 | at[2] << 16;
    }
}

/* Rows `top` to `bottom` of the source, resampled to `width` pixels each, into `out` without gaps. Eight rows at a time, a lane each, so that
 * one weight serves them all; `columns` has room for the words of `in_width` pixels. */
CLONED static void horizontal(
    const uint8_t *source, Py_ssize_t stride, int in_width, int top, int bottom, const taps *t, int width, lanes *columns, uint8_t *out) {
    const lanes half = (lanes){0} + (1 << (PRECISION_BITS - 1)), none = {0}, most = (lanes){0} + 255;
    const int from = t->spans[0].first, to = t->spans[width - 1].first + t->spans[width - 1].count;
    int y = top;
    for (; y + LANES <= bottom; y += LANES) {
        transpose(source + y * stride, stride, in_width, from, to, columns);
        for (int x = 0; x < width; x++) {
            const int32_t *weights = t->weights + (size_t)x * t->size;
            const lanes *at = columns + t->spans[x].first;
            int count = t->spans[x].count;
            lanes red = half, green = half, blue = half;
            for (int i = 0; i < count; i++) {
                red += (at[i] & 255) * weights[i];
                green += (at[i] >> 8 & 255) * weights[i];
                blue += (at[i] >> 16) * weights[i];
            }
            lanes sums[3] = {red >> PRECISION_BITS, green >> PRECISION_BITS, blue >> PRECISION_BITS};
            for (int c = 0; c < 3; c++) {
                sums[c] &= sums[c] > none;
                sums[c] = (sums[c] & (sums[c] < most)) | (most & (sums[c] >= most));
            }
            lanes pixels = sums[0] | sums[1] << 8 | sums[2] << 16;
            uint8_t *pixel = out + ((size_t)(y - top) * width + x) * 3;
            for (int r = 0; r < LANES; r++, pixel += (size_t)width * 3) {
                uint32_t word = (uint32_t)pixels[r];
                if (x + 1 < width) {
                    memcpy(pixel, &word, 4); /* the fourth byte is the next pixel's, which is written after */
                } else {
                    pixel[0] = (uint8_t)word;
                    pixel[1] = (uint8_t)(word >> 8);
                    pixel[2] = (uint8_t)(word >> 16);
                }
            }
        }
    }
    for (; y < bottom; y++) {
        const uint8_t *row = source + y * stride;
        for (int x = 0; x < width; x++) {
            const int32_t *weights = t->weights + (size_t)x * t->size;
            int first = t->spans[x].first, count = t->spans[x].count;
            uint8_t *pixel = out + ((size_t)(y - top) * width + x) * 3;
            for (int c = 0; c < 3; c++) {
                int32_t sum = 1 << (PRECISION_BITS - 1);
                for (int i = 0; i < count; i++) sum += row[(size_t)(first + i) * 3 + c] * weights[i];
                pixel[c] = clip8(sum);
            }
        }
    }
}

/* Rows of `row_bytes` bytes, `stride` apart, resampled to `height` of them. The spans count from the source row `top`. */
CLONED static void vertical(
    const uint8_t *source, Py_ssize_t stride, int top, const taps *t, int row_bytes, int height, uint8_t *out, int32_t *sums) {
    for (int y = 0; y < height; y++) {
        const int32_t *weights = t->weights + (size_t)y * t->size;
        const uint8_t *row = source + (t->spans[y].first - top) * stride;
        for (int x = 0; x < row_bytes; x++) sums[x] = 1 << (PRECISION_BITS - 1);
        for (int i = 0; i < t->spans[y].count; i++, row += stride) {
            int32_t weight = weights[i];
            for (int x = 0; x < row_bytes; x++) sums[x] += row[x] * weight;
        }
        for (int x = 0; x < row_bytes; x++) {
            int32_t sum = sums[x] >> PRECISION_BITS;
            sum = sum < 0 ? 0 : sum;
            out[(size_t)y * row_bytes + x] = (uint8_t)(sum > 255 ? 255 : sum);
        }
    }
}

/* Both passes, or the one that is needed. Returns 0 where memory is short. */
static int both(
    const uint8_t *source, Py_ssize_t stride, int in_width, int in_height, const axis *x, const axis *y, const filter *f, int down_first, int width,
    int height, uint8_t *out) {
    int across = x->length != x->resized, down = y->length != y->resized;
    taps x_taps = {0}, y_taps = {0};
    uint8_t *middle = NULL;
    int32_t *sums = malloc(sizeof(int32_t) * 3 * (size_t)(in_width > width ? in_width : width));
    void *room = malloc(sizeof(lanes) * ((size_t)in_width + 1));
    lanes *columns = (lanes *)(((uintptr_t)room + sizeof(lanes) - 1) / sizeof(lanes) * sizeof(lanes)); /* malloc aligns to 16 bytes only */
    int done = sums && room && make_taps(&x_taps, x, in_width, width, f) && make_taps(&y_taps, y, in_height, height, f);
    if (done) {
        /* What the passes read of the part that is here. */
        int left = across ? x_taps.spans[0].first : x->skipped - x->offset;
        int right = across ? x_taps.spans[width - 1].first + x_taps.spans[width - 1].count : left + width;
        int top = down ? y_taps.spans[0].first : y->skipped - y->offset;
        int bottom = down ? y_taps.spans[height - 1].first + y_taps.spans[height - 1].count : top + height;
        if (across && down && down_first) {
            Py_ssize_t row_bytes = (Py_ssize_t)(right - left) * 3;
            middle = malloc((size_t)height * row_bytes + 1);
            done = middle != NULL;
            if (done) {
                vertical(source + left * 3, stride, 0, &y_taps, (int)row_bytes, height, middle, sums);
                for (int i = 0; i < width; i++) x_taps.spans[i].first -= left;
                horizontal(middle, row_bytes, right - left, 0, height, &x_taps, width, columns, out);
            }
        } else if (across && down) {
            middle = malloc((size_t)(bottom - top) * width * 3 + 1);
            done = middle != NULL;
            if (done) {
                horizontal(source, stride, in_width, top, bottom, &x_taps, width, columns, middle);
                vertical(middle, (Py_ssize_t)width * 3, top, &y_taps, width * 3, height, out, sums);
            }
        } else if (across) {
            horizontal(source, stride, in_width, top, bottom, &x_taps, width, columns, out);
        } else if (down) {
            vertical(source + left * 3, stride, 0, &y_taps, width * 3, height, out, sums);
        } else {
            for (int row = 0; row < height; row++) memcpy(out + (size_t)row * width * 3, source + (top + row) * stride + left * 3, (size_t)width * 3);
        }
    }
    free(middle);
    free(room);
    free(sums);
    free_taps(&x_taps);
    free_taps(&y_taps);
    return done;
}

static int is_rgb(const Py_buffer *view) {
    return view->ndim == 3 && view->itemsize == 1 && view->shape[0] > 0 && view->shape[1] > 0 && view->shape[2] == 3 && view->strides[1] == 3 &&
           view->strides[2] == 1 && view->shape[0] < 1 << 24 && view->shape[1] < 1 << 24;
}

/* Whether `here` pixels of the source are enough to make `count` of the result. */
static int is_axis(const axis *a, Py_ssize_t here, Py_ssize_t count) {
    return a->length > 0 && a->length <= 1 << 24 && a->resized > 0 && a->skipped >= 0 && a->skipped <= a->resized - count && a->offset >= 0 &&
           a->offset <= 1 << 24 && a->offset + here <= a->length + 1 &&
           (a->length != a->resized || (a->offset <= a->skipped && a->skipped + count <= a->offset + here));
}

/* Up to so many pixels of source and result the GIL is kept: getting it back may take longer than the work. */
#define SMALL 4096

static PyObject *resample_part(PyObject *Py_UNUSED(self), PyObject *arguments) {
    PyObject *source_object, *out_object;
    axis x, y;
    const char *name;
    int down_first;
    if (!PyArg_ParseTuple(
            arguments, "O(diii)(diii)spO", &source_object, &x.length, &x.resized, &x.skipped, &x.offset, &y.length, &y.resized, &y.skipped, &y.offset,
            &name, &down_first, &out_object))
        return NULL;
    const filter *f = filters;
    while (f->name && strcmp(f->name, name)) f++;
    Py_buffer source, out;
    if (PyObject_GetBuffer(source_object, &source, PyBUF_STRIDED_RO) < 0) return NULL;
    if (PyObject_GetBuffer(out_object, &out, PyBUF_STRIDED) < 0) {
        PyBuffer_Release(&source);
        return NULL;
    }
    PyObject *result = NULL;
    if (!is_rgb(&source) || !is_rgb(&out) || out.strides[0] != out.shape[1] * 3) {
        PyErr_SetString(PyExc_ValueError, "source and out must be uint8 (H, W, 3) with packed pixels, out without gaps between rows");
    } else if (!f->name) {
        PyErr_Format(PyExc_ValueError, "the filter must not be %s", name);
    } else if (!is_axis(&x, source.shape[1], out.shape[1]) || !is_axis(&y, source.shape[0], out.shape[0])) {
        PyErr_SetString(PyExc_ValueError, "the part must lie within the image, and out within the result");
    } else {
        PyThreadState *state = source.shape[0] * source.shape[1] + out.shape[0] * out.shape[1] > SMALL ? PyEval_SaveThread() : NULL;
        int done = both(
            source.buf, source.strides[0], (int)source.shape[1], (int)source.shape[0], &x, &y, f, down_first, (int)out.shape[1], (int)out.shape[0],
            out.buf);
        if (state) PyEval_RestoreThread(state);
        if (done) {
            result = Py_None;
            Py_INCREF(result);
        } else {
            PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&source);
    return result;
}

static PyMethodDef methods[] = {
    {"resample_part", resample_part, METH_VARARGS,
     "resample_part(source, x, y, filter, down_first, out): a part of an image, uint8 (H, W, 3), into all of out, uint8 (h, w, 3), which is a part of the"
     " resized image. x and y: length of the whole image, its length after resizing, pixels of the result before out, pixels of the image before source."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_resample", "Pillow's resampling, vectorised.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__resample(void) { return PyModuleDef_Init(&module); }
