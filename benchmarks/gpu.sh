#!/usr/bin/env bash
# Checks both frameworks on this machine's GPU and measures their speed; writes one folder. Ends within 9 minutes.
#
#   benchmarks/gpu.sh [FOLDER [PRESET] [option of scripts/benchmark.py ...]]
#
# FOLDER (benchmarks/gpu) gets report.md, results.json and roofline.png. Needs no network and no data.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. XLA_PYTHON_CLIENT_PREALLOCATE=false

out=${1:-benchmarks/gpu}
case $out in -*) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
[ -e "$out" ] && [ ! -d "$out" ] && { echo "error: $out is a file; give the name of a folder" >&2; exit 2; }
shift || true
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

started=$SECONDS
timeout 220 python -m pytest parity_tests/test_gpu*.py -o addopts= -m gpu -n 6 -W default -raP -q --durations=10 --color=no \
  >"$folder/tests" 2>&1
tests=$?
grep -q ' passed' "$folder/tests" || { [ "$tests" = 0 ] && tests="0, but no test ran"; }
[ "$tests" = 124 ] && echo "the tests did not end within 220 seconds" >>"$folder/tests"
seconds_of_tests=$((SECONDS - started))

timeout 300 python scripts/benchmark.py "$@" --out "$folder/speed" >"$folder/log" 2>&1
speed=$?
[ "$speed" = 124 ] && echo "the benchmark did not end within 300 seconds" >>"$folder/log"

mkdir -p "$out"
[ -d "$folder/speed" ] && cp "$folder"/speed/* "$out"
{
  if [ -s "$folder/speed/report.md" ]; then cat "$folder/speed/report.md"; else echo '# No speed was measured'; fi
  if [ "$speed" != 0 ]; then
    echo
    echo "The benchmark ended with exit status $speed:"
    echo
    echo '```text'
    tail -n 40 "$folder/log"
    echo '```'
  fi
  echo
  echo "## Tests (pytest -m gpu, $seconds_of_tests s, exit status $tests)"
  echo
  echo '```text'
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no NVIDIA driver"
  echo "commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
  tail -n 80 "$folder/tests"
  echo '```'
} >"$out/report.md"
echo "wrote $out in $((SECONDS - started)) s: tests $tests, benchmark $speed" >&2
[ "$tests" = 0 ] && [ "$speed" = 0 ]
