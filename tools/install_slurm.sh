#!/usr/bin/env bash
# Install Slurm's daemons for the tests marked `slurm`, without starting any of them, and what the
# stand-in for pyxis is compiled with. Debian or Ubuntu, as root; elsewhere it says why nothing was
# done and exits 0, and those tests skip.
set -uo pipefail
if [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ] && command -v sbatch >/dev/null &&
    command -v ip >/dev/null && command -v gcc >/dev/null && [ -e /usr/include/slurm/spank.h ]; then
    echo "Slurm is here: $(dpkg-query -W -f '${Version}' slurmd 2>/dev/null)"
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "NO SLURM: needs apt-get and root; the tests marked slurm will be skipped" >&2
    exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    # Keeps the packages from starting their services.
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq &&
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client iproute2 gcc libc6-dev libslurm-dev >/dev/null &&
    echo "installed $(dpkg-query -W -f '${Version}' slurmd 2>/dev/null)" ||
    echo "NO SLURM: apt-get could not install it; the tests marked slurm will be skipped" >&2
exit 0
