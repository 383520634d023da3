#!/bin/sh
# Whether an operator's image can be a sandbox. Says `e2a-refused: REASON` and fails when not.
# The guest is started as /usr/bin/python3, so a Python that lives elsewhere gets a link there.
refuse() {
    echo "e2a-refused: $*"
    exit 1
}

for tool in id find chmod mkdir ln rm; do
    command -v "$tool" >/dev/null 2>&1 || refuse "it has no $tool"
done
[ -x /bin/bash ] || refuse "it has no /bin/bash, which runs the commands"
if [ ! -e /usr/bin/python3 ]; then
    python=$(command -v python3) || refuse "it has no python3, which the guest needs (3.11 or newer)"
    ln -s "$python" /usr/bin/python3
fi
version=$(/usr/bin/python3 -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    refuse "its /usr/bin/python3 does not run"
/usr/bin/python3 -I -S -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "its /usr/bin/python3 is $version; the guest needs 3.11 or newer"
/usr/bin/python3 -I -S -c 'import compileall, ctypes, json, select, socket' >/dev/null 2>&1 ||
    refuse "its python3 lacks modules of the standard library"
