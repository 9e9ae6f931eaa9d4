#!/bin/sh
# Runs the front in the foreground: start.sh
# Only checks the configuration:    start.sh check
# Takes changed keys and certificates without closing connections: start.sh reload
set -eu

here=$(cd "$(dirname "$0")" && pwd)
: "${FRONT_RUN:=/tmp/front}"                          # a folder that may be written
: "${FRONT_LISTEN:=8443}"                             # port, or address:port
: "${FRONT_HTTP:=server:8000}"                        # the server's HTTP
: "${FRONT_GRPC:=server:8001}"                        # the server's gRPC
: "${FRONT_GATEWAY:=gateway:8080}"                     # the gateway's HTTP
: "${FRONT_KEYS:=/run/secrets/front_keys}"            # lines NAME KEY, see make_key.sh
: "${FRONT_CERTIFICATE:=/run/secrets/front_certificate}"
: "${FRONT_CERTIFICATE_KEY:=/run/secrets/front_certificate_key}"
: "${FRONT_MAX_BODY:=34m}"                            # largest request; 32 MiB is the server's largest image
: "${FRONT_GATEWAY_MAX_BODY:=64m}"                    # of the gateway, whose pictures are base64
: "${FRONT_RATE:=2000}"                               # requests a second of one key
: "${FRONT_CONCURRENCY:=256}"                         # requests at a time of one key
: "${FRONT_TIMEOUT:=120s}"                            # how long the server may be silent
: "${FRONT_WORKERS:=auto}"

for file in "$FRONT_KEYS" "$FRONT_CERTIFICATE" "$FRONT_CERTIFICATE_KEY"; do
    [ -r "$file" ] || { echo "front: $file: cannot be read" >&2; exit 1; }
done

umask 077
mkdir -p "$FRONT_RUN"
chmod 711 "$FRONT_RUN"  # started by root, nginx works as another user

# A line of the file never reaches the terminal: it may hold a key.
awk '
    /^[ \t]*(#|$)/ { next }
    NF != 2 || $1 !~ /^[A-Za-z0-9_.-]+$/ || length($2) != 64 || $2 ~ /[^0-9a-f]/ {
        print "front: keys, line " NR ": expected NAME and 64 lower-case hexadecimal digits" > "/dev/stderr"
        wrong = 1
        exit 1
    }
    { print "\"Bearer " $2 "\" " $1 ";"; found = 1 }
    END { if (!found && !wrong) { print "front: keys: none" > "/dev/stderr"; exit 1 } }
' "$FRONT_KEYS" > "$FRONT_RUN/keys.conf"

script=
for name in RUN LISTEN HTTP GRPC GATEWAY GATEWAY_MAX_BODY CERTIFICATE CERTIFICATE_KEY MAX_BODY RATE CONCURRENCY TIMEOUT WORKERS; do
    eval "value=\$FRONT_$name"
    case $value in
        '' | *[!A-Za-z0-9_.:/-]*) echo "front: FRONT_$name: got '$value'" >&2; exit 1 ;;
    esac
    script="$script;s|\${FRONT_$name}|$value|g"
done
sed "${script#;}" "$here/nginx.conf.template" > "$FRONT_RUN/nginx.conf"

set -- "${1:-run}" -e stderr -p "$FRONT_RUN" -c "$FRONT_RUN/nginx.conf"
action=$1
shift
case $action in
    run) exec nginx "$@" ;;
    check) exec nginx "$@" -t ;;
    reload) exec nginx "$@" -s reload ;;
    *) echo "usage: start.sh [check | reload]" >&2; exit 2 ;;
esac
