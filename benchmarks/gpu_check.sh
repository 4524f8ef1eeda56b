#!/usr/bin/env bash
# One check of this project on a machine with a GPU: correctness, speed beside the peers, tests.
#
#     benchmarks/gpu_check.sh [FOLDER]               # default: gpu_check; about ten minutes
#     DEVICE=cpu benchmarks/gpu_check.sh [FOLDER]    # the same in small, to try the script
#
# FOLDER gets what each part prints and its JSON files. Every part runs, also after one that fails;
# the exit status is that of the worst. PYTHON is the interpreter (default: python3). Peers that are
# not installed are left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=$(mkdir -p "${1:-gpu_check}" && cd "${1:-gpu_check}" && pwd) || exit 2
python=${PYTHON:-python3} device=${DEVICE:-cuda} worst=0
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1
case $device in
  cuda)
    sizes=(--model vit-base-224 --rounds 3)
    compiled=(--micro-batch 256 --ways ours-layers,ours-whole,limit-compiled --rounds 3)
    tests=(tests/engines tests/model tests/training) ;;
  cpu)
    sizes=(--model micro-32 --micro-batch 8 --images 128 --rounds 1 --steps 2 --warm 2 --ways ours,limit)
    compiled=()
    tests=(tests/engines/test_cuda.py tests/engines/test_devices.py) ;;
  *) echo "DEVICE=$device: must be cuda or cpu" >&2; exit 2 ;;
esac

part() { # name limit_s command...
  local name=$1 limit=$2 status; shift 2
  echo "== $name [$SECONDS s]"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 40 | cut -c1-200
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { echo "$name: exit status $status, see $out/$name.txt"; worst=1; }
}

[ "$device" = cuda ] && part device 30 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
part commit 30 git log -1 --format='%H %cd'
part exactness 240 "$python" -m benchmarks.gpu_check --device "$device" --out "$out/gpu_check.json"
if [ -f benchmarks/throughput.py ]; then
  part speed 600 "$python" -m benchmarks.throughput --device "$device" "${sizes[@]}" --out "$out/throughput.json"
  [ ${#compiled[@]} = 0 ] || part speed_256 300 "$python" -m benchmarks.throughput --device "$device" "${compiled[@]}" --out "$out/throughput_256.json"
fi
CI=true part tests 600 "$python" -m pytest -q -n "${WORKERS:-4}" --dist loadfile -p no:cacheprovider "${tests[@]}"
echo "== end [$SECONDS s], results in $out"
exit "$worst"
