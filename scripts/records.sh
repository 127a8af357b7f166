# Sourced by the scripts that run a sweep and report on it. RESULTS is the sweep's folder; RECORDS, separated by commas,
# the records whose cells are not run again.

committed() { # FOLDERS: their files of records, separated by commas
    local folder
    for folder; do compgen -G "$folder/*.jsonl"; done | paste -sd, || true
}
has_runs() { [ -n "$(find "$1" -name record.json -print -quit 2>/dev/null)" ]; } # FOLDER
ran() { # COMMAND...: 1, some cells failed, is kept in `status`; any other failure, and Ctrl-C, ends the script
    local code=0
    "$@" || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi
    if [ "$code" = 1 ]; then status=1; fi
}
plan_only() { # ARGUMENTS of repro.sweep: true when they run nothing
    local argument
    for argument in "$@"; do case "$argument" in --dry-run | --dry_run | --status) return 0 ;; esac; done
    return 1
}
all_records() { # RECORDS, and RESULTS where there are runs of its own or nothing else, as a list
    if [ -z "$RECORDS" ] || has_runs "$RESULTS"; then echo "[$RECORDS${RECORDS:+,}$RESULTS]"; else echo "[$RECORDS]"; fi
}
