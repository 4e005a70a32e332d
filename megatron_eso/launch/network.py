# ruff: noqa: E501 -- shell text whose lines cannot be broken
"""Shell text that sets up NCCL for a machine type.

The plugins' own profiles are sourced, never copied: their tuning values change with the plugin, and
the plugin's configuration check refuses other values. Sources: the NCCL tests among the machine-learning
examples of Google's cluster-toolkit.
"""

_PLAIN = """\
set_network() { :; }
network_mounts=() network_file="" network_lacks=""
"""

# On one node the plugin is not installed for the job, so it must not be loaded.
_TCPXO = """\
network_file=${TCPXO_FOLDER:-/var/lib/tcpxo/lib64}/nccl-env-profile.sh
network_lacks="the prolog that installs GPUDirect-TCPXO did not run"
set_network() {
    [ "$TRAIN_NODES" -gt 1 ] || return 0
    [ -r "$network_file" ] || return 1
    local folder=${network_file%/*}
    NCCL_LIB_DIR=$folder
    set +u
    # shellcheck disable=SC1090
    source "$network_file"
    set -u
    export NCCL_LIB_DIR
    export NCCL_FASTRAK_CTRL_DEV=enp0s12 NCCL_SOCKET_IFNAME=enp0s12 GLOO_SOCKET_IFNAME=enp0s12
    export NCCL_FASTRAK_IFNAME=${NCCL_FASTRAK_IFNAME:-enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0}
    export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices RANK_LIBRARY_PATH=$folder
    network_mounts=(/var/tmp:/var/tmp "$folder:$folder")
    [ ! -d /dev/aperture_devices ] || network_mounts+=(/dev/aperture_devices:/dev/aperture_devices)
}
network_mounts=()
"""

_TCPX = """\
network_file=/var/lib/tcpx/lib64
network_lacks="the prolog that installs GPUDirect-TCPX did not run"
set_network() {
    [ "$TRAIN_NODES" -gt 1 ] || return 0
    [ -r "$network_file" ] || return 1
    local sockets=/run/tcpx-$SLURM_JOB_ID
    export NCCL_NET=GPUDirectTCPX_v7 NCCL_ALGO=Ring NCCL_PROTO=Simple NCCL_CROSS_NIC=0 NCCL_NET_GDR_LEVEL=PIX
    export NCCL_P2P_PXN_LEVEL=0 NCCL_NSOCKS_PERTHREAD=4 NCCL_SOCKET_NTHREADS=1
    export NCCL_MIN_NCHANNELS=12 NCCL_MAX_NCHANNELS=12 NCCL_BUFFSIZE=4194304 NCCL_DYNAMIC_CHUNK_SIZE=524288
    export NCCL_P2P_NET_CHUNKSIZE=524288 NCCL_P2P_PCI_CHUNKSIZE=524288 NCCL_P2P_NVL_CHUNKSIZE=1048576
    export NCCL_SOCKET_IFNAME=enp0s12 GLOO_SOCKET_IFNAME=enp0s12 NCCL_GPUDIRECTTCPX_CTRL_DEV=enp0s12
    export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=enp6s0,enp12s0,enp134s0,enp140s0 NCCL_GPUDIRECTTCPX_FORCE_ACK=0
    export NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS=1000000
    export NCCL_GPUDIRECTTCPX_TX_COMPLETION_NANOSLEEP=1000
    export NCCL_GPUDIRECTTCPX_TX_BINDINGS='enp6s0:8-21,112-125;enp12s0:8-21,112-125;enp134s0:60-73,164-177;enp140s0:60-73,164-177'
    export NCCL_GPUDIRECTTCPX_RX_BINDINGS='enp6s0:22-35,126-139;enp12s0:22-35,126-139;enp134s0:74-87,178-191;enp140s0:74-87,178-191'
    export NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX=$sockets CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
    export RANK_LIBRARY_PATH=$network_file
    network_mounts=(/var/tmp:/var/tmp "$network_file:$network_file" "$sockets:$sockets")
}
network_mounts=()
"""

# The toolkit's images first had the plugin in /usr/local/gib; they now have it in /var/lib/gib.
_GIB = """\
gib_folder=/var/lib/gib
[ -d "$gib_folder" ] || gib_folder=/usr/local/gib
network_file=$gib_folder/scripts/set_nccl_env.sh
network_lacks="this node has no gIB plugin"
set_network() {
    [ "$TRAIN_NODES" -gt 1 ] || return 0
    [ -r "$network_file" ] || return 1
    set +u
    # shellcheck disable=SC1090
    source "$network_file"
    set -u
    export NCCL_SOCKET_IFNAME=enp0s19,enp192s20 GLOO_SOCKET_IFNAME=enp0s19 NCCL_NET=gIB
    local file
    file=$gib_folder/configs/guest_config.txtpb
    [ ! -r "$file" ] || export NCCL_SHIMNET_GUEST_CONFIG_CHECKER_CONFIG_FILE=$file
    file=$gib_folder/configs/tuner_config.txtpb
    [ ! -r "$file" ] || export NCCL_TUNER_CONFIG_PATH=$file
    export RANK_LIBRARY_PATH=$gib_folder/lib64
    network_mounts=(/var/tmp:/var/tmp "$gib_folder:$gib_folder")
}
network_mounts=()
"""

NETWORKS = {"plain": _PLAIN, "tcpx": _TCPX, "tcpxo": _TCPXO, "gib": _GIB}

# set_container sets CONTAINER (options of srun) and WRAP (words before a rank's command).
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
