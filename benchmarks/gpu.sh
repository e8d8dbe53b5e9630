#!/usr/bin/env bash
# What a GPU makes of this library: four stages, at most eight minutes in all, each of which leaves its results.
#   bash benchmarks/gpu.sh              on a machine with a GPU: writes docs/gpu.json and docs/gpu.md
#   bash benchmarks/gpu.sh --rehearse   the same stages on the CPU, tiny: writes runs/gpu/gpu.json and gpu.md
# A stage that fails or runs out of its time says so on the page, and the others go on. PYTHON chooses the interpreter.
set -u
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
	PYTHON=python3
	[ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
rehearse=${1:-}
case "$rehearse" in "" | --rehearse) ;; *) echo "gpu.sh knows --rehearse alone, got $rehearse" >&2; exit 2 ;; esac
folder=runs/gpu
pages=docs
[ -n "$rehearse" ] && pages=$folder
rm -rf "$folder"
mkdir -p "$folder"
failed=0
stage() { # name, seconds that it may take
	echo "$1 ..."
	timeout "$2" "$PYTHON" -m benchmarks.gpu "$1" --folder "$folder" $rehearse
	code=$?
	[ "$code" -eq 0 ] && return
	failed=1
	"$PYTHON" -m benchmarks.gpu ended "$1" --folder "$folder" --code "$code"
}
stage tests 120
stage rollouts 60
stage tiny 90
stage full_size 200
"$PYTHON" -m benchmarks.gpu pages --folder "$folder" --to "$pages"
echo "$pages/gpu.md"
exit "$failed"
