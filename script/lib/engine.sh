# shellcheck shell=bash
# A Docker engine with the sandbox images: found, or installed and started when this is root.

DOCKERD_SECONDS=60
TEMPLATES=()
CAP_SYS_ADMIN=21 # linux/capability.h; without it nobody mounts anything, dockerd neither.

# engine_ready [TEMPLATE…]: true when sandboxes of these templates (`all` for every one, `standard` by default) can run
# in Docker. False leaves the reason in NO_ENGINE. Ends the script when the engine is there but an image cannot be built.
engine_ready() {
    NO_ENGINE=''
    TEMPLATES=("$@")
    if [[ ${E2A_ENGINE:-docker} == process ]]; then
        NO_ENGINE="E2A_ENGINE=process is set"
        return 1
    fi
    engine_ask
    if [[ $ENGINE_STATE != up ]]; then
        engine_start || return 1
    fi
    engine_images
}

# engine_ask: sets ENGINE_STATE to up or down, and ENGINE_DETAIL.
engine_ask() {
    local answer
    answer=$(.venv/bin/python script/lib/engine.py "${TEMPLATES[@]}") || die "script/lib/engine.py failed"
    read -r ENGINE_STATE ENGINE_DETAIL <<<"$answer"
}

engine_start() {
    local missing
    NO_ENGINE=$ENGINE_DETAIL
    [[ -z ${DOCKER_HOST:-} ]] || return 1 # Somebody else's engine is not ours to start.
    if ! is_root; then
        NO_ENGINE+=", and this is not root, so Docker can be neither installed nor started"
        return 1
    fi
    if ! has_capability "$CAP_SYS_ADMIN"; then
        NO_ENGINE+=", and this is an unprivileged container, in which none can run"
        return 1
    fi
    mapfile -t missing < <(
        packages_need dockerd=docker.io iptables=iptables mkfs.ext4=e2fsprogs debootstrap=debootstrap
    )
    if ((${#missing[@]})) && ! packages_install "${missing[@]}"; then
        NO_ENGINE="Docker could not be installed"
        return 1
    fi
    if [[ -d /run/systemd/system ]]; then
        logged "Starting Docker (systemctl)" systemctl start docker || true
        engine_await || NO_ENGINE="systemctl start docker did not help: see journalctl -u docker"
    else
        dockerd_start || dockerd_start --bridge=none --iptables=false ||
            NO_ENGINE="dockerd does not start here: see $DATA_DIR/log/dockerd.log"
    fi
    [[ $ENGINE_STATE == up ]]
}

# has_capability NUMBER: whether this process holds it.
has_capability() {
    local held
    held=$(awk '/^CapEff/ {print $2}' /proc/self/status)
    (((16#$held >> $1) & 1))
}

# dockerd_start OPTION…: for machines without an init system. It goes on after this script, like any daemon.
# The second try, without a bridge, is for kernels without iptables: sandboxes have no network interface anyway.
dockerd_start() {
    local log=$DATA_DIR/log/dockerd.log pid
    say "Starting dockerd ${*:+($*) }(log: $log)"
    dockerd_forget_dead
    (cd / && exec setsid dockerd "$@") >>"$log" 2>&1 </dev/null &
    pid=$!
    disown "$pid"
    echo "$pid" >"$DATA_DIR/run/dockerd.pid"
    if engine_await "$pid"; then
        say "dockerd runs as process $pid, and stays when this script ends. To stop it: kill $pid"
        return
    fi
    kill "$pid" 2>/dev/null || true
    rm -f "$DATA_DIR/run/dockerd.pid"
    tail -n 3 "$log" | sed 's/^/    | /' >&2
    return 1
}

# dockerd refuses to start while the process of an old pid file lives, even when that is another program by now.
dockerd_forget_dead() {
    local old
    old=$(cat /var/run/docker.pid 2>/dev/null) || return 0
    [[ $(cat "/proc/$old/comm" 2>/dev/null) == dockerd ]] || rm -f /var/run/docker.pid
}

# engine_await [PID]: true as soon as the engine answers; false when the process ends before, or time is up.
engine_await() {
    local until=$((SECONDS + DOCKERD_SECONDS))
    while ((SECONDS < until)); do
        engine_ask
        [[ $ENGINE_STATE == up ]] && return
        [[ -z ${1:-} ]] || kill -0 "$1" 2>/dev/null || return 1
        sleep 0.5
    done
    return 1
}

engine_images() {
    local missing templates
    read -r -a templates <<<"$ENGINE_DETAIL"
    templates=("${templates[@]:1}") # The first word is the engine's version.
    ((${#templates[@]})) || return 0
    if is_root; then # debootstrap makes the base where no registry answers.
        mapfile -t missing < <(packages_need debootstrap=debootstrap mkfs.ext4=e2fsprogs)
        ((${#missing[@]})) && { packages_install "${missing[@]}" || true; }
    fi
    logged "Building the sandbox images: ${templates[*]} (the first time takes some minutes)" \
        .venv/bin/python manage.py image_build "${templates[@]}" ||
        die "the sandbox image could not be built. To try e2a without isolation: E2A_ENGINE=process $0"
}
