#!/usr/bin/env bash
# Draw many pictures overnight, and go on where the run stopped: bash examples/batch.sh [MODEL] [FOLDER] [OPTIONS …]
set -euo pipefail
model=${1:-black-forest-labs/FLUX.1-dev} folder=${2:-out}
mkdir -p "$folder"
cat > "$folder/jobs.jsonl" <<'JOBS'
{"prompt": "a red apple left of a cat", "seed": 1, "output": "apple.png"}
{"prompt": "a red apple left of a cat", "seed": 1, "output": "apple_exact.png", "preset": "exact"}
{"prompt": "a big penguin between a red zebra and a small peach", "seed": 2, "output": "penguin.png"}
JOBS
dma-diffusers batch "$folder/jobs.jsonl" --model "$model" -o "$folder" "${@:3}"
