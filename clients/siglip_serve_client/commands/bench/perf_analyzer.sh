#!/bin/sh
# Load on embed_image with NVIDIA's perf_analyzer, which sends image files one after another.
set -eu
if [ $# -lt 2 ]; then
    cat >&2 <<'TEXT'
usage: perf_analyzer.sh FOLDER IMAGE...

Makes FOLDER/input.json from the image files, runs perf_analyzer at each concurrency, and writes
FOLDER/perf_analyzer.csv. Variables, with their defaults:

  URL=127.0.0.1:8001     the server's address
  PROTOCOL=grpc          or http
  CONCURRENCY=1:64:21    requests in flight, START:END:STEP
  PYTHON=python3         an interpreter of version 3.11 or newer
TEXT
    exit 2
fi
folder=$1
shift
mkdir -p "$folder"
"${PYTHON:-python3}" "$(dirname "$0")/perf_data.py" -o "$folder/input.json" "$@"
exec perf_analyzer -m embed_image -i "${PROTOCOL:-grpc}" -u "${URL:-127.0.0.1:8001}" \
    --input-data "$folder/input.json" --concurrency-range "${CONCURRENCY:-1:64:21}" --percentile 95 \
    -f "$folder/perf_analyzer.csv"
