#!/usr/bin/env bash
# Choose formats and policies for one model's modules and heads by the error that they make, and draw with them:
# bash examples/calibrate.sh [MODEL] [FOLDER] [OPTIONS …]
set -euo pipefail
model=${1:-black-forest-labs/FLUX.1-dev} folder=${2:-out}
mkdir -p "$folder"
cat > "$folder/prompts.txt" <<'PROMPTS'
a red apple left of a cat on a yellow background
a big penguin between a red zebra and a small peach
a blue car right of a green tree
a small house under a large moon
PROMPTS
dma-diffusers calibrate "$model" --prompts "$folder/prompts.txt" -o "$folder/policy.json" "${@:3}"
dma-diffusers generate "a red apple left of a cat" --model "$model" --policy "$folder/policy.json" -o "$folder/apple.png"
