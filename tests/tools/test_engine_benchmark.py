"""The engines' benchmark: its arithmetic and its file by hand, its processes by a stand-in, its runs on a CPU."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.core.errors import AdaCorrError
from tests.engines.stand_in import run_on_stand_in
from tests.plugins.host_kernels import needs_compiler

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
sys.path.append(str(BENCHMARKS))  # the scripts import their siblings by bare names

from engine_jobs import Job, rows_of_job  # noqa: E402
from engine_rows import (  # noqa: E402
    BLOCKS,
    BY_STEP,
    COMPILED,
    DEVICE,
    HELD,
    HOST,
    INPUTS,
    MONOLITH,
    PYTORCH,
    SERVICES,
    Arm,
    Case,
    Results,
    Row,
    arms,
    evaluated_steps,
)
from engine_table import figures, table  # noqa: E402

CASE = Case(size="XL/2", precision="fp16", batch=4, steps=10, profile=(1, 8, 16))
RTX = "tensorrt-rtx"
CHAIN = Arm(backend=RTX, engine=BLOCKS, graphs=True)
HALF = Arm(backend=RTX, engine=BLOCKS, graphs=True, rho=0.5)


def row(arm: Arm, *step_ms: float, rho: float = 0.0, remark: str = "") -> Row:
    seconds = tuple(ms * CASE.steps / 1000 for ms in step_ms)
    return Row(case=CASE, arm=arm, seconds=seconds, blocks=4, rho=rho, remark=remark)


ROWS = {
    each.arm: each
    for each in (
        row(Arm(backend=PYTORCH, engine=COMPILED), 12.0, 12.0, 99.0),
        row(Arm(backend=RTX, engine=MONOLITH), 11.0),
        row(Arm(backend=RTX, engine=MONOLITH, graphs=True), 10.0),
        row(Arm(backend=RTX, engine=BLOCKS), 13.0),
        row(CHAIN, 10.2),
        row(HALF, 5.5, rho=0.5),
        row(Arm(backend=RTX, engine=SERVICES), 0.2),
        row(Arm(backend=RTX, engine=BLOCKS, graphs=True, weights=INPUTS), remark="out of memory"),
    )
}


# --- Arithmetic ------------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 100), rho=st.floats(0, 0.99), first=st.integers(0, 3))
def test_a_schedule_skips_the_share_that_was_asked_for(steps: int, rho: float, first: int) -> None:
    evaluated = evaluated_steps(steps, rho, first)
    assert evaluated <= set(range(steps))
    assert steps - len(evaluated) == min(round(rho * steps), max(steps - first, 0))
    assert evaluated >= set(range(min(first, steps)))
    order = sorted(evaluated)
    gaps = [after - before for before, after in itertools.pairwise(order) if after > first]
    assert not gaps or max(gaps) - min(gaps) <= 1  # evenly


def test_every_arm_has_a_name_of_its_own() -> None:
    every = list(arms(("onnxruntime-cuda", RTX, "tensorrt"), (0.3, 0.5, 0.7)))
    assert len({str(arm) for arm in every}) == len(set(every)) == len(every)
    assert {arm.weights for arm in every if arm.backend == "onnxruntime-cuda"} == {"baked"}
    assert not any(arm.graphs for arm in every if arm.backend == "onnxruntime-cuda")
    assert {arm.rho for arm in every if arm.backend == RTX and arm.reuse == BY_STEP} == {0.0, 0.3, 0.5, 0.7}


def test_the_figures_are_those_of_the_issue() -> None:
    chain = figures(ROWS[CHAIN], ROWS)
    assert chain == pytest.approx({"÷ monolith": 1.02, "µs/launch": 50.0, "÷ compiled": 0.85})
    bare = figures(ROWS[Arm(backend=RTX, engine=BLOCKS)], ROWS)
    assert bare["µs/launch"] == pytest.approx(500.0)  # over the monolith without graphs
    assert figures(ROWS[HALF], ROWS)["efficiency"] == pytest.approx(10.2 / 5.5 * 0.5)
    services = figures(ROWS[Arm(backend=RTX, engine=SERVICES)], ROWS)
    assert services == pytest.approx({"one block ÷ step": 0.2 / 4 / 10.2, "all blocks ÷ step": 0.2 / 10.2})


def test_the_table_says_of_each_goal_whether_it_is_met_and_why_a_row_failed() -> None:
    text = "\n".join(table(ROWS.values()))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "1.020 met" in lines[str(CHAIN)] and "0.850 met" in lines[str(CHAIN)]
    assert "0.927 missed" in lines[str(HALF)]
    assert "0.49% met" in lines[f"{RTX} signals + blend"] and "1.96% missed" in lines[f"{RTX} signals + blend"]
    assert "met" not in lines[f"{RTX} blocks one by one"]  # no goal is about a chain without graphs
    assert f"- failed: out of memory ({RTX} blocks + graphs + inputs one by one)" in text
    assert "- efficiency ≥ 0.95 at ρ 0.5: met by 0 of 1 rows" in text


# --- The file --------------------------------------------------------------------------------------------------------


def test_rows_are_kept_by_machine_and_measured_once(tmp_path: Path) -> None:
    here, there = {"gpu": "A", "torch": "2"}, {"gpu": "A", "torch": "3"}
    results = Results(tmp_path / "new" / "rows.json")
    results.of(here).put(list(ROWS.values()))
    results.save()
    results = Results(tmp_path / "new" / "rows.json")
    assert results.of(here).rows == list(ROWS.values())
    assert results.of(there).rows == []
    kept = results.of(here)
    failed = [arm for arm, each in ROWS.items() if each.failed]
    assert kept.left(CASE, ROWS, retry=False) == []
    assert kept.left(CASE, ROWS, retry=True) == failed
    kept.put([row(failed[0], 10.0)])
    assert kept.left(CASE, ROWS, retry=True) == [] and len(kept.rows) == len(ROWS)


@pytest.mark.parametrize("content", ["", "{}", '[{"machine": {}, "rows": [{"case": 1}]}]'])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(AdaCorrError, match="Name another with --json"):
        Results(file)
    assert file.read_text() == content


# --- Processes -------------------------------------------------------------------------------------------------------

DYING = """
import os, sys
sys.path.append({benchmarks!r})
from engine_jobs import GPU_LOST, JOB, Entry, report
from engine_rows import Row
job = JOB.validate_json(sys.stdin.buffer.read())
for arm in job.arms:
    report(job.journal, Entry(began=arm))
    if arm.engine == "monolith":
        os.abort()
    if arm.engine == "torch.compile":
        report(job.journal, Entry(row=Row(case=job.case, arm=arm, remark="the GPU is lost")))
        sys.exit(GPU_LOST)
for arm in job.arms:
    report(job.journal, Entry(row=Row(case=job.case, arm=arm, seconds=(float(len(job.arms)),))))
"""


def a_job(folder: Path, *job_arms: Arm) -> Job:
    return Job(case=CASE, arms=job_arms, device="cpu", rounds=1, folder=folder, journal=folder / "journal")


def test_an_arm_that_ends_its_process_is_recorded_and_the_others_are_measured_without_it(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(benchmarks=str(BENCHMARKS)))
    rows = rows_of_job(a_job(tmp_path, *ROWS), script)
    assert [each.arm for each in rows] == list(ROWS)
    reasons = {each.arm.engine: each.remark for each in rows if each.failed}
    assert reasons == {MONOLITH: "its process ended with SIGABRT", COMPILED: "the GPU is lost"}
    assert {each.seconds for each in rows if not each.failed} == {(float(len(ROWS) - 3),)}  # in one process, in turns


def test_a_process_that_dies_before_its_first_arm_fails_them_all(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text("raise SystemExit(7)")
    rows = rows_of_job(a_job(tmp_path, *ROWS), script)
    assert [each.arm for each in rows] == list(ROWS)
    assert {each.remark for each in rows} == {"its process ended with exit code 7"}


# --- The command -----------------------------------------------------------------------------------------------------


def run_script(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "engines.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run_script("--json", tmp_path / "rows.json", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not any(tmp_path.iterdir())


def test_the_help_says_that_no_gpu_has_run_it() -> None:
    assert "NOT RUN ON A GPU YET" in run_script("--help").stdout


TINY = ("--device", "cpu", "--backend", "onnxruntime", "--size", "tiny", "--batch", 2, "--steps", 8, "--rounds", 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_cpu_it_measures_a_tiny_model_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    arguments = (*TINY, "--precision", "fp32", "--json", tmp_path / "rows.json", "--rho", 0.5)
    done = run_script(*arguments, "--rows", "*monolith*,*blocks*")
    assert done.returncode == 0, done.stderr
    assert "5 rows to measure of 5" in done.stderr
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "3 rows to measure of 8" in done.stderr
    (kept,) = Results(tmp_path / "rows.json").machines
    assert not [each.remark for each in kept.rows if each.failed]
    errors = {str(each.arm): each.error for each in kept.rows}
    exact = [name for name in errors if "ρ" not in name and "signals" not in name]
    assert len(exact) == 5
    assert all(error is not None and error < 1e-5 for name, error in errors.items() if name in exact)
    assert {each.rho for each in kept.rows} == {0.0, 0.5}
    assert all(len(each.seconds) == 2 for each in kept.rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupt_ends_it_with_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    arguments = (*TINY[:-1], 10**9, "--precision", "fp32", "--json", tmp_path / "rows.json", "--rows", "*monolith*")
    command = [sys.executable, str(BENCHMARKS / "engines.py"), *map(str, arguments)]
    (tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as running:
        assert running.stderr is not None
        while "round 2" not in (line := running.stderr.readline()):
            assert line, "it ended before"
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        last = running.stderr.read().splitlines()[-1]
    assert running.returncode == 130
    assert last.startswith("interrupted: ")
    assert not list(tmp_path.rglob("*.onnx")) and not (tmp_path / "rows.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_backend_refuses_stands_in_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = run_script(*TINY, "--precision", "bf16", "--json", tmp_path / "rows.json", "--rows", "*monolith*")
    assert done.returncode == 0, done.stderr
    assert "- failed: Backend onnxruntime runs no bfloat16 models" in done.stdout


# --- On the stand-in driver ------------------------------------------------------------------------------------------

ON_STAND_IN = """
import sys
from pathlib import Path
sys.path.append({benchmarks!r})
from engine_jobs import Job, rows_of_job
from engine_rows import Case, MachineRows, Results, arms
case = Case(size="tiny", precision="fp32", batch=2, steps=8, profile=(1, 8, 16))
folder = Path({folder!r})
every = tuple(arm for arm in arms(("tensorrt-rtx",), (0.5,)) if arm.engine != "torch.compile")
job = Job(case=case, arms=every, device="cpu", rounds=1, folder=folder, journal=folder / "journal")
results = Results(folder / "rows.json")
results.of({{}}).put(rows_of_job(job, Path({script!r})))
results.save()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_compiler
def test_on_the_stand_in_every_engine_row_is_right_and_graphs_are_where_they_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("cuda.bindings.nvrtc")
    script = Path(__file__).with_name("stand_in_case.py")
    program = ON_STAND_IN.format(benchmarks=str(BENCHMARKS), folder=str(tmp_path), script=str(script))
    done = run_on_stand_in("-c", program)
    assert done.returncode == 0, done.stderr
    (kept,) = Results(tmp_path / "rows.json").machines
    assert not [(str(each.arm), each.remark) for each in kept.rows if each.remark]
    found = {each.arm: each for each in kept.rows if each.arm.backend == RTX}
    whole = [each.error for each in found.values() if each.arm.rho == 0 and each.arm.engine != SERVICES]
    assert len(whole) == 7 and all(error is not None and error < 1e-5 for error in whole)
    assert {each.rho for each in found.values() if each.arm.rho} == {0.5}
    graphs = {str(arm).removeprefix(RTX): round(8 * each.graph_launches) for arm, each in found.items()}
    assert graphs[" monolith"] == graphs[" blocks one by one"] == 0
    condition = 1  # once a request, beside what each of its 8 steps launches
    assert graphs[" monolith + graphs"] == condition + 8
    assert graphs[" blocks + graphs one by one"] == condition + 8 * 5  # embed, three blocks, head
    assert graphs[" blocks + graphs all at once"] == condition + 8 * 3  # embed, the blocks, head
    assert graphs[" signals + blend"] == 8
    assert graphs[" blocks + graphs decided by the device ρ 0.5"] == condition + 8
    by_host, by_device = (
        Arm(backend=RTX, engine=BLOCKS, graphs=True, reuse=HELD, rho=0.5, decided_by=where) for where in (HOST, DEVICE)
    )
    assert found[by_device].error == found[by_host].error, "the same images"
