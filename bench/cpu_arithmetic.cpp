// Times the selective AdamW step's loops on one thread, their arithmetic and their memory apart:
//
//     g++ -std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno
//         -fno-trapping-math -ffp-contract=fast -Icsrc bench/cpu_arithmetic.cpp -o build/arithmetic
//     build/arithmetic
//
// Arithmetic: on a block that stays in the first-level cache. Memory: over arrays that no cache
// holds, plain AdamW (28 bytes an element) and the whole selective step. Nanoseconds an element,
// the least of many repetitions: other programs only add to them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "selective/blocks_cpu.h"

using namespace uegr;

namespace {

template <class Prepare, class F>
double nanoseconds(int64_t elements, int repetitions, int calls, Prepare prepare, F f) {
    double least = 1e9;
    for (int k = 0; k < repetitions; ++k) {
        prepare();
        const auto begin = std::chrono::steady_clock::now();
        for (int c = 0; c < calls; ++c) {
            f();
            asm volatile("" ::: "memory");
        }
        const std::chrono::duration<double, std::nano> took =
            std::chrono::steady_clock::now() - begin;
        least = std::min(least, took.count() / (static_cast<double>(elements) * calls));
    }
    return least;
}

// As torch allocates: each array begins at a multiple of 64 bytes.
struct Arrays {
    int64_t size;
    std::vector<float> memory;
    float *theta, *g, *m, *v;

    explicit Arrays(int64_t n) : size(n), memory(4 * (n + block_size + 80) + 16) {
        float* at =
            reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        for (float** array : {&theta, &g, &m, &v}) *array = at, at += n + block_size + 80;
        fill();
    }
    void fill() const {
        for (int64_t i = 0; i < size; ++i) {
            const float x = static_cast<float>(i * 2654435761u >> 8 & 0xffff) / 65536.0f - 0.5f;
            theta[i] = x, g[i] = 1e-3f * x, m[i] = 1e-4f * x, v[i] = 1e-8f * x * x;
        }
    }
};

struct Step {
    alignas(64) uint32_t words[block_size];
    alignas(64) float factor[block_size];
    RoundKeys keys{7};
    SelectionOptions options{0.5, 5, Normalization::minmax, false, false, true, 0, 1, false};
    Probability<float> probability{options, 0, 2.5e-7};
    AdamW<float> update_rule{1e-4, 0.9, 0.999, 0.01, 1e-8, 10};
    Extremes<float> found;

    void gather(const float* g) { found.add(g, block_size); }
    void draw(int64_t begin) { fill_words(words, block_size, begin / 4, 10, 3, keys); }
    void select(const float* g) {
        const Probability<float> p = probability;
        factor_block<true, true>(block_size, g, words, factor,
                                 [=](int i) { return p.plain_inverse(square(g[i])); });
    }
    void select_any(const float* g) {
        const Probability<float> p = probability;
        factor_block<true>(block_size, g, words, factor,
                           [=](int i) { return p.inverse(square(g[i])); });
    }
    void update(const Arrays& x, int64_t at) {
        update_block<float, false, false>(update_rule, block_size, x.theta + at, x.g + at, factor,
                                          x.m + at, x.v + at, nullptr);
    }
    void all(const Arrays& x, int64_t at) { draw(at), select(x.g + at), update(x, at); }
};

} // namespace

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
    auto step = std::make_unique<Step>();
    const Arrays block(block_size), large(quick ? 1 << 16 : 1 << 25);
    step->draw(0), step->select(block.g);
    auto print = [](const char* what, double ns) { std::printf("%-34s %.3f\n", what, ns); };
    // Filled anew each time: the draws here are always the same, and moments that are never fed
    // would fall to subnormal numbers, over which the processor stumbles.
    auto in_cache = [&](const char* what, auto f) {
        print(what, nanoseconds(block_size, quick ? 2 : 300, 64, [&] { block.fill(); }, f));
    };
    std::printf("nanoseconds an element\n");
    in_cache("in cache: extremes", [&] { step->gather(block.g); });
    in_cache("in cache: words", [&] { step->draw(0); });
    in_cache("in cache: factor, anything held", [&] { step->select_any(block.g); });
    in_cache("in cache: factor, plain", [&] { step->select(block.g); });
    in_cache("in cache: update rule", [&] { step->update(block, 0); });
    in_cache("in cache: words, factor, update", [&] { step->all(block, 0); });
    auto in_memory = [&](const char* what, auto f) {
        auto pass = [&] {
            for (int64_t at = 0; at < large.size; at += block_size) f(at);
        };
        print(what, nanoseconds(large.size, quick ? 1 : 7, 1, [] {}, pass));
    };
    std::fill(step->factor, step->factor + block_size, 1.0f);
    in_memory("in memory: update rule alone", [&](int64_t at) { step->update(large, at); });
    in_memory("in memory: words, factor, update", [&](int64_t at) { step->all(large, at); });
    return 0;
}
