#!/usr/bin/env bash
# Follows docs/deploy-kubernetes.md with the demo model in a cluster of kind, whose name is the argument, and renders a
# video. A release runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
cluster=$1
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
index=${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu} # CPU builds of torch fit a CI machine

for target in shim worker; do
  docker build --target "$target" --build-arg PIP_EXTRA_INDEX_URL="$index" --tag "hunyuan-video-$target:$version" .
  kind load docker-image "hunyuan-video-$target:$version" --name "$cluster"
done

secrets=$(cat infra/kubernetes/secrets.example.yaml)
secrets=${secrets//team:CHANGE-ME,prometheus:CHANGE-ME/team:$(openssl rand -hex 20)}
password=$(openssl rand -hex 20)
secrets=${secrets//hunyuan:CHANGE-ME@/hunyuan:$password@}
secrets=${secrets//POSTGRES_PASSWORD: CHANGE-ME/POSTGRES_PASSWORD: $password}
while [[ $secrets == *CHANGE-ME* ]]; do
  secrets=${secrets/CHANGE-ME/$(openssl rand -hex 20)}
done

kubectl=(kubectl --context "kind-$cluster" --namespace hunyuan-video)
finish() {
  local result=$?
  [ "$result" -eq 0 ] || { "${kubectl[@]}" get pods,events; "${kubectl[@]}" logs deployment/shim --tail 100; }
}
trap finish EXIT

"${kubectl[@]}" apply --filename infra/kubernetes/base/namespace.yaml
"${kubectl[@]}" apply --filename - <<< "$secrets"
"${kubectl[@]}" apply --kustomize infra/kubernetes/overlays/cpu-demo
"${kubectl[@]}" wait --for=condition=Available --timeout=15m deployment --all
# The container has its API keys in the environment.
# shellcheck disable=SC2016
"${kubectl[@]}" exec deployment/shim -- sh -c \
  'HUNYUAN_API_KEY=${HUNYUAN_API_KEYS#*:} hunyuan generate "A paper boat on a rainy street at night" \
    --server http://127.0.0.1:8000 --output /tmp/boat.mp4'
