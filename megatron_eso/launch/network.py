# ruff: noqa: E501 -- shell text whose lines cannot be broken
"""Shell text that sets up NCCL for a machine type.

The plugins' own profiles are sourced, never copied: their tuning values change with the plugin and
other values are refused by its configuration check. Sources: the NCCL tests among the machine-learning
examples of Google's cluster-toolkit.
"""

_PLAIN = """\
set_network() { :; }
network_mounts=()
"""

# One node: the plugin is not installed for the job, so it must not be loaded.
_TCPXO = """\
set_network() {
    [ "$TRAIN_NODES" -gt 1 ] || return 0
    local folder=${TCPXO_FOLDER:-/var/lib/tcpxo/lib64}
    if [ ! -r "$folder/nccl-env-profile.sh" ]; then
        say "no $folder/nccl-env-profile.sh: the prolog that installs GPUDirect-TCPXO did not run"
        exit 1
    fi
    NCCL_LIB_DIR=$folder
    set +u
    # shellcheck disable=SC1091
    source "$folder/nccl-env-profile.sh"
    set -u
    export NCCL_LIB_DIR
    export NCCL_FASTRAK_CTRL_DEV=enp0s12 NCCL_SOCKET_IFNAME=enp0s12 GLOO_SOCKET_IFNAME=enp0s12
    export NCCL_FASTRAK_IFNAME=enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0
    export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices RANK_LIBRARY_PATH=$folder
    network_mounts=(/var/tmp:/var/tmp "$folder:$folder")
}
network_mounts=()
"""

_TCPX = """\
set_network() {
    [ "$TRAIN_NODES" -gt 1 ] || return 0
    local folder=/var/lib/tcpx/lib64 sockets=/run/tcpx-$SLURM_JOB_ID
    export NCCL_NET=GPUDirectTCPX_v7 NCCL_ALGO=Ring NCCL_PROTO=Simple
    export NCCL_SOCKET_IFNAME=enp0s12 GLOO_SOCKET_IFNAME=enp0s12 NCCL_GPUDIRECTTCPX_CTRL_DEV=enp0s12
    export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=enp6s0,enp12s0,enp134s0,enp140s0
    export NCCL_GPUDIRECTTCPX_TX_BINDINGS='enp6s0:8-21,112-125;enp12s0:8-21,112-125;enp134s0:60-73,164-177;enp140s0:60-73,164-177'
    export NCCL_GPUDIRECTTCPX_RX_BINDINGS='enp6s0:22-35,126-139;enp12s0:22-35,126-139;enp134s0:74-87,178-191;enp140s0:74-87,178-191'
    export NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX=$sockets CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
    export RANK_LIBRARY_PATH=$folder
    network_mounts=(/var/tmp:/var/tmp "$folder:$folder" "$sockets:$sockets")
}
network_mounts=()
"""

_GIB = """\
set_network() {
    [ "$TRAIN_NODES" -gt 1 ] || return 0
    if [ ! -r /usr/local/gib/scripts/set_nccl_env.sh ]; then
        say "no /usr/local/gib/scripts/set_nccl_env.sh: this node has no gIB plugin"
        exit 1
    fi
    set +u
    # shellcheck disable=SC1091
    source /usr/local/gib/scripts/set_nccl_env.sh
    set -u
    export NCCL_SOCKET_IFNAME=enp0s19,enp192s20 GLOO_SOCKET_IFNAME=enp0s19 NCCL_NET=gIB
    export RANK_LIBRARY_PATH=/usr/local/gib/lib64
    network_mounts=(/var/tmp:/var/tmp /usr/local/gib:/usr/local/gib)
}
network_mounts=()
"""

NETWORKS = {"plain": _PLAIN, "tcpx": _TCPX, "tcpxo": _TCPXO, "gib": _GIB}

# set_container sets CONTAINER, options of srun, and WRAP, words before a rank's command.
_NO_CONTAINER = """\
set_container() { :; }
CONTAINER=() WRAP=()
"""

# The host's values of these variables must win over the image's, hence --container-env.
_PYXIS = """\
set_container() {
    local names mounts root=${CODE%/slurm/code} # an array's tasks have folders below it
    names=$({ compgen -e | grep -E '^(NCCL_|GLOO_|MASTER_|MEGATRON_ESO_|PYTHON(PATH|SAFEPATH)$|RANK_|POLL_METADATA$|OMP_)'
        printf '%s\\n' "${ENVIRONMENT_NAMES[@]}"; } | grep . | sort -u | paste -sd,)
    mounts=$(printf '%s,' "$root:$root" "$SUBMIT_FOLDER:$SUBMIT_FOLDER" "${network_mounts[@]}" "${MOUNTS[@]}")
    CONTAINER=(--container-image="$IMAGE" --container-env="$names" --container-mounts="${mounts%,}"
        --container-workdir="$SUBMIT_FOLDER")
}
CONTAINER=() WRAP=()
"""

_APPTAINER = """\
set_container() {
    local mount root=${CODE%/slurm/code} # an array's tasks have folders below it
    WRAP=(apptainer exec --nv --pwd "$SUBMIT_FOLDER")
    for mount in "$root:$root" "$SUBMIT_FOLDER:$SUBMIT_FOLDER" "${network_mounts[@]}" "${MOUNTS[@]}"; do
        WRAP+=(--bind "$mount")
    done
    # LD_LIBRARY_PATH is not passed on, so it is set inside; packages of ~/.local, which is mounted, are not the image's.
    WRAP+=("$IMAGE" bash -c "$library_script"'exec "$@"' inside)
    # The rank's own shell runs on the host.
    export RANK_PYTHON="$HOST_PYTHON" PYTHONNOUSERSITE=1
}
CONTAINER=() WRAP=()
"""

CONTAINERS = {"none": _NO_CONTAINER, "pyxis": _PYXIS, "apptainer": _APPTAINER}
