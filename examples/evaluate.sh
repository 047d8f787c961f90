#!/usr/bin/env bash
# Compare two configurations with full precision on your own prompts: bash examples/evaluate.sh [MODEL] [FOLDER] [OPTIONS …]
# FOLDER/report.html is the page to look at: scores with intervals, the noise floor, and the worst pictures.
set -euo pipefail
model=${1:-black-forest-labs/FLUX.1-dev} folder=${2:-out}
mkdir -p "$folder"
cat > "$folder/prompts.txt" <<'PROMPTS'
a red apple left of a cat on a yellow background
a big penguin between a red zebra and a small peach
a blue car right of a green tree
PROMPTS
dma-diffusers eval --model "$model" --prompts "$folder/prompts.txt" -o "$folder" \
    --config "high=bf16,low=int8,policy=dense(everywhere=low)" \
    --config "high=mxfp8,low=mxfp4,policy=importance(budget=0.1)" "${@:3}"
