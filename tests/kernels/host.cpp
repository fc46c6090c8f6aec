// The scheduler of host.h: every thread of a block is a fiber that runs until it waits.

#include "host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <stdexcept>
#include <cstdlib>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

enum Order { FORWARD, REVERSE, SHUFFLED };
enum State { READY, AT_BLOCK, AT_WARP, AT_GRID, DONE };

constexpr std::size_t STACK = 64 << 10;
constexpr std::size_t FENCE = 64;         // bytes behind the shared memory that nobody may write
constexpr int MOST_IDLE_ROUNDS = 10000;  // in which every thread only spins

struct Thread {
    ucontext_t context;
    dim3 index;
    unsigned block, number;
    State state;
    int line;
    unsigned mask;
    uint64_t value, lanes[32];
    bool spun;
};

struct Block {
    dim3 index;
    std::vector<unsigned char> shared;
    std::vector<Thread> threads;
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
ucontext_t scheduler;
std::string failure;

std::string name_of(const Thread& thread) {
    char text[96];
    const dim3 &b = (*blocks)[thread.block].index, &t = thread.index;
    std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.x, t.y, t.z, b.x, b.y, b.z);
    return text;
}

void wait(State state, int line) {
    if (current == nullptr) throw std::runtime_error("a barrier in a kernel launched without fibers");
    current->state = state;
    current->line = line;
    swapcontext(&current->context, &scheduler);
}

void run_fiber() {
    entry(arguments);
    current->state = DONE;
    swapcontext(&current->context, &scheduler);
}

void resume(Thread& thread) {
    current = &thread;
    current_block = &(*blocks)[thread.block];
    threadIdx = thread.index;
    blockIdx = current_block->index;
    thread.spun = false;
    swapcontext(&scheduler, &thread.context);
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
        thread.state = READY;
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
bool release(std::vector<Thread*>& group, State state) {
    const auto waits = [state](const Thread* thread) { return thread->state == state; };
    const auto first = std::find_if(group.begin(), group.end(), waits);
    if (first == group.end()) return false;
    const std::string where = name_of(**first) + " waits in line " + std::to_string((*first)->line);
    for (Thread* thread : group) {
        if (thread->state == DONE)
            failure = "divergent barrier: " + where + ", " + name_of(*thread) + " has returned";
        else if (waits(thread) && thread->line != (*first)->line)
            failure = "divergent barrier: " + where + ", " + name_of(*thread) + " in line " +
                      std::to_string(thread->line);
        if (!failure.empty()) return false;
    }
    if (!std::all_of(group.begin(), group.end(), waits)) return false;
    for (Thread* thread : group) thread->state = READY;
    return true;
}

bool release_warps(Block& block) {
    bool released = false;
    for (Thread& thread : block.threads) {
        if (thread.state != AT_WARP || !failure.empty()) continue;
        std::vector<Thread*> group;
        const unsigned first = thread.number / 32 * 32;
        for (unsigned k = 0; k < 32 && first + k < block.threads.size(); ++k)
            if (thread.mask >> k & 1) group.push_back(&block.threads[first + k]);
        for (Thread* other : group)
            if (other->state == AT_WARP && other->mask != thread.mask) failure = "masks of a warp differ";
        if (std::find(group.begin(), group.end(), &thread) == group.end())
            failure = name_of(thread) + " is not in its own mask";
        if (!release(group, AT_WARP)) continue;
        released = true;
        uint64_t lanes[32] = {};
        for (Thread* other : group) lanes[other->number % 32] = other->value;
        for (Thread* other : group) std::memcpy(other->lanes, lanes, sizeof lanes);
    }
    return released;
}

bool release_block(Block& block) {
    std::vector<Thread*> group;
    for (Thread& thread : block.threads) group.push_back(&thread);
    if (!release(group, AT_BLOCK)) return false;
    uint64_t count = 0;
    for (Thread* thread : group) count += thread->value;
    for (Thread* thread : group) thread->lanes[0] = count;
    return true;
}

void run_together(std::vector<Block>& alive, Order order, std::mt19937& random) {
    blocks = &alive;
    std::vector<Thread*> all;
    for (Block& block : alive)
        for (Thread& thread : block.threads) all.push_back(&thread);
    std::vector<Thread*> turn = all;
    if (order == REVERSE) std::reverse(turn.begin(), turn.end());
    for (int idle = 0; failure.empty();) {
        if (order == SHUFFLED) std::shuffle(turn.begin(), turn.end(), random);
        bool ran = false, advanced = false;
        for (Thread* thread : turn) {
            if (thread->state != READY) continue;
            resume(*thread);
            if (!failure.empty()) return;
            ran = true;
            advanced |= !thread->spun;
        }
        bool released = false;
        for (Block& block : alive) released |= release_warps(block) | release_block(block);
        released |= release(all, AT_GRID);
        const auto done = [](const Thread* thread) { return thread->state == DONE; };
        if (std::all_of(all.begin(), all.end(), done)) return;
        if (!ran && !released && failure.empty()) {
            const auto unfinished = [](const Thread* thread) { return thread->state != DONE; };
            const auto stuck = std::find_if(all.begin(), all.end(), unfinished);
            failure = "deadlock: " + name_of(**stuck) + " waits in line " + std::to_string((*stuck)->line);
        }
        idle = advanced || released ? 0 : idle + 1;
        if (idle > MOST_IDLE_ROUNDS) failure = "deadlock: every thread spins";
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
const uint64_t* warp_barrier(unsigned mask, uint64_t value, int line) {
    if (current != nullptr) {
        current->mask = mask;
        current->value = value;
    }
    wait(AT_WARP, line);
    return current->lanes;
}
void yield() {
    if (current == nullptr) throw std::runtime_error("a spin in a kernel launched without fibers");
    current->spun = true;
    swapcontext(&current->context, &scheduler);
}
unsigned lane() { return current->number % 32; }
void fail(const char* what, int line) {
    failure = std::string(what) + ", line " + std::to_string(line) + ": " + name_of(*current);
    swapcontext(&current->context, &scheduler);  // and never comes back
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
