// Event-driven simulation of tasks with dependencies, unit resources of a capacity, and memories of a capacity.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace bitwright {

namespace {

using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DoublesOut = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntsOut = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Ranked = std::pair<int64_t, int32_t>;  // (priority, task): lower starts first, ties by task index
template <class T>
using MinHeap = std::priority_queue<T, std::vector<T>, std::greater<T>>;

// Rows of a ragged table: row i holds entries[offsets[i] .. offsets[i + 1]).
struct Rows {
    const int64_t* offsets;
    const int32_t* entries;
    Rows(const Longs& offsets_, const Ints& entries_, size_t rows, size_t limit) : offsets(offsets_.data()), entries(entries_.data()) {
        if (offsets_.shape(0) != rows + 1 || offsets[0] != 0 || static_cast<size_t>(offsets[rows]) != entries_.shape(0))
            throw std::invalid_argument("row offsets do not match their entries");
        for (size_t i = 0; i < rows; ++i)
            if (offsets[i] > offsets[i + 1]) throw std::invalid_argument("row offsets decrease");
        for (size_t i = 0; i < entries_.shape(0); ++i)
            if (entries[i] < 0 || static_cast<size_t>(entries[i]) >= limit) throw std::invalid_argument("an index is out of range");
    }
};

}  // namespace

// Returns the number of tasks that finished; a task that never started keeps start = -1. cause[i] is the task whose end
// let task i start (its last dependency, or the task that released what it waited for), -1 for a start at time zero.
// Resources and memories share one index space: resources first, each taken one unit at a time; then memories, of
// which `amounts` are taken at the start of a task (`takes`) and given back at its end (`gives`).
size_t simulate_timeline(Doubles durations, Longs priorities, Longs after_offsets, Ints after, Longs takes_offsets, Ints takes,
                         Doubles take_amounts, Longs gives_offsets, Ints gives, Doubles give_amounts, Doubles capacities,
                         DoublesOut start, DoublesOut finish, IntsOut cause) {
    const size_t n = durations.shape(0), stores = capacities.shape(0);
    if (priorities.shape(0) != n || start.shape(0) != n || finish.shape(0) != n || cause.shape(0) != n)
        throw std::invalid_argument("task arrays differ in length");
    if (take_amounts.shape(0) != takes.shape(0) || give_amounts.shape(0) != gives.shape(0))
        throw std::invalid_argument("amounts and their stores differ in length");
    const Rows before(after_offsets, after, n, n), taken(takes_offsets, takes, n, stores), given(gives_offsets, gives, n, stores);
    nb::gil_scoped_release release;

    std::vector<int64_t> successor_offsets(n + 1, 0);
    std::vector<int32_t> open(n), successors(static_cast<size_t>(before.offsets[n]));
    for (int64_t e = 0; e < before.offsets[n]; ++e) ++successor_offsets[before.entries[e] + 1];
    for (size_t i = 0; i < n; ++i) successor_offsets[i + 1] += successor_offsets[i];
    std::vector<int64_t> fill(successor_offsets.begin(), successor_offsets.end() - 1);
    for (size_t i = 0; i < n; ++i) {
        open[i] = static_cast<int32_t>(before.offsets[i + 1] - before.offsets[i]);
        for (int64_t e = before.offsets[i]; e < before.offsets[i + 1]; ++e)
            successors[fill[before.entries[e]]++] = static_cast<int32_t>(i);
    }

    std::vector<double> free_amount(capacities.data(), capacities.data() + stores);
    std::vector<MinHeap<Ranked>> waiting(stores);
    std::vector<int32_t> waits_for(n, -1);  // the store a candidate came from
    MinHeap<Ranked> candidates;
    MinHeap<std::pair<double, int32_t>> running;
    std::vector<int32_t> touched, last_release(stores, -1);
    std::vector<std::pair<int32_t, Ranked>> still_blocked;
    std::fill_n(start.data(), n, -1.0);
    std::fill_n(finish.data(), n, -1.0);
    std::fill_n(cause.data(), n, -1);

    for (size_t i = 0; i < n; ++i)
        if (open[i] == 0) candidates.emplace(priorities.data()[i], static_cast<int32_t>(i));

    size_t finished = 0;
    double now = 0.0;
    // The first store without room for a task, or -1.
    const auto blocked_by = [&](int32_t task) {
        for (int64_t e = taken.offsets[task]; e < taken.offsets[task + 1]; ++e)
            if (free_amount[taken.entries[e]] < take_amounts.data()[e]) return taken.entries[e];
        return int32_t{-1};
    };
    const auto next_waiter = [&](int32_t store) {
        if (store < 0 || waiting[store].empty() || free_amount[store] <= 0) return;
        const Ranked waiter = waiting[store].top();
        waiting[store].pop();
        waits_for[waiter.second] = store;
        candidates.push(waiter);
    };
    for (;;) {
        while (!candidates.empty()) {
            const Ranked candidate = candidates.top();
            const int32_t task = candidate.second;
            candidates.pop();
            const int32_t came_from = waits_for[task];
            const int32_t store = blocked_by(task);
            if (store < 0) {
                for (int64_t e = taken.offsets[task]; e < taken.offsets[task + 1]; ++e)
                    free_amount[taken.entries[e]] -= take_amounts.data()[e];
                start.data()[task] = now;
                if (came_from >= 0) cause.data()[task] = last_release[came_from];
                running.emplace(now + durations.data()[task], task);
            } else {
                waits_for[task] = -1;
                still_blocked.emplace_back(store, candidate);  // queued after this instant, so that each is tried once
            }
            next_waiter(came_from);
        }
        for (const auto& [store, candidate] : still_blocked) waiting[store].push(candidate);
        still_blocked.clear();
        if (running.empty()) break;
        now = running.top().first;
        touched.clear();
        while (!running.empty() && running.top().first == now) {
            const int32_t task = running.top().second;
            running.pop();
            finish.data()[task] = now;
            ++finished;
            for (int64_t e = given.offsets[task]; e < given.offsets[task + 1]; ++e) {
                const int32_t store = given.entries[e];
                free_amount[store] += give_amounts.data()[e];
                if (free_amount[store] > capacities.data()[store] * (1 + 1e-12) + 1e-9)
                    throw std::invalid_argument("task " + std::to_string(task) + " frees more than was allocated");
                touched.push_back(store);
                last_release[store] = task;
            }
            for (int64_t e = successor_offsets[task]; e < successor_offsets[task + 1]; ++e) {
                const int32_t next = successors[e];
                if (--open[next] == 0) {
                    cause.data()[next] = task;
                    candidates.emplace(priorities.data()[next], next);
                }
            }
        }
        std::sort(touched.begin(), touched.end());
        touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
        for (const int32_t store : touched) next_waiter(store);
    }
    return finished;
}

void bind_timeline(nb::module_& m) {
    m.def("simulate_timeline", &simulate_timeline, nb::arg("durations"), nb::arg("priorities"), nb::arg("after_offsets"),
          nb::arg("after"), nb::arg("takes_offsets"), nb::arg("takes"), nb::arg("take_amounts"), nb::arg("gives_offsets"),
          nb::arg("gives"), nb::arg("give_amounts"), nb::arg("capacities"), nb::arg("start"), nb::arg("finish"),
          nb::arg("cause"));
}

}  // namespace bitwright
