#!/bin/sh
# Makes a self-signed certificate for trying: make_certificate.sh FOLDER [HOST ...]
# FOLDER gets certificate.pem and certificate_key.pem; the hosts are added to localhost and 127.0.0.1. Clients have to
# be given certificate.pem. For serving others, put the files of a certificate that they trust in its place.
set -eu

folder=${1:?usage: make_certificate.sh FOLDER [HOST ...]}
shift
names=DNS:localhost,IP:127.0.0.1
for host; do
    case $host in
        *[!0-9.]*) names=$names,DNS:$host ;;
        *) names=$names,IP:$host ;;
    esac
done
umask 077
mkdir -p "$folder"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -sha256 \
    -subj "/CN=${1:-localhost}" -addext "subjectAltName=$names" -addext "basicConstraints=critical,CA:FALSE" \
    -keyout "$folder/certificate_key.pem" -out "$folder/certificate.pem" 2> /dev/null
echo "$folder/certificate.pem: for $names, 365 days"
