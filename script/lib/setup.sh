# shellcheck shell=bash
# What script/server and script/test share. Sets DATA_DIR and SETUP_LOG.

# shellcheck source=script/lib/say.sh
. script/lib/say.sh
# shellcheck source=script/lib/debian.sh
. script/lib/debian.sh
# shellcheck source=script/lib/python.sh
. script/lib/python.sh
# shellcheck source=script/lib/pages.sh
. script/lib/pages.sh
# shellcheck source=script/lib/engine.sh
. script/lib/engine.sh

DATA_DIR=$(realpath -m "${E2A_DATA_DIR:-var}")
SETUP_LOG=$DATA_DIR/log/setup.log
mkdir -p "$DATA_DIR/log" "$DATA_DIR/run"
printf '\n--- %s %s\n' "$(date -u +%FT%TZ)" "$0" >>"$SETUP_LOG"
