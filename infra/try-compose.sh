#!/usr/bin/env bash
# Follows docs/deploy-docker.md with the demo model, renders a video and removes everything. A release runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e infra/.env ]; then
  echo 'infra/.env exists: this script would delete the volumes of that deployment' >&2
  exit 1
fi
export PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu} # CPU builds of torch fit a CI machine

while IFS= read -r line; do
  [[ $line =~ ^[A-Z_]+=$ ]] && line+=$(openssl rand -hex 20)
  printf '%s\n' "$line"
done < infra/.env.example > infra/.env

compose=(docker compose --file infra/compose.yaml)
finish() {
  local result=$?
  [ "$result" -eq 0 ] || "${compose[@]}" logs --tail 100
  "${compose[@]}" down --volumes
  rm infra/.env
}
trap finish EXIT

"${compose[@]}" up --build --detach --wait --wait-timeout 600
curl --fail --silent --show-error --retry 60 --retry-delay 5 --retry-all-errors http://localhost:8000/ready
"${compose[@]}" exec --no-TTY shim hunyuan generate 'A paper boat on a rainy street at night' \
  --server http://127.0.0.1:8000 --output /tmp/boat.mp4
