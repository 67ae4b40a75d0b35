"""Launching: what is shown is what runs, and the Slurm script is valid shell."""
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_repro.cli import main
from vlm_repro.core.slurm import slurm_script
from vlm_repro.train.checkpoints import last_checkpoint, step_of
from vlm_repro.train.launch import LaunchError, Machines, launch, launch_plan, slurm_job, stream, torchrun, train_folder
from vlm_repro.train.recipe import load_recipe
from vlm_repro.train.watch import read_log

SMALL = ["-p", "data.settings.limit", "1", "-p", "eval_data", "[]", "-p", "batch", "4", "-p", "max_steps", "2", "-p", "log_every", "1",
         "-p", "tuning", '{"method": "lora", "rank": 4}', "-p", "data.settings.categories", "E1"]


def test_print_shows_recipe_folder_and_command_and_writes_nothing(tmp_path, capsys):
    assert main(["train", "mmwalk/tiny", "--nproc", "2", "--out", str(tmp_path / "run"), "--print", "-p", "learning_rate", "4e-4"]) == 0
    said = capsys.readouterr().out
    assert "this call" in said and "--nproc-per-node 2" in said and str(tmp_path / "run") in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("nnodes", [1, 2, 16])
def test_the_slurm_script_is_valid_shell(nnodes, tmp_path, capsys):
    words = ["train", "gpt4scene/published", "--nproc", "8", "--nnodes", str(nnodes), "--slurm", "partition=gpu", "--slurm", "time=600", "--slurm", "account=lab", "--out", str(tmp_path), "--print"]
    assert main(words) == 0
    said = capsys.readouterr().out
    script = said[said.index("#!/bin/bash"):]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    for flag in (f"--nodes={nnodes}", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=gpu", "--time=600", "--account=lab", "--signal=B:USR2@120", "--requeue"):
        assert f"#SBATCH {flag}\n" in script


def test_every_machine_of_a_job_runs_torchrun_with_its_own_rank(tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "scontrol").write_text("#!/bin/bash\necho gpu1\necho gpu2\n")
    (fake / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    (fake / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for f in fake.iterdir():
        f.chmod(0o755)
    script = slurm_script(slurm_job(Machines(4, 2, slurm={}), tmp_path / "a recipe.yaml", tmp_path)).replace(sys.executable, str(fake / "python"))
    env = {"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77"}
    said = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=env, check=True).stdout.splitlines()
    options = dict(zip(said, said[1:]))
    assert (options["--nnodes"], options["--node-rank"], options["--master-addr"], options["--master-port"], options["--nproc-per-node"]) == ("2", "1", "gpu1", "20077", "4")
    assert options["train"] == str(tmp_path / "a recipe.yaml") and options["--out"] == str(tmp_path)


def test_what_cannot_be_launched_is_said(tmp_path, capsys):
    with pytest.raises(ValueError, match="several machines need a place to meet"):
        Machines(nproc=8, nnodes=2)
    assert main(["train", "mmwalk/tiny", "--slurm", "partion=gpu", "--out", str(tmp_path), "--print"]) == 2
    assert "did you mean 'partition'" in capsys.readouterr().err
    assert main(["train", "mmwalk/tinny"]) == 2
    assert "did you mean 'mmwalk/tiny'" in capsys.readouterr().err


def test_a_job_without_slurm_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "mmwalk/tiny", "--slurm", "yes", "--out", str(tmp_path)]) == 2
    assert "Use --print to see the script" in capsys.readouterr().err


def test_the_printed_command_is_the_one_that_runs(tmp_path):
    recipe = load_recipe("mmwalk/tiny")
    assert shlex.split(launch_plan(recipe, tmp_path, Machines(nproc=2)).command) == torchrun(Machines(nproc=2), tmp_path / "launch.yaml", tmp_path)
    assert train_folder(recipe).parts[:2] == ("runs", "train")


def test_a_process_that_fails_is_an_error_with_its_last_words(capsys):
    with pytest.raises(LaunchError, match="(?s)exit code 7.*out of luck"):
        stream([sys.executable, "-c", "print('out of luck'); raise SystemExit(7)"])
    assert "out of luck" in capsys.readouterr().out


def test_train_and_dry_run_from_the_command_line(tmp_path, capsys):
    assert main(["train", "mmwalk/tiny", *SMALL, "--skip-model", "--out", str(tmp_path)]) == 2
    assert "--skip-model belongs to --dry-run" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["train", "mmwalk/tiny", *SMALL, "--dry-run", "--skip-model"]) == 0
    said = capsys.readouterr().out
    assert "⟦" in said and "predicted memory" in said and "forward and backward" not in said
    assert main(["train", "mmwalk/tiny", *SMALL, "--out", str(tmp_path)]) == 0
    assert "weights" in capsys.readouterr().out and (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_two_processes_train_and_their_log_is_streamed(tmp_path, capsys):
    from vlm_repro.cli_run import parse_pairs

    changes = parse_pairs(f"{a}={b}" for a, b in zip(SMALL[1::3], SMALL[2::3]))
    launch(load_recipe("mmwalk/tiny", **changes), tmp_path, Machines(nproc=2))
    said = capsys.readouterr().out
    assert "--nproc-per-node 2" in said and "step 2/2" in said
    assert [row["step"] for row in read_log(Path(tmp_path) / "log.jsonl")] == [1, 2]


@pytest.mark.slow
def test_a_signal_to_the_command_reaches_every_process_and_the_same_command_goes_on(tmp_path):
    words = [str(Path(sys.executable).with_name("vlm-repro")), "train", "mmwalk/tiny", *SMALL, "-p", "data.settings.limit", "4", "-p", "max_steps", "40", "-p", "epochs", "40", "-p", "save_every", "never",
             "--nproc", "2", "--out", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "step 3/40" in line:
                process.terminate()
    assert process.returncode, "".join(said)
    reached = step_of(last_checkpoint(tmp_path))
    assert 3 <= reached < 40 and not (tmp_path / "adapter").exists()
    ended = subprocess.run([*words, "-p", "log_every", "2"], capture_output=True, text=True)
    assert ended.returncode == 0 and f"going on from step {reached}" in ended.stdout and "step 40/40" in ended.stdout


@pytest.mark.slow
def test_a_papers_training_takes_the_processes_of_the_run(tmp_path, capsys):
    from vlm_repro.cli_run import parse_pairs
    from vlm_repro.train.paper import tune

    changes = parse_pairs(f"{a}={b}" for a, b in zip(SMALL[1::3], SMALL[2::3]))
    recipe = load_recipe("mmwalk/tiny", **changes)
    trained = tune(recipe, tmp_path, nproc=2, device="cpu")
    assert "--nproc-per-node 2" in capsys.readouterr().out and trained.steps == trained.of == 2
    assert tune(recipe, tmp_path, nproc=3, device="cpu").weights == trained.weights  # finished: taken as it is
    assert "--nproc-per-node" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="the wish to end with the parent is Linux's")
def test_what_a_killed_launcher_started_ends_too(tmp_path):
    own = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import sys; from vlm_repro.train.launch import stream; stream([sys.executable, '-c', {own!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        started = int(launcher.stdout.readline())
        launcher.kill()
    until = time.monotonic() + 10
    while Path(f"/proc/{started}").exists() and Path(f"/proc/{started}/stat").read_text().split()[2] != "Z" and time.monotonic() < until: time.sleep(.05)
    assert time.monotonic() < until
