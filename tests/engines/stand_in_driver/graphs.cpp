// Capture of a stream into a graph, and graphs. A capture is of one stream and gives a chain.
#include "driver.h"

#include <algorithm>

namespace {

Result cuStreamBeginCapture(Stream* stream, CaptureMode mode) {
    auto lock = locked();
    if (stream->status != NONE) return INVALID_VALUE;
    stream->capture = new Graph;
    count("live_graphs");
    stream->status = ACTIVE;
    stream->mode = mode;
    stream->thread = std::this_thread::get_id();
    stream->last = nullptr;
    return SUCCESS;
}

// Into the body of a conditional node: the only graph that anything is added to by capture.
Result cuStreamBeginCaptureToGraph(Stream* stream, Graph* graph, Op* const*, const void*, size_t dependencies,
                                   CaptureMode mode) {
    auto lock = locked();
    if (stream->status != NONE || !graph->is_body || !graph->nodes.empty() || dependencies) return INVALID_VALUE;
    stream->capture = graph;
    stream->status = ACTIVE;
    stream->mode = mode;
    stream->thread = std::this_thread::get_id();
    stream->last = nullptr;
    return SUCCESS;
}

Result cuStreamEndCapture(Stream* stream, Graph** out) {
    auto lock = locked();
    if (stream->status == NONE) return INVALID_VALUE;
    const bool valid = stream->status == ACTIVE;
    if (out) *out = valid ? stream->capture : nullptr;
    stream->status = NONE;
    stream->capture = nullptr;
    return valid ? SUCCESS : CAPTURE_INVALIDATED;
}

Result cuStreamGetCaptureInfo(Stream* stream, int* status, uint64_t* id, Graph** graph, Op* const** dependencies,
                              const void** edges, size_t* count) {
    auto lock = locked();
    *status = stream->status;
    if (id) *id = reinterpret_cast<uint64_t>(stream->capture);
    if (graph) *graph = stream->capture;
    if (dependencies) *dependencies = &stream->last;
    if (edges) *edges = nullptr;
    if (count) *count = stream->last ? 1 : 0;
    return SUCCESS;
}

Result cuStreamUpdateCaptureDependencies(Stream* stream, Op** nodes, const void*, size_t count, unsigned flags) {
    auto lock = locked();
    constexpr unsigned SET = 1;
    const bool in_order = stream->status == ACTIVE && flags == SET && count == 1 && !stream->capture->nodes.empty() &&
                          nodes[0] == stream->capture->nodes.back().get();
    if (!in_order) {
        complain("captured work may only come after all that was captured before");
        return INVALID_VALUE;
    }
    stream->last = nodes[0];
    return SUCCESS;
}

Result cuThreadExchangeStreamCaptureMode(int*) { return SUCCESS; }

Result cuGraphGetNodes(Graph* graph, Op** nodes, size_t* count) {
    auto lock = locked();
    if (nodes) {
        for (size_t i = 0; i < *count && i < graph->nodes.size(); ++i) nodes[i] = graph->nodes[i].get();
    }
    *count = graph->nodes.size();
    return SUCCESS;
}

Result cuGraphNodeGetType(Op* node, int* type) {
    *type = node->kind;
    return SUCCESS;
}

struct InstantiateParams {  // CUDA_GRAPH_INSTANTIATE_PARAMS
    uint64_t flags;
    Stream* upload_stream;
    Op* error_node;
    int result;
};

Result cuGraphInstantiateWithParams(GraphExec** out, Graph* graph, InstantiateParams* params) {
    auto lock = locked();
    std::vector<uint64_t> handles;
    Result result = SUCCESS;
    auto nodes = snapshot(*graph, handles, result);
    params->result = result == SUCCESS ? 0 : 1;
    if (result != SUCCESS) return result;
    *out = new GraphExec{std::move(nodes), graph->objects, std::move(handles)};
    for (UserObject* object : graph->objects) ++object->references;
    count("live_executables");
    count("instantiations");
    return SUCCESS;
}

Result cuGraphLaunch(GraphExec* executable, Stream* stream) {
    auto lock = locked();
    if (stream->status != NONE) return NOT_SUPPORTED;
    count("graph_launches");
    auto nodes = executable->nodes;  // an executable may be destroyed while it is queued
    auto handles = executable->handles;
    return submit(stream, MARKER, [nodes, handles] { launch_with_conditions(nodes, handles); });
}

Result cuGraphUpload(GraphExec*, Stream*) { return SUCCESS; }

Result cuGraphExecDestroy(GraphExec* executable) {
    auto lock = locked();
    for (UserObject* object : executable->objects) release(object);
    delete executable;
    count("live_executables", -1);
    return SUCCESS;
}

Result cuGraphDestroy(Graph* graph) {
    auto lock = locked();
    if (graph->is_body) return INVALID_VALUE;  // its node owns it
    for (UserObject* object : graph->objects) release(object);
    delete graph;
    count("live_graphs", -1);
    return SUCCESS;
}

Result cuUserObjectCreate(UserObject** out, void* pointer, void (*destroy)(void*), unsigned references, unsigned) {
    auto lock = locked();
    *out = new UserObject{pointer, destroy, references};
    count("live_user_objects");
    return SUCCESS;
}

Result cuUserObjectRelease(UserObject* object, unsigned references) {
    auto lock = locked();
    for (unsigned i = 0; i < references; ++i) release(object);
    return SUCCESS;
}

Result cuGraphRetainUserObject(Graph* graph, UserObject* object, unsigned references, unsigned flags) {
    auto lock = locked();
    constexpr unsigned MOVE = 1;  // the caller's references become the graph's
    if (!(flags & MOVE)) object->references += references;
    graph->objects.insert(graph->objects.end(), references, object);
    return SUCCESS;
}

Result cuGraphReleaseUserObject(Graph* graph, UserObject* object, unsigned references) {
    auto lock = locked();
    for (unsigned i = 0; i < references; ++i) {
        const auto found = std::find(graph->objects.begin(), graph->objects.end(), object);
        if (found == graph->objects.end()) return INVALID_VALUE;
        graph->objects.erase(found);
        release(object);
    }
    return SUCCESS;
}

}  // namespace

void release(UserObject* object) {
    if (--object->references) return;
    object->destroy(object->pointer);
    delete object;
    count("live_user_objects", -1);
}

const std::vector<Entry>& graph_entries() {
    static const std::vector<Entry> entries{
        ENTRY("cuStreamBeginCapture", 10010, cuStreamBeginCapture),
        ENTRY("cuStreamBeginCaptureToGraph", 12030, cuStreamBeginCaptureToGraph),
        ENTRY("cuStreamUpdateCaptureDependencies", 12030, cuStreamUpdateCaptureDependencies),
        ENTRY("cuStreamEndCapture", 10000, cuStreamEndCapture),
        ENTRY("cuStreamGetCaptureInfo", 12030, cuStreamGetCaptureInfo),
        ENTRY("cuThreadExchangeStreamCaptureMode", 10010, cuThreadExchangeStreamCaptureMode),
        ENTRY("cuGraphGetNodes", 10000, cuGraphGetNodes),
        ENTRY("cuGraphNodeGetType", 10000, cuGraphNodeGetType),
        ENTRY("cuGraphInstantiateWithParams", 12000, cuGraphInstantiateWithParams),
        ENTRY("cuGraphLaunch", 10000, cuGraphLaunch),
        ENTRY("cuGraphUpload", 11010, cuGraphUpload),
        ENTRY("cuGraphExecDestroy", 10000, cuGraphExecDestroy),
        ENTRY("cuGraphDestroy", 10000, cuGraphDestroy),
        ENTRY("cuUserObjectCreate", 11030, cuUserObjectCreate),
        ENTRY("cuUserObjectRelease", 11030, cuUserObjectRelease),
        ENTRY("cuGraphRetainUserObject", 11030, cuGraphRetainUserObject),
        ENTRY("cuGraphReleaseUserObject", 11030, cuGraphReleaseUserObject),
    };
    return entries;
}
