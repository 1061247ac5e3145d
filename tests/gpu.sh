# What only a GPU can show: the tests marked gpu, the speed, and one whole run on real images, each killed at its limit.
# Called by `make gpu`. ISIC: the folder with the pictures and masks of ISIC 2017. DRY: any word for tiny sizes on a CPU.
# Writes gpu/ and packs what is small of it into gpu.tar.gz.

cd "$(dirname "$0")/.." || exit 2
data=datasets/isic2017.h5
rm -rf gpu gpu.tar.gz
mkdir gpu
failed=

part() { # name, seconds, command: runs it, and goes on if it fails
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "$name: at most $limit s"
  timeout --kill-after=10 "$limit" "$@" > "gpu/$name.log" 2>&1
  local status=$?
  [ $status = 0 ] || failed="$failed $name"
  [ $status = 124 ] || [ $status = 137 ] && echo "$name: stopped at its limit"
  tail -n 40 "gpu/$name.log"
  echo "$name: exit code $status after $((SECONDS - started)) s" | tee -a gpu/parts.txt
}

if [ -z "$DRY" ] && [ ! -e "$data" ]; then
  part data 60 "$PYTHON" data.py isic "$ISIC" "$data"
fi
part tests 100 "$PYTHON" -m pytest tests/test_gpu.py tests/test_gpu_score.py -q -rs --durations=0 -p no:cacheprovider
if [ -n "$DRY" ]; then
  part bench 300 "$PYTHON" bench.py --quick --preset demo --json gpu/bench.json
  part run 120 "$PYTHON" train.py --preset demo --initial-steps 20 --iterations 1 --run gpu/run
else
  weights=weights/paper.weights.h5
  [ -e "$weights" ] && precision="--data $data --weights $weights"
  part bench 160 "$PYTHON" bench.py --quick --json gpu/bench.json $precision
  part run 160 "$PYTHON" train.py --preset tuned --precision bfloat16 --data "$data" --run gpu/run
fi
if [ -e gpu/run/history.csv ]; then # its last two columns are the seconds of scoring and of training
  awk -F, 'NR > 1 { s += $(NF - 1); t += $NF } END { printf "of the run: %.0f s scoring, %.0f s training\n", s, t }' \
    gpu/run/history.csv | tee -a gpu/parts.txt
fi

tar -czf gpu.tar.gz --exclude='*.h5' --exclude='.*' gpu
[ "$(stat -c %s gpu.tar.gz)" -le 15000000 ] || tar -czf gpu.tar.gz --exclude='*.h5' --exclude='.*' --exclude='*.png' gpu
echo "packed into gpu.tar.gz: tables, csv files, figures, logs"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
