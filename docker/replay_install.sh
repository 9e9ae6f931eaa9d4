#!/bin/sh
# Replays the image's installation where there is no Docker: replay_install.sh [FOLDER]
# The steps of the Dockerfile run in FOLDER (default: build/image), then the installed command serves on the CPU with a
# tritonserver on the PATH, as in the container, and answers `siglip-serve health`. The stand-in for the container's
# Triton is the server of the nvidia-pytriton wheel, an older release that needs numpy below 2. It takes
# minutes and, with torch for CPUs, 1.4 GB.
set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$checkout/build/image}
: "${PYTHON:=python3}"
export PYTHON
rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/served"
folder=$(cd "$folder" && pwd)
unset PYTHONPATH

echo "== dependencies and package, as in the image"
"$checkout/docker/install.sh" "$folder/python" dependencies "$checkout/pyproject.toml"
"$checkout/docker/install.sh" "$folder/python" package "$checkout"
"$folder/python/bin/python" - <<'CHECK'
import importlib.util, numpy, torch
assert importlib.util.find_spec("pytriton") is None, "the image must not hold a Triton of its own"
print(f"numpy {numpy.__version__}, torch {torch.__version__}")
CHECK

echo "== a stand-in for the container's Triton"
embedded=$("$PYTHON" "$checkout/docker/requirements.py" "$checkout/pyproject.toml" embedded)
triton=$(echo "$embedded" | grep '^nvidia-pytriton')
"$PYTHON" -m pip --disable-pip-version-check install --quiet --no-deps --target "$folder/triton" "$triton"
"$PYTHON" -m pip --python "$folder/python/bin/python" --disable-pip-version-check install --quiet 'numpy>=1.26,<2'
server=$folder/triton/pytriton/tritonserver
version=$("$PYTHON" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
mkdir -p "$folder/backends"
cp -r "$server/backends/python" "$folder/backends/"
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$folder/backends/python/"
printf '#!/bin/sh\nexec "%s" --backend-directory="%s" "$@"\n' "$server/bin/tritonserver" "$folder/backends" \
    > "$folder/bin/tritonserver"
chmod +x "$folder/bin/tritonserver"

echo "== the server, in a folder that holds what the image's holds"
cp -r "$checkout/model_repository" "$checkout/checkpoints" "$folder/served/"
cd "$folder/served"
libraries=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
export LD_LIBRARY_PATH="$libraries:$folder/triton/nvidia_pytriton.libs"
export PATH="$folder/python/bin:$folder/bin:$PATH"
export SIGLIP_SERVE_CHECKPOINT=checkpoints/siglip-tiny SIGLIP_SERVE_TEAMS_CHECKPOINT=checkpoints/siglip-tiny-jersey
siglip-serve serve --device cpu --http-port 0 --grpc-port 0 --metrics-port 0 --log-file "$folder/log" > "$folder/out" 2>&1 &
serving=$!
trap 'kill "$serving" 2> /dev/null; wait "$serving" || true' EXIT
tries=0
until grep -q '^  gRPC' "$folder/out"; do
    kill -0 "$serving" 2> /dev/null || { cat "$folder/out"; exit 1; }
    tries=$((tries + 1))
    [ "$tries" -lt 240 ] || { echo "not ready after 120 s"; exit 1; }
    sleep 0.5
done
siglip-serve health --url "$(sed -n 's/^  gRPC *//p' "$folder/out")"
siglip-serve embed checkpoints/siglip-tiny/samples/dog.jpg -o "$folder/dog.npz" \
    --url "$(sed -n 's/^  gRPC *//p' "$folder/out")"
echo "== done"
