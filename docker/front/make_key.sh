#!/bin/sh
# Makes a key for a client and prints it: make_key.sh NAME [FILE]
# The file (default: secrets/keys beside this script) gets a line NAME KEY. To withdraw a key, delete its line.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
name=${1:?usage: make_key.sh NAME [FILE]}
file=${2:-$here/secrets/keys}
case $name in
    *[!A-Za-z0-9_.-]*) echo "make_key.sh: a name has letters, digits, _ . and - only" >&2; exit 1 ;;
esac
umask 077
mkdir -p "$(dirname "$file")"
key=$(openssl rand -hex 32)
echo "$name $key" >> "$file"
echo "$key"
