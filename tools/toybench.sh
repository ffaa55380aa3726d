#!/bin/bash
# Toy benchmark v1 from nothing to scores, on all GPUs of this machine:
#
#   tools/toybench.sh OUT [arguments of tools/study.py]
#
# makes the data, trains the models of configs/toybench/releases.json and scores them (tools/study.py: study.md in OUT,
# and a folder a run), beside the guess that never looks (baseline.json) and upper bounds (upper_bounds.json).
# Stopped, it goes on where it was when started again. DATA is the data root; PYTHON the interpreter.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:?usage: tools/toybench.sh OUT [arguments of tools/study.py]}" && cd "$1" && pwd)
shift
DATA=${DATA:-data/toybench}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

if [ ! -f "$DATA/nuscenes_infos_val_sweep.pkl" ] || [ -d "$DATA/toy_work" ]; then
  $PYTHON tools/make_toy_nuscenes.py --preset toybench-v1 --out "$DATA" || exit 1
fi
$PYTHON tools/study.py --study configs/toybench/releases.json --out "$OUT" --data "$DATA" "$@"
for name in baseline upper_bounds; do
  $PYTHON tools/$name.py --config configs/toybench/v1.1.py --json "$OUT/$name.json" \
    --override "data.train.data_root=$DATA" "data.val.data_root=$DATA" >"$OUT/$name.txt"
done
tail -n 2 "$OUT/baseline.txt"
cat "$OUT/upper_bounds.txt"
