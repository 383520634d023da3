# shellcheck shell=bash
# The Python environment in .venv: made once, filled again only when a list of requirements changes.

PYTHON_WANTED='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

# python_find: the path of a Python >= 3.11 that can make environments; false when there is none.
python_find() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3 /usr/bin/python3.11 /usr/bin/python3; do
        if command -v "$name" >/dev/null && "$name" -c "$PYTHON_WANTED" >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# python_ready LIST…: .venv holds what these files list. A second call in a row costs two small processes.
python_ready() {
    # Two scripts at once must not fill one environment: the second waits here for the first.
    (
        flock 9
        python_make_environment
        python_fill_environment "$@"
    ) 9<"${BASH_SOURCE[0]}"
}

python_make_environment() {
    local python
    [[ -x .venv/bin/python ]] && .venv/bin/python -c 'import pip' 2>/dev/null && return
    if ! python=$(python_find); then
        packages_install python3 python3-venv ||
            die "e2a needs Python 3.11 or later with its venv module: apt-get install python3 python3-venv"
        python=$(python_find) || die "this machine's Python is older than 3.11. Name a newer one: PYTHON=/path/to/python3"
    fi
    rm -rf .venv
    logged "Making .venv with $python" "$python" -m venv .venv || die "python -m venv failed"
}

python_fill_environment() {
    local list digest stale=()
    for list in "$@"; do
        digest=$(sha256sum "$list")
        [[ $(cat ".venv/.has-$list" 2>/dev/null) == "$digest" ]] || stale+=("$list")
    done
    ((${#stale[@]})) || return 0
    # All lists at once, so that one does not undo what another asks for.
    logged "Installing ${stale[*]} into .venv (pip; about a minute)" \
        .venv/bin/python -m pip install --disable-pip-version-check "${stale[@]/#/--requirement=}" ||
        die "pip could not install ${stale[*]}. Is a package index reachable? Just run this again when it is."
    for list in "${stale[@]}"; do
        sha256sum "$list" >".venv/.has-$list"
    done
}
