// The decision of a block's action on the GPU: plugins/decision_oracle.py::decide, bit for bit, in double as the host.
//
// A program of its own: only the driver can resolve its one external function, and the other kernels need none.
#include "elements.cuh"

#ifndef ADACORR_HOST
extern "C" __device__ void cudaGraphSetConditional(unsigned long long condition, unsigned value);
#endif

constexpr int ROW_SIGNALS = 9;  // of which four are read: caching/decisions.py::Signals
constexpr int RECORD = 5;   // numbers of a decision in the trace: plugins/decision_kernels.py

// The cases of a block's switch, and what the trace says.
constexpr long long EVALUATE = 0, REUSE = 1, CORRECT = 2;
// Why; plugins/decision_kernels.py::REASONS has the words.
constexpr long long FIRST_USE = 0, WARM_UP = 1, FINAL_STEPS = 2, MAXIMUM_AGE = 3, PROTECTED = 4, NOT_FINITE = 5,
                    WITHIN_EPSILON = 6, ABOVE_EPSILON = 7, ALWAYS_EVALUATED = 8, NO_REASON = -1;

// A block's row of the rule, floating-point numbers as the bits of doubles: plugins/decision_kernels.py::rule_row.
struct Rule {
    long long lambda_bits, gamma_bits, epsilon_bits, floor_bits, lazy, warmup_steps, final_steps, max_age_steps,
        is_protected;
};

struct Verdict {
    long long action, reason;
    double score, weight;  // NaN where there is none
};

// Guards.reason of caching/guards.py. The age is −1 before the first evaluation.
__device__ inline long long guard_reason(const Rule& rule, long long step, long long steps, long long age) {
    if (age < 0) return FIRST_USE;
    if (step < rule.warmup_steps) return WARM_UP;
    if (step >= steps - rule.final_steps) return FINAL_STEPS;
    if (age > rule.max_age_steps) return MAXIMUM_AGE;
    return rule.is_protected ? PROTECTED : NO_REASON;
}

// The rows of one guidance branch are averaged, and the larger score of the branches decides; false where a number is
// not finite. Signals are as in signals.cu: paper_temporal and paper_spatial are a row's fourth and fifth.
__device__ inline bool paper_score(const float* signals, int rows, int images, double lambda, double& score) {
    bool finite = true;
    score = 0.0;
    for (int first = 0; first < rows; first += images) {
        double temporal = 0.0, spatial = 0.0;
        for (int row = first; row < first + images; ++row) {
            const float* const of = signals + row * ROW_SIGNALS;
            finite = finite && is_finite(of[0]) && is_finite(of[2]) && is_finite(of[3]) && is_finite(of[4]);
            temporal += static_cast<double>(of[3]);
            spatial += static_cast<double>(of[4]);
        }
        temporal /= images;
        spatial /= images;
        const double of_branch = temporal * temporal + lambda * spatial;
        if (first == 0 || of_branch > score) score = of_branch;
    }
    return finite;
}

// weight_from_estimate of caching/scores.py for the thresholds floor and floor + 1.
__device__ inline double paper_weight(double score, double floor, double gamma) {
    const double recompute = floor + 1.0;
    if (recompute <= floor) return score >= floor ? 1.0 : 0.0;
    const double raw = gamma * (score - floor) / (recompute - floor);
    return raw < 0.0 ? 0.0 : raw > 1.0 ? 1.0 : raw;
}

__device__ inline Verdict verdict_of(const Rule& rule, const float* signals, int rows, int images, long long step,
                                     long long steps, long long age) {
    const double none = __longlong_as_double(0x7ff8000000000000ll);
    const long long guard = guard_reason(rule, step, steps, age);
    if (guard != NO_REASON) return Verdict{EVALUATE, guard, none, none};
    double score;
    if (!paper_score(signals, rows, images, __longlong_as_double(rule.lambda_bits), score)) {
        return Verdict{EVALUATE, NOT_FINITE, none, none};
    }
    const double weight =
        paper_weight(score, __longlong_as_double(rule.floor_bits), __longlong_as_double(rule.gamma_bits));
    if (!rule.lazy) return Verdict{CORRECT, ALWAYS_EVALUATED, score, weight};
    if (weight <= __longlong_as_double(rule.epsilon_bits)) return Verdict{REUSE, WITHIN_EPSILON, score, weight};
    return Verdict{weight == 1.0 ? EVALUATE : CORRECT, ABOVE_EPSILON, score, weight};
}

// signals (R, 9); step (1,): the present one; filled (1,): the step of the slot's last evaluation, −1 before it; rule: a
// block's row; scores (R,): the score for the blend; trace (S, L, RECORD), whose row of this step and block is written.
// `condition` is that of the switch that follows. At a step outside the run nothing is done: the first launch, which
// loads the kernel, needs no switch. Grid: one warp, whose lanes all decide the same.
extern "C" __global__ void __launch_bounds__(32)
    adacorr_decide(const float* signals, const long long* step, const long long* filled, const long long* rule,
                   int rows, int images, int steps, int block, int blocks, float* scores, long long* trace,
                   unsigned long long condition) {
    const long long now = step[0];
    if (now < 0 || now >= steps) return;
    const long long age = filled[0] < 0 ? -1 : now - filled[0];
    const Verdict verdict =
        verdict_of(*reinterpret_cast<const Rule*>(rule), signals, rows, images, now, steps, age);
    for (int row = threadIdx.x; row < rows; row += blockDim.x) scores[row] = static_cast<float>(verdict.score);
    if (threadIdx.x != 0) return;
    long long* const record = trace + (now * blocks + block) * RECORD;
    record[0] = verdict.action;
    record[1] = verdict.reason;
    record[2] = age;
    record[3] = __double_as_longlong(verdict.score);
    record[4] = __double_as_longlong(verdict.weight);
    cudaGraphSetConditional(condition, static_cast<unsigned>(verdict.action));
}

// The end of a case that evaluates: the slot holds this step's results, and the block's engine has run once more.
extern "C" __global__ void __launch_bounds__(32)
    adacorr_note_evaluation(const long long* step, long long* filled, long long* launches) {
    if (threadIdx.x != 0) return;
    filled[0] = step[0];
    launches[0] += 1;
}
