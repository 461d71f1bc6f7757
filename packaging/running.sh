#!/bin/bash
# running.sh PLACE: names the processes that run from the program in PLACE, one a line. Exit status 1 where there is none.
set -euo pipefail

found=1
for process in /proc/[0-9]*; do
    words=()
    # A process that ends meanwhile is none.
    { mapfile -t -d '' words <"$process/cmdline"; } 2>/dev/null || continue
    # The first word is the interpreter that the program's first line names.
    if [ "${words[0]:-}" = "$1/bin/python3" ]; then
        echo "process ${process#/proc/}: ${words[*]}"
        found=0
    fi
done
exit "$found"
