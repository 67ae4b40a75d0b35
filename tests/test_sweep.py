"""Sweeps: what is checked beforehand, one failure among others, going on, being stopped, the table of all runs, and the script for Slurm."""
import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from vlm_repro.cli import main
from vlm_repro.core.slurm import Job, SlurmError, parse_slurm, slurm_script
from vlm_repro.report.example import example_run
from vlm_repro.report.rundata import load_run
from vlm_repro.report.sweep_figure import series, sweep_figure
from vlm_repro.report.sweeps import find_runs, holm, paired, read_line, run_table
from vlm_repro.sweep.cluster import queued_jobs
from vlm_repro.sweep.grid import Run, find_notebook, parse_grid, plan, single
from vlm_repro.sweep.local import run_all, shares
from vlm_repro.sweep.state import SUBMITTED, read_state, run_lock, status, write_state, write_submitted
from vlm_repro.sweep.worker import BUSY, execute_run, worker_command

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "x = 1  # a number\ntext = 'a'  # words\nout = ''  # a folder\n"
CODE = "import json, pathlib\nassert x != 2, 'two is one too many'\npathlib.Path(out, 'seen.json').write_text(json.dumps([x, text]))"
WORKER = [sys.executable, "-m", "vlm_repro.sweep.worker"]


def write(path: Path, code: str = CODE, parameters: str | None = PARAMETERS) -> Path:
    """A notebook with a parameters cell, if any, and one cell of code."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters is not None else []
    nb = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(code)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nbformat.write(nb, path)
    return path


@pytest.fixture
def book(tmp_path) -> Path:
    """A notebook whose parameter must not be 2."""
    return write(tmp_path / "book.ipynb")


def said(capsys, *words: str, code: int = 0) -> str:
    """What a command prints, to the terminal or as an error."""
    assert main(list(words)) == code, capsys.readouterr()
    caught = capsys.readouterr()
    return caught.out + caught.err


# ---------------------------------------------------------------- the grid


def test_a_grid_reads_numbers_words_and_lists_with_commas():
    grid = parse_grid(["shots=0,1,finetuned", 'categories=["E1,H1", "E2"]', "keep_depth=True,False", "data_root=/a b/c,/d"])
    assert grid == {"shots": [0, 1, "finetuned"], "categories": ["E1,H1", "E2"], "keep_depth": [True, False], "data_root": ["/a b/c", "/d"]}


@pytest.mark.parametrize("words, why", [
    (["shots"], "write -g NAME=VALUE,VALUE"), (["=1"], "write -g"), (["shots=0,0"], "0 is given twice"), (["shots=0", "shots=1"], "shots is given twice"), (["shots=[]"], "has no values")])
def test_a_grid_that_cannot_be_meant(words, why):
    with pytest.raises(ValueError, match=why):
        parse_grid(words)


@pytest.mark.parametrize("words, why", [
    (["mmwalk", "-g", "shot=0,1"], "no parameter 'shot'; did you mean 'shots'"),
    (["papers/mmwalk.ipynb", "-g", "shots=0", "-p", "sede=1"], "did you mean 'seed'"),
    (["mmwalk", "-g", "views=normal,dog"], "views=dog: views='dog'"),
    (["mmwalk", "-g", "shots=0", "-p", "shots=1"], "both in the grid"),
    (["mmwalk", "-g", "out=a,b"], "name the folder above them with --out"),
    (["mmwalk"], "a sweep needs an axis"),
    (["mmwlak", "-g", "shots=0"], "did you mean 'mmwalk'"),
    (["elsewhere/mmwalk.ipynb", "-g", "shots=0"], "the paper itself is called 'mmwalk'"),
    (["mmwalk", "-g", "shots=0", "--slurm", "partion=gpu"], "did you mean 'partition'"),
    (["mmwalk", "-g", "shots=0", "--slurm", "partition"], "has no value"),
])
def test_bad_input_is_said_before_anything_runs(words, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert why in said(capsys, "sweep", *words, "--out", str(tmp_path / "s"), "--print", code=2)
    assert not (tmp_path / "s").exists()


def test_a_notebook_without_parameters_or_that_is_none(tmp_path, capsys):
    bare = write(tmp_path / "bare.ipynb", "1", None)
    assert "none of its cells is tagged `parameters`" in said(capsys, "sweep", str(bare), "-g", "x=1", code=2)
    (tmp_path / "broken.ipynb").write_text("{")
    assert "is no notebook" in said(capsys, "sweep", str(tmp_path / "broken.ipynb"), "-g", "x=1", code=2)
    assert single(find_notebook(bare), {}).parameters == {}


def test_runs_keep_their_folder_when_the_grid_grows_and_another_seed_gets_another(tmp_path, book):
    notebook = find_notebook(book)
    first = plan(notebook, {"x": [1]}, {}, tmp_path)
    first[0].folder.mkdir()
    assert plan(notebook, {"x": [1, 3]}, {}, tmp_path)[0].folder == first[0].folder
    assert plan(notebook, {"text": ["a"], "x": [1]}, {}, tmp_path)[0].folder != first[0].folder
    mmwalk = find_notebook("mmwalk")
    one, other = (plan(mmwalk, {"shots": [0]}, {"seed": seed}, tmp_path)[0] for seed in (0, 1))
    assert one.folder != other.folder and plan(mmwalk, {"shots": [0]}, {"batch_size": 2}, tmp_path)[0].folder == one.folder
    assert len({run.folder for run in plan(mmwalk, {"batch_size": [1, 2]}, {}, tmp_path)}) == 2
    one.folder.mkdir()
    assert plan(mmwalk, {"seed": [0, 1], "shots": [0]}, {}, tmp_path)[0].folder == one.folder


def test_odd_values_make_odd_folders_safe(tmp_path, book):
    values = ["a friend's data", "$HOME/x y", "ü/ö", "-p", "a\nb", "'; rm -rf /", "x" * 300]
    runs = plan(find_notebook(book), {"text": values}, {}, tmp_path)
    assert len({run.folder for run in runs}) == len(values)
    for run in runs:
        assert run.folder.parent == tmp_path and len(run.name) < 200 and not set(run.name) & set(" '\"$\n;/")


# ---------------------------------------------------------------- running it


@pytest.mark.slow
def test_one_failure_leaves_the_others_alone_and_the_same_command_runs_what_is_missing(tmp_path, book, capsys):
    words = ["sweep", str(book), "-g", "x=1,2,3", "-p", "text", "a friend's $HOME; data", "--jobs", "2", "--out", str(tmp_path / "s")]
    text = said(capsys, *words, code=1)
    assert "3 runs: 2 done, 1 failed" in text and "AssertionError: two is one too many" in text
    seen = {json.loads(p.read_text())[0]: json.loads(p.read_text())[1] for p in (tmp_path / "s").glob("*/seen.json")}
    assert seen == {1: "a friend's $HOME; data", 3: "a friend's $HOME; data"}
    write(book, CODE.replace("x != 2", "x < 9"))
    text = said(capsys, *words)
    assert "2 of 3 runs are done" in text and "3 runs: 3 done" in text and text.count("started") == 1
    assert sorted(read_state(p)["attempts"] for p in (tmp_path / "s").iterdir()) == [1, 1, 2]
    assert "3 runs: 3 done" in said(capsys, *words, "--print")


@pytest.mark.slow
def test_a_run_that_is_killed_is_lost_with_a_reason_and_goes_on(tmp_path):
    book = write(tmp_path / "book.ipynb", "import os, pathlib, signal\nmark = pathlib.Path(out, 'mark')\nif not mark.exists():\n    mark.touch()\n    os.kill(os.getppid(), signal.SIGKILL)")
    runs = plan(find_notebook(book), {"x": [1]}, {}, tmp_path / "s")
    killed = run_all(runs, say=lambda text: None)
    assert killed.counts == {"lost": 1} and "killed without a word" in killed[0].why and "run.log" in killed[0].why
    assert run_all(runs, say=lambda text: None)[0].attempts == 2


@pytest.mark.slow
def test_a_sweep_that_is_stopped_stops_its_runs_and_their_kernels_and_goes_on(tmp_path):
    book = write(tmp_path / "book.ipynb", "import os, pathlib, time\nif not pathlib.Path(out, 'kernel').exists():\n    pathlib.Path(out, 'kernel').write_text(str(os.getpid()))\n    time.sleep(300)")
    words = [str(Path(sys.executable).with_name("vlm-repro")), "sweep", str(book), "-g", "x=1,3", "--jobs", "2", "--out", str(tmp_path / "s")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        end = time.monotonic() + 120
        while len(kernels := [p for p in (tmp_path / "s").glob("*/kernel") if p.read_text()]) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        text = process.communicate(timeout=90)[0]
    assert process.returncode == 130 and "the same command continues" in text
    for p in kernels:
        with pytest.raises(ProcessLookupError):
            os.kill(int(p.read_text()), 0)
    runs = plan(find_notebook(book), {"x": [1, 3]}, {}, tmp_path / "s")
    assert {status(run).state for run in runs} == {"stopped"}
    assert run_all(runs, jobs=2, say=lambda text: None).counts == {"done": 2}


@pytest.mark.slow
def test_a_run_stops_when_its_sweep_is_killed(tmp_path):
    book = write(tmp_path / "book.ipynb", "import pathlib, time\npathlib.Path(out, 'there').touch()\ntime.sleep(300)")
    words = [str(Path(sys.executable).with_name("vlm-repro")), "sweep", str(book), "-g", "x=1", "--out", str(tmp_path / "s")]
    run = plan(find_notebook(book), {"x": [1]}, {}, tmp_path / "s")[0]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (run.folder / "there").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert status(run).state == "running"
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while status(run).state == "running" and time.monotonic() < end:
        time.sleep(0.2)
    assert status(run).state == "stopped"


def test_two_sweeps_do_not_work_on_one_run(tmp_path, book):
    run = Run(book, tmp_path / "r", {})
    run.folder.mkdir()
    with run_lock(run.folder):
        done = subprocess.run([*WORKER, *worker_command(run)], capture_output=True, text=True)
        assert (done.returncode, status(run).state) == (BUSY, "running") and "works on this run" in done.stderr
        assert run_all([run], say=lambda text: None).counts == {"running": 1}


def test_every_place_of_the_pool_has_its_share_of_the_gpus():
    assert shares(list("01234567"), 3) == [["0", "3", "6"], ["1", "4", "7"], ["2", "5"]]
    assert shares(["0"], 2) == [["0"], ["0"]] and shares([], 1) == [[]]


@pytest.mark.parametrize("failures, wanted", [(2, "done"), (3, "failed")])
def test_a_kernel_whose_port_another_one_took_is_started_again(failures, wanted, tmp_path, book, monkeypatch):
    import papermill

    tried = []

    def execute(*words, **more):
        tried.append(words)
        if len(tried) <= failures:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    assert execute_run(Run(book, tmp_path / "r", {})) == wanted and len(tried) == 3
    assert ("did not start" in read_state(tmp_path / "r")["reason"]) == (wanted == "failed")


# ---------------------------------------------------------------- how a run stands


def test_what_a_run_says_of_the_time_before_its_job_does_not_count(tmp_path):
    run = Run(tmp_path / "a.ipynb", tmp_path / "r", {})
    run.folder.mkdir()
    write_state(run.folder, state="failed", reason="once", attempts=1)
    write_submitted(run.folder, "7_0", "7_0_0_log.out", before=1)
    assert [status(run, queue).state for queue in ({"7_0": "PENDING"}, {"7_0": "RUNNING"}, {})] == ["queued", "running", "lost"]
    assert "ended before the run started" in status(run, {}).why
    write_state(run.folder, state="failed", reason="again", attempts=2)
    assert status(run, {}).why == "again"


def test_where_there_is_no_slurm_to_ask_a_job_is_not_taken_for_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run(tmp_path / "a.ipynb", tmp_path / "r", {})
    assert queued_jobs([run]) == {}
    write_submitted(run.folder, "7", "log")
    found = status(run, queued_jobs([run]))
    assert found.state == "queued" and SUBMITTED in found.why


def test_a_paper_is_done_only_with_its_manifest(tmp_path):
    run = Run(tmp_path / "a.ipynb", tmp_path / "r", {})
    run.folder.mkdir()
    write_state(run.folder, state="done", manifest=True, attempts=1)
    assert status(run).state == "missing"
    (run.folder / "manifest.json").touch()
    assert status(run).state == "done"
    (run.folder / "state.json").write_text("{")
    assert status(run).state == "done"


# ---------------------------------------------------------------- Slurm, as far as it goes without


def test_parameters_of_a_job():
    assert parse_slurm(["partition=gpu,gpus=a100:2,time=1-00:00:00", "nodelist=n1,n2", "setup=module load a,b; X=1,Y=2"]) == {
        "partition": "gpu", "gpus": "a100:2", "time": "1-00:00:00", "nodelist": "n1,n2", "setup": "module load a,b; X=1,Y=2"}
    script = slurm_script(Job("j", Path("/a b/logs"), "true", {"gpus": 0, "requeue": 0, "exclusive": True}))
    assert "gpus" not in script and "#SBATCH --no-requeue\n" in script and "#SBATCH --exclusive\n" in script and "'/a b/logs/%j_0_log.out'" in script
    with pytest.raises(SlurmError, match="reads % in the name"):
        Job("j", Path("/50%/logs"), "true", {})


def test_a_job_takes_the_machines_that_it_asks_for(tmp_path):
    def nodes(asks, own=None): return [line for line in slurm_script(Job('a', tmp_path, 'true', asks, nodes=own)).splitlines() if '--nodes' in line]
    assert (nodes({}), nodes({'nodes': '3'}), nodes({}, 2), nodes({'nodes': 2}, 2)) == (['#SBATCH --nodes=1'], ['#SBATCH --nodes=3'], ['#SBATCH --nodes=2'], ['#SBATCH --nodes=2'])
    with pytest.raises(SlurmError, match='leave the parameter out'): nodes({'nodes': 3}, 2)
    with pytest.raises(SlurmError, match='whole number'): nodes({'nodes': 'two'})


def test_the_script_runs_every_run_with_its_parameters_as_they_are(tmp_path, book, capsys, monkeypatch):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "srun").write_text('#!/bin/bash\nwhile [ "$1" != PYTHON ]; do shift; done\nprintf "%s\\n" "$@"\nexit 3\n')
    (fake / "srun").chmod(0o755)
    words = ["sweep", str(book), "-g", 'text=["a friend\'s $HOME", "b, c"]', "-p", "x=3", "--slurm", "partition=gpu,time=60", "--out", str(tmp_path / "s"), "--print"]
    script = said(capsys, *words)
    script = script[script.index("#!/bin/bash"):].replace(shlex.quote(sys.executable), "PYTHON")
    assert "#SBATCH --array=0-1%2\n" in script and not (tmp_path / "s").exists()
    env = {"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=env)
    *_, notebook, folder, parameters = done.stdout.splitlines()
    assert done.returncode == 3 and notebook == str(book) and json.loads(parameters) == {"text": "b, c", "x": 3}
    assert Path(folder).parent == tmp_path / "s"
    first = subprocess.run(["bash"], input=script, text=True, capture_output=True, env={**env, "SLURM_ARRAY_TASK_ID": "0"}).stdout.splitlines()[-1]
    assert json.loads(first)["text"] == "a friend's $HOME"


def test_when_the_time_is_nearly_over_the_run_is_told_and_the_job_goes_back(tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "srun").write_text(f"#!/bin/bash\necho $$ > {tmp_path}/srun.pid\ntrap 'exit 143' TERM\nsleep 30 & wait\n")
    (fake / "scancel").write_text(f"#!/bin/bash\necho scancel $@ >> {tmp_path}/log\nkill -TERM $(cat {tmp_path}/srun.pid)\n")
    (fake / "scontrol").write_text(f"#!/bin/bash\necho scontrol $@ >> {tmp_path}/log\n")
    for f in fake.iterdir():
        f.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(slurm_script(Job("j", tmp_path / "logs", "true", {}, arguments=(["a"], ["b"]))))
    env = {"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1"}
    for restarts, wanted in (("0", ["scancel --signal=TERM 4_1", "scontrol requeue 4_1"]), ("10", ["scancel --signal=TERM 4_1"])):
        (tmp_path / "srun.pid").unlink(missing_ok=True)
        (tmp_path / "log").unlink(missing_ok=True)
        with subprocess.Popen(["bash", str(script)], env={**env, "SLURM_RESTART_COUNT": restarts}) as job:
            while not (tmp_path / "srun.pid").exists() or not (tmp_path / "srun.pid").read_text():
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR2)
        assert job.returncode == 143 and (tmp_path / "log").read_text().splitlines() == wanted


@pytest.mark.parametrize("words", [["sweep", "BOOK", "-g", "x=1,3"], ["submit", "BOOK", "-p", "x", "3"]])
def test_without_slurm_the_error_is_clear_and_the_script_can_be_printed(words, tmp_path, book, capsys, monkeypatch):
    words = [str(book) if w == "BOOK" else w for w in words] + ["--slurm", "partition=gpu", "--out", str(tmp_path / "s")]
    monkeypatch.setenv("PATH", str(tmp_path))
    text = said(capsys, *words, code=2)
    assert "no Slurm on this machine" in text and "--print" in text and not list(tmp_path.glob("s/*/submitted.json"))
    assert "#SBATCH --partition=gpu" in said(capsys, *words, "--print")


def test_what_slurm_refuses_is_said(tmp_path, book, capsys, monkeypatch):
    for name, text in (("srun", "true"), ("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "invalid partition specified: gpu" in said(capsys, "submit", str(book), "--out", str(tmp_path / "s"), "--slurm", "partition=gpu", code=2)


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three runs of the example, the first of which answers one category wrongly, and one that failed."""
    root = tmp_path_factory.mktemp("runs")
    for shots in (0, 1, 3):
        example_run(root / f"shots={shots}", 8, lambda g, s=shots: replace(g, text="nothing") if s == 0 and g.id.startswith("count") else g, {"shots": shots})
    (root / "failed").mkdir()
    write_state(root / "failed", state="failed", reason="cell 3 failed: MemoryError\nmore", parameters={"shots": 9}, attempts=1)
    (root / "slurm").mkdir()
    (root / "note.txt").write_text("no run")
    return root


def test_the_table_shows_what_differs_with_intervals_and_tests(runs, capsys):
    text = said(capsys, "table", *map(str, sorted(runs.iterdir())), "--against", "shots=0", "--column", "count", "--column", "exist")
    assert "WATERMARK" in text and "failed: cell 3 failed: MemoryError" in text and "less shots=0" in text
    table = run_table([runs], "shots=0", ["count", "exist"])
    assert table.varied == ("shots",) and [line.name for line in table.lines] == ["failed", "shots=0", "shots=1", "shots=3"]
    test = table.lines[2].tests["count"]
    assert test.diff > 0 and test.lo > 0 and test.n == 8 and table.lines[2].tests["exist"].diff == 0
    assert table.adjusted("count")["shots=1"] == pytest.approx(min(1, 2 * test.p)) and table.lines[1].tests == {}


def test_the_table_in_other_forms(runs, capsys):
    rows = list(csv.DictReader(io.StringIO(said(capsys, "table", str(runs), "--csv", "--column", "count", "--against", "shots=3"))))
    assert [row["shots"] for row in rows] == ["9", "0", "1", "3"] and float(rows[1]["judge diff"]) < 0 and rows[0]["judge"] == "" and rows[3]["judge p"] == ""
    found = json.loads(said(capsys, "table", str(runs), "--json", "--column", "count"))
    assert [run["settings"]["shots"] for run in found["runs"]] == [9, 0, 1, 3] and found["runs"][1]["numbers"]["judge"]["n"] == 8
    assert said(capsys, "table", str(runs), "--md").count("\n| ") == 6
    assert "choose one form" in said(capsys, "table", str(runs), "--md", "--csv", code=2)


def test_one_run_keeps_its_own_table(runs, capsys):
    assert "verdict" in said(capsys, "table", str(runs / "shots=1"))


def test_bad_input_of_the_table(runs, capsys, tmp_path):
    assert "no such folder" in said(capsys, "table", str(tmp_path / "none"), code=2)
    assert "no run here" in said(capsys, "table", str(tmp_path), code=2)
    assert "did you mean 'colour'" in said(capsys, "table", str(runs), "--column", "color", code=2)
    assert "did you mean 'shots=1'" in said(capsys, "table", str(runs), "--against", "shots=11", code=2)
    assert "3 runs are meant" in said(capsys, "table", str(runs), "--against", "shots", code=2)
    assert "this run has no numbers" in said(capsys, "table", str(runs), "--against", "failed", code=2)


def test_the_difference_is_on_the_scale_of_the_table_and_on_shared_samples_only(tmp_path):
    runs = [load_run(example_run(tmp_path / name, n, lambda g, k=k: replace(g, text="nothing") if k else g)) for k, (name, n) in enumerate((("a", 8), ("b", 6)))]
    scaled = []
    for run in runs:
        rows = list(csv.DictReader(io.StringIO((run.root / "table.csv").read_text())))
        more = [{**r, "unit": "1-5", "status": ""} for r in rows] + [{**r, "value": (float(r["value"]) - 1) * 25, "unit": "0-100"} for r in rows]
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(more)
        (run.root / "table.csv").write_text(out.getvalue())
        scaled.append(load_run(run.root))
    numbers = [read_line(run.root, ["count"])[0].numbers["judge"] for run in scaled]
    test = paired(*scaled, numbers[0], numbers[1])
    raw = [s["values"][0] for i, s in ((i, s) for run in scaled[:1] for i, ss in run.scores.items() for s in ss if s["variant"] == "corrected") if i.startswith("count") and i in scaled[1].scores]
    assert numbers[0].unit == "0-100" and test.n == 6 and test.diff == pytest.approx(25 * (sum(raw) / 6 - 2))


def test_samples_that_ask_something_else_are_not_paired(tmp_path):
    a, b = (load_run(example_run(tmp_path / name, 6)) for name in "ab")
    number = read_line(a.root, ["count"])[0].numbers["judge"]
    others = {i: {**row, "gold": "other"} for i, row in b.samples.items()}
    test = paired(a, replace(b, samples=others), number, number)
    assert test.diff is None and test.note == "no sample in common"


def test_holm_is_what_it_is_defined_to_be():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([None, 0.5]) == [None, 0.5] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_runs_are_found_below_folders_once(runs):
    assert len(find_runs([runs, runs / "shots=1"])) == len(find_runs([runs])) == 4


def test_the_figure_has_a_line_for_each_value_of_the_other_setting(tmp_path, capsys):
    for n, (shots, views) in enumerate([(0, "normal"), ("finetuned", "normal"), (3, "normal"), (0, "dog+")]):
        example_run(tmp_path / f"r{n}", 6, settings={"shots": shots, "views": views})
    table = run_table([tmp_path], column=["count"])
    assert {name: list(points) for name, points in series(table, "judge", "shots", "views").items()} == {"normal": [0, "finetuned", 3], "dog+": [0]}
    axes = sweep_figure(table).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "3", "finetuned"] and len(axes.lines) >= 2
    assert "figure" in said(capsys, "table", str(tmp_path), "--column", "count", "--figure", str(tmp_path / "f.png")) and (tmp_path / "f.png").stat().st_size > 5000
    assert "does not vary" in said(capsys, "table", str(tmp_path), "--figure", str(tmp_path / "f.png"), "--x", "seed", code=2)


@pytest.mark.slow
def test_the_page_shows_the_runs_it_is_given(runs, tmp_path):
    words = [str(Path(sys.executable).with_name("papermill")), str(ROOT / "nbs" / "sweeps.ipynb"), str(tmp_path / "all.ipynb"), "-p", "folder", str(runs), "-p", "against", "shots=0", "-p", "by", ""]
    subprocess.run(words, check=True, capture_output=True)
    outputs = [o["data"] for cell in nbformat.read(tmp_path / "all.ipynb", 4).cells for o in cell.get("outputs", []) if "data" in o]
    assert any("less shots=0" in o.get("text/markdown", "") for o in outputs) and any("image/png" in o for o in outputs)


# ---------------------------------------------------------------- the image


def test_the_image_installs_what_a_checkout_installs():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    runs = [line.removeprefix("RUN ").split() for line in text.splitlines() if line.startswith("RUN ")]
    made = [words for words in runs if words[0] == "make"]
    assert made and {words[1] for words in made} <= targets and not any("pip" in words for words in runs)
    needed = re.search(r"need (.*?);", (ROOT / "Makefile").read_text())[1]
    assert all(tool in text for tool in ("git", "make", "g++", "python3-venv")) and "g++" in needed
    extras = re.search(r"^ARG EXTRAS=(.+)$", text, flags=re.MULTILINE)[1].split(",")
    settings = (ROOT / "settings.ini").read_text()
    assert all(f"\n{extra}_requirements =" in settings for extra in extras)
    toolkit = re.search(r"^cuda-toolkit==(\d+)\.", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert re.search(rf"^ARG CUDA={toolkit}\.", text, flags=re.MULTILINE), "the compiler and the wheels are of one major version"
    assert ".venv" in (ROOT / ".dockerignore").read_text().split()
