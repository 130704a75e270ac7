#!/usr/bin/env bash
# What docs/measurements.md holds, and the tests that need a GPU, into one folder:
#
#     PYTHON=python3 benchmarks/run_all.sh FOLDER [tests] [llama] [decode] [timeline] [attention] [models] [dequant] [demo] [stages] [compile] [small] [saved] [overhead]
#
# Without names, all of them. Each goes on where one before it failed; the exit code is that of the last failure.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:?the folder for the results}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

step() { # name, command ...: its output goes to the folder and its end to the terminal
  local name=$1
  shift
  [ -z "$wanted" ] || [[ " $wanted " == *" $name "* ]] || return 0
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1 || { failed=$?; echo "$name failed ($failed)"; }
  tail -n 40 "$out/$name.log"
}

demos() {
  "$python" -W ignore -m fxopt demo --output "$out/smollm2.json" &&
    "$python" -W ignore -m fxopt demo --model minilm --output "$out/minilm.json"
}

wanted="$*"
step tests "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/lower tests/training/test_gpu.py tests/training/test_distributed.py tests/test_generate.py tests/kernels tests/tune -W ignore
step llama "$python" benchmarks/llama.py --layers 8 --out "$out/llama.json"
step decode "$python" benchmarks/decode_ops.py --out "$out" --table
step timeline "$python" benchmarks/decode_timeline.py --out "$out"
step attention "$python" benchmarks/attention.py "$out"
step models "$python" benchmarks/models.py "$out"
step dequant "$python" benchmarks/dequant_matmul.py
step demo demos
step stages "$python" benchmarks/compile_stages.py
step compile "$python" benchmarks/compile_time.py --layers 8 80
step small "$python" benchmarks/small_models.py --out "$out/small_models.json"
step saved "$python" benchmarks/saved_memory.py --quick
step overhead "$python" benchmarks/call_overhead.py --out "$out/overhead.json"
exit "$failed"
