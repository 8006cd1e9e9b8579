#!/usr/bin/env bash
# Checks both frameworks on this machine's GPU and measures their speed; writes one report. Ends within 9 minutes.
#
#   benchmarks/gpu.sh [REPORT.md [PRESET] [option of scripts/benchmark.py ...]]
#
# Needs no network if the data exists: python scripts/prepare_data.py mini-llm-50m
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. XLA_PYTHON_CLIENT_PREALLOCATE=false

report=${1:-benchmarks/gpu.md}
case $report in -*) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
shift || true
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

started=$SECONDS
timeout 330 python -m pytest parity_tests/test_gpu.py -o addopts= -m gpu -ra -q -s --durations=10 --color=no \
  >"$folder/tests" 2>&1
tests=$?
grep -q ' passed' "$folder/tests" || { [ "$tests" = 0 ] && tests="0, but no test ran"; }
[ "$tests" = 124 ] && echo "the tests did not end within 330 seconds" >>"$folder/tests"
seconds_of_tests=$((SECONDS - started))

timeout 190 python scripts/benchmark.py "$@" --out "$folder/speed" >"$folder/log" 2>&1
speed=$?
[ "$speed" = 124 ] && echo "the benchmark did not end within 190 seconds" >>"$folder/log"

{
  if [ -s "$folder/speed" ]; then cat "$folder/speed"; else
    echo '# No speed was measured'
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
  tail -n 60 "$folder/tests"
  echo '```'
} >"$report"
echo "wrote $report in $((SECONDS - started)) s: tests $tests, benchmark $speed" >&2
[ "$tests" = 0 ] && [ "$speed" = 0 ]
