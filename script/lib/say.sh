# shellcheck shell=bash
# How the scripts speak: one line a step, the long output of others in a log, what is missing with what to do.

if [[ -t 1 ]]; then
    BOLD=$'\e[1m' RED=$'\e[1;31m' YELLOW=$'\e[1;33m' PLAIN=$'\e[0m'
else
    BOLD='' RED='' YELLOW='' PLAIN=''
fi

say() { printf '%s==>%s %s\n' "$BOLD" "$PLAIN" "$*"; }

warn() { printf '%sWARNING:%s %s\n' "$YELLOW" "$PLAIN" "$*" >&2; }

die() {
    printf '%sERROR:%s %s\n' "$RED" "$PLAIN" "$*" >&2
    exit 1
}

# logged WHAT COMMAND…: run it with its output in the log; a terminal also sees its last line go by.
# When it fails the end of its output is shown, and the answer is its exit code.
logged() {
    local what=$1 status=0 began=$SECONDS from
    shift
    say "$what"
    from=$(($(wc -c <"$SETUP_LOG") + 1))
    if [[ -t 1 ]]; then
        "$@" </dev/null 2>&1 | tee -a "$SETUP_LOG" | last_line_only || status=$?
    else
        "$@" </dev/null >>"$SETUP_LOG" 2>&1 || status=$?
    fi
    if ((status)); then
        printf '    failed after %d s; the end of %s:\n' $((SECONDS - began)) "$SETUP_LOG" >&2
        tail -c "+$from" "$SETUP_LOG" | tail -n 20 | sed 's/^/    | /' >&2
    elif ((SECONDS - began > 1)); then
        printf '    done in %d s\n' $((SECONDS - began))
    fi
    return "$status"
}

last_line_only() {
    local line width
    width=$(($(tput cols 2>/dev/null || echo 80) - 5))
    while IFS= read -r line; do
        printf '\r\e[K    %s' "${line:0:width}"
    done
    printf '\r\e[K'
}
