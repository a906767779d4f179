// A stand-in for NVIDIA's libcuda.so.1: what its parts share. See README.md for what it proves and what it can't.
//
// Only what the runtime uses is here, with the driver API's binary layouts of CUDA 13.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

enum Result : int {  // CUresult
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

enum NodeKind : int {  // CUgraphNodeType where ≥ 0
    KERNEL = 0,
    COPY = 1,
    SET = 2,
    HOST = 3,
    CONDITIONAL = 13,
    MARKER = -1,
    MEMORY = -2
};
enum CaptureMode : int { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };
enum CaptureStatus : int { NONE = 0, ACTIVE = 1, INVALIDATED = 2 };

struct Graph;

struct Conditional {  // a node's choice among graphs
    uint64_t handle;
    int type;
    std::vector<Graph*> bodies;
};

struct Op {
    NodeKind kind;
    std::function<void()> run;
    std::shared_ptr<Conditional> conditional = nullptr;
};

struct UserObject {
    void* pointer;
    void (*destroy)(void*);
    unsigned references;
};

struct Graph {
    std::vector<std::shared_ptr<Op>> nodes = {};  // in the order of their capture: a chain
    std::vector<UserObject*> objects = {};
    bool is_body = false;  // of a conditional node, which owns it
};

struct GraphExec {
    std::vector<std::shared_ptr<Op>> nodes;
    std::vector<UserObject*> objects;
    std::vector<uint64_t> handles;  // of the conditions in it
};

// Work waits here until something needs its result.
struct Stream {
    std::deque<Op> queue;
    Graph* capture = nullptr;
    CaptureStatus status = NONE;
    CaptureMode mode = RELAXED;
    Op* last = nullptr;  // what the next captured work comes after
    std::thread::id thread;
};

struct Marker {  // a place in a stream
    Stream* stream;
    bool passed = false;
};

struct Event {
    std::shared_ptr<Marker> marker;
};

struct Device {
    std::recursive_mutex mutex;
    Result failure = SUCCESS;  // as on a GPU, the first failure of queued work stays, and is reported by every later wait
    std::unordered_map<std::string, long> counts;
    std::vector<Stream*> streams;
};

Device& device();
inline std::lock_guard<std::recursive_mutex> locked() { return std::lock_guard<std::recursive_mutex>(device().mutex); }
inline void count(const char* what, long difference = 1) { device().counts[what] += difference; }
long setting(const char* name, long otherwise);  // an environment variable

void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));
void fail(Result failure, const char* format, ...) __attribute__((format(printf, 2, 3)));

// streams.cpp
Result submit(Stream* stream, NodeKind kind, std::function<void()> run);
void run_all();
bool capture_forbids(const char* what);  // and ends the capture, if so

// memory.cpp
void check_canaries();
void set_accessible(bool accessible);  // device memory, to this process
bool is_usable(uint64_t address, size_t count);  // a live allocation, of the device or pinned
size_t free_memory();
size_t total_memory();

// graphs.cpp
void release(UserObject* object);

// conditions.cpp
struct Condition {
    Graph* graph;  // that holds its node
    unsigned otherwise;  // its value when a graph is launched, where it has one
    bool has_default;
    bool is_used = false;  // by a node
    unsigned value = 0;
};
void set_condition(uint64_t handle, unsigned value);  // by the kernel that is running
std::vector<std::shared_ptr<Op>> snapshot(const Graph& graph, std::vector<uint64_t>& handles, Result& result);
void launch_with_conditions(const std::vector<std::shared_ptr<Op>>& nodes, const std::vector<uint64_t>& handles);

// The functions that cuGetProcAddress gives out.
struct Entry {
    const char* name;
    int version;  // of CUDA, from which on the function has this form
    void* function;
};
const std::vector<Entry>& device_entries();
const std::vector<Entry>& memory_entries();
const std::vector<Entry>& stream_entries();
const std::vector<Entry>& graph_entries();
const std::vector<Entry>& kernel_entries();
const std::vector<Entry>& condition_entries();

#define ENTRY(name, version, function) Entry{name, version, reinterpret_cast<void*>(function)}
