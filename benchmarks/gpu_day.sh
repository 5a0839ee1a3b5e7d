#!/usr/bin/env bash
# The hour when there is a GPU: everything that waits for one, in parts of at most nine minutes.
#
#   benchmarks/gpu_day.sh [--wheels FOLDER] [--out FOLDER] [--dry-run] [PART...]
#
# Parts, all by default, in this order:
#   install   this checkout, its dependencies from --wheels alone (no network); torch and Triton are the machine's own
#   test      the tests that are marked gpu: kernels, a split model, CUDA graphs
#   sanitize  the merge's GPU tests under compute-sanitizer, where the CUDA toolkit has it
#   library   libparetofuse on the real driver: its own kernels for this device, bits equal to the CPU's
#   merge     benchmarks.gpu.bench merge: every kernel and plane format, PyTorch, PWEMoE
#   products  benchmarks.gpu.bench products: routed_linear, routed_rows and their rivals over rows
#   models    benchmarks.gpu.bench models: from preference to model by the clock, PEFT, AOTInductor, a router step
#   plot      the picture of what was measured
#
# A part that fails does not keep the others from running; the exit status tells how many did. gpu_bench.csv,
# gpu_bench.png and a log for each part lie in --out (build/gpu_day). --dry-run does the same on a CPU in Triton's
# interpreter, with tiny sizes and nothing installed: a test runs it.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
all=(install test sanitize library merge products models plot)
out=build/gpu_day wheels="" dry="" parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    --dry-run) dry=yes ;;
    -h | --help) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *)
      case " ${all[*]} " in
        *" $1 "*) parts+=("$1") ;;
        *) echo "got $1, expected one of: ${all[*]}, or --help" >&2; exit 64 ;;
      esac ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
mkdir -p "$out"

bench() {
  if [ -n "$dry" ]; then
    TRITON_INTERPRET=1 "$python" -m benchmarks.gpu.bench "$1" --interpreter --out "$out"
  else
    "$python" -m benchmarks.gpu.bench "$1" --out "$out"
  fi
}

part() {
  case $1 in
    install)
      if [ -n "$dry" ]; then echo "dry run: nothing is installed"; return; fi
      local from=()
      if [ -n "$wheels" ]; then from=(--no-index --find-links "$wheels"); fi
      "$python" -m pip install "${from[@]}" "setuptools>=77" pybind11 nlohmann-json cmake ninja pytest \
        moocore safetensors numpy argcomplete tqdm transformers matplotlib &&
        { "$python" -m pip install "${from[@]}" peft || echo "no PEFT: its merges are left out"; } &&
        "$python" -m pip install --no-deps --no-build-isolation "${from[@]}" --editable . &&
        "$python" -m paretofuse doctor
      ;;
    test)
      "$python" -m pytest -q -m gpu tests/kernels tests/stacking/test_placement.py tests/benchmarks/test_gpu_bench.py
      ;;
    sanitize)
      if ! command -v compute-sanitizer >/dev/null; then echo "no compute-sanitizer here: left out"; return; fi
      compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -q -m gpu tests/kernels/test_merge.py
      ;;
    library) "$python" -m pytest -q -m gpu tests/csrc/test_cuda_device.py ;;
    merge | products | models) bench "$1" ;;
    plot) "$python" -m benchmarks.gpu.plot "$out/gpu_bench.csv" -o "$out/gpu_bench.png" ;;
  esac
}

failed=0
for name in "${parts[@]}"; do
  echo "== $name"
  # In a process group of its own, which `timeout` ends as a whole.
  export -f part bench
  export python wheels out dry
  timeout --kill-after 20 540 bash -c 'set -uo pipefail; part "$1"' part "$name" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    [ "$status" -eq 124 ] && echo "$name ran past nine minutes"
    echo "== $name FAILED with status $status"
    failed=$((failed + 1))
  fi
done
echo "== $((${#parts[@]} - failed)) of ${#parts[@]} parts went well; results and logs are in $out"
exit "$failed"
