#!/bin/sh
# The database of docker/compose.many.yaml: made at the first start, one database each for rows, workflows and MLflow.
# The password is a file, the last line of a pgpass: host:port:database:user:password.
set -eu
secret=$PGPASSFILE
[ -r "$secret" ] ||
    { echo "database: $secret cannot be read; a pgpass with the user hilum is needed. See docker/README.md." >&2; exit 2; }

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    rm -rf "$PGDATA.new"
    umask 077
    sed -n 's|^[^:]*:[^:]*:[^:]*:hilum:||p' "$secret" | tail -n 1 >"/tmp/password"
    [ -s /tmp/password ] ||
        { echo "database: $secret names no password of hilum; a line *:*:*:hilum:PASSWORD is needed. Write it." >&2; exit 2; }
    initdb --pgdata "$PGDATA.new" --username hilum --pwfile /tmp/password --auth scram-sha-256 --encoding UTF8 \
        --locale C.UTF-8 --data-checksums >/dev/null
    for name in ledger stories runs; do
        echo "CREATE DATABASE $name;"
    done | postgres --single -D "$PGDATA.new" postgres >/dev/null
    echo "host all hilum all scram-sha-256" >>"$PGDATA.new/pg_hba.conf"
    rm /tmp/password
    mv "$PGDATA.new" "$PGDATA"  # a first start that was killed begins again
fi
# whoever is let in at all proves it by the password, also from inside; no Unix socket is needed
exec postgres -D "$PGDATA" -c listen_addresses='*' -c unix_socket_directories= -c max_connections=200 "$@"
