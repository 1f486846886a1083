// The generator, the elementary functions and the element functions over NumPy arrays, for tests;
// includes no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/loops_cpu.h"
#include "divergence/divergence.h"
#include "dropout/dropout.h"
#include "perturbation/perturbation.h"
#include "selective/selective.h"

namespace py = pybind11;
using namespace uegr;

namespace {

template <class T> using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// f applied to every element of an array.
template <class To, class From, class F> Array<To> map(const Array<From>& in, F f) {
    Array<To> out(std::vector<py::ssize_t>(in.shape(), in.shape() + in.ndim()));
    for (py::ssize_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = f(in.data()[i]);
    return out;
}

// Applies f to every element through the vectors that loops over rows are made of; gives a NaN for
// one that scalars give another value than vectors do.
template <class T, class F> Array<T> map_vectors(const Array<T>& in, F f) {
    Array<T> out = map<T>(in, f);
    vectors<T>(0, in.size(), [&](int64_t i, int count) {
        const auto v = f(load_last(in.data() + i, count, T(0)));
        for (int j = 0; j < count; ++j)
            if (T& scalar = out.mutable_data()[i + j];
                absolute(scalar - v[j]) > absolute(v[j]) * std::numeric_limits<T>::epsilon())
                scalar = NAN;
    });
    return out;
}

// Four words from four counter words and two key words, through the scalar lanes a device uses.
py::tuple philox_of(py::sequence counter, py::sequence key) {
    auto at = [](py::sequence words, int i) { return words[i].cast<uint64_t>(); };
    const FourWords w =
        philox(at(counter, 0) | at(counter, 1) << 32, static_cast<uint32_t>(at(counter, 2)),
               static_cast<uint32_t>(at(counter, 3)), RoundKeys(at(key, 0) | at(key, 1) << 32));
    return py::make_tuple(w.at[0], w.at[1], w.at[2], w.at[3]);
}

// The words of elements [begin, begin + n) of a shard, through the vector lanes the CPU loops use.
Array<uint32_t> words(int64_t begin, int n, py::sequence layout, uint32_t step, uint64_t seed) {
    if (n < 0 || n > block_size) throw py::value_error("n must be in [0, 256]");
    const Layout at{layout[0].cast<int64_t>(), layout[1].cast<int64_t>(), layout[2].cast<int64_t>(),
                    layout[3].cast<int64_t>()};
    uint32_t buffer[2 * block_size + 4];
    const uint32_t* found = element_words(buffer, begin, n, at, step, RoundKeys(seed));
    Array<uint32_t> out(n);
    std::copy(found, found + n, out.mutable_data());
    return out;
}

SelectionOptions options(double threshold, double sharpness, int64_t normalization, bool salient,
                         bool previous, double min_probability) {
    return {threshold,       sharpness, static_cast<Normalization>(normalization),
            salient,         previous,  true,
            min_probability, 1.0,       false};
}

template <class T> void add_arithmetic(py::module_& m, const char* suffix) {
    auto name = [&](const char* text) { return std::string(text) + suffix; };
    m.def(name("power_of_two_").c_str(),
          [](const Array<T>& x) { return map<T>(x, [](T v) { return power_of_two(v); }); });
    m.def(name("dropout_rate_").c_str(), [](const Array<T>& n, T mean, double p, double max_p) {
        return map<T>(n, [&](T v) { return dropout_rate(v, mean, p, max_p); });
    });
    m.def(name("exponential_").c_str(), [](const Array<T>& x) {
        return map_vectors<T>(x, [](auto v) { return exponential(v); });
    });
    m.def(name("half_complement_").c_str(), [](const Array<T>& x) {
        return map_vectors<T>(x, [](auto v) { return half_complement(v); });
    });
    m.def(name("minus_log_of_complement_").c_str(), [](const Array<T>& u) {
        return map_vectors<T>(u, [](auto v) { return minus_log_of_complement(v); });
    });
    m.def(name("rank_bin_").c_str(),
          [](const Array<T>& x) { return map<int>(x, [](T v) { return rank_bin(v); }); });
    m.def(name("inverse_probability_").c_str(),
          [](const Array<T>& s, double s_min, double s_max, double threshold, double sharpness,
             int64_t normalization, bool salient, bool previous, double min_probability) {
              const Probability<T> p(
                  options(threshold, sharpness, normalization, salient, previous, min_probability),
                  s_min, s_max);
              return map<T>(s, [&](T v) { return p.inverse(v); });
          });
}

} // namespace

PYBIND11_MODULE(_bindings, m) {
    m.attr("NORMALIZATIONS") =
        py::dict(py::arg("minmax") = static_cast<int>(Normalization::minmax),
                 py::arg("range") = static_cast<int>(Normalization::range),
                 py::arg("rank") = static_cast<int>(Normalization::rank),
                 py::arg("constant") = static_cast<int>(Normalization::constant));
    m.attr("NORMS") = py::dict(py::arg("l2") = static_cast<int>(Norm::l2),
                               py::arg("linf") = static_cast<int>(Norm::linf));
    m.attr("PERS") = py::dict(py::arg("sample") = static_cast<int>(Per::sample),
                              py::arg("token") = static_cast<int>(Per::token),
                              py::arg("all") = static_cast<int>(Per::all));
    m.attr("REDUCTIONS") = py::dict(py::arg("mean") = static_cast<int>(Reduction::mean),
                                    py::arg("sum") = static_cast<int>(Reduction::sum),
                                    py::arg("none") = static_cast<int>(Reduction::none));
    m.attr("RANK_BINS") = rank_bins;
    m.attr("RANK_SAMPLED") = rank_sampled;
    m.def("philox4x32", philox_of);
    m.def("element_words", words);
    m.def("uniform_below", [](const Array<uint32_t>& words, double p) {
        return map<bool>(words, [limit = uniform_limit(p)](uint32_t word) {
            return uniform_below(word, limit);
        });
    });
    m.def("direction_factor", [](const Array<double>& squares, double epsilon, int64_t norm) {
        return map<double>(squares, [&](double x) {
            return direction_factor(x, epsilon, static_cast<Norm>(norm));
        });
    });
    m.def("ball_factor", [](const Array<double>& squares, double radius) {
        return map<double>(squares, [&](double x) { return ball_factor(x, radius); });
    });
    m.def("rank_stride", [](int64_t size) { return rank_stride(size); });
    m.def("widen_bfloat16", [](const Array<uint16_t>& x) {
        return map<float>(x, [](uint16_t v) { return widen_bfloat16(v); });
    });
    m.def("widen_float16", [](const Array<uint16_t>& x) {
        return map<float>(x, [](uint16_t v) { return widen_float16(v); });
    });
    m.def("round_bfloat16", [](const Array<float>& x) {
        return map<uint16_t>(x, [](float v) { return round_bfloat16(v); });
    });
    m.def("round_float16", [](const Array<float>& x) {
        return map<uint16_t>(x, [](float v) { return round_float16(v); });
    });
    m.def("cut_bfloat16", [](const Array<float>& x, uint32_t word) {
        return map<uint16_t>(x, [&](float v) { return cut_bfloat16(v, word & 0xffffu); });
    });
    add_arithmetic<float>(m, "float");
    add_arithmetic<double>(m, "double");
}
