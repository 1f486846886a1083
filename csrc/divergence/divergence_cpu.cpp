// The losses on the CPU: loops. The formulas are divergence.h's, the checks arguments.h's.
//
// The m+1 rows of one sample are read from memory once and stay in a thread's cache until their
// gradients are written: a visit for the maximum, one for the exponentials, in which the row to be
// read next is asked for, one for the pairs, one for the gradients. Values are kept by row and
// added up in the rows' order, so that they do not depend on the threads.
#include <algorithm>
#include <memory>
#include <new>

#include "../core/tensor.h"
#include "arguments.h"
#include "divergence.h"

namespace uegr {
namespace {

// elements whose sum is taken in T; whose gradient passes through L1 together
constexpr int64_t span = 1024;
// logits
constexpr int64_t worth_a_thread = 1 << 15;
// bytes of a fresh gradient: more than it pays to put into a cache
constexpr int64_t worth_streaming = 1 << 23;

// The N rows of one pass, in the caller's memory.
struct Rows {
    // null: nothing is wanted here
    char* data = nullptr;
    Storage storage = Storage::float32;
    // strides, in elements
    int64_t row = 0, column = 1, classes = 0;
    bool streamed = false;

    Rows() = default;
    Rows(const View& v, int64_t pass)
        : storage(v.storage), row(v.strides[v.dim - 2]), column(v.strides[v.dim - 1]),
          classes(v.sizes[v.dim - 1]) {
        data = v.data && v.dim == 3 ? v.data + pass * v.strides[0] * bytes_of(storage) : v.data;
    }
    char* at(int64_t n) const { return data + n * row * bytes_of(storage); }
    template <class T> bool direct() const {
        return storage == storage_of<T> && (column == 1 || classes == 1);
    }
    View view(int64_t n) const {
        View v;
        v.data = at(n), v.storage = storage, v.contiguous = column == 1, v.dim = 1,
        v.sizes = &classes, v.strides = &column;
        return v;
    }
    // Writes a gradient.
    template <class T> void put(int64_t n, int64_t begin, int64_t count, const T* x) const {
        char* to = at(n) + begin * static_cast<int64_t>(sizeof(T));
        if (!direct<T>()) store_block(view(n), begin, static_cast<int>(count), x);
        else if (streamed) stream(to, reinterpret_cast<const char*>(x), count * sizeof(T));
        else
            vectors<T>(0, count, [=](int64_t i, int some) {
                memcpy(to + i * sizeof(T), x + i, some * sizeof(T));
            });
    }
};

struct Values {
    double clean = 0, adversarial = 0, divergence = 0;
};

struct LossBatch {
    LossOptions options{};
    // first: pass of the pairs
    int64_t samples = 0, classes = 0, first = 0;
    std::vector<Rows> logits, gradients;
    const int64_t* indices = nullptr;
    int64_t index_stride = 0;
    Rows soft;
    // of the gradients: 1/count
    double unit = 1;
    std::vector<Values> values;

    explicit LossBatch(const LossArguments& a)
        : options(a.options), samples(a.samples), classes(a.classes), first(a.first),
          indices(a.indices), index_stride(a.index_stride) {
        for (const View& v : a.logits)
            for (int64_t pass = 0; pass < passes_of(v); ++pass) logits.emplace_back(v, pass);
        if (a.soft.data) soft = Rows(a.soft, 0);
    }
    int64_t passes() const { return static_cast<int64_t>(logits.size()); }
    bool labelled() const { return indices || soft.data; }
    int64_t index(int64_t n) const { return indices[n * index_stride]; }
    bool ignored(int64_t n) const { return indices && index(n) == options.ignore_index; }
    double label_weight(int64_t pass) const {
        return !labelled() ? 0 : pass == 0 ? 1 : 1 / static_cast<double>(passes() - 1);
    }
};

// A thread at work on a batch.
template <class T> class Worker {
    using V = typename Vector<T>::Type;
    static constexpr T lowest = -std::numeric_limits<T>::infinity();

    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    const LossBatch& batch;
    const int64_t classes, padded, passes, m;
    // that a row reaches
    const int lanes;
    std::unique_ptr<T, Free> memory;
    T *staged, *targets;
    std::vector<const T*> x;
    std::vector<RowSums> sums;
    alignas(64) T gradient[span], difference[span];

public:
    explicit Worker(const LossBatch& b)
        : batch(b), classes(b.classes), padded((classes + 15) / 16 * 16), passes(b.passes()),
          m(b.passes() - b.first), lanes(static_cast<int>(std::min<int64_t>(width<T>, classes))),
          x(passes), sums(passes) {
        const int64_t needed = (2 * m + passes + 2) * padded;
        memory.reset(static_cast<T*>(::operator new(needed * sizeof(T), std::align_val_t{64})));
        staged = memory.get() + (2 * m + 1) * padded;
        targets = staged + passes * padded;
    }

    // Samples [begin, end).
    void run(int64_t begin, int64_t end, Values* values) {
        for (int64_t n = begin; n < end; ++n) {
            if (batch.ignored(n)) clear(n);
            else if (batch.options.regression) values[n] = regression(n);
            else values[n] = classification(n, std::min(n + 1, end - 1));
        }
        finish_streams();
    }

private:
    // A vector of a row that may end inside of it.
    static V load(const T* row, int64_t i, int count, T pad) {
        return count == width<T> ? load_vector(row + i) : load_last(row + i, count, pad);
    }

    void clear(int64_t n) {
        std::fill(gradient, gradient + span, T(0));
        for (const Rows& into : batch.gradients)
            for (int64_t at = 0; into.data && at < classes; at += span)
                into.put(n, at, std::min(span, classes - at), gradient);
    }

    // The clean pass, written before the others are read, leaves its memory to them.
    T* exponentials_of(int64_t pass) {
        return memory.get() + std::max<int64_t>(pass - batch.first, 0) * padded;
    }
    T* products_of(int64_t pass) { return exponentials_of(pass) + m * padded; }

    static void stage(const Rows& from, int64_t n, T* to) {
        uegr::load(from.view(n), 0, static_cast<int>(from.classes), to);
    }

    T maximum_of(const T* row, int64_t begin, int64_t end) const {
        V most[4] = {V{} + lowest, V{} + lowest, V{} + lowest, V{} + lowest};
        int64_t i = begin;
        for (; i + 4 * width<T> <= end; i += 4 * width<T>)
            for (int j = 0; j < 4; ++j)
                most[j] = maximum(load_vector(row + i + j * width<T>), most[j]);
        vectors<T>(i, end, [&](int64_t i, int count) {
            most[0] = maximum(load(row, i, count, lowest), most[0]);
        });
        most[0] = maximum(maximum(most[0], most[1]), maximum(most[2], most[3]));
        T each[width<T>], found = lowest;
        store_vector(each, most[0]);
        for (int j = 0; j < lanes; ++j) found = maximum(each[j], found);
        return found;
    }

    // Sum of term(i, count) over the row's vectors.
    template <class Term> double sum(Term term) const {
        Sum<T> total;
        for (int64_t at = 0; at < classes; at += span) {
            V block{};
            vectors<T>(at, std::min(at + span, classes),
                       [&](int64_t i, int count) { block += term(i, count); });
            total.add(block);
        }
        return total.total(lanes);
    }

    // Returns where the row to be read after a pass's begins, to be asked for meanwhile; some
    // memory at hand where there is none or it is strided.
    const char* ahead(int64_t pass, int64_t n, int64_t next) const {
        const Rows& from = batch.logits[pass == passes ? 0 : pass];
        return from.column == 1 ? from.at(pass == passes ? next : n)
                                : reinterpret_cast<const char*>(staged);
    }

    // Reads a pass's row: its maximum, its exponentials and their sum.
    void read(int64_t pass, int64_t n, int64_t next) {
        const Rows& from = batch.logits[pass];
        T* own = staged + pass * padded;
        x[pass] = reinterpret_cast<const T*>(from.at(n));
        if (!from.direct<T>()) stage(from, n, own), x[pass] = own;
        T max = maximum_of(x[pass], 0, classes);
        if (!(absolute(max) <= T(far_out))) {
            for (int64_t i = 0; i < classes; ++i) own[i] = x[pass][i] - max;
            x[pass] = own, max = 0;
        }
        T* e = exponentials_of(pass);
        RowSums& row = sums[pass];
        row = RowSums();
        row.max = max;
        const char* after = ahead(pass + 1, n, next);
        const int64_t item = bytes_of(from.storage);
        row.sum = sum([=, from = x[pass]](int64_t i, int count) {
            __builtin_prefetch(after + i * item, 0, 2);
            const V v = exponential(load(from, i, count, lowest) - max);
            store_vector(e + i, v);
            return v;
        });
        row.settle();
    }

    // The labels' part of a pass's sums.
    void compare(int64_t pass, int64_t n) {
        RowSums& row = sums[pass];
        const T max = static_cast<T>(row.max), *from = x[pass];
        const double smoothing = batch.options.label_smoothing;
        if (batch.indices) {
            if (smoothing < 1)
                row.label = (1 - smoothing) * (static_cast<double>(from[batch.index(n)]) - row.max);
            if (smoothing > 0)
                row.label += smoothing / classes * sum([&](int64_t i, int count) {
                                 return load(from, i, count, max) - max;
                             });
        } else {
            row.label = sum([&](int64_t i, int count) {
                return label_term(load(targets, i, count, T(0)), load(from, i, count, max) - max);
            });
        }
    }

    // The pairs: w = e * (sum of the log ratios) by pass, and its sum. Each loop is short enough
    // for several of its rounds to be under way.
    void pair() {
        const T* e = exponentials_of(batch.first);
        T* w = products_of(batch.first);
        RowSums* of = sums.data() + batch.first;
        for (int64_t k = 0; k < m; ++k) of[k].kl = 0, of[k].pivot = pivot(k);
        for (int64_t at = 0; at < classes; at += span) {
            const int64_t end = std::min(at + span, classes);
            for (int64_t k = 0; k < m; ++k)
                start_ratios(k, at, std::min(at + span, padded), static_cast<T>(-of[k].pivot));
            for (int64_t k = 0; k < m; ++k)
                for (int64_t l = k + 1; l < m; ++l)
                    add_pair(k, l, at, end, w + k * padded, w + l * padded);
            for (int64_t k = 0; k < m; ++k) {
                V total{};
                vectors<T>(at, end,
                           [&, from = e + k * padded, to = w + k * padded](int64_t i, int) {
                               const V product = load_vector(from + i) * load_vector(to + i);
                               store_vector(to + i, product);
                               total += product;
                           });
                Sum<T> block;
                block.add(total);
                of[k].kl += block.total(lanes);
            }
        }
    }

    // whole vectors
    void start_ratios(int64_t k, int64_t begin, int64_t end, T from) {
        T* w = products_of(batch.first + k);
        std::fill(w + begin, w + end, from);
    }

    // The sum of the log ratios at the most probable class, where it dominates the row.
    double pivot(int64_t k) {
        if (!sums[batch.first + k].dominated()) return 0;
        const T* e = exponentials_of(batch.first + k);
        int64_t block = 0;
        while (block + span < classes && maximum_of(e, block, block + span) < T(1)) block += span;
        const int64_t likeliest = std::find(e + block, e + classes, T(1)) - e,
                      at = likeliest / width<T> * width<T>;
        T* w = products_of(batch.first);
        for (int64_t l = 0; l < m; ++l) start_ratios(l, at, at + width<T>, T(0));
        for (int64_t l = 0; l < m; ++l)
            if (l != k)
                add_pair(std::min(k, l), std::max(k, l), at, std::min(at + width<T>, classes),
                         w + std::min(k, l) * padded, w + std::max(k, l) * padded);
        return w[k * padded + likeliest];
    }

    void add_pair(int64_t k, int64_t l, int64_t at, int64_t end, T* of_k, T* of_l) {
        const RowSums &row_k = sums[batch.first + k], &row_l = sums[batch.first + l];
        const T far_k = static_cast<T>(row_k.max - far_below),
                far_l = static_cast<T>(row_l.max - far_below);
        const PairDistance between(row_k, row_l);
        const T from_k = static_cast<T>(between.from_k), from_l = static_cast<T>(between.from_l),
                gap = static_cast<T>(between.gap);
        vectors<T>(at, end,
                   [=, x_k = x[batch.first + k], x_l = x[batch.first + l], d = difference - at,
                    u = gradient - at](int64_t i, int count) {
                       const V between =
                           (maximum(V{} + far_k, load(x_k, i, count, lowest)) - from_k) -
                           (maximum(V{} + far_l, load(x_l, i, count, lowest)) - from_l) - gap;
                       store_vector(d + i, between);
                       store_vector(u + i, half_complement(minus_absolute(between)));
                   });
        vectors<T>(at, end, [=, d = difference - at, u = gradient - at](int64_t i, int) {
            V ratio_k = load_vector(of_k + i), ratio_l = load_vector(of_l + i);
            add_log_ratios(load_vector(d + i), load_vector(u + i), ratio_k, ratio_l);
            store_vector(of_k + i, ratio_k), store_vector(of_l + i, ratio_l);
        });
    }

    void write(int64_t pass, int64_t n, double mass) {
        const Rows& into = batch.gradients[pass];
        if (!into.data) return;
        const LossOptions& o = batch.options;
        const bool in_pairs = pass >= batch.first && m > 1;
        const double smoothed =
            batch.indices ? o.label_smoothing / static_cast<double>(classes) : 0;
        const GradientFactors<T> factors(sums[pass], batch.unit * batch.label_weight(pass), mass,
                                         smoothed, in_pairs ? batch.unit * o.js_weight : 0);
        const T *e = exponentials_of(pass), *w = products_of(pass);
        auto part = [&](int64_t begin, int64_t end, auto out) {
            if (in_pairs)
                vectors<T>(begin, end, [&](int64_t i, int count) {
                    out(i, count, factors.gradient(load_vector(e + i), load_vector(w + i)));
                });
            else
                vectors<T>(begin, end, [&](int64_t i, int count) {
                    out(i, count, factors.gradient(load_vector(e + i)));
                });
        };
        T* row = reinterpret_cast<T*>(into.at(n));
        const bool straight = into.direct<T>() && !batch.soft.data &&
                              (!into.streamed || reinterpret_cast<uintptr_t>(row) % sizeof(V) == 0);
        for (int64_t at = 0; at < classes; at += span) {
            const int64_t end = std::min(at + span, classes),
                          label = batch.indices ? batch.index(n) : -1;
            const bool has_label = label >= at && label < end;
            if (straight && !has_label && into.streamed) {
                part(at, end, [=](int64_t i, int count, V v) { stream_vector(row + i, count, v); });
            } else if (straight && !has_label) {
                part(at, end,
                     [=](int64_t i, int count, V v) { memcpy(row + i, &v, count * sizeof(T)); });
            } else {
                part(at, end,
                     [=, to = gradient - at](int64_t i, int, V v) { store_vector(to + i, v); });
                for (int64_t i = at; batch.soft.data && i < end; ++i)
                    gradient[i - at] = factors.labelled(gradient[i - at], targets[i]);
                if (has_label)
                    gradient[label - at] = factors.labelled(gradient[label - at],
                                                            static_cast<T>(1 - o.label_smoothing));
                into.put(n, at, end - at, gradient);
            }
        }
    }

    Values classification(int64_t n, int64_t next) {
        double mass = batch.indices ? 1 : 0;
        if (batch.soft.data) {
            stage(batch.soft, n, targets);
            const T share = static_cast<T>(1 - batch.options.label_smoothing),
                    floor = static_cast<T>(batch.options.label_smoothing / classes);
            for (int64_t i = 0; i < classes; ++i) targets[i] = targets[i] * share + floor;
            mass = sum([&](int64_t i, int count) { return load(targets, i, count, T(0)); });
        }
        Values found;
        for (int64_t pass = 0; pass < passes; ++pass) {
            read(pass, n, next);
            if (!batch.labelled()) continue;
            compare(pass, n);
            (pass ? found.adversarial : found.clean) +=
                sums[pass].cross_entropy(mass) * batch.label_weight(pass);
            if (pass < batch.first) write(pass, n, mass);
        }
        if (m > 1) {
            pair();
            for (int64_t k = batch.first; k < passes; ++k) found.divergence += sums[k].divergence();
            found.divergence = pairs_divergence(found.divergence, m);
        }
        for (int64_t pass = batch.first; pass < passes; ++pass) write(pass, n, mass);
        return found;
    }

    Values regression(int64_t n) {
        for (int64_t pass = 0; pass < passes; ++pass)
            stage(batch.logits[pass], n, staged + pass * padded);
        if (batch.labelled()) stage(batch.soft, n, targets);
        auto distance = [&](const T* a, const T* b) {
            return sum([&](int64_t i, int count) {
                       return squared(load(a, i, count, T(0)), load(b, i, count, T(0)));
                   }) /
                   classes;
        };
        Values found;
        for (int64_t k = 0; k < passes; ++k) {
            const T* own = staged + k * padded;
            if (batch.labelled())
                (k ? found.adversarial : found.clean) +=
                    distance(own, targets) * batch.label_weight(k);
            for (int64_t l = k + 1; k >= batch.first && l < passes; ++l)
                found.divergence += distance(own, staged + l * padded);
        }
        for (int64_t k = 0; k < passes; ++k) {
            if (!batch.gradients[k].data) continue;
            const T *own = staged + k * padded, unit = static_cast<T>(batch.unit / classes);
            const T label = static_cast<T>(batch.label_weight(k)),
                    weight = static_cast<T>(k < batch.first ? 0 : batch.options.js_weight);
            for (int64_t at = 0; at < classes; at += span) {
                const int64_t count = std::min(span, classes - at);
                for (int64_t i = 0; i < count; ++i)
                    gradient[i] = batch.labelled()
                                      ? label * squared_slope(own[at + i], targets[at + i])
                                      : T(0);
                for (int64_t l = batch.first; l < passes; ++l)
                    for (int64_t i = 0; i < count; ++i)
                        gradient[i] +=
                            weight * squared_slope(own[at + i], staged[l * padded + at + i]);
                for (int64_t i = 0; i < count; ++i) gradient[i] *= unit;
                batch.gradients[k].put(n, at, count, gradient);
            }
        }
        return found;
    }
};

template <class T> void work(LossBatch& batch) {
    const int64_t grain = std::max<int64_t>(1, worth_a_thread / (batch.passes() * batch.classes));
    auto part = [&](int64_t begin, int64_t end) {
        std::make_unique<Worker<T>>(batch)->run(begin, end, batch.values.data());
    };
    if (batch.samples == 0) return;
    if (batch.samples <= grain || torch::stable::get_num_threads() == 1) part(0, batch.samples);
    else torch::stable::parallel_for(0, batch.samples, grain, part);
}

// Counts the rows that are not ignored; raises where a class is none.
int64_t count_rows(const LossBatch& batch) {
    int64_t count = batch.samples;
    for (int64_t n = 0; batch.indices && n < batch.samples; ++n) {
        const int64_t label = batch.index(n), ignored = batch.options.ignore_index;
        count -= label == ignored;
        STD_TORCH_CHECK(label == ignored || (label >= 0 && label < batch.classes), "labels hold ",
                        label, "; give classes from 0 to ", batch.classes - 1, ", or ", ignored,
                        " (ignore_index) for rows to leave out");
    }
    return count;
}

// Runs a batch and returns the loss and its parts.
std::pair<Tensor, Tensor> run(LossBatch& batch, const Tensor& like, int64_t count) {
    const bool by_row = batch.options.reduction == Reduction::none,
               mean = batch.options.reduction == Reduction::mean;
    const bool wide = like.scalar_type() == ScalarType::Double;
    batch.unit = mean ? 1 / static_cast<double>(count) : 1;
    batch.values.resize(batch.samples);
    if (wide) work<double>(batch);
    else work<float>(batch);
    const int64_t rows = by_row ? batch.samples : 1;
    if (!by_row) {
        Values total;
        for (const Values& v : batch.values)
            total.clean += v.clean, total.adversarial += v.adversarial,
                total.divergence += v.divergence;
        const double by = mean ? static_cast<double>(count) : 1;
        batch.values = {{total.clean / by, total.adversarial / by, total.divergence / by}};
    }
    const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
    Tensor loss = by_row ? torch::stable::new_empty(like, {rows}, type)
                         : torch::stable::new_empty(like, {}, type);
    Tensor parts = by_row ? torch::stable::new_empty(like, {3, rows}, type)
                          : torch::stable::new_empty(like, {3}, type);
    auto fill = [&](auto* loss, auto* parts) {
        using T = std::remove_pointer_t<decltype(loss)>;
        for (int64_t n = 0; n < rows; ++n) {
            const Values& v = batch.values[n];
            loss[n] =
                static_cast<T>(v.clean + v.adversarial + batch.options.js_weight * v.divergence);
            parts[n] = static_cast<T>(v.clean), parts[rows + n] = static_cast<T>(v.adversarial),
            parts[2 * rows + n] = static_cast<T>(v.divergence);
        }
    };
    if (wide)
        fill(static_cast<double*>(loss.mutable_data_ptr()),
             static_cast<double*>(parts.mutable_data_ptr()));
    else
        fill(static_cast<float*>(loss.mutable_data_ptr()),
             static_cast<float*>(parts.mutable_data_ptr()));
    return {loss, parts};
}

// Says where the gradients of a tensor of logits go: memory that is written whole, or nowhere.
void direct_gradients(LossBatch& batch, int64_t passes, const Tensor* into, bool fresh) {
    const int64_t bytes = into ? into->numel() * into->element_size() : 0;
    if (into && fresh) expect_large_pages(view(*into, "logits", true), into->numel());
    for (int64_t pass = 0; pass < passes; ++pass) {
        batch.gradients.push_back(into ? Rows(view(*into, "logits", true), pass) : Rows());
        batch.gradients.back().streamed = fresh && bytes >= worth_streaming;
    }
}

template <class T> void scale_rows(const ScalingArguments& a) {
    std::vector<T> by(a.factors);
    for (int64_t n = 0; n < a.factors; ++n) load(a.factor, n, 1, &by[n]);
    auto rows = [&](int64_t begin, int64_t end) {
        T block[block_size];
        for (int64_t row = begin; row < end; ++row) {
            const T scale = by[a.factors == 1 ? 0 : row % a.samples];
            if (scale == 1 && a.in_place()) continue;
            const int64_t last = (row + 1) * a.classes;
            for (int64_t at = row * a.classes; at < last; at += block_size) {
                const int count = static_cast<int>(std::min<int64_t>(block_size, last - at));
                load_block(a.source, at, count, block);
                for (int i = 0; i < block_size; ++i) block[i] *= scale;
                store_block(a.target, at, count, block);
            }
        }
    };
    const int64_t grain = std::max<int64_t>(1, worth_a_thread / a.classes);
    if (a.size <= worth_a_thread) rows(0, a.size / a.classes);
    else torch::stable::parallel_for(0, a.size / a.classes, grain, rows);
}

} // namespace

static std::pair<Tensor, Tensor> evaluate(const LossArguments& arguments,
                                          const std::vector<bool>& needs, const Tensors& gradients,
                                          bool fresh) {
    LossBatch batch(arguments);
    const int64_t count = count_rows(batch);
    size_t at = 0;
    for (size_t i = 0; i < needs.size(); ++i)
        direct_gradients(batch, passes_of(arguments.logits[i]),
                         needs[i] ? &gradients[at++] : nullptr, fresh);
    return run(batch, arguments.like, count);
}

static void scale(const ScalingArguments& arguments) {
    if (arguments.size == 0) return;
    if (!arguments.in_place()) expect_large_pages(arguments.target, arguments.size);
    if (arguments.source.storage == Storage::float64) scale_rows<double>(arguments);
    else scale_rows<float>(arguments);
}

EXPORT_BOXED(uegr_loss)
EXPORT_BOXED(uegr_loss_)
EXPORT_BOXED(scale_gradients)
EXPORT_BOXED(scale_gradients_)

} // namespace uegr
