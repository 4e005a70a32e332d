#!/usr/bin/env python3
# ruff: noqa: E501, B008
"""A throw-away multi-node Slurm cluster on one machine, for tests. Stdlib only; nothing outside DIR is written.

Needs: apt-get install slurmctld slurmd slurm-client (Debian 12: 22.05.8; 24.11.5 tested too). No systemd, cgroups, munge.

  with LocalSlurm(tmp_path, nodes=2) as s:
      s.run("sbatch", "job.sh"); s.kill_node("n1"); s.start_node("n1")
  localslurm.py start DIR -n 4 [--isolate] [--gpus 8] [--extra FILE]; eval "$(localslurm.py env DIR)"; localslurm.py stop DIR
  localslurm.py kill-node | start-node | cut | heal DIR n1

isolate=True (root, or `unshare --user --map-current-user --keep-caps --net --mount --fork pytest ...`): every node is its
own pid+mount+uts+net namespace (own hostname, IP, /dev/shm), so a rendezvous on localhost fails as on a real cluster and
kill_node is like pulling the plug. isolate=False: any user; nodes share the host and differ by slurmd's port.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import pathlib
import pwd
import re
import signal
import socket
import subprocess
import time

CONF = """
ClusterName=t{tag} SlurmctldHost={host}({ctl}) SlurmctldPort={port} SlurmUser={user} SlurmdUser={user}
AuthType=auth/none CredType=cred/none AuthInfo=cred_expire=5
StateSaveLocation={d}/ctld SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid SlurmdPidFile={d}/run/%n.pid
SlurmctldLogFile={d}/log/slurmctld.log SlurmdLogFile={d}/log/%n.log
SlurmdParameters=config_overrides ProctrackType=proctrack/linuxproc TaskPlugin=task/none
SwitchType=switch/none MpiDefault=none GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux JobCompType=jobcomp/filetxt JobCompLoc={d}/jobcomp.txt
SelectType=select/cons_tres SelectTypeParameters=CR_Core
SchedulerType=sched/backfill SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=1
PreemptType=preempt/partition_prio PreemptMode=REQUEUE JobRequeue=1 ReturnToService=2
SlurmdTimeout=10 MessageTimeout=5 TCPTimeout=2 KillWait=5 UnkillableStepTimeout=60 BatchStartTimeout=15
"""  # one `key=value` a word here, a line in the file
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF"""


def _stat(pid):  # (parent, start time) or None; the start time tells a reused pid
    try:
        f = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if f[0] == "Z" else (int(f[1]), int(f[19]))
    except OSError:
        return None


def _tree(pid):
    kids = {}
    for p in filter(str.isdigit, os.listdir("/proc")):
        if s := _stat(p):
            kids.setdefault(s[0], []).append(int(p))
    out = [pid]
    for p in out:
        out += kids.get(p, [])
    return out


def _ip(*cmds):
    for c in cmds:
        subprocess.run(["ip", *c.split()], check=True)


def free_port():
    with socket.create_server(("", 0)) as s:
        return s.getsockname()[1]


def _wait(cond, what, timeout=30):
    end = time.time() + timeout
    while not cond():
        if time.time() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


class LocalSlurm:
    def __init__(
        self,
        state,
        nodes=2,
        cpus=4,
        gpus=8,
        gpu_type="h100",
        mem=8000,
        prefix="n",
        isolate=False,
        partitions=PARTITIONS,
        extra="",
        die_with_parent=False,
    ):
        self.d = self.dir = pathlib.Path(state).absolute()
        self.conf, self.file = self.d / "slurm.conf", self.d / "cluster.json"
        self.env = dict(os.environ, SLURM_CONF=str(self.conf))
        self.nodes, self.cpus, self.gpus, self.gpu_type, self.mem = nodes, cpus, gpus, gpu_type, mem
        self.partitions, self.extra, self.die = partitions, extra, die_with_parent
        self.names, self.isolate = [f"{prefix}{i}" for i in range(nodes)], isolate
        self.children = []  # kept, or Popen complains when it is collected
        if self.file.exists():
            saved = json.loads(self.file.read_text())
            self.names, self.isolate = saved["names"], saved["isolate"]
        # slurmstepd listens here; a longer path than a Unix socket's 107 bytes fails every job, without a word.
        socket_path = f"{self.d}/spool/{self.names[-1]}/{self.names[-1]}_99999.4294967291"
        if len(os.fsencode(socket_path)) > 107:
            raise ValueError(
                f"DIR is {len(os.fsencode(socket_path)) - 107} bytes too long: {self.d}"
            )
        h = hashlib.sha1(str(self.d).encode()).digest()
        self.tag, self.net = h.hex()[:5], f"10.{100 + h[5] % 100}.{h[6]}"

    def start(self):
        self.stop()  # what an earlier, killed run left
        try:
            self._configure()
            ctld = f"exec /usr/sbin/slurmctld -D -f {self.conf}"
            if self.isolate:  # with our hosts file, or 24.11 asks DNS for the nodes' names
                ctld = f"mount --bind {self.d}/hosts /etc/hosts; {ctld}"
                _ip(
                    "link set lo up",
                    f"link add slb{self.tag} type bridge",
                    f"addr add {self.net}.1/24 dev slb{self.tag}",
                    f"link set slb{self.tag} up",
                )
            self._spawn(
                "slurmctld", (["unshare", "--mount"] if self.isolate else []) + ["bash", "-c", ctld]
            )
            for n in self.names:
                self.start_node(n)
            _wait(self._ready, f"nodes idle; see {self.d}/log")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self):
        for name in sorted(self._procs(), key=lambda n: n != "slurmctld"):
            self._kill(name, signal.SIGTERM if name == "slurmctld" else signal.SIGKILL)
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()
        links = [f"slb{self.tag}", f"slb{self.tag}x"] + [
            f"sl{self.tag}v{i}" for i in range(len(self.names))
        ]
        for link in links if self.isolate else []:
            subprocess.run(["ip", "link", "del", link], stderr=subprocess.DEVNULL)

    __enter__ = start

    def __exit__(self, *exc):
        self.stop()

    def start_node(self, n):
        i, slurmd = (
            self.names.index(n),
            f"/usr/sbin/slurmd -D -b -f {self.conf} -N {n}",
        )  # -b: count as booted just now
        if not self.isolate:
            return self._spawn(n, slurmd.split())
        veth = f"sl{self.tag}v{i}"
        init = (
            f"hostname {n}; mount --bind {self.d}/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm; ip link set lo up;"
            f" until ip link set eth0 up 2>/dev/null; do sleep .05; done; ip addr add {self.net}.{i + 10}/24 dev eth0;"
            f" {slurmd} & while :; do wait; sleep 1; done"
        )  # bash, as the node's pid 1, reaps orphans
        pid = self._spawn(
            n,
            [
                "unshare",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount",
                "--mount-proc",
                "--uts",
                "--net",
                "bash",
                "-c",
                init,
            ],
        )
        _wait(
            lambda: os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"),
            "netns",
            5,
        )
        # A killed node's end vanishes with its namespace, a moment later.
        subprocess.run(["ip", "link", "del", veth], stderr=subprocess.DEVNULL)
        _ip(
            f"link add {veth} type veth peer name {veth}p",
            f"link set {veth} master slb{self.tag} up",
            f"link set {veth}p netns {pid} name eth0",
        )

    def kill_node(self, n):
        """Power loss: slurmd, its slurmstepds and every task get SIGKILL."""
        self._kill(n, signal.SIGKILL)

    def cut_node(self, n, up=False):
        """Cut (or heal) the node's network while its processes live on; isolate=True only."""
        _ip(f"link set sl{self.tag}v{self.names.index(n)} {'up' if up else 'down'}")

    def split_off(self, *names):
        """Part nodes from the controller but not from one another (or the file system): a switch that
        lost its uplink. Healed by ``rejoin``. isolate=True only."""
        _ip(f"link add slb{self.tag}x type bridge", f"link set slb{self.tag}x up")
        for n in names:
            _ip(f"link set sl{self.tag}v{self.names.index(n)} master slb{self.tag}x")

    def rejoin(self, *names):
        """Bring nodes back that ``split_off`` parted."""
        for n in names:
            _ip(f"link set sl{self.tag}v{self.names.index(n)} master slb{self.tag}")
        _ip(f"link del slb{self.tag}x")

    def freeze(self, *names, stop=True):
        """Stop (or continue) the ranks and their launchers on nodes; return how many processes that were."""
        number = 0
        for pid in (p for n in names for p in self.pids(n)):
            try:
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"megatron_eso" in words and {b"launch", b"train"} & set(words):
                os.kill(pid, signal.SIGSTOP if stop else signal.SIGCONT)
                number += 1
        return number

    def _ready(self):
        for n, (pid, _) in self._procs().items():
            if not _stat(pid):
                raise RuntimeError(f"{n} died: " + (self.d / f"log/{n}.out").read_text()[-500:])
        return set(self.node_states().values()) == {"idle"}

    def node_states(self):
        out = self.run("sinfo", "-hN", "-o", "%N %T", check=False).stdout
        return dict(line.split() for line in out.splitlines())

    def problem(self, lines=8):
        """Return what may explain why nothing goes on: jobs with reasons, nodes, errors in the daemons' logs."""
        text = (
            self.run("squeue", "-o", "%i %T %r %N", check=False).stdout + f"{self.node_states()}\n"
        )
        for log in sorted((self.d / "log").glob("*.log")):
            errors = [x for x in log.read_text().splitlines() if re.search("error|fail", x, re.I)]
            text += "".join(f"{log.stem}: {x}\n" for x in errors[-lines:])
        return text

    def pids(self, n):
        return _tree(self._procs()[n][0])

    def run(self, *cmd, check=True, timeout=120, **kw):
        return subprocess.run(
            list(map(str, cmd)),
            text=True,
            capture_output=True,
            check=check,
            timeout=timeout,
            **{"cwd": self.d, "env": self.env, **kw},
        )

    def _configure(self):
        for sub in ("ctld", "log", "run", "dev", *(f"spool/{n}" for n in self.names)):
            (self.d / sub).mkdir(parents=True, exist_ok=True)
        host, ctl = (
            socket.gethostname().split(".")[0],
            f"{self.net}.1" if self.isolate else "127.0.0.1",
        )
        hosts, lines = (
            ["127.0.0.1 localhost", f"{ctl} {host} metadata.google.internal"],
            [],
        )  # for a fake GCE metadata server
        for i, n in enumerate(self.names):
            addr, port = (
                (f"{self.net}.{i + 10}", 6818) if self.isolate else ("127.0.0.1", free_port())
            )
            hosts.append(f"{addr} {n}")
            lines.append(
                f"NodeName={n} NodeHostname={n} NodeAddr={addr} Port={port} CPUs={self.cpus} "
                f"RealMemory={self.mem}"
                + (f" Gres=gpu:{self.gpu_type}:{self.gpus}" if self.gpus else "")
            )
        (self.d / "hosts").write_text("\n".join(hosts) + "\n")
        (self.d / "cgroup.conf").touch()
        (self.d / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={','.join(self.names)} Name=gpu Type={self.gpu_type} "
            f"File={self._gpu_files()}\n"
            if self.gpus
            else ""
        )
        conf = CONF.format(
            tag=self.tag,
            host=host,
            ctl=ctl,
            port=free_port(),
            d=self.d,
            user=pwd.getpwuid(os.getuid())[0],
        )
        self.conf.write_text("\n".join([*conf.split(), *lines, self.partitions, self.extra, ""]))

    def _gpu_files(
        self,
    ):  # Slurm wants character devices, and sets CUDA_VISIBLE_DEVICES by their number
        try:
            for i in range(self.gpus):
                if not (self.d / f"dev/nvidia{i}").exists():
                    os.mknod(self.d / f"dev/nvidia{i}", 0o020666, os.makedev(195, i))
        except PermissionError:  # not root: borrow ttys; in a container, plain files (then CUDA_VISIBLE_DEVICES stays empty)
            if os.path.exists(f"/dev/tty{self.gpus - 1}"):
                return f"/dev/tty[0-{self.gpus - 1}]"
            for i in range(self.gpus):
                (self.d / f"dev/nvidia{i}").touch()
        return f"{self.d}/dev/nvidia[0-{self.gpus - 1}]"

    def _procs(self):  # on disk, as the command line and Slurm's ResumeProgram change it too
        return json.loads(self.file.read_text())["procs"] if self.file.exists() else {}

    def _set_proc(self, name, proc=None):
        """Remember a process (pid, start time), or forget it; others may do so at the same moment."""
        with open(self.d / "cluster.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            procs = {k: v for k, v in self._procs().items() if k != name}
            if proc:
                procs[name] = proc
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(dict(names=self.names, isolate=self.isolate, procs=procs)))
            part.replace(self.file)

    def _spawn(self, name, cmd):
        def pre(prctl=ctypes.CDLL(None).prctl):
            prctl(
                36, 1
            )  # PR_SET_CHILD_SUBREAPER: slurmd adopts its orphaned slurmstepds, so _tree finds them
            prctl(1, signal.SIGKILL if self.die else 0)  # PR_SET_PDEATHSIG

        env = {k: v for k, v in self.env.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
        with open(self.d / "log" / f"{name}.out", "ab") as log:
            p = subprocess.Popen(
                cmd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.d,
                env=env,
                start_new_session=True,
                preexec_fn=pre,
            )
        self.children.append(p)
        self._set_proc(name, (p.pid, (_stat(p.pid) or (0, 0))[1]))
        return p.pid

    def _kill(self, name, sig):
        pid, born = self._procs().get(name, (0, 0))
        if pid and (s := _stat(pid)) and s[1] == born:
            pids = [pid] if sig == signal.SIGTERM or self.isolate else _tree(pid)
            for p in filter(_stat, pids):
                os.kill(p, sig)
            _wait(lambda: not any(map(_stat, pids)), f"end of {name}")
            for child in self.children:
                child.poll()
        self._set_proc(name)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("cmd", choices="start stop env kill-node start-node cut heal".split())
    p.add_argument("dir"), p.add_argument("node", nargs="?")
    (
        p.add_argument("-n", "--nodes", type=int, default=2),
        p.add_argument("--cpus", type=int, default=4),
    )
    p.add_argument("--gpus", type=int, default=8), p.add_argument("--prefix", default="n")
    (
        p.add_argument("--isolate", action="store_true"),
        p.add_argument("--extra", help="file with slurm.conf lines"),
    )
    o = p.parse_args()
    s = LocalSlurm(
        o.dir,
        o.nodes,
        o.cpus,
        o.gpus,
        prefix=o.prefix,
        isolate=o.isolate,
        extra=pathlib.Path(o.extra).read_text() if o.extra else "",
    )
    {
        "start": s.start,
        "stop": s.stop,
        "env": lambda: print(f"export SLURM_CONF={s.conf}"),
        "kill-node": lambda: s.kill_node(o.node),
        "start-node": lambda: s.start_node(o.node),
        "cut": lambda: s.cut_node(o.node),
        "heal": lambda: s.cut_node(o.node, up=True),
    }[o.cmd]()


if __name__ == "__main__":
    main()
