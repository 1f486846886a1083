// Elements over threads on the CPU: blocks of words from the generator, blocks of elements from any
// strides and dtype, rows in vectors.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <glob.h>
#include <sys/mman.h>
#endif

#include "philox.h"
#include "view.h"

namespace uegr {

// elements that pass through L1 together
constexpr int block_size = 256;

#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
constexpr int philox_chains = 4;
template <> inline Lanes multiply_low(Lanes a, Lanes b) {
    // unmasked: GCC 12 warns
    return (Lanes)_mm512_maskz_mul_epu32(255, (__m512i)a, (__m512i)b);
}
constexpr Lanes lane_numbers{0, 1, 2, 3, 4, 5, 6, 7};
inline Lanes low_pairs(Lanes a, Lanes b) {
    return __builtin_shuffle(a, b, Lanes{0, 8, 1, 9, 2, 10, 3, 11});
}
inline Lanes high_pairs(Lanes a, Lanes b) {
    return __builtin_shuffle(a, b, Lanes{4, 12, 5, 13, 6, 14, 7, 15});
}
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
constexpr int philox_chains = 2;
template <> inline Lanes multiply_low(Lanes a, Lanes b) {
    return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
constexpr Lanes lane_numbers{0, 1, 2, 3};
inline Lanes low_pairs(Lanes a, Lanes b) { return __builtin_shuffle(a, b, Lanes{0, 4, 1, 5}); }
inline Lanes high_pairs(Lanes a, Lanes b) { return __builtin_shuffle(a, b, Lanes{2, 6, 3, 7}); }
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
constexpr int philox_chains = 2;
#ifdef __SSE2__
template <> inline Lanes multiply_low(Lanes a, Lanes b) {
    return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#endif
constexpr Lanes lane_numbers{0, 1};
inline Lanes low_pairs(Lanes a, Lanes b) { return __builtin_shuffle(a, b, Lanes{0, 2}); }
inline Lanes high_pairs(Lanes a, Lanes b) { return __builtin_shuffle(a, b, Lanes{1, 3}); }
#endif
constexpr int lane_count = sizeof(Lanes) / sizeof(uint64_t);

using Words = Counter<Lanes, Lanes, Lanes, Lanes>;

// The first three rounds of lane_count counters from q on; their low halves do not wrap.
inline Words mixed(uint64_t q, uint32_t step, uint32_t stream, const RoundKeys& keys) {
    const Counter<Lanes, uint64_t, uint64_t, uint64_t> start{lane_numbers + q, q >> 32, step,
                                                             stream};
    const auto c = philox_round(
        philox_round(philox_round(start, keys.k0[0], keys.k1[0]), keys.k0[1], keys.k1[1]),
        keys.k0[2], keys.k1[2]);
    return {c.c0, c.c1, c.c2, c.c3};
}

// Element 4q + j has the j-th output of counter q.
inline void store_words(uint32_t* words, const Words& c) {
    const Lanes low = (c.c0 & 0xffffffffu) | (c.c1 << 32),
                high = (c.c2 & 0xffffffffu) | (c.c3 << 32);
    const Lanes first = low_pairs(low, high), second = high_pairs(low, high);
    memcpy(words, &first, sizeof(first));
    memcpy(words + 2 * lane_count, &second, sizeof(second));
}

// elements that a loop over part of a block rounds n up to
constexpr int slice = 16;

// Asks for the memory of some arrays, a slice of each at a time, two blocks ahead of their turn.
// The words of a block take long and read no memory: asking among them keeps it busy, where
// hardware's own prefetching, which waits for reads, stops. Of float64's slices it asks for the
// first of two lines.
template <int arrays> class Ahead {
    static constexpr int distance = 2 * block_size;
    const char* next[arrays];
    // bytes
    int64_t step[arrays];

public:
    // `first` is in the others' place until they are given.
    Ahead(const View& first, int64_t begin) {
        for (int i = 0; i < arrays; ++i) follow(i, first, begin);
    }
    void follow(int i, const View& view, int64_t begin) {
        const int64_t bytes = bytes_of(view.storage);
        next[i] = view.data + (begin + distance) * bytes, step[i] = slice * bytes;
    }
    void ask() {
        for (int i = 0; i < arrays; ++i) __builtin_prefetch(next[i]), next[i] += step[i];
    }
};
struct NothingAhead {
    void ask() {}
};

// At least the n words from the counter q on, within a block, several chains at a time: one chain's
// multiplications hide another's.
template <class Memory = NothingAhead>
inline void fill_words(uint32_t* words, int n, uint64_t q, uint32_t step, uint32_t stream,
                       const RoundKeys& keys, Memory ahead = {}) {
    constexpr int chains = philox_chains, at_once = 4 * chains * lane_count;
    // one slice in so many rounds, of the eight there are with the first three taken as one
    constexpr int pace = 8 * slice / at_once;
    static_assert(pace > 0 && 8 * slice % at_once == 0);
    for (int done = 0; done < n; done += at_once) {
        Words c[chains];
        ahead.ask();
#pragma GCC unroll 4
        for (int i = 0; i < chains; ++i)
            c[i] = mixed(q + done / 4 + i * lane_count, step, stream, keys);
#pragma GCC unroll 10
        for (int round = 3; round < 10; ++round) {
            if ((round - 2) % pace == 0) ahead.ask();
#pragma GCC unroll 4
            for (int i = 0; i < chains; ++i)
                c[i] = philox_round(c[i], keys.k0[round], keys.k1[round]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < chains; ++i) store_words(words + done + 4 * i * lane_count, c[i]);
    }
}

// Calls element(i) for n elements in whole slices. No element may read what another one writes:
// the compiler is told so, since it would look at all arrays anew before each slice.
template <class Element> inline void slices(int n, Element element) {
    for (int begin = 0; begin < n; begin += slice) {
#pragma GCC ivdep
        for (int i = begin; i < begin + slice; ++i) element(i);
    }
}

// Entries of a table, by the instruction for it where that is the faster way: Zen's takes longer
// than so many loads.
inline void look_up(int n, const float* table, const int32_t* index, float* out) {
#if defined(__AVX512F__)
    static const bool slow = __builtin_cpu_is("amd");
    if (!slow) {
        for (int i = 0; i < n; i += 16)
            _mm512_storeu_ps(
                out + i,
                _mm512_mask_i32gather_ps(__m512{}, 65535, _mm512_loadu_si512(index + i), table, 4));
        return;
    }
#endif
    // four at a time, stored together: half the time of one after another
    using Four = float __attribute__((vector_size(16)));
    for (int i = 0; i < n; i += 4) {
        const int32_t* at = index + i;
        const Four found = {table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
        memcpy(out + i, &found, sizeof(found));
    }
}

// The words of elements [begin, begin + n), n <= block_size, at the start of what is returned;
// `words` holds 2 blocks and 4 more.
template <class Memory = NothingAhead>
const uint32_t* element_words(uint32_t* words, int64_t begin, int n, const Layout& at,
                              uint32_t step, const RoundKeys& keys, Memory ahead = {}) {
    const uint32_t stream = static_cast<uint32_t>(at.stream);
    const int64_t index = at.offset + begin / at.run * at.stride + begin % at.run,
                  within = at.run - begin % at.run;
    if (index % block_size == 0 && within >= n) {
        fill_words(words, n, index / 4, step, stream, keys, ahead);
        return words;
    }
    // run by run, each from the counter its first element belongs to
    for (int done = 0; done < n;) {
        const int64_t l = begin + done, left = at.run - l % at.run;
        const int64_t from = at.offset + l / at.run * at.stride + l % at.run;
        const int skip = static_cast<int>(from % 4);
        // elements before the counter's low half does
        const int64_t wraps = 4 * ((int64_t(1) << 32) - (from / 4 & 0xffffffff)) - skip;
        const int64_t most = minimum(minimum<int64_t>(left, block_size - skip), wraps);
        const int count = static_cast<int>(minimum<int64_t>(most, n - done));
        uint32_t* fresh = words + block_size + 4;
        // once a block
        if (done == 0) fill_words(fresh, skip + count, from / 4, step, stream, keys, ahead);
        else fill_words(fresh, skip + count, from / 4, step, stream, keys);
        memcpy(words + done, fresh + skip, count * sizeof(uint32_t));
        done += count;
    }
    return words;
}

// Calls piece(done, offset, count, stride) for the runs along the last axis that make up elements
// [begin, begin + n).
template <class Piece> void each_run(const View& view, int64_t begin, int n, Piece piece) {
    if (view.contiguous || view.dim == 0) return piece(0, begin, n, int64_t(1));
    const int last = view.dim - 1;
    for (int done = 0; done < n;) {
        int64_t rest = begin + done, offset = 0;
        const int64_t column = rest % view.sizes[last];
        for (int d = last; d >= 0; --d) {
            offset += rest % view.sizes[d] * view.strides[d];
            rest /= view.sizes[d];
        }
        const int count = static_cast<int>(minimum<int64_t>(n - done, view.sizes[last] - column));
        piece(done, offset, count, view.strides[last]);
        done += count;
    }
}

template <class T, class Source, class Widen>
void load_as(const View& view, int64_t begin, int n, T* out, Widen widen) {
    const Source* data = reinterpret_cast<const Source*>(view.data);
    each_run(view, begin, n, [&](int done, int64_t offset, int count, int64_t stride) {
        if (stride == 1)
            for (int i = 0; i < count; ++i) out[done + i] = static_cast<T>(widen(data[offset + i]));
        else
            for (int i = 0; i < count; ++i)
                out[done + i] = static_cast<T>(widen(data[offset + i * stride]));
    });
}

// Elements [begin, begin + n) in the arithmetic's type.
template <class T> void load(const View& view, int64_t begin, int n, T* out) {
    switch (view.storage) {
    case Storage::float32: load_as<T, float>(view, begin, n, out, [](float x) { return x; }); break;
    case Storage::bfloat16:
        load_as<T, uint16_t>(view, begin, n, out, [](uint16_t x) { return widen_bfloat16(x); });
        break;
    case Storage::float16:
        load_as<T, uint16_t>(view, begin, n, out, [](uint16_t x) { return widen_float16(x); });
        break;
    case Storage::float64:
        load_as<T, double>(view, begin, n, out, [](double x) { return x; });
        break;
    case Storage::boolean:
        load_as<T, uint8_t>(view, begin, n, out, [](uint8_t x) { return x; });
        break;
    }
}

// Loads elements as `load` does, and zeros up to a whole block: no loop has a tail of its own.
template <class T> void load_block(const View& view, int64_t begin, int n, T* out) {
    load(view, begin, n, out);
    for (int i = n; i < block_size; ++i) out[i] = 0;
}

template <class Target, class Narrow>
void store_as(const View& view, int64_t begin, int n, Narrow narrow) {
    Target* data = reinterpret_cast<Target*>(view.data);
    each_run(view, begin, n, [&](int done, int64_t offset, int count, int64_t stride) {
        if (stride == 1)
            for (int i = 0; i < count; ++i) data[offset + i] = narrow(done + i);
        else
            for (int i = 0; i < count; ++i) data[offset + i * stride] = narrow(done + i);
    });
}

// Writes them back, 16-bit floats to nearest; a bfloat16 by its words, shifted right by `shift`,
// where there are some.
template <class T>
void store_block(const View& view, int64_t begin, int n, const T* x,
                 const uint32_t* words = nullptr, int shift = 0) {
    auto single = [&](int i) { return static_cast<float>(x[i]); };
    switch (view.storage) {
    case Storage::float32: store_as<float>(view, begin, n, single); break;
    case Storage::bfloat16:
        if (words)
            store_as<uint16_t>(view, begin, n, [&](int i) {
                return cut_bfloat16(single(i), words[i] >> shift & 0xffffu);
            });
        else store_as<uint16_t>(view, begin, n, [&](int i) { return round_bfloat16(single(i)); });
        break;
    case Storage::float16:
        store_as<uint16_t>(view, begin, n, [&](int i) { return round_float16(single(i)); });
        break;
    case Storage::float64:
        store_as<double>(view, begin, n, [&](int i) { return static_cast<double>(x[i]); });
        break;
    case Storage::boolean:
        store_as<uint8_t>(view, begin, n, [&](int i) { return static_cast<uint8_t>(x[i] != 0); });
        break;
    }
}

template <class T>
constexpr Storage storage_of = sizeof(T) == 8 ? Storage::float64 : Storage::float32;

// Asks for a block's memory ahead of its turn: the arithmetic of the block before hides the wait.
inline void prefetch_block(const View& view, int64_t begin) {
    const char* from = view.data + begin * bytes_of(view.storage);
    for (int i = 0; i < block_size * bytes_of(view.storage); i += 64) __builtin_prefetch(from + i);
}

// The block itself where it lies in memory as the arithmetic wants it, else a copy of it in
// `scratch`. `granule`: what the caller's loops round n up to.
template <class T>
T* block_at(const View& view, int64_t begin, int n, T* scratch, int granule = block_size) {
    if (view.contiguous && view.storage == storage_of<T> && n % granule == 0)
        return reinterpret_cast<T*>(view.data) + begin;
    load_block(view, begin, n, scratch);
    return scratch;
}

// Calls use(element), element(i) being element begin + i in the arithmetic's type, 0 from n on:
// read from memory where it is whole blocks of T or bfloat16, else from a copy in `scratch`.
template <class T, class Use>
void read_block(const View& view, int64_t begin, int n, T* scratch, Use use) {
    if (view.contiguous && view.storage == Storage::bfloat16 && n == block_size) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(view.data) + begin;
        return use([=](int i) { return static_cast<T>(widen_bfloat16(from[i])); });
    }
    const T* from = block_at(view, begin, n, scratch);
    use([=](int i) { return from[i]; });
}

// Writes element(i) to element begin + i, by way of `scratch` where memory is not as `read_block`
// reads it. The memory may be that of what `element` reads, element by element.
template <class T, class Element>
void write_block(const View& view, int64_t begin, int n, T* scratch, Element element) {
    // whole blocks, since vectors of 16-bit results are longer than slices
    const bool whole = view.contiguous && n == block_size;
    if (whole && view.storage == Storage::bfloat16) {
        uint16_t* to = reinterpret_cast<uint16_t*>(view.data) + begin;
#pragma GCC ivdep
        for (int i = 0; i < block_size; ++i) to[i] = round_bfloat16(static_cast<float>(element(i)));
        return;
    }
    const bool direct = whole && view.storage == storage_of<T>;
    T* to = direct ? reinterpret_cast<T*>(view.data) + begin : scratch;
#pragma GCC ivdep
    for (int i = 0; i < block_size; ++i) to[i] = static_cast<T>(element(i));
    if (!direct) store_block(view, begin, n, scratch);
}

// A row in vectors of the instruction set's width: sums stay in registers and their order is the
// same for every row.
template <class T> struct Vector;
template <> struct Vector<float> {
    typedef float Type __attribute__((vector_size(sizeof(Lanes))));
    typedef uint32_t Bits __attribute__((vector_size(sizeof(Lanes))));
};
template <> struct Vector<double> {
    typedef double Type __attribute__((vector_size(sizeof(Lanes))));
    typedef Lanes Bits;
};
template <> struct Float<Vector<float>::Type> {
    using Element = float;
    using Bits = Vector<float>::Bits;
};
template <> struct Float<Vector<double>::Type> {
    using Element = double;
    using Bits = Vector<double>::Bits;
};
// Single instructions, where the compiler would take two.
#if defined(__AVX512F__)
template <> inline Vector<float>::Type maximum(Vector<float>::Type a, Vector<float>::Type b) {
    return _mm512_maskz_max_ps(65535, a, b);
}
template <> inline Vector<float>::Type minimum(Vector<float>::Type a, Vector<float>::Type b) {
    return _mm512_maskz_min_ps(65535, a, b);
}
#elif defined(__AVX2__)
template <> inline Vector<float>::Type maximum(Vector<float>::Type a, Vector<float>::Type b) {
    return _mm256_max_ps(a, b);
}
template <> inline Vector<float>::Type minimum(Vector<float>::Type a, Vector<float>::Type b) {
    return _mm256_min_ps(a, b);
}
#elif defined(__SSE2__)
template <> inline Vector<float>::Type maximum(Vector<float>::Type a, Vector<float>::Type b) {
    return _mm_max_ps(a, b);
}
template <> inline Vector<float>::Type minimum(Vector<float>::Type a, Vector<float>::Type b) {
    return _mm_min_ps(a, b);
}
#endif
template <class T> constexpr int width = sizeof(Lanes) / sizeof(T);

template <class T> typename Vector<T>::Type load_vector(const T* from) {
    typename Vector<T>::Type v;
    memcpy(&v, from, sizeof(v));
    return v;
}
template <class T> void store_vector(T* to, typename Vector<T>::Type v) {
    memcpy(to, &v, sizeof(v));
}

// The last vector of a row that lies in the caller's memory: `pad` stands where the row has ended.
template <class T> typename Vector<T>::Type load_last(const T* from, int64_t count, T pad) {
    typename Vector<T>::Type v = typename Vector<T>::Type{} + pad;
    memcpy(&v, from, count * sizeof(T));
    return v;
}

// Calls body(i, count) for the vectors of elements [begin, end), count being a constant but for the
// last one.
template <class T, class Body> HOST_DEVICE void vectors(int64_t begin, int64_t end, Body body) {
    for (; begin + width<T> <= end; begin += width<T>) body(begin, width<T>);
    if (begin < end) body(begin, static_cast<int>(end - begin));
}

// A long sum: a block's in its lanes, the blocks' in double.
template <class T> struct Sum {
    double lanes[width<T>] = {};

    void add(typename Vector<T>::Type block) {
        for (int i = 0; i < width<T>; ++i) lanes[i] += block[i];
    }
    // Of the first `count` lanes: short rows leave the others empty.
    double total(int count) const {
        double sum = 0;
        for (int i = 0; i < count; ++i) sum += lanes[i];
        return sum;
    }
};

constexpr uintptr_t large_page = 1 << 21;
inline char* large_page_after(const char* p) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) | (large_page - 1)) + 1);
}

// Tells whether the machine is a virtual one that hands free memory back to its host (virtio's
// balloon, feature 5). Large pages are handed back first, and the host takes longer to find new
// ones than all the faults of small pages take.
inline bool hands_memory_back() {
    static const bool found = [] {
        bool reports = false;
#ifdef __linux__
        glob_t devices{};
        glob("/sys/bus/virtio/drivers/virtio_balloon/*/features", 0, nullptr, &devices);
        for (size_t i = 0; i < devices.gl_pathc; ++i) {
            constexpr int feature = 5;
            char bits[feature + 2] = {};
            FILE* file = fopen(devices.gl_pathv[i], "r");
            if (file && fgets(bits, sizeof(bits), file)) reports |= bits[feature] == '1';
            if (file) fclose(file);
        }
        globfree(&devices);
#endif
        return reports;
    }();
    return found;
}

// Asks for large pages on the inside of large memory that nothing was written to yet: 4 KiB at a
// time its page faults outlast the arithmetic.
inline void expect_large_pages([[maybe_unused]] const View& view,
                               [[maybe_unused]] int64_t elements) {
#ifdef MADV_HUGEPAGE
    const int64_t bytes = elements * bytes_of(view.storage);
    if (!view.contiguous || bytes < static_cast<int64_t>(large_page) || hands_memory_back()) return;
    char *first = large_page_after(view.data - 1),
         *last = large_page_after(view.data + bytes) - large_page;
    if (first < last) madvise(first, last - first, MADV_HUGEPAGE);
#endif
}

// Copies past the caches what nobody reads soon; `finish_streams` makes it visible to other
// threads.
inline void stream(char* to, const char* from, int64_t bytes) {
#ifdef __SSE2__
    constexpr int64_t cache_line = 64;
    int64_t head = -reinterpret_cast<uintptr_t>(to) & (cache_line - 1);
    if (head > bytes) head = bytes;
    memcpy(to, from, head);
    int64_t done = head;
    for (; done + cache_line <= bytes; done += cache_line) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
#else
        for (int64_t i = done; i < done + cache_line; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
    }
    memcpy(to + done, from + done, bytes - done);
#else
    memcpy(to, from, bytes);
#endif
}
// `to` is aligned
template <class T> void stream_vector(T* to, int count, typename Vector<T>::Type v) {
    if (count < width<T>) memcpy(to, &v, count * sizeof(T));
#if defined(__AVX512F__)
    else _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    else _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
    else _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(v));
#else
    else store_vector(to, v);
#endif
}
inline void finish_streams() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

} // namespace uegr
