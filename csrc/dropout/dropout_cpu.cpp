// Adaptive dropout on the CPU: sums and loop. The formulas are dropout.h's, the checks
// arguments.h's.
//
// Elements pass in blocks of 256 of the row-major order. What belongs to units is kept for one row
// and 255 units more, so that a block finds its own in one stretch, whichever unit it starts at.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "dropout.h"

namespace uegr {
namespace {

// blocks that are worth a thread
constexpr int64_t thread_blocks = 64;
// elements, at least, whose squares are added up on their own: so threads do not show
constexpr int64_t least_part = 1 << 16;
constexpr int64_t most_parts = 64;

template <class T> std::vector<T> values(const View& view, int64_t n) {
    std::vector<T> out(n);
    load(view, 0, static_cast<int>(n), out.data());
    return out;
}

template <class T>
void drop_block(const T* h, const uint32_t* words, const int32_t* limits, const T* scales,
                T* __restrict out) {
    for (int i = 0; i < block_size; ++i) out[i] = dropped(h[i], words[i], limits[i], scales[i]);
}

template <class T> void add_squares(const T* g, double* __restrict sums) {
    for (int i = 0; i < block_size; ++i) sums[i] = with_square(sums[i], g[i]);
}

template <class T> struct Call {
    View in, out;
    int64_t size, units, stretch;
    uint64_t key;
    std::vector<int32_t> limits;
    std::vector<T> scales;

    template <class Rate> void use_rates(const View& rates) {
        const auto r = values<Rate>(rates, units);
        for (int64_t j = 0; j < stretch; ++j)
            limits[j] = uniform_limit(r[j % units]), scales[j] = keep_scale<T>(r[j % units]);
    }

    Call(const DropoutArguments& arguments, const View& out)
        : in(arguments.in), out(out), size(arguments.size), units(arguments.units),
          stretch(units + block_size - 1), key(static_cast<uint64_t>(*arguments.key)),
          limits(stretch), scales(stretch) {
        if (arguments.rates.storage == Storage::float64) use_rates<double>(arguments.rates);
        else use_rates<float>(arguments.rates);
    }

    // Elements [first, last), from a whole block on.
    void drop(int64_t first, int64_t last, double* sums) const {
        const RoundKeys keys(key);
        alignas(64) T from[block_size], to[block_size];
        alignas(64) uint32_t words[block_size];
        for (int64_t begin = first; begin < last; begin += block_size) {
            const int n = static_cast<int>(std::min<int64_t>(block_size, last - begin));
            const int64_t unit = begin % units;
            fill_words(words, block_size, begin / 4, 0, 0, keys, Ahead<1>(in, begin));
            const T* block = block_at(in, begin, n, from);
            // out is fresh
            const bool direct = out.storage == storage_of<T> && n == block_size;
            T* result = direct ? reinterpret_cast<T*>(out.data) + begin : to;
            drop_block(block, words, &limits[unit], &scales[unit], result);
            if (!direct) store_block(out, begin, n, to);
            if (sums) add_squares(block, sums + unit);
        }
    }

    void run() const {
        const int64_t blocks = (size + block_size - 1) / block_size;
        torch::stable::parallel_for(0, blocks, thread_blocks, [&](int64_t begin, int64_t end) {
            drop(begin * block_size, std::min(size, end * block_size), nullptr);
        });
    }

    // Drops all elements as `run` does, and returns the sum of squares of each unit.
    std::vector<double> run_with_squares() const {
        // A part has at least 8 rows: so the sums stay small beside the elements.
        const int64_t wanted =
            std::max({least_part, 8 * stretch, (size + most_parts - 1) / most_parts});
        const int64_t part = (wanted + block_size - 1) / block_size * block_size,
                      parts = (size + part - 1) / part;
        std::vector<double> sums(parts * stretch), total(units);
        torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                drop(i * part, std::min(size, (i + 1) * part), &sums[i * stretch]);
        });
        for (int64_t i = 0; i < parts; ++i)
            for (int64_t first = 0; first < stretch; first += units)
                for (int64_t j = first; j < std::min(stretch, first + units); ++j)
                    total[j - first] += sums[i * stretch + j];
        return total;
    }
};

template <class T> std::vector<T> rates_of(const RatesArguments& arguments) {
    const auto& [norm, pending, units, p, max_p, momentum, fold] = arguments;
    auto n = values<T>(norm, units);
    auto unseen = [&] { return std::all_of(n.begin(), n.end(), [](T x) { return x == 0; }); };
    if (fold) {
        auto squares = values<T>(pending, units);
        if (std::any_of(squares.begin(), squares.end(), [](T x) { return x > 0; })) {
            const bool first = unseen();
            for (int64_t j = 0; j < units; ++j)
                n[j] = moved_norm(n[j], squares[j], momentum, first);
            store_block(norm, 0, static_cast<int>(units), n.data());
        }
        std::fill(squares.begin(), squares.end(), T(0));
        store_block(pending, 0, static_cast<int>(units), squares.data());
    }
    if (unseen()) return std::vector<T>(units, static_cast<T>(p));
    const T mean =
        static_cast<T>(std::accumulate(n.begin(), n.end(), 0.0) / static_cast<double>(units));
    for (T& x : n) x = dropout_rate(x, mean, p, max_p);
    return n;
}

} // namespace

static void drop(const DropoutArguments& arguments, const Tensor& out, const Tensor* squares) {
    const View to = view(out, "out", true);
    std::vector<double> sums(squares ? arguments.units : 0);
    auto run = [&](const auto& call) {
        if (squares) sums = call.run_with_squares();
        else call.run();
    };
    const bool wide =
        arguments.in.storage == Storage::float64 || arguments.rates.storage == Storage::float64;
    if (arguments.size > 0 && wide) run(Call<double>(arguments, to));
    else if (arguments.size > 0) run(Call<float>(arguments, to));
    if (squares)
        store_block(view(*squares, "squares", true), 0, static_cast<int>(sums.size()), sums.data());
}

static void set_rates(const RatesArguments& arguments, const Tensor& rates) {
    const View out = view(rates, "rates", true);
    const int units = static_cast<int>(arguments.units);
    if (arguments.norm.storage == Storage::float64)
        store_block(out, 0, units, rates_of<double>(arguments).data());
    else store_block(out, 0, units, rates_of<float>(arguments).data());
}

} // namespace uegr
