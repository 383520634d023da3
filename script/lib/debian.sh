# shellcheck shell=bash
# Debian packages: installed when this is root, named when it is not.

is_root() { ((EUID == 0)); }

# has NAME: whether this machine has that program, also where only root's PATH looks, or that library (lib….so.1).
has() {
    local PATH=$PATH:/usr/sbin:/sbin libraries
    if [[ $1 == *.so.* ]]; then
        libraries=$(ldconfig -p)
        [[ $libraries == *"$1"* ]]
    else
        command -v "$1" >/dev/null
    fi
}

# packages_need NAME=PACKAGE…: the packages of the programs and libraries that are missing, one a line.
packages_need() {
    local pair
    for pair in "$@"; do
        has "${pair%%=*}" || printf '%s\n' "${pair#*=}"
    done
}

# packages_install PACKAGE…: false when they cannot be had. Without root it says what an administrator would type.
packages_install() {
    if ! command -v apt-get >/dev/null; then
        warn "this is not a Debian machine, so install these by its own means: $*"
        return 1
    fi
    if ! is_root; then
        warn "this is not root, so packages cannot be installed here. As root: apt-get install $*"
        return 1
    fi
    logged "Refreshing the package lists" apt-get -o DPkg::Lock::Timeout=300 update || return 1
    # 300 s: a new machine may still be running its own first updates.
    logged "Installing $* (apt-get)" env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "$@"
}
