// Finds races by what happens before what, in whatever order the threads of host.cpp happen to run: two
// accesses of the same memory by different threads, one of them a write, must be ordered by barriers, or by a
// release that an acquire has seen. g++ -fsanitize=thread announces the accesses; its library is not linked.
//
// Each thread has a clock, and knows up to which time of every other's it has seen all ("FastTrack", Flanagan
// and Freund 2009). What it does not know: fences, and scopes smaller than the GPU.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class Races {
   public:
    void begin(unsigned threads) {
        seen.assign(threads, Clock(threads, 0));
        for (unsigned k = 0; k < threads; ++k) seen[k][k] = 1;
        told.clear();
        pages.clear();
    }

    // All of them have seen what any of them had seen.
    void meet(const std::vector<unsigned>& threads) {
        Clock all(seen.size(), 0);
        for (unsigned k : threads) join(all, seen[k]);
        for (unsigned k : threads) {
            seen[k] = all;
            ++seen[k][k];
        }
    }

    // Who acquires what is at `where` afterwards has seen all that this thread has; with `add` also what was
    // told there before, since an atomic addition goes on with it.
    void release(unsigned thread, const void* where, bool add) {
        Clock& clock = told[where];
        if (!add || clock.empty()) clock = seen[thread];
        else join(clock, seen[thread]);
        ++seen[thread][thread];
    }
    void acquire(unsigned thread, const void* where) {
        const auto found = told.find(where);
        if (found != told.end()) join(seen[thread], found->second);
    }

    // Returns what other access this one races with, or nothing.
    struct Conflict {
        bool found, write;
        unsigned thread;
    };
    Conflict access(unsigned thread, const void* first, std::size_t size, bool write) {
        const uintptr_t start = uintptr_t(first) / GRAIN, stop = (uintptr_t(first) + size - 1) / GRAIN;
        for (uintptr_t place = start; place <= stop; ++place) {
            const Conflict conflict = access(thread, cell(place), write);
            if (conflict.found) return conflict;
        }
        return {false, false, 0};
    }

   private:
    using Clock = std::vector<uint32_t>;
    struct Event {
        unsigned thread;
        uint32_t time;  // 0 for none
    };
    struct Cell {
        Event written{};
        std::vector<Event> read;  // since, as far as they are not before one another
    };
    static constexpr std::size_t GRAIN = 2;  // bytes: the smallest number that kernels share
    static constexpr std::size_t PAGE = 2048;
    std::vector<Clock> seen;
    std::unordered_map<const void*, Clock> told;
    std::unordered_map<uintptr_t, std::vector<Cell>> pages;

    static void join(Clock& into, const Clock& other) {
        for (std::size_t k = 0; k < into.size(); ++k)
            if (into[k] < other[k]) into[k] = other[k];
    }
    Cell& cell(uintptr_t place) {
        std::vector<Cell>& page = pages[place / PAGE];
        if (page.empty()) page.resize(PAGE);
        return page[place % PAGE];
    }
    bool before(const Event& event, unsigned thread) const {
        return event.time <= seen[thread][event.thread];
    }

    Conflict access(unsigned thread, Cell& cell, bool write) {
        if (!before(cell.written, thread)) return {true, true, cell.written.thread};
        const Event now = {thread, seen[thread][thread]};
        if (write) {
            for (const Event& event : cell.read)
                if (!before(event, thread)) return {true, false, event.thread};
            cell.read.clear();
            cell.written = now;
            return {false, false, 0};
        }
        for (Event& event : cell.read)
            if (before(event, thread)) {
                event = now;
                return {false, false, 0};
            }
        cell.read.push_back(now);
        return {false, false, 0};
    }
};
