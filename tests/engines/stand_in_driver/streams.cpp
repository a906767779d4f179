// Streams and events. Nothing that is put on a stream runs before something waits for it: what reads a result too early
// reads what was there before. With STAND_IN_EAGER=1 everything runs at once, the other extreme of what a GPU may do.
#include "driver.h"

#include <algorithm>

namespace {

// The default streams have reserved handles.
Stream* stream_of(Stream* handle) {
    static Stream* const standard = new Stream;
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? standard : handle;
}

struct Unlocked {  // device memory is open to this process only while queued work runs
    Unlocked() { set_accessible(true); }
    ~Unlocked() {
        check_canaries();
        set_accessible(false);
    }
};

void run_next(Stream* stream) {
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    op.run();
    if (op.kind != MARKER) count("operations");
}

void run_until(const std::shared_ptr<Marker>& marker) {
    Unlocked unlocked;
    while (!marker->passed && !marker->stream->queue.empty()) run_next(marker->stream);
}

void run_stream(Stream* stream) {
    Unlocked unlocked;
    while (!stream->queue.empty()) run_next(stream);
}

Result refuse_wait_in_capture(Stream* stream) {
    if (stream->status == NONE) return SUCCESS;
    complain("a stream is waited for while it is captured");
    stream->status = INVALIDATED;
    return CAPTURE_UNSUPPORTED;
}

Result cuStreamCreateWithPriority(Stream** out, unsigned, int) {
    auto lock = locked();
    *out = new Stream;
    device().streams.push_back(*out);
    count("live_streams");
    return SUCCESS;
}

Result cuStreamCreate(Stream** out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }

Result cuStreamDestroy(Stream* stream) {  // what is queued still runs, as the driver promises
    auto lock = locked();
    run_stream(stream);
    auto& streams = device().streams;
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    count("live_streams", -1);
    delete stream;
    return SUCCESS;
}

Result cuStreamSynchronize(Stream* stream) {
    auto lock = locked();
    if (const Result refusal = refuse_wait_in_capture(stream_of(stream))) return refusal;
    run_stream(stream_of(stream));
    count("stream_waits");
    return device().failure;
}

Result cuCtxSynchronize() {
    auto lock = locked();
    if (capture_forbids("cuCtxSynchronize")) return CAPTURE_UNSUPPORTED;
    run_all();
    count("device_waits");
    return device().failure;
}

Result cuStreamQuery(Stream* stream) {
    auto lock = locked();
    return stream->queue.empty() ? device().failure : NOT_READY;
}

Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    auto lock = locked();
    auto marker = event->marker;
    if (!marker) return SUCCESS;
    return submit(stream, MARKER, [marker] { run_until(marker); });
}

Result cuStreamGetPriority(Stream*, int* priority) {
    *priority = 0;
    return SUCCESS;
}

Result cuStreamGetFlags(Stream*, unsigned* flags) {
    *flags = 1;  // does not wait for the default stream
    return SUCCESS;
}

Result cuStreamIsCapturing(Stream* stream, int* status) {
    auto lock = locked();
    *status = stream_of(stream)->status;
    return SUCCESS;
}

Result cuEventCreate(Event** out, unsigned) {
    auto lock = locked();
    *out = new Event;
    count("live_events");
    return SUCCESS;
}

Result cuEventDestroy(Event* event) {
    auto lock = locked();
    delete event;
    count("live_events", -1);
    return SUCCESS;
}

Result cuEventRecord(Event* event, Stream* stream) {
    auto lock = locked();
    auto marker = std::make_shared<Marker>(Marker{stream_of(stream)});
    event->marker = marker;
    return submit(stream, MARKER, [marker] { marker->passed = true; });
}

Result cuEventQuery(Event* event) {
    auto lock = locked();
    return !event->marker || event->marker->passed ? device().failure : NOT_READY;
}

Result cuEventSynchronize(Event* event) {
    auto lock = locked();
    if (event->marker) run_until(event->marker);
    count("event_waits");
    return device().failure;
}

}  // namespace

Result submit(Stream* handle, NodeKind kind, std::function<void()> run) {
    Stream* const stream = stream_of(handle);
    if (stream->status == INVALIDATED) return CAPTURE_INVALIDATED;
    if (stream->status == ACTIVE) {
        if (kind < 0) {
            complain("something is captured that only a live stream can do");
            stream->status = INVALIDATED;
            return CAPTURE_UNSUPPORTED;
        }
        stream->capture->nodes.push_back(std::make_shared<Op>(Op{kind, std::move(run)}));
        stream->last = stream->capture->nodes.back().get();
        return SUCCESS;
    }
    stream->queue.push_back(Op{kind, std::move(run)});
    if (setting("STAND_IN_EAGER", 0)) run_stream(stream);
    return SUCCESS;
}

void run_all() {
    for (Stream* stream : device().streams) run_stream(stream);
}

// Called by its symbol: cuda.bindings frees a host function's data after the first run, and a graph runs it again.
extern "C" Result cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    auto lock = locked();
    return submit(stream, HOST, [function, data] { function(data); });
}

// What a test's engine puts on a stream where a real one puts kernels: so it may stand wherever a kernel may.
extern "C" Result stand_in_launch(Stream* stream, void (*function)(void*), void* data) {
    auto lock = locked();
    return submit(stream, KERNEL, [function, data] { function(data); });
}

bool capture_forbids(const char* what) {
    bool forbidden = false;
    for (Stream* stream : device().streams) {
        const bool strict =
            stream->mode == GLOBAL || (stream->mode == THREAD_LOCAL && stream->thread == std::this_thread::get_id());
        if (stream->status != ACTIVE || !strict) continue;
        complain("%s can't be captured", what);
        stream->status = INVALIDATED;
        forbidden = true;
    }
    return forbidden;
}

const std::vector<Entry>& stream_entries() {
    static const std::vector<Entry> entries{
        ENTRY("cuStreamCreate", 2000, cuStreamCreate),
        ENTRY("cuStreamCreateWithPriority", 5050, cuStreamCreateWithPriority),
        ENTRY("cuStreamDestroy", 4000, cuStreamDestroy),
        ENTRY("cuStreamSynchronize", 2000, cuStreamSynchronize),
        ENTRY("cuStreamQuery", 2000, cuStreamQuery),
        ENTRY("cuStreamWaitEvent", 3020, cuStreamWaitEvent),
        ENTRY("cuStreamGetPriority", 5050, cuStreamGetPriority),
        ENTRY("cuStreamGetFlags", 5050, cuStreamGetFlags),
        ENTRY("cuStreamIsCapturing", 10000, cuStreamIsCapturing),
        ENTRY("cuCtxSynchronize", 2000, cuCtxSynchronize),
        ENTRY("cuEventCreate", 2000, cuEventCreate),
        ENTRY("cuEventDestroy", 4000, cuEventDestroy),
        ENTRY("cuEventRecord", 2000, cuEventRecord),
        ENTRY("cuEventQuery", 2000, cuEventQuery),
        ENTRY("cuEventSynchronize", 2000, cuEventSynchronize),
    };
    return entries;
}
