#!/bin/bash
# Toy benchmark v1 from nothing to scores, on all GPUs of this machine:
#
#   tools/toybench.sh OUT            make the data, train the models (one a GPU, side by side), score them
#   tools/toybench.sh OUT make       one of the steps: make, train, score
#
# Stopped, or ended by TIME_LIMIT (seconds, for "train"), it goes on where it was when started again.
# RUNS are config:seed of configs/toybench, dealt to the GPUs in turn; ITERS overrides their number of steps;
# OVERRIDE holds more changes of the config (an option of docs/training.md, say, with an OUT of its own), as in
#   OVERRIDE=train.ema_decay=0.999 RUNS='small:0 small:1' tools/toybench.sh OUT/ema train
# DATA is the data root; PYTHON the interpreter. Everything but the data goes to OUT: a folder a run with log,
# checkpoints and scores.json, and baseline.json.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:?usage: tools/toybench.sh OUT [make|train|score]}" && cd "$1" && pwd)
STEP=${2:-all}
DATA=${DATA:-data/toybench}
RUNS=${RUNS:-small:0 v1.1:0 v1.0:0 v1.1_pano:0 v1.1:1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
GPUS=$($PYTHON -c 'import torch; print(max(torch.cuda.device_count(), 1))')
WORKERS=$(($(nproc) / GPUS - 2))
WORKERS=$((WORKERS > 1 ? WORKERS : 1))
PLACE="data.train.data_root=$DATA data.val.data_root=$DATA data.test.data_root=$DATA data.workers_per_gpu=$WORKERS ${OVERRIDE:-}"

make_data() {
  [ -f "$DATA/nuscenes_infos_val_sweep.pkl" ] && [ ! -d "$DATA/toy_work" ] && return
  $PYTHON tools/make_toy_nuscenes.py --preset toybench-v1 --out "$DATA"
}

folder() { echo "$OUT/${1%%:*}_seed${1##*:}"; }

train_one() {  # GPU, config:seed
  local run=$2 dir resume=''
  dir=$(folder "$run")
  [ -f "$dir/trained" ] && return
  ls "$dir"/*.pth >/dev/null 2>&1 && resume='--resume auto'
  CUDA_VISIBLE_DEVICES=$1 ${TIME_LIMIT:+timeout --signal=TERM "$TIME_LIMIT"} \
    $PYTHON train.py --config "configs/toybench/${run%%:*}.py" --work-dir "$dir" --seed "${run##*:}" --no-eval \
    ${ITERS:+--max-iters "$ITERS"} $resume --override $PLACE >>"$OUT/${run/:/_seed}.txt" 2>&1
  local status=$?
  [ $status = 0 ] && grep -q 'training is complete' "$dir/log.txt" && touch "$dir/trained"
  echo "$run: train.py ended with status $status, see $dir/log.txt"
}

score_one() {
  local run=$2 dir
  dir=$(folder "$run")
  [ -e "$dir/latest.pth" ] || return
  CUDA_VISIBLE_DEVICES=$1 $PYTHON val.py --config "configs/toybench/${run%%:*}.py" --weights "$dir/latest.pth" \
    --out "$dir/scores.json" --override $PLACE >"$dir/scores.txt" 2>&1
  echo "$run: $(tail -n 1 "$dir/scores.txt")"
}

on_all_gpus() {  # function; the runs are dealt out, each GPU does its own one after the other
  local gpu pids=''
  for ((gpu = 0; gpu < GPUS; gpu++)); do
    (
      number=0
      for run in $RUNS; do
        [ $((number % GPUS)) = $gpu ] && "$1" $gpu "$run"
        number=$((number + 1))
      done
    ) &
    pids="$pids $!"
  done
  if [ "$1" = train_one ]; then
    while kill -0 $pids 2>/dev/null; do
      sleep 30
      for run in $RUNS; do
        [ -f "$(folder "$run")/log.txt" ] && echo "$run: $(grep iteration "$(folder "$run")/log.txt" | tail -n 1 | cut -c 22-130)"
      done
    done
  fi
  wait $pids
}

case $STEP in make | all) make_data || exit 1 ;; esac
case $STEP in train | all) on_all_gpus train_one ;; esac
case $STEP in score | all)
  on_all_gpus score_one
  $PYTHON tools/baseline.py --config configs/toybench/v1.1.py --json "$OUT/baseline.json" --override $PLACE >"$OUT/baseline.txt"
  $PYTHON tools/upper_bounds.py --config configs/toybench/v1.1.py --json "$OUT/upper_bounds.json" --override $PLACE >"$OUT/upper_bounds.txt"
  tail -n 2 "$OUT/baseline.txt"
  cat "$OUT/upper_bounds.txt"
  ;;
esac
