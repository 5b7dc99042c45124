#!/usr/bin/env bash
# Generates a video with curl: ./generate.sh "A paper boat on a rainy street at night" [FILE]
# HUNYUAN_SERVER is the server's address. HUNYUAN_API_KEY is its key, if it needs one.
set -euo pipefail

prompt=${1:?usage: $0 PROMPT [FILE]}
server=${HUNYUAN_SERVER:-http://localhost:8000}
file=${2:-video.mp4}
# curl retries after 503 and lost connections. The Idempotency-Key prevents a second task for the same request.
ask=(curl --silent --show-error --fail-with-body --retry 5 --retry-connrefused)
if [ -n "${HUNYUAN_API_KEY:-}" ]; then ask+=(--header "Authorization: Bearer $HUNYUAN_API_KEY"); fi

field() { sed -nE "s/.*\"$1\": ?\"?([^\",}]*).*/\1/p"; }

# The prompt as a JSON string: escapes backslashes and quotes, replaces line ends by spaces.
quoted=$(printf '%s' "$prompt" | tr '\n' ' ' | sed 's/[\\"]/\\&/g')
answer=$("${ask[@]}" "$server/generate" \
  --header "Content-Type: application/json" \
  --header "Idempotency-Key: $(cat /proc/sys/kernel/random/uuid)" \
  --data "{\"prompt\": \"$quoted\", \"duration\": 5, \"resolution\": \"720p\"}") || { echo "refused: $answer" >&2; exit 1; }
task_id=$(field task_id <<<"$answer")
echo "task $task_id" >&2

while status=$("${ask[@]}" "$server/status/$task_id"); do
  case $(field status <<<"$status") in
    completed) break ;;
    failed) echo "failed: $(field error <<<"$status")" >&2; exit 1 ;;
    *) printf '\r%3s %% %s ' "$(field progress <<<"$status")" "$(field stage <<<"$status")" >&2 ;;
  esac
  sleep 2
done
"${ask[@]}" --output "$file" "$server/videos/$task_id.mp4"
echo "saved $file" >&2
