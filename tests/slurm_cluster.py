"""A real Slurm on this machine alone: munged, slurmctld and slurmd in a folder of their own, on 127.0.0.1, stopped by process id."""
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
InactiveLimit=0
SchedulerParameters=requeue_setup_env_fail
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def absent() -> list[str]:
    """The programs of Slurm that this machine lacks."""
    return [name for name in DAEMONS if not shutil.which(name, path=PLACES)]


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in taken:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in taken]


def wait_for(what: str, check, seconds: float = 60, root: Path | None = None) -> None:
    """Wait until `check` is true; fail with the daemons' last words if it never is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return
        time.sleep(0.2)
    logs = "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in sorted(root.glob("*.log"))) if root else ""
    raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{logs}")


def ask(*words: str) -> str:
    """What a Slurm command says; empty where it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def start(stack: contextlib.ExitStack, root: Path, *words: str) -> subprocess.Popen:
    """Start a daemon in the foreground; it is stopped with the stack."""
    log = stack.enter_context(open(root / f"{words[0]}.out.log", "wb"))
    process = subprocess.Popen([shutil.which(words[0], path=PLACES), *words[1:]], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    stack.callback(stop, process)
    return process


def stop(process: subprocess.Popen) -> None:
    """End one process that was started here."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(cpus: int = 2) -> Iterator[Path]:
    """A running Slurm of one machine; the clients find it through SLURM_CONF. Yields its folder."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        host = socket.gethostname().split(".")[0]
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        (root / "slurm.conf").write_text(CONF.format(root=root, host=host, user=getpass.getuser(), ports=free_ports(2), cpus=max(cpus, os.cpu_count() or 1)))
        (root / "state").mkdir()
        (root / "spool").mkdir()
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")
        stack.callback(lambda: os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before))
        start(stack, root, "munged", "--foreground", "--force", f"--key-file={root}/munge.key", f"--socket={root}/munge.socket",
              f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed")
        wait_for("munged", (root / "munge.socket").exists, root=root)
        start(stack, root, "slurmctld", "-D", "-f", str(root / "slurm.conf"))
        start(stack, root, "slurmd", "-D", "-f", str(root / "slurm.conf"))
        wait_for("an idle node", lambda: ask("sinfo", "--noheader", "--format", "%T") in ("idle", "mixed"), root=root)
        try:
            yield root
        finally:
            subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
            with contextlib.suppress(TimeoutError):
                wait_for("an empty queue", lambda: not ask("squeue", "--noheader"), 30)
