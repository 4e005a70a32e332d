"""Accounting for a local cluster: mariadbd and slurmdbd of its own, so that `sacct` answers.

Debian: slurmdbd and mariadb-server. Without them a cluster starts without accounting, as many do.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.slurm_cluster.localslurm import free_port


class AccountingDaemons:
    """Start before the cluster, whose slurm.conf takes ``conf``; empty where they are not installed."""

    def __init__(self, folder):
        self.folder = Path(folder) / "accounting"
        self.is_there = bool(shutil.which("mariadbd")) and Path("/usr/sbin/slurmdbd").exists()
        self._ports = free_port(), free_port()
        self._processes = []
        self.conf = ""
        if self.is_there:
            self.conf = (
                "AccountingStorageType=accounting_storage/slurmdbd\n"
                f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={self._ports[1]}\n"
                "AccountingStorageEnforce=associations,limits,qos\n"
            )

    def __enter__(self):
        if self.is_there:
            self.folder.mkdir(parents=True)
            try:
                self._start_database()
                self._start_slurmdbd()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *problem):
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)

    def register(self, cluster):
        """Make the user known, or Slurm keeps no record of the jobs."""
        if self.is_there:
            name = cluster.conf.read_text().partition("ClusterName=")[2].split()[0]
            for words in (
                ["cluster", name], ["account", "research", f"cluster={name}"],
                ["user", getpass.getuser(), "account=research", f"cluster={name}"],
            ):  # fmt: skip
                cluster.run("sacctmgr", "-i", "add", *words, check=False)
            time.sleep(2)

    def _start(self, name, *words, **environment):
        with open(self.folder / f"{name}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **environment})
            )

    def _start_database(self):
        folder, user = self.folder, getpass.getuser()
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={folder}/data", f"--user={user}",
             "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True, capture_output=True,
        )  # fmt: skip
        self._start(
            "mariadbd", "mariadbd", "--no-defaults", f"--datadir={folder}/data", f"--user={user}",
            f"--socket={folder}/socket", f"--port={self._ports[0]}", "--bind-address=127.0.0.1",
            f"--pid-file={folder}/mariadbd.pid", "--innodb-buffer-pool-size=16M",
            "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        client = ["mariadb", "--no-defaults", f"--socket={folder}/socket", "-uroot", "-e"]
        for _ in range(200):
            if subprocess.run([*client, "select 1"], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        words = ""
        for host in ("127.0.0.1", "localhost"):
            words += f"create user s@'{host}' identified by 's';"
            words += f"grant all on slurm_acct_db.* to s@'{host}';"
        subprocess.run([*client, words], check=True)

    def _start_slurmdbd(self):
        file = self.folder / "slurmdbd.conf"
        file.write_text(
            f"AuthType=auth/none\nDbdHost={socket.gethostname().split('.')[0]}\nDbdAddr=127.0.0.1\n"
            f"DbdPort={self._ports[1]}\nSlurmUser={getpass.getuser()}\n"
            "StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={self._ports[0]}\nStorageUser=s\nStoragePass=s\n"
            f"LogFile={self.folder}/slurmdbd.log\nPidFile={self.folder}/slurmdbd.pid\n"
        )
        file.chmod(0o600)
        self._start("slurmdbd", "/usr/sbin/slurmdbd", "-D",
                    SLURM_CONF=str(self.folder / "slurm.conf"))  # fmt: skip
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self._ports[1]), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"slurmdbd does not listen; see {self.folder}")
