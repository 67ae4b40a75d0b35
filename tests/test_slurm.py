"""A real Slurm on this machine: a sweep as an array, a job that is killed, one that is put back, and the table at the end (make test-slurm)."""
import json
import os
import signal
import subprocess
from pathlib import Path

import nbformat
import pytest
from slurm_cluster import absent, ask, cluster, wait_for

from vlm_repro.cli import main
from vlm_repro.core.slurm import queue
from vlm_repro.report.sweeps import run_table
from vlm_repro.sweep.grid import find_notebook, plan
from vlm_repro.sweep.state import read_state, status

LACK = absent()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(LACK), reason=f"no {', '.join(LACK)} here: apt-get install slurm-wlm munge")]
CODE = """
import json, os, pathlib, time
log = pathlib.Path(out, 'starts.jsonl')
with log.open('a') as f: f.write(json.dumps([x, text, os.environ.get('SLURM_JOB_ID')]) + '\\n')
while not pathlib.Path(out, 'go').exists() and not pathlib.Path(go).exists(): time.sleep(.1)
"""


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of one machine."""
    with cluster() as root:
        yield root


@pytest.fixture
def book(tmp_path) -> Path:
    """A notebook that says it was started and then waits for a file."""
    cells = [nbformat.v4.new_code_cell(f"x = 1\ntext = ''\nout = ''\ngo = {str(tmp_path / 'go')!r}\n", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(CODE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), tmp_path / "a book.ipynb")
    return tmp_path / "a book.ipynb"


def starts(folder: Path) -> list:
    """What the notebook wrote each time it was started."""
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()] if (folder / "starts.jsonl").exists() else []


def logs(folder: Path) -> str:
    """The logs of the jobs, for a failing test."""
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in sorted(folder.glob("slurm/*")) if f.is_file())


def test_a_sweep_of_two_runs_one_killed_then_resubmitted_then_the_table(slurm, tmp_path, capsys):
    """The paper itself: its runs are real, and so is their table."""
    out = tmp_path / "sweep"
    words = ["sweep", "mmwalk", "-g", "shots=0,1", "-p", "limit", "1", "-p", "categories", "E1,E2", "--out", str(out), "--slurm", "time=30"]
    runs = plan(find_notebook("mmwalk"), {"shots": [0, 1]}, {"limit": 1, "categories": "E1,E2"}, out)
    assert main(words) == 0 and "submitted: 2 runs" in capsys.readouterr().out
    jobs = [read_state(run.folder)["job"] for run in runs]
    assert jobs[0].endswith("_0") and jobs[1].endswith("_1")
    assert main(words) == 0 and "submitted" not in capsys.readouterr().out, "what is in the queue is not submitted again"
    wait_for("the first run to start", lambda: status(runs[0], queue()).state == "running" and read_state(runs[0].folder).get("state") == "running", 300, slurm)
    os.kill(int(read_state(runs[0].folder)["where"].split()[1]), signal.SIGKILL)
    wait_for("the killed job to end", lambda: jobs[0] not in queue(), 120, slurm)
    assert main([*words, "--print"]) == 0
    said = capsys.readouterr().out
    assert status(runs[0], queue()).state == "lost" and "lost" in said and "#SBATCH" in said, said
    code = main([*words, "--wait"])
    said = capsys.readouterr().out
    assert code == 0 and "submitted: 1 run;" in said and "2 runs: 2 done" in said, said + logs(out)
    assert [read_state(run.folder)["attempts"] for run in runs] == [2, 1]
    table = run_table([out], against="shots=0")
    assert table.varied == ("shots",) and len(table.lines) == 2 and all(line.numbers["lexical@1"].n == 2 for line in table.lines)
    assert table.lines[1].tests["lexical@1"].n == 2 and table.watermarks
    assert main(["table", str(out), "--against", "shots=0"]) == 0 and "less shots=0" in capsys.readouterr().out


def test_a_job_that_is_put_back_goes_on_and_a_value_stays_as_it_is(slurm, tmp_path, book, capsys):
    text = "a friend's $HOME; 100 %, \"x\""
    words = ["submit", str(book), "-p", "text", text, "--out", str(tmp_path / "a run"), "--slurm", "time=30"]
    assert main(words) == 0
    folder = tmp_path / "a run"
    job = read_state(folder)["job"]
    wait_for("the run to start", lambda: len(starts(folder)) == 1, 120, slurm)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for("the run to be stopped", lambda: read_state(folder).get("state") == "stopped" or len(starts(folder)) == 2, 60, slurm)
    assert main(words) == 0 and "submitted" not in capsys.readouterr().out.replace(f"job {job} submitted", ""), "a job that waits to start again is not submitted again"
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
    wait_for("the run to start again", lambda: len(starts(folder)) == 2, 240, slurm)
    (folder / "go").touch()
    wait_for("the job to end", lambda: job not in queue(), 120, slurm)
    state = read_state(folder)
    assert state["state"] == "done" and state["attempts"] == 2, logs(folder)
    assert [s[1] for s in starts(folder)] == [text, text] and {s[2] for s in starts(folder)} == {job}


def test_at_the_end_of_its_time_a_run_of_an_array_saves_stops_and_goes_back_alone(slurm, tmp_path, book, capsys):
    out = tmp_path / "s"
    words = ["sweep", str(book), "-g", "x=1,3", "--out", str(out), "--slurm", "time=30"]
    assert main(words) == 0
    first, last = plan(find_notebook(book), {"x": [1, 3]}, {}, out)
    wait_for("both to start", lambda: len(starts(first.folder)) == len(starts(last.folder)) == 1, 120, slurm)
    job = read_state(last.folder)["job"]
    subprocess.run(["scancel", "--signal=USR2", "--batch", job], check=True)  # what Slurm sends before the time is over
    wait_for("the run to be stopped", lambda: read_state(last.folder).get("state") == "stopped", 60, slurm)
    wait_for("the job to be back in the queue", lambda: queue().get(job) == "PENDING", 60, slurm)
    assert status(first, queue()).state == "running" and len(starts(first.folder)) == 1, "the other run of the array is left alone"
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
    wait_for("the run to start again", lambda: len(starts(last.folder)) == 2, 240, slurm)
    (tmp_path / "go").touch()
    assert main([*words, "--wait"]) == 0, logs(out)
    assert [read_state(run.folder)["attempts"] for run in (first, last)] == [1, 2]


def test_a_cancelled_run_is_not_put_back_and_the_same_command_continues_it(slurm, tmp_path, book, capsys):
    words = ["submit", str(book), "--out", str(tmp_path / "r"), "--slurm", "time=30"]
    assert main(words) == 0
    job = read_state(tmp_path / "r")["job"]
    wait_for("the run to start", lambda: len(starts(tmp_path / "r")) == 1, 120, slurm)
    subprocess.run(["scancel", job], check=True)
    wait_for("the job to end", lambda: job not in queue(), 60, slurm)
    assert read_state(tmp_path / "r")["state"] == "stopped" and "SIGTERM" in read_state(tmp_path / "r")["reason"]
    (tmp_path / "go").touch()
    assert main([*words, "--wait"]) == 0 and "1 runs: 1 done" in capsys.readouterr().out


def test_the_printed_script_is_the_submitted_one_and_runs_by_hand(slurm, tmp_path, book, capsys):
    (tmp_path / "go").touch()
    words = ["sweep", str(book), "-g", "x=1,3", "--out", str(tmp_path / "s"), "--slurm", "time=30"]
    assert main([*words, "--print"]) == 0
    printed = capsys.readouterr().out
    printed = printed[printed.index("#!/bin/bash"):].rstrip()
    (tmp_path / "by hand.sh").write_text(printed + "\n")
    (tmp_path / "s" / "slurm").mkdir(parents=True)
    array = ask("sbatch", "--parsable", str(tmp_path / "by hand.sh"))
    assert array.isdigit()
    wait_for("the array to end", lambda: not any(job.split("_")[0] == array for job in queue()), 180, slurm)
    assert "2 done" in (main([*words, "--print"]) == 0 and capsys.readouterr().out or ""), logs(tmp_path / "s")
    assert main(["sweep", str(book), "-g", "x=4,5", "--out", str(tmp_path / "t"), "--slurm", "time=30", "--print"]) == 0
    shown = capsys.readouterr().out
    assert main(["sweep", str(book), "-g", "x=4,5", "--out", str(tmp_path / "t"), "--slurm", "time=30", "--wait"]) == 0
    sent = next((tmp_path / "t" / "slurm").glob("*_submission.sh")).read_text()
    assert sent.strip() == shown[shown.index("#!/bin/bash"):].strip()


def test_what_slurm_refuses_is_said_and_nothing_is_written_down(slurm, tmp_path, book, capsys):
    assert main(["submit", str(book), "--out", str(tmp_path / "r"), "--slurm", "partition=none"]) == 2
    assert "invalid partition" in capsys.readouterr().err.lower() and not (tmp_path / "r" / "submitted.json").exists()


def test_training_through_the_same_script(slurm, tmp_path, capsys):
    small = ["-p", "data.settings.limit", "1", "-p", "eval_data", "[]", "-p", "batch", "4", "-p", "max_steps", "2", "-p", "log_every", "1", "-p", "tuning", '{"method": "lora", "rank": 4}',
             "-p", "data.settings.categories", "E1"]
    assert main(["train", "mmwalk/tiny", *small, "--out", str(tmp_path), "--slurm", "gpus=0,time=30"]) == 0
    wait_for("the training to end", lambda: not queue(), 400, slurm)
    assert (tmp_path / "adapter" / "adapter_config.json").exists(), logs(tmp_path)


def test_without_the_controller_the_error_says_so(tmp_path, book, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    assert main(["submit", str(book), "--out", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "Slurm did not take the job" in said and "--print" in said
