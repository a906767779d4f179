// Conditional nodes: graphs of which one runs, chosen by a value that a kernel sets while the graph runs.
#include "driver.h"

#include <algorithm>
#include <map>

namespace {

enum Type : int { IF = 0, SWITCH = 2 };

constexpr unsigned ASSIGN_DEFAULT = 1;
constexpr unsigned UNSET = 0xCBCBCBCB;  // of a condition without a default, before a kernel has set it

// They are never forgotten, and their handles never used again: an executable graph outlives the one it was made of.
std::map<uint64_t, Condition>& conditions() {
    static std::map<uint64_t, Condition> all;
    return all;
}

std::vector<uint64_t> running;  // the conditions of the graph that is running

Result cuGraphConditionalHandleCreate(uint64_t* out, Graph* graph, void*, unsigned value, unsigned flags) {
    auto lock = locked();
    static uint64_t made = uint64_t{1} << 40;  // needs all of its 64 bits
    *out = ++made;
    conditions()[*out] = Condition{graph, value, (flags & ASSIGN_DEFAULT) != 0};
    return SUCCESS;
}

struct NodeParams {  // CUgraphNodeParams, of which only conditional ones are known here
    int type;
    int reserved[3];
    uint64_t handle;
    int conditional_type;
    unsigned size;
    Graph** bodies;  // out: an array of the node's own
    void* context;
    unsigned char rest[208];
};
static_assert(sizeof(NodeParams) == 256);

Result cuGraphAddNode(Op** out, Graph* graph, Op* const* dependencies, const void*, size_t count, NodeParams* params) {
    auto lock = locked();
    const auto found = conditions().find(params->handle);
    const int type = params->conditional_type;
    const bool sized = (type == IF && params->size >= 1 && params->size <= 2) || (type == SWITCH && params->size >= 1);
    const bool in_order = graph->nodes.empty() ? !count : count == 1 && dependencies[0] == graph->nodes.back().get();
    if (params->type != CONDITIONAL || found == conditions().end() || found->second.graph != graph ||
        found->second.is_used || !sized || !params->context || !in_order) {
        complain("a node is added that is no conditional one at the graph's end, with a new condition of that graph");
        return INVALID_VALUE;
    }
    found->second.is_used = true;
    auto node = std::make_shared<Op>(Op{CONDITIONAL, {}});
    node->conditional = std::shared_ptr<Conditional>(new Conditional{params->handle, type, {}}, [](Conditional* gone) {
        for (Graph* body : gone->bodies) {
            for (UserObject* object : body->objects) release(object);
            delete body;
        }
        delete gone;
    });
    for (unsigned i = 0; i < params->size; ++i) {
        node->conditional->bodies.push_back(new Graph);
        node->conditional->bodies.back()->is_body = true;
    }
    params->bodies = node->conditional->bodies.data();
    graph->nodes.push_back(node);
    *out = node.get();
    return SUCCESS;
}

void run_nodes(const std::vector<std::shared_ptr<Op>>& nodes) {
    for (const auto& node : nodes) {
        node->run();
        count("operations");
    }
}

using Bodies = std::vector<std::vector<std::shared_ptr<Op>>>;

void run_chosen(uint64_t handle, int type, const Bodies& bodies) {
    const auto found = conditions().find(handle);
    const unsigned value = found->second.value;
    if (!found->second.has_default && value == UNSET) {
        return fail(LAUNCH_FAILED, "a conditional node runs before anything has set its condition");
    }
    const unsigned chosen = type == SWITCH ? value : value ? 0 : 1;
    if (chosen < bodies.size()) run_nodes(bodies[chosen]);
    count("conditional_nodes");
}

bool is_allowed_in_a_body(NodeKind kind) { return kind == KERNEL || kind == COPY || kind == SET || kind == CONDITIONAL; }

}  // namespace

void set_condition(uint64_t handle, unsigned value) {
    if (std::find(running.begin(), running.end(), handle) == running.end()) {
        return fail(LAUNCH_FAILED, "a kernel sets a condition that is not of the graph in which it runs");
    }
    conditions()[handle].value = value;
}

// Copies a graph, so that it may go: an executable graph is a thing of its own. A body may not hold every kind of node.
std::vector<std::shared_ptr<Op>> snapshot(const Graph& graph, std::vector<uint64_t>& handles, Result& result) {
    std::vector<std::shared_ptr<Op>> nodes;
    for (const auto& node : graph.nodes) {
        if (graph.is_body && !is_allowed_in_a_body(node->kind)) {
            complain("the body of a conditional node holds what it may not: a node of kind %d", node->kind);
            result = NOT_SUPPORTED;
        }
        if (node->kind != CONDITIONAL) {
            nodes.push_back(node);
            continue;
        }
        Bodies bodies;
        for (const Graph* body : node->conditional->bodies) bodies.push_back(snapshot(*body, handles, result));
        const uint64_t handle = node->conditional->handle;
        const int type = node->conditional->type;
        handles.push_back(handle);
        nodes.push_back(std::make_shared<Op>(Op{CONDITIONAL, [=] { run_chosen(handle, type, bodies); }}));
    }
    return nodes;
}

void launch_with_conditions(const std::vector<std::shared_ptr<Op>>& nodes, const std::vector<uint64_t>& handles) {
    for (const uint64_t handle : handles) {
        Condition& condition = conditions()[handle];
        condition.value = condition.has_default ? condition.otherwise : UNSET;
    }
    running = handles;
    run_nodes(nodes);
    running.clear();
}

const std::vector<Entry>& condition_entries() {
    static const std::vector<Entry> entries{
        ENTRY("cuGraphConditionalHandleCreate", 12030, cuGraphConditionalHandleCreate),
        ENTRY("cuGraphAddNode", 12030, cuGraphAddNode),
    };
    return entries;
}
