#include "scheduler.h"

#include <csetjmp>
#include <csignal>
#include <memory>
#include <pthread.h>
#include <random>
#include <ucontext.h>
#include <vector>

namespace host_cuda {
namespace {

constexpr std::size_t STACK_BYTES = 64 * 1024;
constexpr unsigned MOST_THREADS = 1024;

enum class State { running, at_barrier, at_exchange, finished };

struct Fibre {
    State state = State::finished;
    dim3 index{};
    bool predicate = false;       // of the barrier
    unsigned value = 0, mask = 0;  // of the exchange
    int count = 0;                // what the barrier gave
    bool started = false;
    jmp_buf place;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

std::vector<Fibre> fibres;  // kept from launch to launch; a fibre that has finished a block's thread waits for the next
Fibre* current = nullptr;
std::vector<Condition> conditions_set;
jmp_buf scheduler;
ucontext_t scheduler_context;
Kernel kernel_now = nullptr;
void** arguments_now = nullptr;

sigjmp_buf outside;  // of the kernel, for an access that faults
pthread_t kernel_thread;

// Tests put pages that can't be accessed around their buffers. Another thread's fault is not ours: it ends the process.
void on_fault(int signal) {
    if (pthread_equal(pthread_self(), kernel_thread)) siglongjmp(outside, 1);
    std::signal(signal, SIG_DFL);
}

class FaultHandler {
public:
    FaultHandler() {
        struct sigaction action {};
        action.sa_handler = on_fault;
        kernel_thread = pthread_self();
        sigaction(SIGSEGV, &action, &before_);
    }
    ~FaultHandler() { sigaction(SIGSEGV, &before_, nullptr); }

private:
    struct sigaction before_;
};

void leave() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void fibre_main() {
    for (;;) {
        kernel_now(arguments_now);
        current->state = State::finished;
        leave();
    }
}

// Runs a fibre until it waits or finishes. swapcontext asks the kernel for signal masks, so only its first start does.
__attribute__((noinline)) void resume(Fibre& fibre) {
    current = &fibre;
    threadIdx = fibre.index;
    fibre.state = State::running;
    if (_setjmp(scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    fibre.stack = std::make_unique<char[]>(STACK_BYTES);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fibre.context, fibre_main, 0);
    swapcontext(&scheduler_context, &fibre.context);
}

using Order = std::vector<unsigned>;

Order order_of(unsigned count, std::mt19937_64* shuffle) {
    Order order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    for (unsigned i = count; shuffle != nullptr && i > 1; --i) std::swap(order[i - 1], order[(*shuffle)() % i]);
    return order;
}

const char* exchange(Fibre* warp) {
    unsigned values[WARP_SIZE];
    for (unsigned lane = 0; lane < WARP_SIZE; ++lane) {
        if (warp[lane].state != State::at_exchange) return "lanes of a warp part at a shuffle";
        if (warp[lane].mask != warp[0].mask) return "lanes of a warp shuffle differently";
        values[lane] = warp[lane].value;
    }
    for (unsigned lane = 0; lane < WARP_SIZE; ++lane) warp[lane].value = values[(lane ^ warp[0].mask) % WARP_SIZE];
    return nullptr;
}

// Runs a warp until all its lanes are at the block's barrier or have finished.
const char* run_warp(Fibre* warp, const Order& lanes) {
    for (;;) {
        bool exchanging = false;
        for (const unsigned lane : lanes) {
            if (warp[lane].state != State::at_barrier && warp[lane].state != State::finished) resume(warp[lane]);
        }
        for (unsigned lane = 0; lane < WARP_SIZE; ++lane) exchanging |= warp[lane].state == State::at_exchange;
        if (!exchanging) return nullptr;
        if (const char* error = exchange(warp)) return error;
    }
}

const char* run_block(unsigned threads, std::mt19937_64* shuffle) {
    const Order warps = order_of(threads / WARP_SIZE, shuffle), lanes = order_of(WARP_SIZE, shuffle);
    for (unsigned i = 0; i < threads; ++i) {
        fibres[i].state = State::running;
        fibres[i].index = dim3{i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    for (;;) {
        for (const unsigned warp : warps) {
            if (const char* error = run_warp(&fibres[warp * WARP_SIZE], lanes)) return error;
        }
        unsigned waiting = 0;
        int count = 0;
        for (unsigned i = 0; i < threads; ++i) {
            waiting += fibres[i].state == State::at_barrier;
            count += fibres[i].state == State::at_barrier && fibres[i].predicate;
        }
        if (waiting == 0) return nullptr;
        if (waiting != threads) return "threads of a block part at a barrier";
        for (unsigned i = 0; i < threads; ++i) {
            fibres[i].count = count;
            fibres[i].state = State::running;
        }
    }
}

const char* run_blocks(unsigned threads, unsigned long long seed) {
    std::mt19937_64 generator(seed);
    std::mt19937_64* const shuffle = seed == 0 ? nullptr : &generator;
    for (const unsigned i : order_of(gridDim.x * gridDim.y * gridDim.z, shuffle)) {
        blockIdx = dim3{i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
        if (const char* error = run_block(threads, shuffle)) return error;
    }
    return nullptr;
}

}  // namespace

int wait_for_block(bool predicate) {
    current->predicate = predicate;
    current->state = State::at_barrier;
    leave();
    return current->count;
}

unsigned exchange_in_warp(unsigned lanes, unsigned value, unsigned mask) {
    current->value = value;
    current->mask = lanes == 0xffffffffu ? mask : WARP_SIZE;  // anything but the whole warp: refused in exchange()
    current->state = State::at_exchange;
    leave();
    return current->value;
}

void set_condition(unsigned long long handle, unsigned value) { conditions_set.push_back({handle, value}); }

const std::vector<Condition>& conditions() { return conditions_set; }

const char* run_grid(Kernel kernel, void** arguments, dim3 grid, dim3 block, unsigned long long seed) {
    const unsigned long long threads = 1ull * block.x * block.y * block.z;
    if (threads == 0 || threads > MOST_THREADS || threads % WARP_SIZE != 0) return "a block is 1 to 32 whole warps";
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return "the grid's size";
    if (fibres.empty()) fibres = std::vector<Fibre>(MOST_THREADS);
    conditions_set.clear();
    kernel_now = kernel;
    arguments_now = arguments;
    gridDim = grid;
    blockDim = block;
    const FaultHandler handler;
    const char* const error = sigsetjmp(outside, 1) == 0 ? run_blocks(static_cast<unsigned>(threads), seed)
                                                         : "memory is accessed that it may not";
    if (error != nullptr) fibres.clear();  // they stand in the middle of a kernel
    return error;
}

}  // namespace host_cuda
