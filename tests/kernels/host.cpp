// The scheduler of host.h: every thread of a block is a fiber that runs until it waits.

#include "host.h"

#include "races.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

enum Order { FORWARD, REVERSE, SHUFFLED, UNEVEN };
enum State { READY, AT_BLOCK, AT_WARP, AT_GRID, DONE };

constexpr std::size_t STACK = 64 << 10;
constexpr std::size_t FENCE = 64;         // bytes behind the shared memory that nobody may write
constexpr int MOST_IDLE_ROUNDS = 10000;  // in which every thread only spins
constexpr int MOST_POLLS = 1 << 20;      // of memory in one turn, which nobody changes meanwhile

struct Copy {
    void* to;
    const void* from;  // null for zeros
};

struct Thread {
    ucontext_t context;  // where it begins
    jmp_buf paused;      // where it goes on: swapcontext would call the system twice a turn
    bool begun;
    dim3 index;
    unsigned block, number, id;  // in the block, and of all that run together
    State state;
    bool orders;  // memory, by what it waits for: shuffles and products do not
    int line;
    unsigned mask;
    uint64_t value, lanes[32];
    bool spun;
    int polls;
    host::Multiply what;  // and with what a warp is to multiply
    float* d;
    const unsigned *a, *b;
    std::vector<std::vector<Copy>> copies;  // under way, by groups; the last one is still open
};

using Group = std::vector<Thread*>;

struct Block {
    dim3 index;
    std::vector<unsigned char> shared;
    std::vector<Thread> threads;
    Group all;
};

// Stacks are kept for the next launch.
struct Stacks {
    std::vector<void*> free;
    void* take() {
        if (free.empty()) {
            const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
            void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
            if (stack == MAP_FAILED) throw std::runtime_error("no memory for another thread's stack");
            return stack;
        }
        void* stack = free.back();
        free.pop_back();
        return stack;
    }
} stacks;

void (*entry)(void**);
void** arguments;
Thread* current;            // null while a thread runs without a fiber
Block* current_block;
std::vector<Block>* blocks;
jmp_buf scheduler;
std::string failure;
Races races;
bool check_races;  // where the kernel was compiled so that it announces its accesses

std::string name_of(const Thread& thread) {
    char text[96];
    const dim3 &b = (*blocks)[thread.block].index, &t = thread.index;
    std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.x, t.y, t.z, b.x, b.y, b.z);
    return text;
}

void leave() {
    if (!_setjmp(current->paused)) _longjmp(scheduler, 1);
}

void wait(State state, int line, bool orders = true) {
    if (current == nullptr) throw std::runtime_error("a barrier in a kernel launched without fibers");
    current->state = state;
    current->orders = orders;
    current->line = line;
    leave();
}

void run_fiber() {
    entry(arguments);
    if (current->copies.size() > 1 || !current->copies[0].empty())
        failure = name_of(*current) + " returned before its copies arrived";
    current->state = DONE;
    leave();
}

void resume(Thread& thread) {
    current = &thread;
    current_block = &(*blocks)[thread.block];
    threadIdx = thread.index;
    blockIdx = current_block->index;
    thread.spun = false;
    thread.polls = 0;
    if (!_setjmp(scheduler)) {
        if (std::exchange(thread.begun, true)) _longjmp(thread.paused, 1);
        setcontext(&thread.context);
    }
    current = nullptr;
}

void begin(Block& block, unsigned number, std::size_t shared) {
    block.shared.assign(shared + FENCE, 0xff);  // NaN in every floating-point type
    block.threads.resize(blockDim.x * blockDim.y * blockDim.z);
    for (unsigned k = 0; k < block.threads.size(); ++k) {
        Thread& thread = block.threads[k];
        thread.index = {k % blockDim.x, k / blockDim.x % blockDim.y, k / blockDim.x / blockDim.y};
        thread.block = number;
        thread.number = k;
        thread.id = number * block.threads.size() + k;
        thread.state = READY;
        thread.begun = false;
        thread.what = host::NOTHING;
        thread.copies.resize(1);
        block.all.push_back(&thread);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks.take();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_fiber, 0);
    }
}

void end(Block& block, std::size_t shared) {
    for (Thread& thread : block.threads) stacks.free.push_back(thread.context.uc_stack.ss_sp);
    for (std::size_t k = shared; k < block.shared.size(); ++k)
        if (block.shared[k] != 0xff && failure.empty()) failure = "a write behind the shared memory";
}

// Let all threads go that wait in `state`, if every one of `group` does and at one line. Report where they
// disagree: a barrier that some threads do not reach.
bool release(const Group& group, State state) {
    const auto waits = [state](const Thread* thread) { return thread->state == state; };
    const auto first = std::find_if(group.begin(), group.end(), waits);
    if (first == group.end()) return false;
    for (const Thread* thread : group) {
        const bool elsewhere = waits(thread) && thread->line != (*first)->line;
        if (thread->state != DONE && !elsewhere) continue;
        failure = "divergent barrier: " + name_of(**first) + " waits in line " +
                  std::to_string((*first)->line) + ", " + name_of(*thread) +
                  (elsewhere ? " in line " + std::to_string(thread->line) : " has returned");
        return false;
    }
    if (!std::all_of(group.begin(), group.end(), waits)) return false;
    for (Thread* thread : group) thread->state = READY;
    if (check_races && (*first)->orders) {
        std::vector<unsigned> ids;
        for (const Thread* thread : group) ids.push_back(thread->id);
        races.meet(ids);
    }
    return true;
}

float number_of(host::Multiply what, unsigned bits) {
    if (what == host::BFLOAT16) return float_of_bits(bits << 16);
    if (what == host::FLOAT16) return float_of_half(bits);
    if (bits & 0x1fff) failure = "an operand of mma_16x8x8 that tf32() has not rounded";
    return float_of_bits(bits);
}

// d += a b of a whole warp. Where its numbers lie in the registers of the lanes is PTX's, by "Matrix
// Fragments for mma.m16n8k16" and "for mma.m16n8k8": a register holds one tf32 or two neighbouring halves.
void multiply_warp(const Group& warp) {
    const host::Multiply what = warp[0]->what;
    const unsigned wide = what == host::TF32 ? 1 : 2;  // numbers in a register
    const unsigned depth = 8 * wide;
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned n = 0; n < wide; ++n) {
            const unsigned group = lane / 4, k = lane % 4 * wide + n, shift = 16 * n;
            const unsigned ones = wide == 2 ? 0xffff : 0xffffffff;
            for (unsigned r = 0; r < 4; ++r)
                a[group + r % 2 * 8][k + r / 2 * depth / 2] =
                    number_of(what, warp[lane]->a[r] >> shift & ones);
            for (unsigned r = 0; r < 2; ++r)
                b[k + r * depth / 2][group] = number_of(what, warp[lane]->b[r] >> shift & ones);
        }
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned r = 0; r < 4; ++r) {
            const unsigned row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
            double sum = warp[lane]->d[r];
            for (unsigned k = 0; k < depth; ++k) sum += double(a[row][k]) * b[k][column];
            warp[lane]->d[r] = float(sum);
        }
}

bool release_warp(Block& block, Thread& thread) {
    Group group;
    const unsigned first = thread.number / 32 * 32;
    for (unsigned k = 0; k < 32 && first + k < block.threads.size(); ++k)
        if (thread.mask >> k & 1) group.push_back(&block.threads[first + k]);
    for (Thread* other : group) {
        if (other->state != AT_WARP) continue;
        if (other->mask != thread.mask || other->what != thread.what) failure = "masks of a warp differ";
        if (other->what != host::NOTHING && group.size() < 32) failure = "a product needs a warp of 32 lanes";
    }
    if (std::find(group.begin(), group.end(), &thread) == group.end())
        failure = name_of(thread) + " is not in its own mask";
    if (!failure.empty() || !release(group, AT_WARP)) return false;
    if (thread.what != host::NOTHING) {
        multiply_warp(group);
        for (Thread* other : group) other->what = host::NOTHING;
        return true;
    }
    uint64_t lanes[32] = {};
    for (Thread* other : group) lanes[other->number % 32] = other->value;
    for (Thread* other : group) std::memcpy(other->lanes, lanes, sizeof lanes);
    return true;
}

bool release_warps(Block& block) {
    bool released = false;
    for (Thread& thread : block.threads)
        if (thread.state == AT_WARP && failure.empty()) released |= release_warp(block, thread);
    return released;
}

bool release_block(Block& block) {
    if (!release(block.all, AT_BLOCK)) return false;
    uint64_t count = 0;
    for (Thread* thread : block.all) count += thread->value;
    for (Thread* thread : block.all) thread->lanes[0] = count;
    return true;
}

// Gives each of the threads a turn; whether one of them did more than to spin, and whether there was one.
struct Turns {
    bool ran, advanced;
};
template <class Threads>
Turns run_each(const Threads& threads) {
    Turns turns{};
    for (Thread* thread : threads) {
        if (thread->state != READY) continue;
        resume(*thread);
        if (!failure.empty()) break;
        turns.ran = true;
        turns.advanced |= !thread->spun;
    }
    return turns;
}

bool release_all(std::vector<Block>& alive, const Group& all) {
    bool released = false;
    for (Block& block : alive) released |= release_warps(block) | release_block(block);
    return released | release(all, AT_GRID);
}

// One round in which whole warps come in an order of precedence: the first one that can do more than spin
// does, until it cannot. So some are as far ahead of the last as the kernel allows.
Turns run_uneven(std::vector<Block>& alive, const std::vector<Group>& warps) {
    Turns turns{};
    for (const Group& warp : warps) {
        for (;;) {
            const Turns now = run_each(warp);
            turns.ran |= now.ran;
            if (!now.advanced || !failure.empty()) break;
            turns.advanced = true;
            if (!release_warps(alive[warp[0]->block])) break;
        }
        if (turns.advanced || !failure.empty()) break;
    }
    return turns;
}

// The warps of all blocks in random order; half of the time those of a block together.
std::vector<Group> warps_of(std::vector<Block>& alive, std::mt19937& random) {
    std::vector<Group> warps;
    std::vector<unsigned> order(alive.size());
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned k : order) {
        const Group& all = alive[k].all;
        const std::size_t before = warps.size();
        for (std::size_t n = 0; n < all.size(); n += 32)
            warps.emplace_back(all.begin() + n, all.begin() + std::min(n + 32, all.size()));
        std::shuffle(warps.begin() + before, warps.end(), random);
    }
    if (random() % 2) std::shuffle(warps.begin(), warps.end(), random);
    return warps;
}

void run_together(std::vector<Block>& alive, Order order, std::mt19937& random) {
    blocks = &alive;
    if (check_races) races.begin(alive.size() * alive[0].threads.size());
    Group all;
    for (Block& block : alive) all.insert(all.end(), block.all.begin(), block.all.end());
    const std::vector<Group> warps = order == UNEVEN ? warps_of(alive, random) : std::vector<Group>();
    Group turn = all;
    if (order == REVERSE) std::reverse(turn.begin(), turn.end());
    for (int idle = 0; failure.empty();) {
        if (order == SHUFFLED) std::shuffle(turn.begin(), turn.end(), random);
        const Turns turns = order == UNEVEN ? run_uneven(alive, warps) : run_each(turn);
        if (!failure.empty()) return;
        const bool released = release_all(alive, all);
        const auto unfinished = [](const Thread* thread) { return thread->state != DONE; };
        const auto left = std::find_if(all.begin(), all.end(), unfinished);
        if (left == all.end()) return;
        idle = turns.advanced || released ? 0 : idle + 1;
        if (!failure.empty()) return;
        if (!turns.ran && !released)
            failure = "deadlock: " + name_of(**left) + " waits in line " + std::to_string((*left)->line);
        if (idle <= MOST_IDLE_ROUNDS) continue;
        const auto spins = [](const Thread* thread) { return thread->state == READY; };
        const Thread& one = **std::find_if(all.begin(), all.end(), spins);
        failure = "deadlock: every thread spins, " + name_of(one) + " in line " + std::to_string(one.line);
    }
}

// Threads that never wait need no fibers: they run one after the other.
void run_alone(const std::vector<dim3>& order_of_blocks, Order order, std::mt19937& random) {
    std::vector<unsigned> turn(blockDim.x * blockDim.y * blockDim.z);
    std::iota(turn.begin(), turn.end(), 0u);
    if (order == REVERSE) std::reverse(turn.begin(), turn.end());
    current = nullptr;
    for (const dim3& block : order_of_blocks) {
        blockIdx = block;
        if (order == SHUFFLED) std::shuffle(turn.begin(), turn.end(), random);
        for (unsigned k : turn) {
            threadIdx = {k % blockDim.x, k / blockDim.x % blockDim.y, k / blockDim.x / blockDim.y};
            entry(arguments);
        }
    }
}

}  // namespace

namespace host {

unsigned char* shared_memory() {
    if (current == nullptr) throw std::runtime_error("shared memory in a kernel launched without fibers");
    return current_block->shared.data();
}
void block_barrier(int line) {
    if (current != nullptr) current->value = 0;
    wait(AT_BLOCK, line);
}
unsigned block_count(bool predicate, int line) {
    if (current != nullptr) current->value = predicate;
    wait(AT_BLOCK, line);
    return unsigned(current->lanes[0]);
}
void whole_grid_barrier(int line) { wait(AT_GRID, line); }
const uint64_t* warp_barrier(unsigned mask, uint64_t value, int line, bool orders) {
    if (current != nullptr) {
        current->mask = mask;
        current->value = value;
    }
    wait(AT_WARP, line, orders);
    return current->lanes;
}
void yield(int line) {
    if (current == nullptr) throw std::runtime_error("a spin in a kernel launched without fibers");
    current->spun = true;
    current->line = line;
    leave();
}
void count_poll(int line) {
    if (current != nullptr && ++current->polls > MOST_POLLS) fail("a spin without pause()", line);
}
void multiply(Multiply what, float* d, const unsigned* a, const unsigned* b, int line) {
    if (current == nullptr) throw std::runtime_error("a product in a kernel launched without fibers");
    current->what = what;
    current->d = d;
    current->a = a;
    current->b = b;
    current->mask = 0xffffffff;
    wait(AT_WARP, line, false);
}
void release(const void* where, bool add) {
    if (check_races && current != nullptr) races.release(current->id, where, add);
}
void acquire(const void* where) {
    if (check_races && current != nullptr) races.acquire(current->id, where);
}
// An access of the current thread to memory that others may know; `from` is where the code is.
void announce(const void* where, std::size_t size, bool write, const void* from) {
    if (!check_races || current == nullptr) return;
    const auto within = [where](const void* start, std::size_t bytes) {
        return std::size_t(static_cast<const char*>(where) - static_cast<const char*>(start)) < bytes;
    };
    if (within(current->context.uc_stack.ss_sp, STACK)) return;
    for (const dim3* own : {&threadIdx, &blockIdx, &blockDim, &gridDim})
        if (within(own, sizeof(dim3))) return;
    const Races::Conflict conflict = races.access(current->id, where, size, write);
    if (!conflict.found) return;
    const std::size_t size_of_block = current_block->threads.size();
    const Thread& other = (*blocks)[conflict.thread / size_of_block].threads[conflict.thread % size_of_block];
    failure = "a race: " + name_of(*current) + (write ? " writes" : " reads") + " what " + name_of(other) +
              (conflict.write ? " wrote" : " reads");
    Dl_info library;
    if (from != nullptr && dladdr(from, &library)) {
        const std::size_t place = std::size_t(from) - std::size_t(library.dli_fbase) - 1;  // for addr2line
        char text[32];
        std::snprintf(text, sizeof text, " at +%#zx", place);
        failure += text;
    }
    leave();
}
void copy_async(void* shared, const void* global, int line) {
    const auto* const to = static_cast<unsigned char*>(shared);
    const auto& memory = current_block->shared;
    if (to < memory.data() || to + 16 > memory.data() + memory.size() - FENCE)
        fail("a copy to outside of the shared memory", line);
    if (std::size_t(shared) % 16) fail("a misaligned copy", line);
    announce(shared, 16, true);
    if (global != nullptr) announce(global, 16, false);
    std::memset(shared, 0xff, 16);
    current->copies.back().push_back({shared, global});
}
void copy_commit() { current->copies.emplace_back(); }
void copy_wait(unsigned later) {
    auto& copies = current->copies;
    while (copies.size() > later + 1) {
        for (const Copy& copy : copies.front()) {  // they may happen at any time from the call to the wait
            announce(copy.to, 16, true);
            if (copy.from != nullptr) announce(copy.from, 16, false);
            if (copy.from == nullptr) std::memset(copy.to, 0, 16);
            else std::memcpy(copy.to, copy.from, 16);
        }
        copies.erase(copies.begin());
    }
}
unsigned lane() { return current->number % 32; }
void fail(const char* what, int line) {
    failure = std::string(what) + ", line " + std::to_string(line) + ": " + name_of(*current);
    leave();  // and never comes back
    std::abort();
}

}  // namespace host

// Runs a kernel; returns what went wrong, or null. `mode`: 0 without fibers, 1 block after block, 2 all
// blocks at the same time (a cooperative launch).
extern "C" const char* host_run(
    void (*kernel)(void**), void** args, const unsigned* grid, const unsigned* block, std::size_t shared,
    int mode, int order, unsigned seed) {
    std::mt19937 random(seed);
    failure.clear();
    entry = kernel;
    arguments = args;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    std::vector<dim3> turn;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) turn.push_back({x, y, z});
    if (order == REVERSE) std::reverse(turn.begin(), turn.end());
    if (order == SHUFFLED) std::shuffle(turn.begin(), turn.end(), random);
    try {
        if (mode == 0) {
            run_alone(turn, Order(order), random);
        } else {
            const std::size_t together = mode == 2 ? turn.size() : 1;
            for (std::size_t k = 0; k < turn.size() && failure.empty(); k += together) {
                std::vector<Block> alive(together);
                for (unsigned n = 0; n < together; ++n) {
                    alive[n].index = turn[k + n];
                    begin(alive[n], n, shared);
                }
                run_together(alive, Order(order), random);
                for (Block& one : alive) end(one, shared);
            }
        }
    } catch (const std::exception& error) {
        failure = error.what();
    }
    return failure.empty() ? nullptr : failure.c_str();
}

// What -fsanitize=thread calls before an access.
#define FROM __builtin_return_address(0)
#define ACCESS(size)                                                                                 \
    extern "C" void __tsan_read##size(void* p) { host::announce(p, size, false, FROM); }             \
    extern "C" void __tsan_write##size(void* p) { host::announce(p, size, true, FROM); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* p, std::size_t size) { host::announce(p, size, false, FROM); }
extern "C" void __tsan_write_range(void* p, std::size_t size) { host::announce(p, size, true, FROM); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() { check_races = true; }

// What -fsanitize=alignment calls before an access at an address that is no multiple of what its type needs.
extern "C" void __ubsan_handle_type_mismatch_v1(void* data, void* address) {
    struct Place {
        const char* file;
        unsigned line, column;
    };
    const int line = int(static_cast<Place*>(data)->line);
    if (current != nullptr) host::fail("a misaligned access", line);
    throw std::runtime_error("a misaligned access, line " + std::to_string(line));
}

// ------------------------------------------------------------------------------------ half precision

float float_of_half(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
    return sign * std::ldexp(float(1024 + fraction), exponent - 25);
}

// To nearest, ties to even, as the device rounds; the host's default rounding does the work.
unsigned short half_of_float(float x) {
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | (unsigned short)std::nearbyint(std::ldexp(size, 24));
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // in [1/2, 1)
    const unsigned mantissa = unsigned(std::nearbyint(std::ldexp(fraction, 11)));  // in [1024, 2048]
    return sign | (unsigned short)(((exponent + 14 - 1) << 10) + mantissa);
}
