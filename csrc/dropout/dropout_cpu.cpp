// Adaptive dropout on the CPU: checks, sums, loop. The formulas are dropout.h's.
//
// Elements pass in blocks of 256 of the row-major order. What belongs to units is kept for one row
// and 255 units more, so that a block finds its own in one stretch, whichever unit it starts at.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../core/tensor.h"
#include "dropout.h"

namespace uegr {
namespace {

constexpr int64_t thread_blocks = 64;   // that are worth a thread
constexpr int64_t least_part =
    1 << 16; // elements, at least, whose squares are added up on their own: so threads do not show
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

    template <class Rate> void set_rates(const View& rates) {
        const auto r = values<Rate>(rates, units);
        for (int64_t j = 0; j < stretch; ++j)
            limits[j] = uniform_limit(r[j % units]), scales[j] = keep_scale<T>(r[j % units]);
    }

    Call(View in, View out, const View& rates, int64_t size, int64_t units, uint64_t key)
        : in(in), out(out), size(size), units(units), stretch(units + block_size - 1), key(key),
          limits(stretch), scales(stretch) {
        if (rates.storage == Storage::float64) set_rates<double>(rates);
        else set_rates<float>(rates);
    }

    // Elements [first, last), from a whole block on.
    void drop(int64_t first, int64_t last, double* sums) const {
        const RoundKeys keys(key);
        alignas(64) T from[block_size], to[block_size];
        alignas(64) uint32_t words[block_size];
        for (int64_t begin = first; begin < last; begin += block_size) {
            const int n = static_cast<int>(std::min<int64_t>(block_size, last - begin));
            const int64_t unit = begin % units;
            prefetch_block(in, begin + block_size);
            fill_words(words, block_size, begin / 4, 0, 0, keys);
            const T* block = block_at(in, begin, n, from);
            const bool direct = out.storage == storage_of<T> && n == block_size; // out is fresh
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

    // The same, and the sum of squares of each unit.
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

bool is_wide(const View& view, const char* name) {
    STD_TORCH_CHECK(view.storage == Storage::float32 || view.storage == Storage::float64, name,
                    " must be float32 or float64");
    return view.storage == Storage::float64;
}

// Calls f with a Call over `in` and the fresh tensor that it drops into, which is returned.
template <class F>
Tensor drop(const Tensor& in, const char* name, const Tensor& rates, const Tensor& key, F f) {
    const View from = view(in, name, false), r = view(rates, "rates", false);
    STD_TORCH_CHECK(from.storage != Storage::boolean, name,
                    " is bool; use float32, bfloat16, float16 or float64");
    const bool wide = is_wide(r, "rates") || from.storage == Storage::float64;
    STD_TORCH_CHECK(from.dim > 0 && r.dim == 1 && r.sizes[0] == from.sizes[from.dim - 1],
                    "rates must have one number for each index of ", name, "'s last axis");
    STD_TORCH_CHECK(key.is_cpu() && key.numel() == 1 && key.scalar_type() == ScalarType::Long,
                    "key must be an int64 on the CPU");
    const uint64_t seed = static_cast<uint64_t>(*static_cast<const int64_t*>(key.const_data_ptr()));

    Tensor out = torch::stable::new_empty(in, in.sizes());
    if (in.numel() == 0) return out;

    const View to = view(out, "out", true);
    if (wide) f(Call<double>(from, to, r, in.numel(), r.sizes[0], seed));
    else f(Call<float>(from, to, r, in.numel(), r.sizes[0], seed));
    return out;
}

// The rates, after what backwards left in `pending` is folded into `norm`.
template <class T>
std::vector<T> rates_of(const View& norm, const View& pending, int64_t units, double p,
                        double max_p, double momentum, bool fold) {
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

static Tensor adaptive_dropout(Tensor h, Tensor rates, Tensor key, Tensor) {
    return drop(h, "h", rates, key, [](const auto& call) { call.run(); });
}

static std::tuple<Tensor, Tensor> adaptive_dropout_backward(Tensor grad, Tensor rates, Tensor key) {
    std::vector<double> sums(rates.numel());
    Tensor gradient =
        drop(grad, "grad", rates, key, [&](const auto& call) { sums = call.run_with_squares(); });
    Tensor squares = torch::stable::new_empty(rates, rates.sizes());
    store_block(view(squares, "squares", true), 0, static_cast<int>(sums.size()), sums.data());
    return {gradient, squares};
}

static Tensor dropout_rates_(Tensor gradient_norm, Tensor pending, double p, double max_p,
                             double momentum, bool fold) {
    const View n = view(gradient_norm, "gradient_norm", true),
               squares = view(pending, "pending", true);
    const bool wide = is_wide(n, "gradient_norm");
    STD_TORCH_CHECK(
        n.dim == 1 && squares.dim == 1 && n.sizes[0] == squares.sizes[0] &&
            is_wide(squares, "pending") == wide,
        "gradient_norm and pending must have one axis of the same size, and the same dtype");

    Tensor rates = torch::stable::new_empty(gradient_norm, gradient_norm.sizes());
    const int units = static_cast<int>(n.sizes[0]);
    if (units == 0) return rates;

    const View out = view(rates, "rates", true);
    if (wide)
        store_block(out, 0, units,
                    rates_of<double>(n, squares, units, p, max_p, momentum, fold).data());
    else
        store_block(out, 0, units,
                    rates_of<float>(n, squares, units, p, max_p, momentum, fold).data());
    return rates;
}

EXPORT_BOXED(adaptive_dropout)
EXPORT_BOXED(adaptive_dropout_backward)
EXPORT_BOXED(dropout_rates_)

} // namespace uegr
