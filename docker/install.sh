#!/bin/sh
# Installs a hilum node from the bundle this file lies in, and starts it. No network is needed. Run as root.
#
#   ./install.sh [FOLDER]      where the node is kept                                   /srv/hilum
#
# Settings, all from the environment:
#   SUM       what `hilum bundle` printed, told another way: then nobody on the way can have changed the bundle
#   ENGINE    docker or podman                                                          whichever is there
#   NETWORK   what the container is on; `none` and `host` publish no ports              the engine's own
#   ADDRESS   where the ports 11112 and 8080 are published                              127.0.0.1
#   MEMORY    what the container may take                                               12g
#
# An installation that is there is upgraded: its config, packages of other names and all it received stay.
set -eu
fail() { echo "install.sh: $1" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-/srv/hilum}
user=10001

cd "$here"
[ -z "${SUM:-}" ] || echo "$SUM  SHA256SUMS" | sha256sum --check --status ||
    fail "SHA256SUMS is not the one that was announced; the bundle was changed on the way. Fetch it again."
sha256sum --check --quiet --strict SHA256SUMS ||
    fail "these files are not as they were made; all of them must be. Carry the bundle over again."
strangers=$(find . -type f ! -path ./SHA256SUMS | sed 's|^\./||' | while read -r name; do
    cut -c 67- SHA256SUMS | grep -qxF "$name" || echo "$name"
done)
[ -z "$strangers" ] || fail "these files are not of the bundle: $strangers. Remove them, or carry it over again."
links=$(find . -type l)
[ -z "$links" ] || fail "these are links, a bundle has none: $links. Carry it over again."
[ "$(id -u)" = 0 ] || fail "user $(id -un) runs this; root is needed, to give folders to the node's user. Use sudo."

engine=${ENGINE:-}
for name in docker podman; do
    [ -n "$engine" ] || ! command -v "$name" >/dev/null || ! "$name" info >/dev/null 2>&1 || engine=$name
done
[ -n "$engine" ] || fail "neither docker nor podman answers; one of them is needed. Install it from your distribution's medium."
image=$(sed -n 's/^HILUM_IMAGE=//p' .env)
for archive in images/*.tar; do
    "$engine" load --input "$archive" >/dev/null
done

install --directory "$target" "$target/packages" "$target/config"
install --directory --mode 700 --owner "$user" --group "$user" "$target/state"
for package in packages/*/; do
    name=$(basename "$package")
    rm -rf "$target/packages/.$name"
    cp -R "$package" "$target/packages/.$name"
    rm -rf "${target:?}/packages/$name"
    mv "$target/packages/.$name" "$target/packages/$name"
done
chmod -R a+rX "$target/packages"
cp sbom.json bundle.json "$target"
[ -e "$target/config/node.yaml" ] || install --mode 644 config/node.yaml "$target/config/node.yaml"

case ${NETWORK:-} in
    none | host) network="--network $NETWORK" ;;
    *) network="${NETWORK:+--network $NETWORK} --publish ${ADDRESS:-127.0.0.1}:11112:11112 --publish ${ADDRESS:-127.0.0.1}:8080:8080" ;;
esac
"$engine" rm --force hilum-node >/dev/null 2>&1 || true
# shellcheck disable=SC2086  # several words
"$engine" run --detach --name hilum-node --restart unless-stopped --stop-timeout 60 $network \
    --user "$user:$user" --read-only --tmpfs /tmp:mode=1777,size=2g,nosuid,nodev --cap-drop all \
    --security-opt no-new-privileges --memory "${MEMORY:-12g}" --pids-limit 512 \
    --volume "$target/config:/etc/hilum:ro" --volume "$target/packages:/packages:ro" \
    --volume "$target/state:/state" "$image" node --config /etc/hilum/node.yaml >/dev/null

# two minutes: a slow disk may take one to bring in what torch needs
for _ in $(seq 40); do
    if "$engine" exec hilum-node hilum node --config /etc/hilum/node.yaml --healthy 2>/dev/null; then
        echo "the node is ready; its config is $target/config/node.yaml, restart it by: $engine restart hilum-node"
        exit 0
    fi
    sleep 3
done
"$engine" logs hilum-node >&2 || true
fail "the node did not become ready within two minutes; its log is above. Mend $target/config/node.yaml and run this again."
